// SPDX-License-Identifier: Apache-2.0
/// \file
/// Partial attention states: attend to some of the keys, keep (output, log-sum-exp), merge later.
///
/// Start here to split the KV axis over machines, to share a prefix, or to combine the scores of several query groups.
/// Axes: B batch, S query position, H query head, E value dim. Every log-sum-exp is natural (base e).
/// Merging is commutative and associative up to rounding; the empty state (lse = -inf, out = 0) is its identity.
/// (Source: Dao et al. 2022, FlashAttention; the state algebra as in FlashInfer, Ye et al. 2025.)
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa {

/// Attention over a subset of the keys, with all that is needed to extend it to another subset.
/// \tparam T  element of `out`, const for read-only states; `lse` is accumulator_t<T>, const where T is.
template <class T>
struct partial_state {
  using lse_element = std::conditional_t<std::is_const_v<T>, const accumulator_t<T>, accumulator_t<T>>;

  tensor_view<T, 4> out;            // [B, S, H, E], normalised over the keys seen; 0 where none
  tensor_view<lse_element, 3> lse;  // [B, S, H], ln sum exp(score); -inf where none

  /// A mutable state is also a read-only one.
  constexpr operator partial_state<const T>() const noexcept requires(!std::is_const_v<T>) { return {out, lse}; }
};

template <class T, class L>
partial_state(tensor_view<T, 4>, tensor_view<L, 3>) -> partial_state<T>;

namespace detail {

template <class T>
inline constexpr bool is_partial_state = false;
template <class T>
inline constexpr bool is_partial_state<partial_state<T>> = true;

inline namespace GQA_ISA {

/// A state fits a merge's result: same extents, sound layout.
template <class T>
[[nodiscard]] fault find_state_fault(const char* name, const partial_state<const T>& state,
                                     const tensor_view<T, 4>& result) noexcept {
  const auto out = describe(name, state.out);
  if (const auto f = find_layout_fault(out)) return f;
  for (int axis = 0; axis < 4; ++axis) {
    if (const auto f = find_extent_fault(out, axis, result.extent(axis), "that of the merge's result")) return f;
  }
  return find_lse_fault("state.lse", state.lse, state.out);
}

/// States fit the one that they are merged into: same extents, sound layout, memory apart or the same.
template <class T>
[[nodiscard]] fault find_merge_fault(std::span<const partial_state<const T>> states,
                                     const partial_state<T>& result) noexcept {
  const operand out = describe("result.out", result.out);
  if (const auto f = find_output_fault(out)) return f;
  if (const auto f = find_lse_fault("result.lse", result.lse, result.out)) return f;
  if (result.lse.size() > 0 && result.out.extent(3) < 1)
    return make_fault(errc::shape, "result.out: expected values of at least 1 element, got none");
  const operand lse = describe("result.lse", result.lse);
  if (const auto f = find_overlap_fault(out, lse)) return f;
  for (const auto& state : states) {
    if (const auto f = find_state_fault<T>("state.out", state, result.out)) return f;
    for (const auto& part : {describe("state.out", state.out), describe("state.lse", state.lse)}) {
      for (const auto& written : {out, lse}) {
        if (is_same_memory(part, written)) continue;  // merged in place
        if (const auto f = find_overlap_fault(written, part)) return f;
      }
    }
  }
  return {};
}

/// One row (b, s, h) of merge_many. sums [E]: scratch.
template <class T, class A = accumulator_t<T>>
void merge_state_row(std::span<const partial_state<const T>> states, const partial_state<T>& result, index_t b,
                     index_t s, index_t h, A* sums) noexcept {
  constexpr A empty = -std::numeric_limits<A>::infinity();
  const index_t dim = result.out.extent(3);
  A top = empty;
  std::size_t seen = 0, last = 0;  // states that are not empty
  for (std::size_t i = 0; i < states.size(); ++i) {
    const A lse = states[i].lse(b, s, h);
    if (lse == empty) continue;
    ++seen;
    last = i;
    top = (std::max)(top, lse);
  }
  T* const out = &result.out(b, s, h, 0);
  if (seen == 0) {
    std::fill_n(out, dim, static_cast<T>(A{0}));
    result.lse(b, s, h) = empty;
    return;
  }
  if (seen == 1) {  // replaced exactly
    std::copy_n(&states[last].out(b, s, h, 0), dim, out);
    result.lse(b, s, h) = states[last].lse(b, s, h);
    return;
  }
  const A shift = top == empty ? A{0} : top;  // -inf only if all are NaN, which then stay NaN
  A total{0};
  std::fill_n(sums, dim, A{0});
  for (std::size_t i = 0; i < states.size(); ++i) {
    const A lse = states[i].lse(b, s, h);
    if (lse == empty) continue;
    const A weight = std::exp(lse - shift);
    total += weight;
    const T* const more = &states[i].out(b, s, h, 0);
    for (index_t e = 0; e < dim; ++e) sums[e] = scalar_madd(weight, static_cast<A>(more[e]), sums[e]);
  }
  for (index_t e = 0; e < dim; ++e) out[e] = stored<T>(sums[e] / total);
  result.lse(b, s, h) = stored<A>(shift + std::log(total));
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// result <- the merge of all states, as if their keys had been attended to at once. No states: the empty state.
/// \param states  [B, S, H, E] each, over pairwise disjoint keys (not checked).
/// \param result  [B, S, H, E]; may be one of the states, and may share no memory with the others.
/// \throws error (errc::shape, errc::stride) if a shape differs, a last axis is not contiguous or memory is shared;
///         nothing is written.
/// Cost: reads every state once, writes the result once, in accumulator precision.
template <class T>
void merge_many(std::type_identity_t<std::span<const partial_state<const T>>> states, partial_state<T> result,
                context& ctx) {
  using A = accumulator_t<T>;
  if (const auto fault = detail::find_merge_fault<T>(states, result)) return detail::raise(fault);
  if (result.out.size() == 0) return;

  const index_t q_len = result.out.extent(1), heads = result.out.extent(2), dim = result.out.extent(3);
  auto* const sums =
      reinterpret_cast<A*>(ctx.detail_scratch(static_cast<std::size_t>(ctx.concurrency() * dim) * sizeof(A)));
  if (sums == nullptr) return;
  ctx.for_each(result.out.extent(0) * q_len, [&](index_t task, index_t worker) {
    for (index_t h = 0; h < heads; ++h)
      detail::merge_state_row<T>(states, result, task / q_len, task % q_len, h, sums + worker * dim);
  });
}

/// self <- self (+) other.
/// \param other  [B, S, H, E] over keys disjoint from self's (not checked); it may share no memory with self.
/// \throws error (errc::shape, errc::stride) if the shapes differ or memory is shared; self is untouched then.
template <class T>
void merge(partial_state<T> self, std::type_identity_t<partial_state<const T>> other, context& ctx) {
  const std::array<partial_state<const T>, 2> both{partial_state<const T>(self), other};
  merge_many<T>(both, self, ctx);
}

/// The checks of merge(), and nothing else: errc::ok if the call would run.
template <class T>
[[nodiscard]] errc check(const partial_state<T>& self, std::type_identity_t<partial_state<const T>> other) noexcept {
  const std::array<partial_state<const T>, 2> both{partial_state<const T>(self), other};
  return detail::find_merge_fault<T>(both, self).code;
}
/// And those of merge_many().
template <class T>
[[nodiscard]] errc check(std::type_identity_t<std::span<const partial_state<const T>>> states,
                         const partial_state<T>& result) noexcept {
  return detail::find_merge_fault<T>(states, result).code;
}

}  // namespace GQA_ISA
}  // namespace gqa

GQA_END_PACKET_CODE
