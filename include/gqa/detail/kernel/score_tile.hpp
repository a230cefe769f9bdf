// SPDX-License-Identifier: Apache-2.0
/// \file
/// Scores of a few rows on a whole key tile, and nothing else: what bounds of keys and top keys are found by.
#pragma once

#include <cstddef>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// The scores s [rows, 64] of up to 6 rows of queries in accumulators on a whole tile, and nothing else.
template <class P, reading How = reading::blocks>
void score_tile(const kv_tile<P>& tile, const accumulator_t<P>* q, index_t q_stride, index_t head_dim, index_t rows,
                accumulator_t<P>* s) noexcept {
  using A = accumulator_t<P>;
  block_operands<P, A> op{.tile = tile, .next = at_hand(tile)};
  op.q = q, op.q_stride = q_stride, op.head_dim = head_dim;
  op.s = s, op.score_factor = A{1};
  op.panel_end = tile_panels;
  const auto row = static_cast<std::size_t>(rows - 1);
  if constexpr (How == reading::blocks) {
    row_block_kernels<P, A>::scores[row](op);
  } else {
    stream_kernels<P, A, How>::scores[row](op);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
