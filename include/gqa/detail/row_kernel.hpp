// SPDX-License-Identifier: Apache-2.0
/// \file
/// The micro-kernel's products for few rows, on rows of keys and values where they lie: decode over plain tensors.
///
/// With a handful of query rows a tile is read about as fast as it comes from memory, so packing it would double the
/// traffic in cache. Keys are transposed packet_size x packet_size at a time in registers and multiplied at once,
/// values are multiplied as they are. Every sum has the terms and the order of tile_kernel.hpp, and so its bits. Per
/// tile of 64 tokens: reads 64 (D + E) elements once and does 64 R (D + E) multiply-adds. Rows of keys and values are
/// prefetched in the order in which they will be used, 16 rows ahead, whole rows at a time (across a row's pages a
/// hardware prefetcher does not follow), the values while the last keys are multiplied, the keys wanted next while the
/// last values are.
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
  const K* next_k = nullptr;  // rows of keys, of the same stride, that will be wanted next: prefetched
};

/// True for dims that the row kernels take: whole packets only.
template <class A>
[[nodiscard]] constexpr bool row_kernel_takes(index_t head_dim, index_t value_dim) noexcept {
  return head_dim % packet_size<A> == 0 && value_dim % (block_vectors * packet_size<A>) == 0;
}

/// Rows of values are prefetched in groups of this many, each while the group before it is multiplied.
inline constexpr index_t group_tokens = panel_tokens;

/// Asks for `count` cache lines of a group of rows, in memory order, from where it stopped the last time.
class group_prefetcher {
 public:
  static constexpr index_t line_bytes = 64;

  group_prefetcher(const void* rows, index_t row_bytes, index_t stride_bytes) noexcept
      : rows_(rows), row_bytes_(row_bytes), stride_bytes_(stride_bytes) {}

  void operator()(index_t count) noexcept {
    for (index_t i = 0; i < count; ++i) {
      prefetch(rows_, offset_ + column_);
      column_ += line_bytes;
      if (column_ < row_bytes_) continue;
      column_ = 0;
      offset_ += stride_bytes_;
    }
  }

  /// Lines of a row.
  [[nodiscard]] static index_t lines(index_t row_bytes) noexcept { return ceil_div(row_bytes, line_bytes); }

 private:
  const void* rows_;
  index_t row_bytes_, stride_bytes_;
  index_t offset_ = 0, column_ = 0;
};

/// S [Rows, 64] = Q [Rows, D] K^T, one packet of tokens at a time.
template <class A, int Rows, class K, class V>
void score_rows(const kv_rows<K, V>& kv, const A* q, index_t q_stride, index_t head_dim, index_t value_dim,
                A* s) noexcept {
  constexpr index_t width = packet_size<A>;
  constexpr index_t k_size = sizeof(K), v_size = sizeof(V);
  for (index_t t = 0; t < tile_tokens; t += width) {
    const index_t next = t + width;
    group_prefetcher ahead = next < tile_tokens
                                 ? group_prefetcher(kv.k + next * kv.k_stride, head_dim * k_size, kv.k_stride * k_size)
                                 : group_prefetcher(kv.v, value_dim * v_size, kv.v_stride * v_size);
    packet<A> sum[1][Rows];
    clear<A>(sum);
    for (index_t d = 0; d < head_dim; d += width) {
      ahead(width * width * k_size / group_prefetcher::line_bytes);
      packet<A> square[width];
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) square[i] = load_as<A>(kv.k + (t + i) * kv.k_stride + d);
      transpose<A>(square);
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) {
        GQA_UNROLL
        for (int r = 0; r < Rows; ++r) sum[0][r] = madd(broadcast(q[r * q_stride + d + i]), square[i], sum[0][r]);
      }
    }
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) store(s + r * tile_tokens + t, sum[0][r]);
  }
}

/// O[:, column : column + Vectors packets] = alpha O + P [Rows, 64] V. The first columns prefetch for all.
template <class A, int Rows, int Vectors, class K, class V>
void value_row_columns(const kv_rows<K, V>& kv, const A* p, const A* alpha, A* out, index_t out_stride,
                       index_t head_dim, index_t value_dim, index_t column) noexcept {
  constexpr index_t width = packet_size<A>;
  constexpr index_t k_size = sizeof(K), v_size = sizeof(V);
  packet<A> sum[Rows][Vectors];
  clear<A>(sum);
  for (index_t group = 0; group < tile_tokens; group += group_tokens) {
    const index_t next = group + group_tokens;
    const bool last = next == tile_tokens;
    const index_t row_bytes = last ? head_dim * k_size : value_dim * v_size;
    group_prefetcher ahead = last ? group_prefetcher(kv.next_k, row_bytes, kv.k_stride * k_size)
                                  : group_prefetcher(kv.v + next * kv.v_stride, row_bytes, kv.v_stride * v_size);
    const index_t lines = column == 0 ? group_prefetcher::lines(row_bytes) : 0;
    for (index_t t = group; t < next; ++t) {
      ahead(lines);
      packet<A> step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) step[v] = load_as<A>(kv.v + t * kv.v_stride + column + v * width);
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
    const packet<A> scale = broadcast(alpha[r]);
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      A* const to = out + r * out_stride + column + v * width;
      store(to, madd(load(to), scale, sum[r][v]));
    }
  }
}

/// O [Rows, E] = alpha O + P V. One or two rows leave registers for twice the columns: whole rows of values at a time.
template <class A, int Rows, class K, class V>
void value_rows(const kv_rows<K, V>& kv, const A* p, const A* alpha, A* out, index_t out_stride, index_t head_dim,
                index_t value_dim) noexcept {
  constexpr int wide = Rows <= 2 ? 2 * block_vectors : block_vectors;
  index_t column = 0;
  for (; column + wide * packet_size<A> <= value_dim; column += wide * packet_size<A>)
    value_row_columns<A, Rows, wide>(kv, p, alpha, out, out_stride, head_dim, value_dim, column);
  for (; column < value_dim; column += block_vectors * packet_size<A>)
    value_row_columns<A, Rows, block_vectors>(kv, p, alpha, out, out_stride, head_dim, value_dim, column);
}

/// The two products for each number of rows in a block.
template <class A, class K, class V>
struct row_kernels {
  using scores_kernel = void (*)(const kv_rows<K, V>&, const A*, index_t, index_t, index_t, A*) noexcept;
  using values_kernel = void (*)(const kv_rows<K, V>&, const A*, const A*, A*, index_t, index_t, index_t) noexcept;
  static constexpr std::array<scores_kernel, block_rows> scores = {score_rows<A, 1, K, V>, score_rows<A, 2, K, V>,
                                                                   score_rows<A, 3, K, V>, score_rows<A, 4, K, V>,
                                                                   score_rows<A, 5, K, V>, score_rows<A, 6, K, V>};
  static constexpr std::array<values_kernel, block_rows> values = {value_rows<A, 1, K, V>, value_rows<A, 2, K, V>,
                                                                   value_rows<A, 3, K, V>, value_rows<A, 4, K, V>,
                                                                   value_rows<A, 5, K, V>, value_rows<A, 6, K, V>};
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
