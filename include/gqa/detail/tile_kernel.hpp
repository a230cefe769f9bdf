// SPDX-License-Identifier: Apache-2.0
/// \file
/// The micro-kernel: a register block of C += A B, the one loop behind both products of attention.
///
///     scores:  S [rows, 64] = Q [rows, D] K^T      B = K panels [D/p][16][p],     depth D
///     values:  O [rows, E]  = alpha O + P V        B = V panels [16/p][<=64][p],  depth 16 a panel
///
/// A step broadcasts p elements of each row of A and multiplies them by a row of `Vectors` packets of B
/// (simd/product.hpp: p = 1 but for bfloat16, 2 neighbours in a 32-bit lane). The block has
/// to hide the latency of the multiply-add (4 cycles x 2 a cycle on current x86, 4 x 4 on wide Arm): 6 rows x 4 packets
/// fill 24 of 32 registers and leave 4 for B and one for the broadcast; with 16 registers 6 x 2 + 2 + 1. A step loads
/// Vectors + Rows elements or packets for Rows * Vectors multiply-adds: 10 loads to 24, so loads are not the limit.
/// For a tile of 64 keys, 6 rows read 256 B of B from L1 or L2 per 24 multiply-adds, 21 B a cycle.
///
/// Order: one accumulator an element, its sum over the depth ascending, one multiply-add each. The block's shape
/// changes which elements are computed together, never their bits. A sum starts at +0, and O takes it in one
/// multiply-add: sums over 64 tokens, then over tiles, keep rounding errors far below those of one long chain.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

inline constexpr int block_rows = 6;
inline constexpr int block_vectors = packet_registers == 32 ? 4 : 2;

/// sum[r][v] += A[r, :depth] B[:depth, v]. A is row-major with `a_stride`; packet v of its first p elements' products
/// lies at b[v], that of the next p at b[v] + b_step.
template <class P, class L, int Rows, int Vectors>
GQA_INLINE void accumulate(packet<accumulator_t<P>> (&sum)[Rows][Vectors], const L* a, index_t a_stride,
                           const P* const (&b)[Vectors], index_t b_step, index_t depth) noexcept {
  using product = lane_product<P, L>;
  const P* lanes[Vectors];
  GQA_UNROLL
  for (int v = 0; v < Vectors; ++v) lanes[v] = b[v];
  for (index_t i = 0; i < depth; i += product::depth) {
    GQA_UNROLL
    for (int part = 0; part < product::parts; ++part) {
      typename product::right step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) step[v] = product::load(lanes[v], part);
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const typename product::left element = product::broadcast(a + r * a_stride + i, part);
        GQA_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[r][v] = product::madd(element, step[v], sum[r][v]);
      }
    }
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) lanes[v] += b_step;
  }
}

template <class A, int Rows, int Vectors>
GQA_INLINE void clear(packet<A> (&sum)[Rows][Vectors]) noexcept {
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = zeros<A>();
  }
}

/// Operands of one row block's products: panels of P, queries and weights in L. Shapes: q [Rows, D], s and p [Rows,
/// 64], out [Rows, padded E], alpha [Rows].
template <class P, class L>
struct block_operands {
  using A = accumulator_t<P>;
  const kv_tile<P>& tile;
  const L* q;
  index_t q_stride;
  index_t head_dim;
  A* s;            // scores; row stride 64
  A score_factor;  // on the products of 16-bit queries, which cannot carry it
  const L* p;      // weights; row stride 64
  A* out;
  index_t out_stride;
  const A* alpha;
  index_t value_dim;               // padded
  index_t panel_begin, panel_end;  // the panels that some row of the block sees
};

/// S[:, column : column + Vectors packets] = Q K^T.
template <class P, class L, int Rows, int Vectors>
void score_columns(const block_operands<P, L>& op, index_t column) noexcept {
  using A = accumulator_t<P>;
  constexpr int width = packet_size<A>;
  constexpr index_t lanes = lane_elements<P>;
  packet<A> sum[Rows][Vectors];
  clear<A>(sum);
  const P* b[Vectors];
  GQA_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    const index_t c = column + v * width;
    b[v] = op.tile.k[static_cast<std::size_t>(c / panel_tokens)] + c % panel_tokens * lanes;
  }
  accumulate<P, L>(sum, op.q, op.q_stride, b, panel_tokens * lanes, op.head_dim);
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (!std::is_same_v<L, A>) sum[r][v] = mul<A>(sum[r][v], broadcast(op.score_factor));
      store(op.s + r * tile_tokens + column + v * width, sum[r][v]);
    }
  }
}

/// O[:, column : column + Vectors packets] = alpha O + P V, within one block of value columns `columns` wide.
template <class P, class L, int Rows, int Vectors>
void value_columns(const block_operands<P, L>& op, index_t block, index_t columns, index_t column) noexcept {
  using A = accumulator_t<P>;
  constexpr int width = packet_size<A>;
  constexpr index_t lanes = lane_elements<P>;
  packet<A> sum[Rows][Vectors];
  clear<A>(sum);
  for (index_t panel = op.panel_begin; panel < op.panel_end; ++panel) {
    const P* const from = op.tile.v[static_cast<std::size_t>(panel)] + block * panel_tokens + column * lanes;
    const P* b[Vectors];
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) b[v] = from + v * width * lanes;
    accumulate<P, L>(sum, op.p + panel * panel_tokens, tile_tokens, b, columns * lanes, panel_tokens);
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const packet<A> alpha = broadcast(op.alpha[r]);
    A* const out = op.out + r * op.out_stride + block + column;
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) store(out + v * width, madd(load(out + v * width), alpha, sum[r][v]));
  }
}

/// Calls f.template operator()<Vectors>(column) so that blocks of packets cover [begin, end), multiples of 16 columns.
template <class A, class F>
GQA_INLINE void for_each_column_block(index_t begin, index_t end, const F& f) noexcept {
  constexpr index_t width = packet_size<A>;
  constexpr index_t full = block_vectors * width;
  index_t column = begin;
  for (; column + full <= end; column += full) f.template operator()<block_vectors>(column);
  if constexpr (full > panel_tokens) {
    constexpr int panel_vectors = static_cast<int>(panel_tokens / width);  // 1 with 16 lanes, 2 with 8
    const index_t left = (end - column) / panel_tokens;
    if constexpr (block_vectors > 3 * panel_vectors) {
      if (left == 3) f.template operator()<3 * panel_vectors>(column);
      if (left == 2) f.template operator()<2 * panel_vectors>(column);
    }
    if (left == 1) f.template operator()<panel_vectors>(column);
  }
}

/// Scores of a row block on the panels it sees.
template <class P, class L, int Rows>
void score_block(const block_operands<P, L>& op) noexcept {
  for_each_column_block<accumulator_t<P>>(
      op.panel_begin * panel_tokens, op.panel_end * panel_tokens,
      [&op]<int Vectors>(index_t column) { score_columns<P, L, Rows, Vectors>(op, column); });
}

/// Output of a row block after the tile.
template <class P, class L, int Rows>
void value_block_rows(const block_operands<P, L>& op) noexcept {
  for (index_t block = 0; block < op.value_dim; block += value_block) {
    const index_t columns = std::min(value_block, op.value_dim - block);
    for_each_column_block<accumulator_t<P>>(0, columns, [&]<int Vectors>(index_t column) {
      value_columns<P, L, Rows, Vectors>(op, block, columns, column);
    });
  }
}

/// The two products for each number of rows in a block.
template <class P, class L>
struct row_block_kernels {
  using kernel = void (*)(const block_operands<P, L>&) noexcept;
  static constexpr std::array<kernel, block_rows> scores = {score_block<P, L, 1>, score_block<P, L, 2>,
                                                            score_block<P, L, 3>, score_block<P, L, 4>,
                                                            score_block<P, L, 5>, score_block<P, L, 6>};
  static constexpr std::array<kernel, block_rows> values = {value_block_rows<P, L, 1>, value_block_rows<P, L, 2>,
                                                            value_block_rows<P, L, 3>, value_block_rows<P, L, 4>,
                                                            value_block_rows<P, L, 5>, value_block_rows<P, L, 6>};
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
