// SPDX-License-Identifier: Apache-2.0
/// \file
/// The two products for few rows, on rows of keys and values where they lie: decode over plain tensors.
///
/// With a handful of query rows a tile is read about as fast as it comes from memory, so packing it would double the
/// traffic in cache. Per tile of 64 tokens: reads 64 (D + E) elements once, each row from end to end, and does
/// 64 R (D + E) multiply-adds. The order is the memory's own, one token after the other and all of a row at once,
/// because that is what hardware prefetchers follow: sixteen tokens side by side, as a transposing kernel reads them,
/// or half a row of each of sixteen and then the other half, come at half the rate. Sums of whole rows of values for
/// more than 3 query rows do not fit the registers, so a group of 16 tokens is read again, from L1, for the others.
/// A call takes a group of 16 tokens, so that where a token's heads lie together the scheduler can visit all heads of
/// a group before the next: sixteen streams, each from end to end.
///
/// Scores are sums over lanes (d, d + width, d + 2 width, ... ascending) and then over the lanes of a packet as a tree;
/// outputs are sums over tokens ascending. So scores differ in the last bits from those of packed tiles, which sum in
/// one lane; which of the two a tile takes depends on its own sequence alone.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Tokens of a group: whole packets of any ISA.
inline constexpr index_t group_tokens = panel_tokens;

/// 16 rows of keys [16, D] or values [16, E] in memory, as a source has them.
template <class T>
struct row_group {
  const T* at;
  index_t stride;  // elements
};
template <class K, class V>
struct kv_rows {
  using key = K;
  using value = V;
  row_group<K> k;
  row_group<V> v;
};
/// The same as kernels take them, who know the type. (By value: by reference its members would be loaded again after
/// each store of a packet, which may alias anything, and addresses would wait for stores. It cost a single row a third
/// of its speed.)
struct row_strip {
  const void* at;
  index_t stride;  // elements
};
/// How groups are visited: by so many query rows of a KV head, and so many KV heads before the next group.
struct group_visit {
  index_t query_rows, heads;
};

/// Rows that a kernel asks for while it reads those of a group: the first one `bytes` after the group's own, each
/// `stride` bytes after the one before it. None where `bytes` is 0.
struct rows_ahead {
  index_t bytes = 0, stride = 0;
};
struct kv_ahead {
  rows_ahead k, v;
};

/// Asks for the i-th of them, `elements` long, in pieces of two cache lines.
template <class T>
GQA_INLINE void fetch_row(const T* group, rows_ahead ahead, index_t i, index_t elements) noexcept {
  if (ahead.bytes == 0) return;
  const index_t at = ahead.bytes + i * ahead.stride;
  for (index_t piece = 0; piece < elements * index_t{sizeof(T)}; piece += 128) {
    GQA_UNROLL
    for (index_t line = 0; line < 128; line += 64) prefetch<2>(group, at + piece + line);
  }
}

/// How rows of T meet a left operand of L: one by one in accumulators, or as pairs of 16-bit neighbours.
template <class T, class L>
inline constexpr bool multiplies_pairs = std::is_same_v<T, L>&& has_dot<T>;

/// Elements of a key that one packet of products takes.
template <class A, class K, class L>
inline constexpr index_t dot_elements = (multiplies_pairs<K, L> ? 2 : 1) * packet_size<A>;

/// sum[r] += the products of q's row r and `Steps` steps of a key.
template <int Rows, int Steps, class A, class L, class K>
GQA_INLINE void dot_steps(packet<A> (&sum)[Rows][1], const K* key, const L* q, index_t q_stride) noexcept {
  using product = lane_product<K, L>;
  GQA_UNROLL
  for (index_t d = 0; d < Steps * dot_elements<A, K, L>; d += dot_elements<A, K, L>) {
    if constexpr (multiplies_pairs<K, L>) {
      const typename product::right step = product::load(key + d, 0);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r][0] = product::madd(product::load(q + r * q_stride + d, 0), step, sum[r][0]);
    } else {
      packet<A> step = load_as<A>(key + d);
      keep_in_register(step);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r][0] = madd(load(q + r * q_stride + d), step, sum[r][0]);
    }
  }
}

/// lanes[r] = the products of q's row r and one key, summed over the packets of the key. (Four steps at a time: with a
/// branch a step, memory comes to a single row of floats up to a quarter slower.)
template <int Rows, class A, class L, class K>
GQA_INLINE void dot_lanes(const K* key, const L* q, index_t q_stride, index_t head_dim, A* lanes,
                          index_t lanes_stride) noexcept {
  constexpr index_t one = dot_elements<A, K, L>, four = 4 * one;
  packet<A> sum[Rows][1];
  clear<A>(sum);
  index_t d = 0;
  for (; d + four <= head_dim; d += four) dot_steps<Rows, 4, A>(sum, key + d, q + d, q_stride);
  for (; d < head_dim; d += one) dot_steps<Rows, 1, A>(sum, key + d, q + d, q_stride);
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) store(lanes + r * lanes_stride, sum[r][0]);
}

/// S [Rows, 16] = Q [Rows, D] K^T, in rows of 64.
template <int Rows, class A, class L, class K>
void score_rows(row_strip keys, rows_ahead ahead, const L* q, index_t q_stride, index_t head_dim, A* s) noexcept {
  constexpr index_t width = packet_size<A>;
  alignas(64) A lanes[Rows][group_tokens * width];
  const K* const first = static_cast<const K*>(keys.at);
  const K* key = first;
  for (index_t t = 0; t < group_tokens; ++t, key += keys.stride) {
    fetch_row(first, ahead, t, head_dim);
    dot_lanes<Rows>(key, q, q_stride, head_dim, lanes[0] + t * width, group_tokens * width);
  }
  for (int r = 0; r < Rows; ++r) {
    for (index_t t = 0; t < group_tokens; t += width)
      store(s + r * tile_tokens + t, sum_lanes_each(lanes[r] + t * width));
  }
}

/// Query rows whose sums over a row of values, up to row_vectors packets of it, are kept in registers: 3 x 8 of 32, or
/// 3 x 4 of 16.
inline constexpr int pass_rows = 3;
inline constexpr int row_vectors = 2 * block_vectors;

/// sums[:, column : column + Vectors packets] += P [Rows, 16] V, with P in rows of 64; asks for rows ahead.
template <int Rows, int Vectors, class A, class L, class V>
void value_row_columns(row_group<V> rows, rows_ahead ahead, index_t value_dim, const L* p, A* sums, index_t sums_stride,
                       index_t column) noexcept {
  constexpr index_t width = packet_size<A>;
  packet<A> sum[Rows][Vectors];
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * sums_stride + column + v * width);
  }
  const V* row = rows.at + column;
  if constexpr (multiplies_pairs<V, L>) {
    using product = lane_product<V, L>;
    for (index_t t = 0; t < group_tokens; t += 2, row += 2 * rows.stride) {
      fetch_row(rows.at, ahead, t, value_dim), fetch_row(rows.at, ahead, t + 1, value_dim);
      typename product::left weight[Rows];
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) weight[r] = product::broadcast(p + r * tile_tokens + t, 0);
      GQA_UNROLL
      for (int v = 0; v < Vectors; v += 2) {
        typename product::right step[2];
        load_two_rows(row + v * width, row + rows.stride + v * width, step);
        GQA_UNROLL
        for (int r = 0; r < Rows; ++r) {
          sum[r][v] = product::madd(weight[r], step[0], sum[r][v]);
          sum[r][v + 1] = product::madd(weight[r], step[1], sum[r][v + 1]);
        }
      }
    }
  } else {
    for (index_t t = 0; t < group_tokens; ++t, row += rows.stride) {
      fetch_row(rows.at, ahead, t, value_dim);
      packet<A> weight[Rows];
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) weight[r] = broadcast(p[r * tile_tokens + t]);
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        packet<A> step = load_as<A>(row + v * width);
        keep_in_register(step);
        GQA_UNROLL
        for (int r = 0; r < Rows; ++r) sum[r][v] = madd(weight[r], step, sum[r][v]);
      }
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) store(sums + r * sums_stride + column + v * width, sum[r][v]);
  }
}

/// sums += P V [Rows, E] and the weights P themselves, unless the softmax sums those: some of the rows, then the
/// others, which find the group in L1.
template <int Rows, class A, class L, class V>
void value_rows(row_strip strip, rows_ahead ahead, const L* p, const weighted_sums<A>& sums, index_t sums_stride,
                index_t value_dim) noexcept {
  const row_group<V> rows{static_cast<const V*>(strip.at), strip.stride};
  constexpr int passes = static_cast<int>(ceil_div(Rows, pass_rows)), now = static_cast<int>(ceil_div(Rows, passes));
  constexpr index_t wide = row_vectors * packet_size<A>, narrow = block_columns<A>;
  index_t column = 0;
  const auto next_ahead = [&] { return column == 0 ? ahead : rows_ahead{}; };
  for (; column + wide <= value_dim; column += wide)
    value_row_columns<now, row_vectors>(rows, next_ahead(), value_dim, p, sums.values, sums_stride, column);
  for (; column < value_dim; column += narrow)
    value_row_columns<now, block_vectors>(rows, next_ahead(), value_dim, p, sums.values, sums_stride, column);
  if constexpr (!sums_in_lanes<L>) {
    using product = lane_product<V, L>;
    for (int r = 0; r < now; ++r) {
      A sum = sums.weights[r];
      for (index_t t = 0; t < group_tokens; t += product::depth)
        sum = product::add_elements(p + r * tile_tokens + t, sum);
      sums.weights[r] = sum;
    }
  }
  if constexpr (Rows > now)
    value_rows<Rows - now, A, L, V>(strip, {}, p + now * tile_tokens,
                                    {sums.values + now * sums_stride, sums.weights + now}, sums_stride, value_dim);
}

/// The two products for each number of rows in a block, and the multiples of dims that they take.
template <class A, class L>
struct strip_table {
  using score_kernel = void (*)(row_strip, rows_ahead, const queries_of_left<L>* q, index_t q_stride, index_t head_dim,
                                A* s) noexcept;
  using value_kernel = void (*)(row_strip, rows_ahead, const weight_element<L>* p, const weighted_sums<A>&,
                                index_t sums_stride, index_t value_dim) noexcept;
  std::array<score_kernel, block_rows> scores;
  std::array<value_kernel, block_rows> values;
  index_t head_dims, value_dims;

  [[nodiscard]] bool takes(index_t head_dim, index_t value_dim) const noexcept {
    return head_dim % head_dims == 0 && value_dim % value_dims == 0;
  }
};
template <class A, class L, class K, class V>
inline constexpr strip_table<A, L> strip_table_of{
    by_rows([]<int Rows>() { return &score_rows<Rows, A, L, K>; }, std::make_integer_sequence<int, block_rows>{}),
    by_rows([]<int Rows>() { return &value_rows<Rows, A, L, V>; }, std::make_integer_sequence<int, block_rows>{}),
    dot_elements<A, K, L>, block_vectors* packet_size<A>};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
