// SPDX-License-Identifier: Apache-2.0
/// \file
/// Rows of queries and of a source, one by one, and the cache that group-wise attention reads its far keys from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/nearest.hpp>
#include <gqa/detail/part_of_source.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/visibility.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Queries [begin, end) of some heads of a sequence as rows s * heads + h of `dim` elements, in accumulators.
template <class A>
[[nodiscard]] point_rows<A> pool_queries(const query_rows<A, A>& q, index_t dim, index_t b, key_range queries,
                                         key_range heads, A* to) noexcept {
  const index_t stride = round_up(dim, 16);
  for (index_t s = queries.begin; s < queries.end; ++s) {
    for (index_t h = heads.begin; h < heads.end; ++h)
      q.load(b, s, h, dim, 1, to + ((s - queries.begin) * heads.size() + h - heads.begin) * stride);
  }
  return {to, queries.size() * heads.size(), dim, stride};
}

template <class Head>
concept has_rows_in_memory = requires(const Head& head) {
  head.rows(index_t{}, index_t{}, index_t{});
};

/// Of token t of a tile of keys [64, D] and values [64, E] the key and the first `value_dim` elements of the value, in
/// accumulators.
template <class P, class A>
void read_token_of(const kv_tile<P>& tile, index_t t, index_t head_dim, index_t tile_value_dim, A* key, A* value,
                   index_t value_dim) noexcept {
  const auto panel = static_cast<std::size_t>(t / panel_tokens);
  for (index_t d = 0; d < head_dim; ++d) key[d] = static_cast<A>(tile.k[panel][key_index<P>(t % panel_tokens, d)]);
  for (index_t e = 0; e < value_dim; ++e)
    value[e] = static_cast<A>(tile.v[panel][value_index<P>(t % panel_tokens, e, tile_value_dim)]);
}

/// The same of token t of a head whose rows, or panels, lie in memory.
template <class Head, class A>
void read_token(const Head& head, index_t t, A* key, A* value, index_t value_dim) noexcept {
  if constexpr (has_rows_in_memory<Head>) {
    const auto row = head.rows(0, 0, t);
    for (index_t d = 0; d < head.head_dim(); ++d) key[d] = static_cast<A>(row.k.at[d]);
    for (index_t e = 0; e < value_dim; ++e) value[e] = static_cast<A>(row.v.at[e]);
  } else {
    read_token_of(head.tile(0, 0, t / tile_tokens, tile_tokens, nullptr), t % tile_tokens, head.head_dim(),
                  head.value_dim(), key, value, value_dim);
  }
}

/// Appends all keys of a head to sequence n of a cache, with [v | k] as values if `means` says so.
template <class Head, class P>
void pack_head(const Head& head, bool means, index_t n, kv_cache<P>& cache) {
  using A = std::conditional_t<std::is_same_v<P, accumulator_t<P>>, P, float>;
  const index_t dim = head.head_dim(), own_value_dim = head.value_dim(), value_dim = cache.value_dim();
  std::vector<A> keys(static_cast<std::size_t>(tile_tokens * dim));
  std::vector<A> values(static_cast<std::size_t>(tile_tokens * value_dim));
  std::vector<typename Head::panel_element> scratch(static_cast<std::size_t>(head.scratch_elements()));
  for (index_t first = 0; first < head.length(0); first += tile_tokens) {
    const index_t tokens = std::min(tile_tokens, head.length(0) - first);
    const auto for_each_token = [&](const auto& read) {
      for (index_t t = 0; t < tokens; ++t) {
        A* const key = keys.data() + t * dim;
        A* const value = values.data() + t * value_dim;
        read(t, key, value);
        if (means) std::copy_n(key, dim, value + own_value_dim);
      }
    };
    if constexpr (has_rows_in_memory<Head>) {
      for_each_token([&](index_t t, A* key, A* value) { read_token(head, first + t, key, value, own_value_dim); });
    } else {
      const auto tile = head.tile(0, 0, first / tile_tokens, tokens, scratch.data());
      for_each_token(
          [&](index_t t, A* key, A* value) { read_token_of(tile, t, dim, own_value_dim, key, value, own_value_dim); });
    }
    cache.append(n, tensor_view<const A, 4>(keys.data(), {1, tokens, 1, dim}),
                 tensor_view<const A, 4>(values.data(), {1, tokens, 1, value_dim}));
  }
}

/// Calls f(panel, token in it) for the keys [0, end) of a head's tiles that `seen` leaves.
template <class Head, class F>
void for_each_key(const Head& head, const key_interval& seen, index_t end, const F& f) {
  for (index_t first = 0; first < end; first += tile_tokens) {
    const std::uint64_t bits = seen.visible_bits(position{0, 0, 0, first}) & bits_between(0, end - first);
    if (bits == 0) continue;
    const auto tile = head.tile(0, 0, first / tile_tokens, tile_tokens, nullptr);
    for (index_t t = 0; t < tile_tokens; ++t) {
      if ((bits >> t & 1) != 0) f(tile.k[static_cast<std::size_t>(t / panel_tokens)], t % panel_tokens);
    }
  }
}

/// The largest distance of one of those keys from their mean, or else from 0, rounded up.
template <class Head>
[[nodiscard]] double spread_of(const Head& head, const key_interval& seen, index_t end, bool from_mean) {
  using P = typename Head::panel_element;
  const index_t dim = head.head_dim();
  std::vector<double> mean(static_cast<std::size_t>(dim));
  index_t count = 0;
  for_each_key(head, seen, end, [&](const P* panel, index_t t) {
    ++count;
    for (index_t d = 0; d < dim; ++d)
      mean[static_cast<std::size_t>(d)] += static_cast<double>(panel[key_index<P>(t, d)]);
  });
  for (double& x : mean) x = from_mean ? x / static_cast<double>(std::max<index_t>(count, 1)) : 0;
  double largest = 0;
  for_each_key(head, seen, end, [&](const P* panel, index_t t) {
    double sum = 0;
    for (index_t d = 0; d < dim; ++d) {
      const double difference = static_cast<double>(panel[key_index<P>(t, d)]) - mean[static_cast<std::size_t>(d)];
      sum += difference * difference;
    }
    largest = std::max(largest, sum);
  });
  return std::sqrt(largest) * (1 + (static_cast<double>(dim) + 4) * 0x1p-53);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
