// SPDX-License-Identifier: Apache-2.0
// An engine that has pages and page tables of its own: one call for a prompt, two drafts of three tokens and a decode
// step, each sequence with keys of its own, and the same outputs as from calls one by one.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.hpp"

namespace model {
constexpr gqa::index_t q_heads = 8, kv_heads = 2, dim = 64, row = q_heads * dim;
constexpr gqa::index_t page_size = 16, pages = 64;
}  // namespace model

int main() {
  using namespace model;
  // Pages [page, token, KV head, dim], as vLLM and others keep them, and who owns which: 32-bit tables.
  const auto k = example::random(pages * page_size * kv_heads * dim),
             v = example::random(static_cast<std::int64_t>(k.size()));
  const std::vector<gqa::index_t> lengths{100, 50, 51, 300};
  std::vector<std::int32_t> page_indices, page_offsets{0};
  std::int32_t next = 0;
  for (const gqa::index_t length : lengths) {
    for (gqa::index_t token = 0; token < length; token += page_size)
      page_indices.push_back(next++ * 37 % static_cast<std::int32_t>(pages));  // in no order
    page_offsets.push_back(static_cast<std::int32_t>(page_indices.size()));
  }
  const gqa::paged_view<float> kv({k.data(), {pages, page_size, kv_heads, dim}},
                                  {v.data(), {pages, page_size, kv_heads, dim}}, page_indices, page_offsets, lengths);

  // Queries of all sequences in one tensor: 100 of a prompt, 3 and 3 drafts, 1 of a decode step.
  const std::vector<gqa::index_t> q_offsets{0, 100, 103, 106, 107};
  const std::vector<gqa::sequence_id> sequences{gqa::sequence_id{0}, gqa::sequence_id{1}, gqa::sequence_id{2},
                                                gqa::sequence_id{3}};
  const gqa::index_t total = q_offsets.back();
  const auto q = example::random(total * row);
  std::vector<float> out(q.size());
  gqa::context ctx;
  gqa::batch_options options;
  options.common.causal = true;
  // The drafts of sequence 1 are a tree: the third continues the first, not the second.
  const bool tree[] = {true, false, false, true, true, false, true, false, true};
  const std::vector<gqa::tensor_view<const bool, 2>> masks{{}, {tree, {3, 3}}, {}, {}};
  options.masks = masks;
  gqa::batch_attention(gqa::tensor_view<const float, 3>(q.data(), {total, q_heads, dim}), q_offsets, kv, sequences,
                       gqa::tensor_view<float, 3>(out.data(), {total, q_heads, dim}), options, ctx);

  // One by one, over keys and values collected from their pages.
  std::vector<float> expected(out.size());
  for (std::size_t n = 0; n < lengths.size(); ++n) {
    std::vector<float> own_k, own_v;
    for (gqa::index_t t = 0; t < lengths[n]; ++t) {
      const gqa::index_t page = page_indices[static_cast<std::size_t>(page_offsets[n] + t / page_size)];
      const auto at = static_cast<std::ptrdiff_t>((page * page_size + t % page_size) * kv_heads * dim);
      own_k.insert(own_k.end(), k.begin() + at, k.begin() + at + kv_heads * dim);
      own_v.insert(own_v.end(), v.begin() + at, v.begin() + at + kv_heads * dim);
    }
    const gqa::index_t first = q_offsets[n], count = q_offsets[n + 1] - first;
    std::vector<char> seen(static_cast<std::size_t>(count * lengths[n]), 1);
    for (gqa::index_t i = 0; i < 3 && n == 1; ++i) {
      for (gqa::index_t j = 0; j < 3; ++j)
        seen[static_cast<std::size_t>((i + 1) * lengths[n] - 3 + j)] = tree[i * 3 + j] ? 1 : 0;
    }
    gqa::attention_options one{.causal = true};
    one.mask = gqa::tensor_view<const bool, 4>(reinterpret_cast<const bool*>(seen.data()), {1, 1, count, lengths[n]});
    gqa::attention(gqa::view(q.data() + first * row, {1, count, q_heads, dim}),
                   gqa::view(own_k.data(), {1, lengths[n], kv_heads, dim}),
                   gqa::view(own_v.data(), {1, lengths[n], kv_heads, dim}),
                   gqa::view(expected.data() + first * row, {1, count, q_heads, dim}), one, ctx);
  }
  return example::ended(example::same(out, expected));
}
