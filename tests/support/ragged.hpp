// SPDX-License-Identifier: Apache-2.0
// Ragged batches for tests, and each of their sequences in a call by itself.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "cases.hpp"
#include "rng.hpp"
#include "tensor.hpp"

namespace gqa::test {

// Sequences of different lengths in a cache, in pages and as tensors; some of them, in some order, with so many queries
// each, are a batch.
template <class T>
struct ragged_case {
  using X = detail::read_element<T>;  // of rows, and of queries

  index_t heads, kv_heads, dim, value_dim;
  std::vector<index_t> lengths;  // of all sequences
  tensor<X> k, v;
  std::vector<sequence_id> sequences;
  std::vector<index_t> offsets{0};
  std::vector<X> q;

  ragged_case(index_t h, index_t g, index_t d, index_t e, const std::vector<index_t>& of_sequences, rng& random)
      : heads(h),
        kv_heads(g),
        dim(d),
        value_dim(e),
        lengths(of_sequences),
        k({count(), longest(), g, d}, layout::bshd),
        v({count(), longest(), g, e}, layout::bshd) {
    for (tensor<X>* x : {&k, &v})
      for (X& y : x->data()) y = static_cast<X>(static_cast<float>(random.normal()));
  }
  void add(index_t sequence, index_t queries, rng& random) {
    sequences.push_back(static_cast<sequence_id>(sequence));
    offsets.push_back(offsets.back() + queries);
    for (index_t i = 0; i < queries * heads * dim; ++i)
      q.push_back(static_cast<X>(static_cast<float>(random.normal())));
  }
  index_t count() const { return static_cast<index_t>(lengths.size()); }
  index_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  index_t total() const { return offsets.back(); }
  index_t queries(std::size_t n) const { return offsets[n + 1] - offsets[n]; }
  index_t length(std::size_t n) const { return lengths[static_cast<std::size_t>(sequences[n])]; }
  tensor_view<const X, 3> rows() const { return {q.data(), {total(), heads, dim}}; }
  tensor_view<const X, 4> rows_of(std::size_t n) const {
    return {q.data() + offsets[n] * heads * dim, {1, queries(n), heads, dim}};
  }
  auto of_sequence(const tensor<X>& x, std::size_t n) const {
    return slice(slice(x.view(), 0, static_cast<index_t>(sequences[n]), 1), 1, 0, length(n));
  }
  kv_cache<T> cache() const {
    kv_cache<T> c(count(), kv_heads, longest(), dim, value_dim);
    for (index_t b = 0; b < count(); ++b) {
      const index_t tokens = lengths[static_cast<std::size_t>(b)];
      c.append(b, slice(slice(k.view(), 0, b, 1), 1, 0, tokens), slice(slice(v.view(), 0, b, 1), 1, 0, tokens));
    }
    return c;
  }
};

template <class T>
struct rows_result {
  std::vector<T> out;
  std::vector<accumulator_t<T>> lse;
  rows_result(index_t rows, index_t heads, index_t dim)
      : out(static_cast<std::size_t>(std::max<index_t>(rows * heads * dim, 1)), static_cast<T>(9.0f)),
        lse(static_cast<std::size_t>(std::max<index_t>(rows * heads, 1)), 9) {}
};

// The batch over a source, beside each of its sequences alone.
template <class T, class KV>
void expect_single_calls(const ragged_case<T>& c, const KV& kv, const batch_options& options, context& ctx,
                         const std::string& what) {
  using X = detail::read_element<T>;
  rows_result<X> batch(c.total(), c.heads, c.value_dim);
  const partial_state<X> state{tensor_view<X, 4>(batch.out.data(), {1, c.total(), c.heads, c.value_dim}),
                               tensor_view<accumulator_t<X>, 3>(batch.lse.data(), {1, c.total(), c.heads})};
  batch_attention(c.rows(), c.offsets, kv, c.sequences, state, options, ctx);
  std::vector<X> plain(batch.out.size(), static_cast<X>(8.0f));
  batch_attention(c.rows(), c.offsets, kv, c.sequences,
                  tensor_view<X, 3>(plain.data(), {c.total(), c.heads, c.value_dim}), options, ctx);
  if (c.total() > 0) {
    EXPECT_EQ(std::memcmp(plain.data(), batch.out.data(), plain.size() * sizeof(X)), 0) << what;
  }
  for (std::size_t n = 0; n < c.sequences.size(); ++n) {
    attention_options one = options.common;
    one.kv_lengths = {};
    if (!options.common.kv_lengths.empty()) one.kv_lengths = options.common.kv_lengths.subspan(n, 1);
    if (!options.query_offsets.empty()) one.query_offsets = options.query_offsets.subspan(n, 1);
    const index_t queries = c.queries(n), keys = kv.length(static_cast<index_t>(c.sequences[n]));
    const index_t length = one.kv_lengths.empty() ? keys : one.kv_lengths[0];
    // A draft's mask as a mask of the whole sequence.
    std::vector<char> seen(static_cast<std::size_t>(std::max<index_t>(queries * keys, 1)), 1);
    if (!options.masks.empty() && options.masks[n].size() > 0) {
      for (index_t i = 0; i < queries; ++i)
        for (index_t j = 0; j < queries; ++j)
          seen[static_cast<std::size_t>(i * keys + length - queries + j)] = options.masks[n](i, j);
      one.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(seen.data()), {1, 1, queries, keys});
    }
    rows_result<X> expected(queries, c.heads, c.value_dim);
    const partial_state<X> to{tensor_view<X, 4>(expected.out.data(), {1, queries, c.heads, c.value_dim}),
                              tensor_view<accumulator_t<X>, 3>(expected.lse.data(), {1, queries, c.heads})};
    context alone;
    const detail::part_of_source<KV> own(kv, static_cast<index_t>(c.sequences[n]), 0, c.kv_heads, keys);
    attention(c.rows_of(n), own, to, one, alone);
    const index_t first = c.offsets[n] * c.heads;
    if (queries == 0) continue;
    ASSERT_EQ(std::memcmp(batch.out.data() + first * c.value_dim, expected.out.data(), expected.out.size() * sizeof(X)),
              0)
        << what << ", sequence " << n << " of " << queries << " queries over " << keys;
    ASSERT_EQ(std::memcmp(batch.lse.data() + first, expected.lse.data(), expected.lse.size() * sizeof(batch.lse[0])), 0)
        << what << ", lse of sequence " << n;
  }
}

}  // namespace gqa::test
