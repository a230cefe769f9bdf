// SPDX-License-Identifier: Apache-2.0
// Attention to parts of the keys, merged exactly: keys on several machines, a shared prefix, far keys and near keys.
#include <gqa/gqa.hpp>

#include <array>

#include "check.hpp"

// An output and a log-sum-exp that own their memory.
struct part {
  std::vector<float> out, lse;
  gqa::partial_state<float> state;

  part(gqa::index_t s, gqa::index_t h, gqa::index_t d)
      : out(static_cast<std::size_t>(s * h * d)),
        lse(static_cast<std::size_t>(s * h)),
        state{gqa::view(out.data(), {1, s, h, d}), gqa::tensor_view<float, 3>(lse.data(), {1, s, h})} {}
};

int main() {
  constexpr gqa::index_t queries = 10, keys = 500, first = 200, q_heads = 4, kv_heads = 2, dim = 64;
  const std::vector<float> q = example::random(queries * q_heads * dim);
  const std::vector<float> k = example::random(keys * kv_heads * dim), v = example::random(keys * kv_heads * dim);
  const auto q_view = gqa::view(q.data(), {1, queries, q_heads, dim});
  const auto slice = [&](const std::vector<float>& x, gqa::index_t from, gqa::index_t to) {
    return gqa::view(x.data() + from * kv_heads * dim, {1, to - from, kv_heads, dim});
  };
  const std::array<float, q_heads> sinks{0.5f, -1.0f, 0.0f, 2.0f};
  const gqa::index_t offset = keys - queries;  // position of the first query

  // Positions are relative to a part's own first key; the sinks go to exactly one part.
  part left(queries, q_heads, dim), right(queries, q_heads, dim);
  gqa::attention(q_view, slice(k, 0, first), slice(v, 0, first), left.state,
                 {.causal = true, .query_offset = offset, .sinks = sinks});
  gqa::attention(q_view, slice(k, first, keys), slice(v, first, keys), right.state,
                 {.causal = true, .query_offset = offset - first});
  gqa::context ctx;
  gqa::merge(left.state, right.state, ctx);

  std::vector<float> expected(q.size());
  gqa::reference::attention(q_view, slice(k, 0, keys), slice(v, 0, keys),
                            gqa::view(expected.data(), {1, queries, q_heads, dim}), {.causal = true, .sinks = sinks});
  return example::ended(example::same(left.out, expected));
}
