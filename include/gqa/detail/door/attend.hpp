// SPDX-License-Identifier: Apache-2.0
/// \file
/// From a typed call to the engine: checks, then every type is erased, and what products are made of is chosen.
///
///     q [B, S, H, D]      -> query_rows
///     kv                  -> tile_source<P>    of all of these engine<P, L>::run
///     out [B, S, H, E]    -> output_rows
///     variant             -> row_rules<A>
///
/// P is what the source's panels hold, A its accumulator, and L what queries and weights are held in: A, or what the
/// hardware multiplies panels of P with.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/cache/adapted_source.hpp>
#include <gqa/detail/cache/decoded_kv.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/run.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {

template <class T>
concept output_tensor = tensor_like<T> && !std::is_const_v<element_of<T>>;

template <class T>
concept output_state = is_partial_state<std::remove_cvref_t<T>> &&
    !std::is_const_v<typename decltype(std::declval<T>().out)::element_type>;

/// What attention() writes to.
template <class T>
concept attention_output = output_tensor<T> || output_state<T>;

template <class Out>
[[nodiscard]] auto output_view(Out&& out) {
  if constexpr (output_state<Out>) {
    return out.out;
  } else {
    return as_view(std::forward<Out>(out));
  }
}

/// An output as calls take it: a state, or a view.
template <class Out>
[[nodiscard]] auto as_output(Out&& out) {
  if constexpr (output_state<Out>) {
    return out;
  } else {
    return as_view(std::forward<Out>(out));
  }
}

template <class Q, class Stored>
concept query_element_for = (storable<Q> && std::is_same_v<Q, Stored>) ||
                            (std::is_same_v<Q, float> && sixteen_bit_float<Stored>) ||
                            (is_encoded<Stored> && storable<Q> && !std::is_same_v<Q, double>);

/// The dtype rules of the door, one message each.
template <class Q, class Source, class Out>
constexpr void require_dtypes() noexcept {
  using stored = typename Source::element;
  static_assert(query_element_for<Q, stored>,
                "gqa: q must have the element type of k, or be float over 16-bit keys, or of any type but double over "
                "keys or values of 8 bits");
  static_assert(std::is_same_v<Out, float> || std::is_same_v<Out, double> || std::is_same_v<Out, Q>,
                "gqa: out must be float, double or have the element type of q");
}

inline namespace GQA_ISA {

/// What a call reads and writes beside keys and values, without its types.
struct call_operands {
  operand q, out;
  std::optional<operand> lse = {};
};
template <class Q, class Out>
[[nodiscard]] call_operands describe_call(const tensor_view<const Q, 4>& q, const Out& out_or_state) noexcept {
  call_operands o{describe("q", q), describe("out", output_view(out_or_state))};
  if constexpr (output_state<Out>) o.lse = describe("out.lse", out_or_state.lse);
  return o;
}

/// Calls find(output) for the log-sum-exp, where there is one, and the output; returns the first fault that it finds.
template <class Find>
[[nodiscard]] fault find_in_outputs(const call_operands& call, const Find& find) noexcept {
  if (call.lse) {
    if (const auto f = find(*call.lse)) return f;
  }
  return find(call.out);
}
/// Outputs may not overlap what is read.
[[nodiscard]] GQA_ONCE inline fault find_overlap_with(const call_operands& call, const operand& read) noexcept {
  return find_in_outputs(call, [&](const operand& out) noexcept { return find_overlap_fault(out, read); });
}

/// Memory that is written is apart from all that is read, and no element of it at two places.
[[nodiscard]] GQA_ONCE inline fault find_memory_fault(const call_operands& call, const key_source& kv,
                                                      const attention_options& options) noexcept {
  if (call.lse) {
    if (const auto f = find_lse_fault(*call.lse, call.out)) return f;
    if (const auto f = find_written_fault(*call.lse)) return f;
    if (const auto f = find_overlap_fault(*call.lse, call.out)) return f;
  }
  if (const auto f = find_overlap_with(call, call.q)) return f;
  if (const auto f = find_in_outputs(call, [&](const operand& out) noexcept { return kv.find_overlap(out); })) return f;
  return find_in_options(options, [&](const operand& read) noexcept { return find_overlap_with(call, read); });
}

/// Extents of a call of q_len queries of q_heads heads over a source.
template <class Source>
[[nodiscard]] call_shape shape_of(index_t q_len, index_t q_heads, const Source& kv) noexcept {
  return {kv.batch(), q_len, kv.kv_len(), q_heads, kv.kv_heads(), kv.head_dim(), kv.value_dim()};
}

/// The source, extents, layouts and options of a call.
[[nodiscard]] GQA_ONCE inline fault find_operands_fault(const call_operands& call, const key_source& kv,
                                                        const attention_options& options) noexcept {
  if (const auto f = kv.find_fault()) return f;
  const call_shape shape = shape_of(call.q.extents[1], call.q.extents[2], kv);
  if (const auto f = find_shape_fault(call.q, call.out, shape)) return f;
  if (const auto f = find_options_fault(options, shape)) return f;
  for (index_t b = 0; b < shape.batch && !options.kv_lengths.empty(); ++b) {
    const index_t said = options.kv_lengths[static_cast<std::size_t>(b)];
    if (const auto f = find_kv_length_fault("options.kv_lengths", b, said, kv.length(b))) return f;
  }
  return {};
}

/// All checks of a call but those of its turns and rules.
[[nodiscard]] GQA_ONCE inline fault find_call_fault(const call_operands& call, const key_source& kv,
                                                    const attention_options& options) noexcept {
  if (const auto f = find_operands_fault(call, kv, options)) return f;
  return find_memory_fault(call, kv, options);
}
template <class Q, class Source, class Out>
[[nodiscard]] fault find_call_fault(const tensor_view<const Q, 4>& q, const Source& kv, const Out& out_or_state,
                                    const attention_options& options) noexcept {
  return find_call_fault(describe_call(q, out_or_state), adapt_keys(kv), options);
}

/// A call without its element types, with queries and weights held in L.
template <class L, class Queries, class Source, class Out>
[[nodiscard]] auto problem_of(const Queries& q, const Source& kv, const Out& out_or_state,
                              const attention_options& options) noexcept {
  using A = accumulator_t<typename Source::panel_element>;
  const auto& rows = rows_of(q);
  problem<A, L> p;
  p.shape = shape_of(rows.extent(1), rows.extent(2), kv);
  p.options = options;
  p.q = query_rows<A, queries_of_left<L>>::of(q);
  const auto out = output_view(out_or_state);
  if constexpr (output_state<Out>) {
    p.out = output_rows<A>::of(out, out_or_state.lse);
  } else {
    p.out = output_rows<A>::of(out);
  }
  return p;
}

/// Queries that see keys which their source no longer has. What rules leave visible is asked of all such keys of a
/// sequence as one block: rules that say no more than `some` of it are taken to show them.
[[nodiscard]] GQA_ONCE inline fault find_gone_fault(const call_geometry& call, const key_source& kv,
                                                    const key_rules& rules) {
  for (index_t b = 0; b < call.shape.batch && kv.about().has_gaps; ++b) {
    const key_range tiles = kv.gone_tiles(call.kv_sequence(b));
    const index_t queries = call.q_len(b), length = call.length(kv, b), offset = call.query_offset(b, length);
    if (tiles.size() == 0 || queries == 0) continue;
    const index_t first = call.interval().keys_of(offset, length).begin;
    const index_t end = call.interval().keys_of(offset + queries - 1, length).end;
    const key_range seen{(std::max)(tiles.begin * tile_tokens, first), (std::min)(tiles.end * tile_tokens, end)};
    if (seen.size() == 0) continue;
    if (rules.about().hides_blocks &&
        rules.visible({b, 0, call.shape.q_heads, offset, offset + queries, seen.begin, seen.end}) == visibility::none)
      continue;
    return make_fault(errc::range,
                      "kv: expected queries of sequence %lld that see no key of [%lld, %lld), which are gone, got "
                      "some that may see [%lld, %lld)",
                      printable(b), printable(tiles.begin * tile_tokens), printable(tiles.end * tile_tokens),
                      printable(seen.begin), printable(seen.end));
  }
  return {};
}

/// A variant as rules: none, rules themselves, or a user's.
template <class A>
[[nodiscard]] no_rules<A> rules_of(const no_variant&) noexcept {
  return {};
}
template <class A, std::derived_from<row_rules<A>> Rules>
[[nodiscard]] const Rules& rules_of(const Rules& rules) noexcept {
  return rules;
}
template <class A, attention_variant Variant>
requires(!std::derived_from<Variant, key_rules>)
    [[nodiscard]] adapted_variant<Variant, A> rules_of(const Variant& variant) noexcept {
  return adapted_variant<Variant, A>(variant);
}

/// All that is wrong with a call.
template <class Queries, class Out>
[[nodiscard]] fault find_attention_fault_of(const Queries& q, const key_source& kv, const Out& out_or_state,
                                            const attention_options& options, const key_rules& rules) {
  const call_operands call = describe_call(rows_of(q), out_or_state);
  if (const auto f = find_call_fault(call, kv, options)) return f;
  if (const auto f = find_turns_fault(q)) return f;
  return find_gone_fault({shape_of(call.q.extents[1], call.q.extents[2], kv), options}, kv, rules);
}
template <class Queries, class Source, class Out, class Variant>
[[nodiscard]] fault find_attention_fault(const Queries& q, const Source& kv, const Out& out_or_state,
                                         const attention_options& options, const Variant& variant) {
  using A = accumulator_t<typename Source::panel_element>;
  return find_attention_fault_of(q, adapt_keys(kv), out_or_state, options, rules_of<A>(variant));
}

/// A checked call with queries and weights held in L.
template <class L, class Queries, class P, class Out>
void attend_in(const Queries& q, const tile_source<P>& kv, const Out& out_or_state, const attention_options& options,
               const ragged_rows& ragged, const row_rules<accumulator_t<P>>& rules, context& ctx) {
  auto p = problem_of<L>(q, kv, out_or_state, options);
  if (!ragged.q_offsets.empty()) {
    p.ragged = ragged;
    p.shape.batch = static_cast<index_t>(ragged.sequences.size()), p.shape.q_len = 0;
    for (index_t b = 0; b < p.shape.batch; ++b) p.shape.q_len = (std::max)(p.shape.q_len, p.q_len(b));
  }
  if (const auto f = find_gone_fault(p, kv, rules)) return raise(f);
  engine<P, L>::run(p, kv, rules, ctx);
}

/// Whether this call multiplies panels of P as they lie.
template <class Q, class P>
[[nodiscard]] bool takes_dot(const attention_options& options) noexcept {
  return has_dot<P> && !options.float_products.value_or(std::is_same_v<Q, float> && !is_encoded<P>);
}

/// A checked call: chooses what products are made of, runs.
template <class Queries, class P, class Out>
void attend_checked(const Queries& q, const tile_source<P>& kv, const Out& out_or_state,
                    const attention_options& options, const ragged_rows& ragged,
                    const row_rules<accumulator_t<P>>& rules, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  if (output_view(out_or_state).size() == 0) return;
  if constexpr (has_dot<P>) {
    if (takes_dot<Q, P>(options)) return attend_in<dot_left<P>>(q, kv, out_or_state, options, ragged, rules, ctx);
  }
  if constexpr (is_encoded<P>) {
    const decoded_tiles<P> decoded(kv);
    attend_in<float, Queries, float>(q, decoded, out_or_state, options, ragged, rules, ctx);
  } else {
    attend_in<accumulator_t<P>>(q, kv, out_or_state, options, ragged, rules, ctx);
  }
}

/// A call of erased keys and rules: checked, then run.
template <class Queries, class P, class Out>
void attend_over(const Queries& q, const tile_source<P>& kv, const Out& out_or_state, const attention_options& options,
                 const row_rules<accumulator_t<P>>& rules, context& ctx) {
  if (const auto fault = find_call_fault(describe_call(rows_of(q), out_or_state), kv, options)) return raise(fault);
  if (const auto fault = find_turns_fault(q)) return raise(fault);
  attend_checked<Queries, P>(q, kv, out_or_state, options, {}, rules, ctx);
}

/// The one way in. Parts: how rules have tiles read.
template <tile_parts Parts = tile_parts::whole, class Queries, class Source, class Out, class Variant>
void attend(const Queries& q, const Source& kv, const Out& out_or_state, const attention_options& options,
            const Variant& variant, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  using P = typename Source::panel_element;
  require_dtypes<Q, Source, typename decltype(output_view(out_or_state))::value_type>();
  const tile_source<P>& source = adapt<Parts>(kv);
  attend_over<Queries, P>(q, source, out_or_state, options, rules_of<accumulator_t<P>>(variant), ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
