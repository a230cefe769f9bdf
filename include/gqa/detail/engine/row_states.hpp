// SPDX-License-Identifier: Apache-2.0
/// \file
/// The rows of a tile on their way in and out: queries loaded, states begun, merged and finished, outputs written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

template <class P, class L>
void load_queries(const engine_call<P, L>& call, const row_tile& t, workspace<P, L>& w) noexcept {
  const index_t dim = call.shape.head_dim;
  call.rows.for_each_row(t, [&](index_t r, const row_index& row) {
    queries_of_left<L>* const to = w.q + r * call.q_stride();
    call.q.load(row.batch, call.rows.call().row_of(row.batch, row.query), row.q_head, dim, call.scores.query_factor(),
                to, w.turned);
    if constexpr (!std::is_same_v<queries_of_left<L>, q8>)
      std::fill(to + dim, to + round_up(dim, lane_elements<key_type<P>>), queries_of_left<L>(0));
  });
}

/// The states of rows that saw no key at all.
template <class P, class L, class A>
void clear_states(const engine_call<P, L>& call, const row_tile& t, const raw_states<A>& states) noexcept {
  std::fill_n(states.max, t.rows, minus_infinity<A>);
  std::fill_n(states.sum, t.rows, A{0});
  std::fill_n(states.out, t.rows * call.out_stride(), A{0});
}

/// Starts a split: rows that have seen nothing.
template <class P, class L, class A>
void begin_split(const engine_call<P, L>& call, const row_tile& t, workspace<P, L>& w, const raw_states<A>& states) {
  clear_states(call, t, states);
  if constexpr (sums_in_lanes<L>) std::fill_n(w.lanes, t.rows * packet_size<A>, A{0});
  w.whole = call.sees.whole_tiles(t);
  // Nothing may be hidden from rows that read in place: values there cannot be kept out of a sum, were they NaN. What
  // decides is the call's shape and options; the contents of a mask would let one head's mask choose another's kernel,
  // and so its bits.
  w.in_place = call.reads_strips() && call.sees.sees_intervals(t) && call.rows.rows_of(t.b(), t.g) <= block_rows;
}
/// The row tile of some of a family's members, with its part of the workspace and the states.
template <class P, class L, class A>
void narrow_to(const engine_call<P, L>& call, std::span<const index_t> members, row_tile& t, workspace<P, L>& w,
               raw_states<A>& states) noexcept {
  const auto before = static_cast<std::size_t>(members.data() - t.members.data());
  const index_t skipped = call.rows.rows_of(t.members.first(before), t.g);
  t.members = members;
  t.rows = call.rows.rows_of(members, t.g);
  w.q += skipped * call.q_stride();
  if constexpr (sums_in_lanes<L>) w.lanes += skipped * packet_size<A>;
  w.whole = call.sees.whole_tiles(t);
  states = {states.max + skipped, states.sum + skipped, states.out + skipped * call.out_stride()};
}
/// Ends a split.
template <class P, class L, class A>
void end_split(const row_tile& t, const workspace<P, L>& w, const raw_states<A>& states) noexcept {
  if constexpr (sums_in_lanes<L>) {
    for (index_t r = 0; r < t.rows; ++r) states.sum[r] = sum_lanes(w.lanes + r * packet_size<A>);
  }
}

/// self <- self (+) other, of a later split.
template <class P, class L, class A>
void merge_states(const engine_call<P, L>& call, const row_tile& t, const raw_states<A>& self,
                  const raw_states<A>& other) noexcept {
  for (index_t r = 0; r < t.rows; ++r) merge_row(self, other, r, call.out_stride(), call.scores.base());
}

/// Joins the sinks, normalises and writes the rows.
template <class P, class L, class A>
void finish_rows(const engine_call<P, L>& call, const row_tile& t, const raw_states<A>& states) noexcept {
  const auto& sinks = call.options.sinks;
  const index_t dim = call.shape.value_dim;
  call.rows.for_each_row(t, [&](index_t r, const row_index& row) {
    const A sink = sinks.empty() ? minus_infinity<A> : static_cast<A>(sinks[static_cast<std::size_t>(row.q_head)]);
    const finished_row<A> done = finish_row(states.max[r], states.sum[r], sink, call.scores.base());
    const index_t at = call.rows.call().row_of(row.batch, row.query);
    call.out.store(row.batch, at, row.q_head, dim, states.out + r * call.out_stride(), done.scale, done.sum);
    if (call.out.lse == nullptr) return;
    // With only the sink the logarithm is the sink itself, unrounded.
    call.out.store_log_sum_exp(row.batch, at, row.q_head, states.sum[r] == A{0} ? sink : log_sum_exp(done));
  });
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
