// SPDX-License-Identifier: Apache-2.0
/// \file
/// The two products for few rows, on rows of keys and values where they lie: decode over plain tensors.
///
/// With a handful of query rows a tile is read about as fast as it comes from memory, so packing it would double the
/// traffic in cache. Per tile of 64 tokens: reads 64 (D + E) elements once, each row from end to end, and does
/// 64 R (D + E) multiply-adds. The order is the memory's own, one token after the other, because that is what hardware
/// prefetchers follow: sixteen tokens side by side, as a transposing kernel reads them, came at half the rate.
///
/// Scores are sums over lanes (d, d + width, d + 2 width, ... ascending) and then over the lanes of a packet as a tree;
/// outputs are sums over tokens ascending. So scores differ in the last bits from those of packed tiles, which sum in
/// one lane; which of the two a tile takes depends on its own sequence alone.
#pragma once

#include <array>

#include <gqa/config.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_kernel.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// 64 rows of keys [64, D] and values [64, E] in memory. Strides in elements.
template <class K, class V>
struct kv_rows {
  const K* k;
  index_t k_stride;
  const V* v;
  index_t v_stride;
  // Rows of the same strides that are wanted after these and that no hardware prefetcher foresees, or nullptr: the
  // next head's, which lie beside these rows where a token's heads lie together.
  const K* next_k = nullptr;
  const V* next_v = nullptr;
};

/// True for dims that the row kernels take: whole packets only.
template <class A>
[[nodiscard]] constexpr bool row_kernel_takes(index_t head_dim, index_t value_dim) noexcept {
  return head_dim % packet_size<A> == 0 && value_dim % (block_vectors * packet_size<A>) == 0;
}

/// lanes[r] = the products of q's row r and one key, summed over the packets of the key. Asks for the cache lines of
/// `next`, if there is one, on the way.
template <class A, int Rows, class K>
GQA_INLINE void dot_lanes(const K* key, const K* next, const A* q, index_t q_stride, index_t head_dim, A* lanes,
                          index_t lanes_stride) noexcept {
  constexpr index_t width = packet_size<A>;
  packet<A> sum[Rows][1];
  clear<A>(sum);
  for (index_t d = 0; d < head_dim; d += width) {
    if (next != nullptr) prefetch(next, d * index_t{sizeof(K)});
    const packet<A> step = load_as<A>(key + d);
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) sum[r][0] = madd(load(q + r * q_stride + d), step, sum[r][0]);
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

/// S [Rows, 64] = Q [Rows, D] K^T.
template <class A, int Rows, class K, class V>
void score_rows(const kv_rows<K, V>& kv, const A* q, index_t q_stride, index_t head_dim, A* s) noexcept {
  constexpr index_t width = packet_size<A>;
  alignas(64) A lanes[Rows][width * width];
  for (index_t t = 0; t < tile_tokens; t += width) {
    for (index_t i = 0; i < width; ++i) {
      const index_t row = (t + i) * kv.k_stride;
      dot_lanes<A, Rows>(kv.k + row, kv.next_k == nullptr ? nullptr : kv.next_k + row, q, q_stride, head_dim,
                         lanes[0] + i * width, width * width);
    }
    for (int r = 0; r < Rows; ++r) store(s + r * tile_tokens + t, sum_each<A>(lanes[r]));
  }
}

/// O[:, column : column + Vectors packets] = alpha O + P [Rows, 64] V.
template <class A, int Rows, int Vectors, class K, class V>
void value_row_columns(const kv_rows<K, V>& kv, const A* p, const A* alpha, A* out, index_t out_stride,
                       index_t column) noexcept {
  constexpr index_t width = packet_size<A>;
  packet<A> sum[Rows][Vectors];
  clear<A>(sum);
  for (index_t t = 0; t < tile_tokens; ++t) {
    const V* const row = kv.v + t * kv.v_stride + column;
    const V* const next = kv.next_v == nullptr ? nullptr : kv.next_v + t * kv.v_stride + column;
    packet<A> step[Vectors];
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      if (next != nullptr) prefetch(next, v * width * index_t{sizeof(V)});
      step[v] = load_as<A>(row + v * width);
    }
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const packet<A> weight = broadcast(p[r * tile_tokens + t]);
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[r][v] = madd(weight, step[v], sum[r][v]);
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const packet<A> scale = broadcast(alpha[r]);
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      A* const to = out + r * out_stride + column + v * width;
      store(to, madd(load(to), scale, sum[r][v]));
    }
  }
}

/// O [Rows, E] = alpha O + P V. Few rows leave registers for twice the columns: whole rows of values at a time.
template <class A, int Rows, class K, class V>
void value_rows(const kv_rows<K, V>& kv, const A* p, const A* alpha, A* out, index_t out_stride,
                index_t value_dim) noexcept {
  constexpr int wide = Rows <= 2 ? 2 * block_vectors : block_vectors;
  index_t column = 0;
  for (; column + wide * packet_size<A> <= value_dim; column += wide * packet_size<A>)
    value_row_columns<A, Rows, wide>(kv, p, alpha, out, out_stride, column);
  for (; column < value_dim; column += block_vectors * packet_size<A>)
    value_row_columns<A, Rows, block_vectors>(kv, p, alpha, out, out_stride, column);
}

/// The two products for each number of rows in a block.
template <class A, class K, class V>
struct row_kernels {
  using scores_kernel = void (*)(const kv_rows<K, V>&, const A*, index_t, index_t, A*) noexcept;
  using values_kernel = void (*)(const kv_rows<K, V>&, const A*, const A*, A*, index_t, index_t) noexcept;
  static constexpr std::array<scores_kernel, block_rows> scores = {score_rows<A, 1, K, V>, score_rows<A, 2, K, V>,
                                                                   score_rows<A, 3, K, V>, score_rows<A, 4, K, V>,
                                                                   score_rows<A, 5, K, V>, score_rows<A, 6, K, V>};
  static constexpr std::array<values_kernel, block_rows> values = {value_rows<A, 1, K, V>, value_rows<A, 2, K, V>,
                                                                   value_rows<A, 3, K, V>, value_rows<A, 4, K, V>,
                                                                   value_rows<A, 5, K, V>, value_rows<A, 6, K, V>};
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
