// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

namespace gqa::digests {
namespace {

constexpr shape n{"h6g2d16", 1, 6, 2, 900, 16, 16};

template <class Source>
void digest_grouped(const std::string& name, const Source& kv) {
  Eigen::ThreadPool pool(2);
  context ctx(pool);
  const std::vector<float> slopes = numbers<float>(n.heads, 3);
  for (const bool strict : {false, true}) {
    for (const bool has_alibi : {false, true}) {
      call<float> c{n, n.keys};
      grouped_options o;
      o.attention.causal = true;
      if (has_alibi) o.attention.alibi_slopes = slopes;
      o.block = 128, o.window = 100, o.always_group = true, o.strict_causal = strict;
      o.groupwise.form = groupwise_form::improved;
      grouped_attention(c.queries(), kv, c.outputs(), o, ctx);
      print("grouped_attention/" + name + (strict ? "/strict" : "/") + (has_alibi ? "alibi" : ""), c.result());
    }
  }
  std::vector<query_groups<float>> sets(static_cast<std::size_t>(n.kv_heads));
  const index_t rows = n.keys * n.heads / n.kv_heads;
  call<float> c{n, n.keys};
  std::vector<index_t> labels(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<index_t>(i * i % 37);
  for (auto& set : sets) group_by_labels(tensor_view<const float, 2>(c.q.data(), {rows, n.head_dim}), labels, set, ctx);
  groupwise_attention(c.queries(), kv, std::span<const query_groups<float>>(sets), c.state(), {}, {}, ctx);
  print("groupwise_attention/" + name, c.result());
  within_group_attention(c.queries(), kv, std::span<const query_groups<float>>(sets), c.outputs(), {.causal = true},
                         ctx);
  print("within_group_attention/" + name, c.result());
}

}  // namespace

void digest_groups() {
  const auto k = numbers<float>(n.keys * n.kv_heads * n.head_dim, 1);
  const auto v = numbers<float>(n.keys * n.kv_heads * n.value_dim, 2);
  digest_grouped("dense", kv_view(view(k.data(), {1, n.keys, n.kv_heads, n.head_dim}),
                                  view(v.data(), {1, n.keys, n.kv_heads, n.value_dim})));
  kv_cache<float> cache(1, n.kv_heads, n.keys, n.head_dim);
  fill<float>(cache, n);
  digest_grouped("kv_cache", cache);
  context ctx;
  const projected_keys<float> projected(cache, {.rank = 5});
  const rope embedding(n.head_dim);
  ring_kv_cache<float> ring(1, n.kv_heads, 10, 300, n.head_dim);
  std::vector<index_t> positions;
  for (index_t t = 0; t < n.keys; ++t) positions.push_back(t);
  const auto turns = embedding.turns<float>(positions, ctx);
  ring.append(turned(view(k.data(), {1, n.keys, n.kv_heads, n.head_dim}), turns),
              view(v.data(), {1, n.keys, n.kv_heads, n.value_dim}));
  for (const index_t q_len : {1, 4}) {
    call<float> c{n, q_len};
    projected_attention(c.queries(), cache, projected, c.state(), {.attention = {.causal = true}, .page_budget = 8},
                        ctx);
    print("projected_attention/q" + std::to_string(q_len), c.result());
    streaming_attention(c.queries(), embedding, ring, c.state(), {}, ctx);
    print("streaming_attention/q" + std::to_string(q_len), c.result());
  }
}

}  // namespace gqa::digests
