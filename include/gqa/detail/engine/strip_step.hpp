// SPDX-License-Identifier: Apache-2.0
/// \file
/// Few rows on keys and values where they lie, strip by strip of 16 tokens: decode over plain tensors.
///
/// A run of key tiles is read twice from end to end: all keys, which gives the scores; then, once their weights are
/// known, all values. Where a token's heads lie together, the walk visits a strip of all heads before the next strip.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Where a strip stands: the n-th of key tile i, which is the `slot`-th of its run.
struct strip_place {
  index_t i, slot, n;
};

template <class P, class L>
class strip_step {
  using A = accumulator_t<P>;

 public:
  explicit strip_step(const engine_call<P, L>& call) noexcept : call_(call) {}

  /// What rows ask for while `heads` KV heads read in place, one after the other.
  void look_ahead(const row_tile& t, index_t heads, workspace<P, L>& w) const noexcept {
    w.ahead = call_.kv.ahead(t.g, {t.rows, heads});
  }
  /// Finds the strips of key tile i.
  void find_strips(const row_tile& t, index_t i, workspace<P, L>& w) const noexcept {
    call_.kv.find_strips(call_.rows.call().kv_sequence(t.b()), t.g, i, w.strips);
  }

  /// The scores of a strip.
  void score(const row_tile& t, const strip_place& at, workspace<P, L>& w) const noexcept {
    call_.kernels.strips->scores[static_cast<std::size_t>(t.rows - 1)](
        w.strips.k[static_cast<std::size_t>(at.n)], w.ahead.k, w.q, call_.q_stride(), call_.shape.head_dim,
        w.s + at.slot * t.rows * tile_tokens + at.n * group_tokens);
  }
  /// Once all strips of a run of tiles are scored: their weights.
  void weigh(const row_tile& t, index_t tiles, workspace<P, L>& w, const raw_states<A>& states) const noexcept {
    if constexpr (!std::is_same_v<A, L>) multiply(w.s, tiles * t.rows * tile_tokens, call_.scores.score_factor());
    for (index_t row = 0; row < tiles * t.rows; row += t.rows)
      softmax_steps<L>(t.rows, w.s + row * tile_tokens, w.p + row * tile_tokens, states.max, w.lanes, w.alpha + row);
  }
  /// The values of a strip.
  void apply(const row_tile& t, const strip_place& at, workspace<P, L>& w, const raw_states<A>& states) const noexcept {
    const index_t out_stride = call_.out_stride();
    if (at.n == 0) {
      std::fill_n(w.tile_sums, t.rows * out_stride, A{0});
      std::fill_n(w.tile_weights, t.rows, A{0});
    }
    call_.kernels.strips->values[static_cast<std::size_t>(t.rows - 1)](
        w.strips.v[static_cast<std::size_t>(at.n)], w.ahead.v,
        w.p + at.slot * t.rows * tile_tokens + at.n * group_tokens, {w.tile_sums, w.tile_weights}, out_stride,
        call_.shape.value_dim);
    if (at.n + 1 == tile_panels)
      add_tile_sums<A>({w.tile_sums, w.tile_weights}, w.alpha + at.slot * t.rows,
                       {states.out, sums_in_lanes<L> ? nullptr : states.sum}, t.rows, out_stride);
  }

 private:
  static void multiply(A* s, index_t count, A factor) noexcept {
    for (index_t c = 0; c < count; c += packet_size<A>) store(s + c, mul<A>(load(s + c), broadcast(factor)));
  }

  const engine_call<P, L>& call_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
