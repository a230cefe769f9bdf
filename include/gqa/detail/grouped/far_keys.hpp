// SPDX-License-Identifier: Apache-2.0
/// \file
/// Rows of queries and of a source, one by one, and the cache that group-wise attention reads its far keys from.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/grouped/nearest.hpp>
#include <gqa/detail/grouped/part_of_source.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of queries that are pooled because they share keys and scores, in the order (b, s, h).
struct row_block {
  struct place {
    index_t b, s, h;
  };

  key_range sequences, queries, heads;

  [[nodiscard]] index_t size() const noexcept { return sequences.size() * queries.size() * heads.size(); }
  [[nodiscard]] place at(index_t i) const noexcept {
    const index_t token = i / heads.size();
    return {sequences.begin + token / queries.size(), queries.begin + token % queries.size(),
            heads.begin + i % heads.size()};
  }
};

/// Query heads that are pooled: all of a KV head, or one by one where ALiBi gives each a slope of its own.
struct head_pool {
  index_t kv_head;
  key_range heads;
};
/// Those of a call, which outlives this.
template <class Problem>
class head_pools {
 public:
  explicit head_pools(const Problem& call) noexcept : call_(call) {}

  [[nodiscard]] index_t size() const noexcept { return is_by_heads() ? call_.shape.q_heads : call_.shape.kv_heads; }
  [[nodiscard]] head_pool operator[](index_t n) const noexcept {
    const call_shape& shape = call_.shape;
    if (is_by_heads()) return {kv_head_of(n, shape.q_heads, shape.kv_heads, call_.options.group_offsets), {n, n + 1}};
    const index_t first = call_.first_head(n);
    return {n, {first, first + call_.group_size(n)}};
  }

 private:
  [[nodiscard]] bool is_by_heads() const noexcept { return !call_.options.alibi_slopes.empty(); }

  const Problem& call_;
};

/// Of those rows `count`, spread over all of them and over their heads in turn, in accumulators.
template <class A>
[[nodiscard]] point_rows<A> sample_queries(const query_rows<A, A>& q, index_t dim, const row_block& rows, index_t count,
                                           A* to) noexcept {
  const index_t stride = round_up(dim, 16), step = count == 0 ? 1 : rows.size() / count;
  for (index_t i = 0; i < count; ++i) {
    const auto [b, s, h] = rows.at(i * rows.size() / count + i % step);
    q.load(b, s, h, dim, 1, to + i * stride);
  }
  return {to, count, dim, stride};
}
/// All of them.
template <class A>
[[nodiscard]] point_rows<A> pool_queries(const query_rows<A, A>& q, index_t dim, const row_block& rows,
                                         A* to) noexcept {
  return sample_queries(q, dim, rows, rows.size(), to);
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
    const index_t tokens = (std::min)(tile_tokens, head.length(0) - t / tile_tokens * tile_tokens);
    read_token_of(head.tile(0, 0, t / tile_tokens, tokens, nullptr), t % tile_tokens, head.head_dim(), head.value_dim(),
                  key, value, value_dim);
  }
}

/// Appends all keys of a head to sequence n of a cache, with [v | k] as values if `means` says so. False after a
/// capacity error where that returns; so do those below.
template <class Head, class P>
[[nodiscard]] bool pack_head(const Head& head, bool means, index_t n, kv_cache<P>& cache) {
  using A = std::conditional_t<std::is_same_v<P, accumulator_t<P>>, P, float>;
  const index_t dim = head.head_dim(), own_value_dim = head.value_dim(), value_dim = cache.value_dim();
  reporting_vector<A> keys, values;
  reporting_vector<typename Head::panel_element> scratch;
  if (!make_zeros(keys, static_cast<std::size_t>(tile_tokens * dim), "far keys") ||
      !make_zeros(values, static_cast<std::size_t>(tile_tokens * value_dim), "far values") ||
      !make_zeros(scratch, static_cast<std::size_t>(head.scratch_elements()), "far keys"))
    return false;
  for (index_t first = 0; first < head.length(0); first += tile_tokens) {
    const index_t tokens = (std::min)(tile_tokens, head.length(0) - first);
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
  return true;
}

/// Calls f(key), a row in accumulators, for the keys [0, end) of a head that `seen` leaves.
template <class Head, class F>
[[nodiscard]] bool for_each_key(const Head& head, const key_interval& seen, index_t end, const F& f) {
  using A = accumulator_t<typename Head::panel_element>;
  reporting_vector<A> key;
  reporting_vector<typename Head::panel_element> scratch;
  if (!make_zeros(key, static_cast<std::size_t>(head.head_dim()), "far keys") ||
      !make_zeros(scratch, static_cast<std::size_t>(head.scratch_elements()), "far keys"))
    return false;
  for (index_t first = 0; first < end; first += tile_tokens) {
    const std::uint64_t bits = seen.visible_bits(position{0, 0, 0, first}) & bits_between(0, end - first);
    if (bits == 0) continue;
    const auto for_each_seen = [&](const auto& read) {
      for (std::uint64_t left = bits; left != 0; left &= left - 1) read(std::countr_zero(left)), f(key.data());
    };
    if constexpr (has_rows_in_memory<Head>) {
      for_each_seen([&](index_t t) { read_token(head, first + t, key.data(), key.data(), 0); });
    } else {
      const index_t tokens = (std::min)(tile_tokens, end - first);
      const auto tile = head.tile(0, 0, first / tile_tokens, tokens, scratch.data());
      for_each_seen(
          [&](index_t t) { read_token_of(tile, t, head.head_dim(), head.value_dim(), key.data(), key.data(), 0); });
    }
  }
  return true;
}

/// The largest distance of one of those keys from their mean, or else from 0, rounded up; nothing after a capacity
/// error where that returns.
template <class Head>
[[nodiscard]] std::optional<double> spread_of(const Head& head, const key_interval& seen, index_t end, bool from_mean) {
  using A = accumulator_t<typename Head::panel_element>;
  const index_t dim = head.head_dim();
  reporting_vector<A> centre;  // near the mean: where it lies exactly does not matter
  reporting_vector<double> sum;
  if (!make_zeros(centre, static_cast<std::size_t>(dim), "far keys") ||
      !make_zeros(sum, static_cast<std::size_t>(dim), "far keys"))
    return {};
  if (from_mean) {
    index_t count = 0;
    const bool done = for_each_key(head, seen, end, [&](const A* key) {
      ++count;
      for (index_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += static_cast<double>(key[d]);
    });
    if (!done) return {};
    for (std::size_t d = 0; d < sum.size(); ++d)
      centre[d] = static_cast<A>(sum[d] / static_cast<double>(std::max<index_t>(count, 1)));
  }
  double largest = 0;
  const bool done = for_each_key(head, seen, end, [&](const A* key) {
    largest = (std::max)(largest, static_cast<double>(squared_distance(key, centre.data(), dim)));
  });
  if (!done) return {};
  if (!(largest > 1e-25 && largest < 1e35)) {  // squares may have left the range of floats
    largest = 0;
    const bool done_again = for_each_key(head, seen, end, [&](const A* key) {
      double squares = 0;
      for (index_t d = 0; d < dim; ++d) {
        const double x = static_cast<double>(key[d]) - static_cast<double>(centre[static_cast<std::size_t>(d)]);
        squares += x * x;
      }
      largest = (std::max)(largest, squares);
    });
    if (!done_again) return {};
  }
  const double error = (static_cast<double>(dim) + 3) * static_cast<double>(std::numeric_limits<A>::epsilon());
  return std::sqrt(largest) * (1 + error);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
