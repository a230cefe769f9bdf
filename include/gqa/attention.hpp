// SPDX-License-Identifier: Apache-2.0
/// \file
/// attention(): the door. Exact grouped-query attention over plain tensors or any kv_source.
///
///     out[b, s, h] = sum over visible t of softmax_t(score(q[b, s, h] . k[b, t, g(h)])) v[b, t, g(h)]
///
/// MHA (one head a group), GQA and MQA (one group) are the same call: the numbers of heads say which. Prefill, append
/// and decode are the same call: the lengths say which, and query positions default to the last ones of the sequence.
///
/// Shapes: q [B, S, H, D], k [B, T, G, D], v [B, T, G, E], out [B, S, H, E]. Last axes contiguous, other strides free.
/// Types: k and v float, double, Eigen::half or Eigen::bfloat16; q the type of k, or float over 16-bit keys; out float,
/// double or the type of q. Scores, sums and outputs are computed in float (double over double) and rounded once;
/// bfloat16 queries and the weights they give meet bfloat16 keys and values as pairs where the hardware multiplies
/// those.
///
/// Cost: 2 (D + E) operations a visible pair; K and V are read once per group of heads and 96 query rows, never
/// repeated. Scratch, in the context: a few hundred KB a thread and, in prefill, packed keys and values, 64 MiB at most
/// unless one KV head needs more; in decode over several threads, the states of unmerged splits, 64 MiB at most.
///
/// Read on: detail/schedule.hpp (tasks, as detail/plan.hpp divides a call) -> detail/tile_engine.hpp (one task) ->
/// detail/tile_kernel.hpp (one block; or detail/row_kernel.hpp, few rows in place) -> detail/online_softmax.hpp (one
/// row) -> back in the tile engine's finish().
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/decoded_kv.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/schedule.hpp>
#include <gqa/detail/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {
namespace detail {

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

/// Outputs may not overlap inputs.
template <class Out>
[[nodiscard]] fault find_overlap_with(const Out& out_or_state, const operand& read) noexcept {
  if constexpr (output_state<Out>) {
    if (const auto f = find_overlap_fault(describe("out.lse", out_or_state.lse), read)) return f;
  }
  return find_overlap_fault(describe("out", output_view(out_or_state)), read);
}

/// Memory that is written is apart from all that is read, and no element of it at two places.
template <class Q, class Source, class Out>
[[nodiscard]] fault find_memory_fault(const tensor_view<const Q, 4>& q, const Source& kv, const Out& out_or_state,
                                      const attention_options& options) noexcept {
  if constexpr (output_state<Out>) {
    const auto out = output_view(out_or_state);
    if (const auto f = find_lse_fault("out.lse", out_or_state.lse, out)) return f;
    if (const auto f = find_overlap_fault(describe("out.lse", out_or_state.lse), describe("out", out))) return f;
  }
  const auto find_overlap = [&](const operand& read) noexcept { return find_overlap_with(out_or_state, read); };
  if (const auto f = find_overlap(describe("q", q))) return f;
  if constexpr (requires { kv.keys(); }) {
    if (const auto f = find_overlap(describe("k", kv.keys()))) return f;
    if (const auto f = find_overlap(describe("v", kv.values()))) return f;
  }
  if constexpr (requires { kv.tables(); }) {
    for (const operand& table : kv.tables()) {
      if (const auto f = find_overlap(table)) return f;
    }
  }
  return find_in_options(options, find_overlap);
}

/// The source, extents, layouts and options of a call.
template <class Q, class Source, class Out>
[[nodiscard]] fault find_operands_fault(const tensor_view<const Q, 4>& q, const Source& kv,
                                        const tensor_view<Out, 4>& out_view,
                                        const attention_options& options) noexcept {
  if (const auto f = kv.find_fault()) return f;
  const operand queries = describe("q", q), out = describe("out", out_view);
  const call_shape shape{kv.batch(),    q.extent(1),   kv.kv_len(),   q.extent(2),
                         kv.kv_heads(), kv.head_dim(), kv.value_dim()};
  if (const auto f = find_shape_fault(queries, out, shape)) return f;
  if (const auto f = find_options_fault(options, shape)) return f;
  for (index_t b = 0; b < shape.batch && !options.kv_lengths.empty(); ++b) {
    const index_t said = options.kv_lengths[static_cast<std::size_t>(b)];
    if (const auto f = find_kv_length_fault("options.kv_lengths", b, said, kv.length(b))) return f;
  }
  return {};
}

/// All checks of a call.
template <class Q, class Source, class Out>
[[nodiscard]] fault find_call_fault(const tensor_view<const Q, 4>& q, const Source& kv, const Out& out_or_state,
                                    const attention_options& options) noexcept {
  if (const auto f = find_operands_fault(q, kv, output_view(out_or_state), options)) return f;
  return find_memory_fault(q, kv, out_or_state, options);
}

/// A call without its element types, with queries and weights held in L.
template <class L, class Queries, class Source, class Out>
[[nodiscard]] auto problem_of(const Queries& q, const Source& kv, const Out& out_or_state,
                              const attention_options& options) noexcept {
  using A = accumulator_t<typename Source::panel_element>;
  const auto& rows = rows_of(q);
  problem<A, L> p{
      {kv.batch(), rows.extent(1), kv.kv_len(), rows.extent(2), kv.kv_heads(), kv.head_dim(), kv.value_dim()},
      options,
      query_rows<A, queries_of_left<L>>::of(q),
      {}};
  const auto out = output_view(out_or_state);
  if constexpr (output_state<Out>) {
    p.out = output_rows<A>::of(out, out_or_state.lse);
  } else {
    p.out = output_rows<A>::of(out);
  }
  return p;
}

/// Queries that see keys which their source no longer has. What a variant leaves visible is asked of all such keys of a
/// sequence as one block: one that says no more than `some` of it is taken to see them.
template <class A, class L, class Source, class Variant>
[[nodiscard]] fault find_gone_fault(const problem<A, L>& p, const Source& kv, const Variant& variant) {
  if constexpr (requires { kv.gone_tiles(index_t{}); }) {
    for (index_t b = 0; b < p.shape.batch; ++b) {
      const key_range tiles = kv.gone_tiles(p.kv_sequence(b));
      const index_t queries = p.q_len(b), length = p.length(kv, b), offset = p.query_offset(b, length);
      if (tiles.size() == 0 || queries == 0) continue;
      const index_t first = p.interval().keys_of(offset, length).begin;
      const index_t end = p.interval().keys_of(offset + queries - 1, length).end;
      const key_range seen{(std::max)(tiles.begin * tile_tokens, first), (std::min)(tiles.end * tile_tokens, end)};
      if (seen.size() == 0) continue;
      if constexpr (hides_blocks<Variant>) {
        const key_block block{b, 0, p.shape.q_heads, offset, offset + queries, seen.begin, seen.end};
        if (variant.visible(block) == visibility::none) continue;
      }
      return make_fault(errc::range,
                        "kv: expected queries of sequence %lld that see no key of [%lld, %lld), which are gone, got "
                        "some that may see [%lld, %lld)",
                        printable(b), printable(tiles.begin * tile_tokens), printable(tiles.end * tile_tokens),
                        printable(seen.begin), printable(seen.end));
    }
  }
  return {};
}

/// All that is wrong with a call.
template <class Queries, class Source, class Out, class Variant>
[[nodiscard]] fault find_attention_fault(const Queries& q, const Source& kv, const Out& out_or_state,
                                         const attention_options& options, const Variant& variant) {
  if (const auto f = find_call_fault(rows_of(q), kv, out_or_state, options)) return f;
  if (const auto f = find_turns_fault(q)) return f;
  using A = accumulator_t<typename Source::panel_element>;
  return find_gone_fault(problem_of<A>(q, kv, out_or_state, options), kv, variant);
}

/// A checked call with queries and weights held in L.
template <class L, class Queries, class Source, class Out, class Variant>
void attend_in(const Queries& q, const Source& kv, const Out& out_or_state, const attention_options& options,
               const ragged_rows& ragged, const Variant& variant, context& ctx) {
  auto p = problem_of<L>(q, kv, out_or_state, options);
  if (!ragged.q_offsets.empty()) {
    p.ragged = ragged;
    p.shape.batch = static_cast<index_t>(ragged.sequences.size()), p.shape.q_len = 0;
    for (index_t b = 0; b < p.shape.batch; ++b) p.shape.q_len = (std::max)(p.shape.q_len, p.q_len(b));
  }
  if (const auto f = find_gone_fault(p, kv, variant)) return raise(f);
  scheduler<Source, Variant, L>(p, kv, variant, ctx).run();
}

/// What queries and weights are held in where panels of P are multiplied as they lie.
template <class P>
using dot_left = std::conditional_t<is_mixed<P>, lefts_of<P>, P>;
/// Whether they are.
template <class Q, class P>
[[nodiscard]] bool takes_dot(const attention_options& options) noexcept {
  return has_dot<P> && !options.float_products.value_or(std::is_same_v<Q, float> && !is_encoded<P>);
}

/// A checked call: erases the element types of q and out, chooses what products are made of, runs.
template <class Queries, class Source, class Out, class Variant>
void attend_checked(const Queries& q, const Source& kv, const Out& out_or_state, const attention_options& options,
                    const ragged_rows& ragged, const Variant& variant, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  using panel_element = typename Source::panel_element;
  if (output_view(out_or_state).size() == 0) return;
  if constexpr (has_dot<panel_element>) {
    if (takes_dot<Q, panel_element>(options))
      return attend_in<dot_left<panel_element>>(q, kv, out_or_state, options, ragged, variant, ctx);
  }
  if constexpr (is_encoded<panel_element>) {
    attend_in<float>(q, decoded_kv(kv), out_or_state, options, ragged, variant, ctx);
  } else {
    attend_in<accumulator_t<panel_element>>(q, kv, out_or_state, options, ragged, variant, ctx);
  }
}

/// The one way in.
template <class Queries, class Source, class Out, class Variant>
void attend(const Queries& q, const Source& kv, const Out& out_or_state, const attention_options& options,
            const Variant& variant, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  require_dtypes<Q, Source, typename decltype(output_view(out_or_state))::value_type>();
  if (const auto fault = find_call_fault(rows_of(q), kv, out_or_state, options)) return raise(fault);
  if (const auto fault = find_turns_fault(q)) return raise(fault);
  attend_checked(q, kv, out_or_state, options, {}, variant, ctx);
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q over the keys and values of a source, with a user's variant (variants.hpp).
/// \param q        [B, S, H, D], or turned() (rope_turns.hpp)
/// \param kv       source of B sequences and G KV heads; H a multiple of G, or see attention_options::group_offsets
/// \param out      [B, S, H, E], or a partial_state, whose lse is written too; may share no memory with an input
/// \param options  see options.hpp
/// \throws error   for anything that does not fit, before anything is written
template <detail::turnable Q, kv_source KV, detail::attention_output Out, attention_variant Variant>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options, const Variant& variant, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend(queries, kv, detail::as_output(std::forward<Out>(out)), options, variant, ctx);
}

/// The same without a variant.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend(queries, kv, detail::as_output(std::forward<Out>(out)), options, detail::no_variant{}, ctx);
}

/// On the calling thread.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options = {}) {
  context ctx;
  attention(std::forward<Q>(q), kv, std::forward<Out>(out), options, ctx);
}

/// Attention of q [B, S, H, D] over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out, attention_variant Variant>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, const Variant& variant, context& ctx) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options,
            variant, ctx);
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, context& ctx) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options, ctx);
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options = {}) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options);
}

/// The checks of attention(), and nothing else: errc::ok if the call would run. The other calls have one each, which
/// takes what the call does but the context and the report, and stands beside it in its header.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const attention_options& options = {}) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  const auto to = detail::as_output(std::forward<Out>(out));
  return detail::find_attention_fault(queries, kv, to, options, detail::no_variant{}).code;
}

/// The same with a variant, which is asked about keys that are gone.
template <detail::turnable Q, kv_source KV, detail::attention_output Out, attention_variant Variant>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const attention_options& options, const Variant& variant) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_attention_fault(queries, kv, detail::as_output(std::forward<Out>(out)), options, variant).code;
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options = {}) noexcept {
  return check(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options);
}

/// Makes room in a context for attention(q, k, v, out, options, ctx), and plans it, so that calls of this shape
/// allocate nothing. Elements of q, k, v and out are neither read nor written; their pointers may be anything but null.
/// Calls of another shape are divided in another way, and may need more even where they are smaller: reserve each shape
/// there is.
/// \throws error  as attention() does, and errc::capacity if the memory cannot be had
template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void reserve(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, context& ctx) {
  const context::detail_dry_run dry(ctx);
  attention(std::forward<Q>(q), std::forward<K>(k), std::forward<V>(v), std::forward<Out>(out), options, ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa
