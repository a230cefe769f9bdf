// SPDX-License-Identifier: Apache-2.0
/// \file
/// Combining what several kinds of attention found for the same queries.
///
///     merge_disjoint()  one softmax over the union of disjoint keys: exact. Overlaps are refused.
///     exclude()         takes keys out of a state that it has seen: with merge(), the union of overlapping keys, each
///                       counted once: merge(a, b), then exclude what both saw. Exact but for cancellation.
///     gated_sum()       a weighted sum of finished outputs, gates given: the three branches of Native Sparse Attention
///                       (Yuan et al. 2025) and the like. Each branch keeps its own softmax, keys and values, so it is
///                       no attention over their union, and what two branches see counts twice.
///     mix()             the same of two with weights w and 1 - w.
/// merge() and merge_many() themselves are in state.hpp.
#pragma once

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
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa {
namespace detail {

[[nodiscard]] inline fault find_overlapping_keys_fault(std::span<const key_range> keys, std::size_t states) noexcept {
  if (keys.size() != states)
    return make_fault(errc::shape, "keys: expected %zu ranges (one a state), got %zu", states, keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (keys[i].begin < keys[i].end && keys[j].begin < keys[j].end && keys[i].begin < keys[j].end &&
          keys[j].begin < keys[i].end)
        return make_fault(errc::range,
                          "keys[%zu]: expected keys apart from those of keys[%zu], got both of [%lld, %lld)", i, j,
                          printable(keys[i].begin > keys[j].begin ? keys[i].begin : keys[j].begin),
                          printable(keys[i].end < keys[j].end ? keys[i].end : keys[j].end));
    }
  }
  return {};
}

inline namespace GQA_ISA {

/// out <- the sum over branches of gate_of(branch, b, s, h), of type A, times it. A gate of 0 leaves its branch out.
template <class A, class T, class Out, class GateOf>
void sum_branches(std::span<const tensor_view<const T, 4>> branches, const GateOf& gate_of,
                  const tensor_view<Out, 4>& out, context& ctx) {
  const index_t q_len = out.extent(1), heads = out.extent(2), dim = out.extent(3);
  ctx.for_each(out.extent(0) * q_len, [&](index_t task, index_t) {
    const index_t b = task / q_len, s = task % q_len;
    for (index_t h = 0; h < heads; ++h) {
      for (index_t e = 0; e < dim; ++e) {
        A sum{0};
        for (std::size_t i = 0; i < branches.size(); ++i) {
          const A gate = gate_of(i, b, s, h);
          if (gate != A{0}) sum = scalar_madd(gate, static_cast<A>(branches[i](b, s, h, e)), sum);
        }
        out(b, s, h, e) = stored<Out>(sum);
      }
    }
  });
}

/// Branches [B, S, H, E] fit the sum.
template <class T, class Out>
[[nodiscard]] fault find_branches_fault(std::span<const tensor_view<const T, 4>> branches,
                                        const tensor_view<Out, 4>& out) noexcept {
  const operand written = describe("out", out);
  if (const auto f = find_output_fault(written)) return f;
  for (const auto& view : branches) {
    const operand branch = describe("branch", view);
    if (const auto f = find_layout_fault(branch)) return f;
    for (int axis = 0; axis < 4; ++axis) {
      if (const auto f = find_extent_fault(branch, axis, out.extent(axis), "that of out")) return f;
    }
    if (const auto f = find_overlap_fault(written, branch)) return f;
  }
  return {};
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// merge_many() of states over the ranges of keys that are given beside them.
/// \param states  [B, S, H, E] each
/// \param keys    one for each state: it has seen some of these keys and no others (not checked)
/// \throws error  also (errc::range) if two ranges have a key in common; nothing is written then
template <class T>
void merge_disjoint(std::type_identity_t<std::span<const partial_state<const T>>> states,
                    std::span<const key_range> keys, partial_state<T> result, context& ctx) {
  if (const auto f = detail::find_overlapping_keys_fault(keys, states.size())) return detail::raise(f);
  merge_many<T>(states, result, ctx);
}

/// self <- self without the keys of `part`, of which self has seen all (not checked).
/// \param part    [B, S, H, E]; it may share no memory with self, unless it is self
/// \throws error  as merge()
/// What part weighs of self, w, is lost in precision: errors of the two states come out 1 / (1 - w) times as large.
/// Where nothing is left, to rounding, the result is the empty state.
template <class T>
void exclude(partial_state<T> self, std::type_identity_t<partial_state<const T>> part, context& ctx) {
  using A = accumulator_t<T>;
  if (const auto f = detail::find_merge_fault<T>(std::span(&part, 1), self)) return detail::raise(f);
  if (self.out.size() == 0) return;
  constexpr A empty = -std::numeric_limits<A>::infinity();
  const index_t q_len = self.out.extent(1), heads = self.out.extent(2), dim = self.out.extent(3);
  ctx.for_each(self.out.extent(0) * q_len, [&](index_t task, index_t) {
    const index_t b = task / q_len, s = task % q_len;
    for (index_t h = 0; h < heads; ++h) {
      A& lse = self.lse(b, s, h);
      const A gone = part.lse(b, s, h);
      if (gone == empty) continue;
      const A weight = std::exp(gone - lse), left = -std::expm1(gone - lse);
      T* const out = &self.out(b, s, h, 0);
      const T* const more = &part.out(b, s, h, 0);
      const bool nothing = left <= A{0};
      for (index_t e = 0; e < dim; ++e) {
        const A rest = detail::scalar_madd(-weight, static_cast<A>(more[e]), static_cast<A>(out[e])) / left;
        out[e] = nothing ? T(0) : detail::stored<T>(rest);
      }
      lse = nothing ? empty : detail::stored<A>(lse + std::log(left));
    }
  });
}

/// out <- the sum over branches of gates[i](b, s, h) times branches[i](b, s, h, :). A gate of 0 leaves its branch out.
/// \param branches  [B, S, H, E] each, finished outputs
/// \param gates     one for each branch, [B, S, H], any strides, 0 to share one
/// \param out       [B, S, H, E], apart from the branches and the gates in memory
/// \throws error    (errc::shape, errc::stride) for anything that does not fit, before anything is written
/// Cost: reads every branch once, in accumulator precision, and rounds once.
template <class T, class Out>
void gated_sum(std::type_identity_t<std::span<const tensor_view<const T, 4>>> branches,
               std::span<const tensor_view<const float, 3>> gates, tensor_view<Out, 4> out, context& ctx) {
  using A = accumulator_t<std::conditional_t<std::is_same_v<Out, double>, double, T>>;
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_branches_fault<T>(branches, out)) return f;
    if (gates.size() != branches.size())
      return detail::make_fault(errc::shape, "gates: expected %zu (one a branch), got %zu", branches.size(),
                                gates.size());
    for (const auto& gate : gates) {
      if (const auto f = detail::find_lse_fault("gate", gate, out)) return f;
      if (const auto f = detail::find_overlap_fault(detail::describe("out", out), detail::describe("gate", gate)))
        return f;
    }
    return {};
  };
  if (const auto fault = find_fault()) return detail::raise(fault);
  if (out.size() == 0) return;
  const auto gate_of = [&](std::size_t i, index_t b, index_t s, index_t h) {
    return static_cast<A>(gates[i](b, s, h));
  };
  detail::sum_branches<A, T>(branches, gate_of, out, ctx);
}

/// out <- weight a + (1 - weight) b, of finished outputs [B, S, H, E].
/// \throws error  as gated_sum(), and (errc::option) unless 0 <= weight <= 1
template <class T, class Out>
void mix(tensor_view<const T, 4> a, std::type_identity_t<tensor_view<const T, 4>> b, double weight,
         tensor_view<Out, 4> out, context& ctx) {
  if (!(weight >= 0 && weight <= 1))
    return detail::raise(detail::make_fault(errc::option, "weight: expected 0 to 1, got %g", weight));
  using A = accumulator_t<std::conditional_t<std::is_same_v<Out, double>, double, T>>;
  const std::array<tensor_view<const T, 4>, 2> both{a, b};
  if (const auto f = detail::find_branches_fault<T>(std::span<const tensor_view<const T, 4>>(both), out))
    return detail::raise(f);
  if (out.size() == 0) return;
  const std::array<A, 2> weights{static_cast<A>(weight), static_cast<A>(1 - weight)};
  detail::sum_branches<A, T>(
      std::span<const tensor_view<const T, 4>>(both),
      [&](std::size_t i, index_t, index_t, index_t) { return weights[i]; }, out, ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa

GQA_END_PACKET_CODE
