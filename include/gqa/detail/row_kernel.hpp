// SPDX-License-Identifier: Apache-2.0
/// \file
/// The two products for few rows, on rows of keys and values where they lie: decode over plain tensors.
///
/// With a handful of query rows a tile is read about as fast as it comes from memory, so packing it would double the
/// traffic in cache. Per tile of 64 tokens: reads 64 (D + E) elements once, each row from end to end, and does
/// 64 R (D + E) multiply-adds. The order is the memory's own, one token after the other, because that is what hardware
/// prefetchers follow: sixteen tokens side by side, as a transposing kernel reads them, came at half the rate.
/// A call takes a group of 16 tokens, so that where a token's heads lie together the scheduler can visit all heads of
/// a group before the next: sixteen streams, each from end to end.
///
/// Scores are sums over lanes (d, d + width, d + 2 width, ... ascending) and then over the lanes of a packet as a tree;
/// outputs are sums over tokens ascending. So scores differ in the last bits from those of packed tiles, which sum in
/// one lane; which of the two a tile takes depends on its own sequence alone.
#pragma once

#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/read_ahead.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_kernel.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Tokens of a group: whole packets of any ISA.
inline constexpr index_t group_tokens = panel_tokens;

/// 16 rows of keys [16, D] or values [16, E] in memory.
template <class T>
struct row_group {
  const T* at;
  index_t stride;  // elements
};
template <class K, class V>
struct kv_rows {
  row_group<K> k;
  row_group<V> v;
};
/// Bytes from any group of a call to the one that is read read_ahead_bytes() later.
struct groups_ahead {
  index_t k = 0, v = 0;
};

/// How rows of T meet a left operand of L: one by one in accumulators, or as pairs of 16-bit neighbours.
template <class T, class L>
inline constexpr bool multiplies_pairs = std::is_same_v<T, L>&& has_dot<T>;

/// True for dims that the row kernels take: whole packets only.
template <class A, class K, class L>
[[nodiscard]] constexpr bool row_kernel_takes(index_t head_dim, index_t value_dim) noexcept {
  return head_dim % (packet_size<A> * (multiplies_pairs<K, L> ? 2 : 1)) == 0 &&
         value_dim % (block_vectors * packet_size<A>) == 0;
}

/// lanes[r] = the products of q's row r and one key, summed over the packets of the key.
template <int Rows, class A, class L, class K>
GQA_INLINE void dot_lanes(const K* key, index_t ahead, const L* q, index_t q_stride, index_t head_dim, A* lanes,
                          index_t lanes_stride) noexcept {
  packet<A> sum[Rows][1];
  clear<A>(sum);
  if constexpr (multiplies_pairs<K, L>) {
    using product = lane_product<K, L>;
    constexpr index_t step_elements = 2 * packet_size<A>;
    for (index_t d = 0; d < head_dim; d += step_elements) {
      fetch_ahead<Rows, step_elements>(key + d, d, ahead);
      const typename product::right step = product::load(key + d, 0);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r][0] = product::madd(product::load(q + r * q_stride + d, 0), step, sum[r][0]);
    }
  } else {
    constexpr index_t step_elements = packet_size<A>;
    for (index_t d = 0; d < head_dim; d += step_elements) {
      fetch_ahead<Rows, step_elements>(key + d, d, ahead);
      packet<A> step = load_as<A>(key + d);
      keep_in_register(step);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r][0] = madd(load(q + r * q_stride + d), step, sum[r][0]);
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) store(lanes + r * lanes_stride, sum[r][0]);
}

/// The sums of the lanes of packet_size<A> packets, one a lane: a transpose and a tree of additions.
template <class A>
[[nodiscard]] GQA_INLINE packet<A> sum_each(const A* lanes) noexcept {
  constexpr int width = packet_size<A>;
  packet<A> square[width];
  GQA_UNROLL
  for (int i = 0; i < width; ++i) square[i] = load(lanes + i * width);
  transpose<A>(square);
  GQA_UNROLL
  for (int half = width / 2; half >= 1; half /= 2) {
    GQA_UNROLL
    for (int i = 0; i < half; ++i) square[i] = add(square[i], square[i + half]);
  }
  return square[0];
}

/// S [Rows, 16] = Q [Rows, D] K^T, in rows of 64.
template <int Rows, class A, class L, class K>
void score_rows(const row_group<K>& keys, index_t ahead, const L* q, index_t q_stride, index_t head_dim,
                A* s) noexcept {
  constexpr index_t width = packet_size<A>;
  alignas(64) A lanes[Rows][width * width];
  for (index_t t = 0; t < group_tokens; t += width) {
    for (index_t i = 0; i < width; ++i)
      dot_lanes<Rows>(keys.at + (t + i) * keys.stride, ahead, q, q_stride, head_dim, lanes[0] + i * width,
                      width * width);
    for (int r = 0; r < Rows; ++r) store(s + r * tile_tokens + t, sum_each<A>(lanes[r]));
  }
}

/// sums[:, column : column + Vectors packets] += P [Rows, 16] V, with P in rows of 64.
template <int Rows, int Vectors, class A, class L, class V>
void value_row_columns(const row_group<V>& rows, index_t ahead, const L* p, A* sums, index_t sums_stride,
                       index_t column) noexcept {
  constexpr index_t width = packet_size<A>;
  packet<A> sum[Rows][Vectors];
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * sums_stride + column + v * width);
  }
  if constexpr (multiplies_pairs<V, L>) {
    using product = lane_product<V, L>;
    for (index_t t = 0; t < group_tokens; t += 2) {
      const V* const row = rows.at + t * rows.stride + column;
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        fetch_ahead<Rows, width>(row + v * width, column + v * width, ahead);
        fetch_ahead<Rows, width>(row + rows.stride + v * width, column + v * width, ahead);
      }
      typename product::right step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) step[v] = load_two_rows(row + v * width, row + rows.stride + v * width);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const typename product::left weights = product::broadcast(p + r * tile_tokens + t, 0);
        GQA_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[r][v] = product::madd(weights, step[v], sum[r][v]);
      }
    }
  } else {
    for (index_t t = 0; t < group_tokens; ++t) {
      const V* const row = rows.at + t * rows.stride + column;
      packet<A> step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        fetch_ahead<Rows, width>(row + v * width, column + v * width, ahead);
        step[v] = load_as<A>(row + v * width);
        keep_in_register(step[v]);
      }
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const packet<A> weight = broadcast(p[r * tile_tokens + t]);
        GQA_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[r][v] = madd(weight, step[v], sum[r][v]);
      }
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) store(sums + r * sums_stride + column + v * width, sum[r][v]);
  }
}

/// sums += P V [Rows, E] and the weights P themselves, unless the softmax sums those. Few rows leave registers for
/// twice the columns: whole rows of values at a time.
template <int Rows, class A, class L, class V>
void value_rows(const row_group<V>& rows, index_t ahead, const L* p, const weighted_sums<A>& sums, index_t sums_stride,
                index_t value_dim) noexcept {
  constexpr int wide = Rows <= 2 ? 2 * block_vectors : block_vectors;
  index_t column = 0;
  for (; column + wide * packet_size<A> <= value_dim; column += wide * packet_size<A>)
    value_row_columns<Rows, wide>(rows, ahead, p, sums.values, sums_stride, column);
  for (; column < value_dim; column += block_vectors * packet_size<A>)
    value_row_columns<Rows, block_vectors>(rows, ahead, p, sums.values, sums_stride, column);
  if constexpr (!sums_in_lanes<L>) {
    using product = lane_product<V, L>;
    for (int r = 0; r < Rows; ++r) {
      for (index_t t = 0; t < group_tokens; t += product::depth)
        sums.weights[r] = product::add_elements(p + r * tile_tokens + t, sums.weights[r]);
    }
  }
}

/// The two products for each number of rows in a block.
template <class A, class L, class K, class V>
struct row_kernels {
  static constexpr std::make_integer_sequence<int, block_rows> blocks{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_rows<Rows, A, L, K>; }, blocks);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_rows<Rows, A, L, V>; }, blocks);
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
