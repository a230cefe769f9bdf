// SPDX-License-Identifier: Apache-2.0
/// \file
/// The products of a single row block that streams a tile from memory, panel by panel: decode.
///
/// A panel's 16 tokens of all value columns are multiplied before the next panel's, so that memory is read from front
/// to back; their sums wait in L1 (tile_sums) and join the output once all panels are in. Order of sums and bits are
/// those of tile_kernel.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// total [Rows] = alpha total + the sums of a tile, once all of it is in.
template <class A>
void add_tile_sums(const weighted_sums<A>& tile, const A* alpha, const weighted_sums<A>& total, index_t rows,
                   index_t stride) noexcept {
  for (index_t r = 0; r < rows; ++r) {
    const packet<A> scale = broadcast(alpha[r]);
    for (index_t e = r * stride; e < (r + 1) * stride; e += packet_size<A>)
      store(total.values + e, madd(load(total.values + e), scale, load(tile.values + e)));
    if (total.weights != nullptr) total.weights[r] = scalar_madd(total.weights[r], alpha[r], tile.weights[r]);
  }
}

/// Scores panel by panel: memory from front to back.
template <class P, class L, int Rows, reading How>
void score_block_in_order(const block_operands<P, L>& op) noexcept {
  constexpr int panel_vectors = static_cast<int>(panel_tokens / packet_size<accumulator_t<P>>);
  for (index_t panel = op.panel_begin; panel < op.panel_end; ++panel)
    score_columns<P, L, Rows, panel_vectors, How>(op, panel * panel_tokens);
}

/// sums[:, Vectors packets of columns] += P V of one panel, from 0 if it is the first. (Its loop steps pointers:
/// finding each token's place anew, as value_columns() does across panels, costs one row a tenth of its speed.)
template <class P, class L, int Rows, int Vectors, int Weights, reading How>
void value_panel_columns(const block_operands<P, L>& op, index_t panel, const value_place& at) noexcept {
  using A = accumulator_t<P>;
  constexpr int width = packet_size<A>;
  constexpr index_t lanes = lane_elements<P>;
  const bool starts = panel == op.panel_begin;
  A* const sums = op.tile_sums + at.block + at.column;
  packet<A> sum[Rows][Vectors];
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = starts ? zeros<A>() : load(sums + r * op.out_stride + v * width);
  }
  std::array<A, Weights> weights{};
  if (!starts) std::copy_n(op.tile_weights + at.first_row, Weights, weights.begin());
  const L* const p = op.p + panel * panel_tokens;
  const index_t ahead = bytes_ahead<P, How>(op.ahead.v, panel);
  const P* const from = op.tile.v[static_cast<std::size_t>(panel)] + at.block * panel_tokens + at.column * lanes;
  const P* b[Vectors];
  GQA_UNROLL
  for (int v = 0; v < Vectors; ++v) b[v] = from + v * width * lanes;
  for (index_t t = 0; t < panel_tokens; t += lanes) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) fetch_ahead<Rows, width * lanes>(b[v], t * at.columns + v * width * lanes, ahead);
    multiply_step<P, L>(sum, p + t, tile_tokens, b);
    add_weights<P, L>(weights, p + at.first_row * tile_tokens + t);
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) b[v] += at.columns * lanes;
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) store(sums + r * op.out_stride + v * width, sum[r][v]);
  }
  std::copy_n(weights.begin(), Weights, op.tile_weights + at.first_row);
}

/// Output of a row block, panel by panel: each panel's columns have their sums in L1 while the others' turn is.
template <class P, class L, int Rows, reading How>
void value_block_in_order(const block_operands<P, L>& op) noexcept {
  using A = accumulator_t<P>;
  constexpr int vectors = Rows <= block_rows ? block_vectors : block_vectors / 2;
  for (index_t panel = op.panel_begin; panel < op.panel_end; ++panel) {
    for_each_value_column<P, L, Rows, vectors>(op.value_dim,
                                               [&op, panel]<int Vectors, int Weights>(const value_place& at) {
                                                 value_panel_columns<P, L, Rows, Vectors, Weights, How>(op, panel, at);
                                               });
  }
  add_tile_sums<A>({op.tile_sums, op.tile_weights}, op.alpha, {op.out, op.weight_sums}, Rows, op.out_stride);
}

/// Those of a single block, which streams it from memory.
template <class P, class L, reading How>
struct stream_kernels {
  static constexpr std::make_integer_sequence<int, stream_rows<accumulator_t<P>>> streams{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_block_in_order<P, L, Rows, How>; }, streams);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_block_in_order<P, L, Rows, How>; }, streams);
};
/// The same as a value.
template <class P, class L>
struct stream_table {
  using kernel = void (*)(const block_operands<P, L>&) noexcept;
  using kernels = std::array<kernel, static_cast<std::size_t>(stream_rows<accumulator_t<P>>)>;
  kernels scores, values;
  bool scattered;  // asks ahead for what operands say
};
template <class P, class L, reading How>
inline constexpr stream_table<P, L> stream_table_of{stream_kernels<P, L, How>::scores,
                                                    stream_kernels<P, L, How>::values, How == reading::scattered};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
