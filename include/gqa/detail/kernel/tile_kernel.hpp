// SPDX-License-Identifier: Apache-2.0
/// \file
/// The micro-kernel: a register block of C += A B, the one loop behind both products of attention.
///
///     scores:  S [rows, 64] = Q [rows, D] K^T      B = K panels [D/p][16][p],     depth D
///     values:  O [rows, E]  = alpha O + P V        B = V panels [16/p][<=64][p],  depth 16 a panel
///
/// A step broadcasts p elements of each row of A and multiplies them by a row of `Vectors` packets of B
/// (simd/product.hpp: p = 1 but for bfloat16, 2 neighbours in a 32-bit lane). The block has to hide the latency of the
/// multiply-add (4 cycles x 2 a cycle on current x86, 4 x 4 on wide Arm): 6 rows x 4 packets fill 24 of 32 registers
/// and leave 4 for B and one for the broadcast; with 16 registers 6 x 2 + 2 + 1. A step loads Vectors + Rows elements
/// or packets for Rows * Vectors multiply-adds: 10 loads to 24, so loads are not the limit. For a tile of 64 keys, 6
/// rows read 256 B of B from L1 or L2 per 24 multiply-adds, 21 B a cycle.
///
/// Order: one accumulator an element, its sum over the depth ascending, one multiply-add each. The block's shape
/// changes which elements are computed together, never their bits. A sum starts at +0, and O takes it in one
/// multiply-add: sums over 64 tokens, then over tiles, keep rounding errors far below those of one long chain.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// One step: sum[r][v] += A[r, :p] B[:p, v]. A is row-major with `a_stride`; packet v of B's row of lanes is at b[v].
template <class P, class L, int Rows, int Vectors>
GQA_INLINE void multiply_step(packet<accumulator_t<P>> (&sum)[Rows][Vectors], const L* a, index_t a_stride,
                              const P* const (&b)[Vectors]) noexcept {
  using product = lane_product<P, L>;
  GQA_UNROLL
  for (int part = 0; part < product::parts; ++part) {
    typename product::right step[Vectors];
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) step[v] = product::load(b[v], part);
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const typename product::left element = product::broadcast(a + r * a_stride, part);
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[r][v] = product::madd(element, step[v], sum[r][v]);
    }
  }
}

/// sums[r] += the p weights of row r, as a column of ones would have them.
template <class P, class L, std::size_t Rows>
GQA_INLINE void add_weights(std::array<accumulator_t<P>, Rows>& sums, const L* weights) noexcept {
  if constexpr (Rows > 0) {
    GQA_UNROLL
    for (std::size_t r = 0; r < Rows; ++r)
      sums[r] = lane_product<P, L>::add_elements(weights + static_cast<index_t>(r) * tile_tokens, sums[r]);
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

/// Bytes from panel `panel` to what it asks for: a constant where that follows in memory (which gains 2 %).
template <class P, reading How>
[[nodiscard]] GQA_INLINE index_t bytes_ahead([[maybe_unused]] const std::array<index_t, tile_panels>& of_panels,
                                             [[maybe_unused]] index_t panel) noexcept {
  if constexpr (How == reading::scattered) return of_panels[static_cast<std::size_t>(panel)];
  return read_ahead_bytes<P>;
}

/// S[:, column : column + Vectors packets] = Q K^T.
template <class P, class L, int Rows, int Vectors, reading How>
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
  index_t next = op.next.keys.bytes + column / block_columns<A> * bytes_fetched(op.head_dim / lanes);
  const index_t ahead = bytes_ahead<P, How>(op.ahead.k, column / panel_tokens);
  for (index_t d = 0; d < op.head_dim; d += lanes) {
    if constexpr (How == reading::blocks) prefetch<2>(op.next.keys.at, next), next += 64;
    GQA_UNROLL
    for (int v = 0; v < Vectors && How != reading::blocks; ++v)
      fetch_ahead<Rows, width * lanes>(b[v], d * panel_tokens + v * width * lanes, ahead);
    multiply_step<P, L>(sum, op.q + d, op.q_stride, b);
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) b[v] += panel_tokens * lanes;
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (!std::is_same_v<L, A>) sum[r][v] = mul<A>(sum[r][v], broadcast(op.score_factor));
      store(op.s + r * tile_tokens + column + v * width, sum[r][v]);
    }
  }
}

/// Some packets of value columns: from `column` on in the block of `columns` that begins at `block`. Beside them the
/// weights of some rows are added up, from `first_row` on.
struct value_place {
  index_t block, columns, column;
  index_t first_row;
};

/// O[:, Vectors packets of columns] = alpha O + P V, and the same of the weights of `Weights` rows.
template <class P, class L, int Rows, int Vectors, int Weights>
void value_columns(const block_operands<P, L>& op, const value_place& at) noexcept {
  using A = accumulator_t<P>;
  constexpr int width = packet_size<A>;
  constexpr index_t lanes = lane_elements<P>;
  packet<A> sum[Rows][Vectors];
  clear<A>(sum);
  std::array<A, Weights> weights{};
  const L* const weights_at = op.p + at.first_row * tile_tokens;
  // One loop over all panels: a nest of loops of 16 costs a mispredicted branch a panel, 4 % of the time.
  const index_t first = at.block * panel_tokens + at.column * lanes, end = op.panel_end * panel_tokens;
  index_t next = op.next.values.bytes + (at.block + at.column) / block_columns<A> * bytes_fetched(tile_tokens / lanes);
  for (index_t t = op.panel_begin * panel_tokens; t < end; t += lanes) {
    prefetch<2>(op.next.values.at, next), next += 64;
    const auto token = static_cast<std::size_t>(t);  // unsigned: its quotient and remainder are a shift and a mask
    const P* const from =
        op.tile.v[token / panel_tokens] + first + static_cast<index_t>(token % panel_tokens) * at.columns;
    const P* b[Vectors];
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) b[v] = from + v * width * lanes;
    multiply_step<P, L>(sum, op.p + t, tile_tokens, b);
    add_weights<P, L>(weights, weights_at + t);
  }
  A* const out = op.out + at.block + at.column;
  // Once maxima have settled alpha is 1, and O + sum the same bits for an addition, which some cores do beside their
  // multiply-adds.
  bool settled = true;
  for (int r = 0; r < Rows; ++r) settled = settled && op.alpha[r] == A{1};
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      A* const to = out + r * op.out_stride + v * width;
      store(to, settled ? add(load(to), sum[r][v]) : madd(load(to), broadcast(op.alpha[r]), sum[r][v]));
    }
  }
  index_t row = at.first_row;
  for (const A sum_of_row : weights) {
    op.weight_sums[row] = scalar_madd(op.weight_sums[row], op.alpha[row], sum_of_row);
    ++row;
  }
}

/// Calls f.template operator()<Vectors>(column) so that blocks of packets cover [begin, end), multiples of 16 columns.
template <class A, int Most = block_vectors, class F>
GQA_INLINE void for_each_column_block(index_t begin, index_t end, const F& f) noexcept {
  constexpr index_t width = packet_size<A>;
  constexpr index_t full = Most * width;
  index_t column = begin;
  for (; column + full <= end; column += full) f.template operator()<Most>(column);
  if constexpr (full > panel_tokens) {
    constexpr int panel_vectors = static_cast<int>(panel_tokens / width);  // 1 with 16 lanes, 2 with 8
    const index_t left = (end - column) / panel_tokens;
    if constexpr (Most > 3 * panel_vectors) {
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
      [&op]<int Vectors>(index_t column) { score_columns<P, L, Rows, Vectors, reading::blocks>(op, column); });
}

/// Calls f.template operator()<Vectors, Weights>(place) for the value columns, block by block of 64, at most `Most`
/// packets at a time. Unless the softmax sums weights, some columns do. Those of full width add up a few rows' each
/// until all rows had their turn: beside 6 x 4 packets of 32 registers half of the rows', beside 6 x 2 of 16 one row's,
/// or half of the rows' too where there are not enough of full width. Where there is only one, a narrower one or else
/// that one adds up all.
template <class P, class L, int Rows, int Most, class F>
GQA_INLINE void for_each_value_column(index_t value_dim, const F& f) noexcept {
  using A = accumulator_t<P>;
  constexpr int half = (Rows + 1) / 2, few = packet_registers == 32 ? half : 1;
  constexpr index_t width = Most * packet_size<A>;
  const index_t full = value_dim / width;
  const int at_once = full * few >= Rows ? few : full >= 2 ? half : Rows;
  const bool has_narrow = full * width < value_dim;
  index_t done = sums_in_lanes<L> ? Rows : 0;
  for (index_t block = 0; block < value_dim; block += value_block) {
    const index_t columns = (std::min)(value_block, value_dim - block);
    for_each_column_block<A, Most>(0, columns, [&]<int Vectors>(index_t column) {
      const auto call = [&]<int Weights>() {
        f.template operator()<Vectors, Weights>(value_place{block, columns, column, done});
        done += Weights;
      };
      if constexpr (!sums_in_lanes<L>) {
        if constexpr (Vectors == Most) {
          if (at_once == few && done + few <= Rows) return call.template operator()<few>();
          if constexpr (half != few) {
            if (at_once == half && done + half <= Rows) return call.template operator()<half>();
          }
          if constexpr (Rows % half != 0) {
            if (at_once == half && done < Rows) return call.template operator()<Rows % half>();
          }
        }
        if (at_once == Rows && done < Rows && (Vectors < Most || !has_narrow)) return call.template operator()<Rows>();
      }
      call.template operator()<0>();
    });
  }
}

/// Output of a row block after the tile.
template <class P, class L, int Rows>
void value_block_rows(const block_operands<P, L>& op) noexcept {
  for_each_value_column<P, L, Rows, block_vectors>(
      op.value_dim,
      [&op]<int Vectors, int Weights>(const value_place& at) { value_columns<P, L, Rows, Vectors, Weights>(op, at); });
}

/// The products of 1, 2, ... rows of many row blocks, which read a tile from cache.
template <class P, class L>
struct row_block_kernels {
  static constexpr std::make_integer_sequence<int, block_rows> blocks{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_block<P, L, Rows>; }, blocks);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_block_rows<P, L, Rows>; }, blocks);
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
