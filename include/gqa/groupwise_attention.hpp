// SPDX-License-Identifier: Apache-2.0
/// \file
/// groupwise_attention(): the representatives of query groups attend to all keys, the members share what they find.
///
/// The far part of grouped_attention(), by itself: groups are given, one set for each sequence and KV head, every query
/// sees all valid keys, and the result is a state, to be merged with others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/far_keys.hpp>
#include <gqa/detail/group_attender.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/error.hpp>
#include <gqa/groupwise_options.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {

/// Scores that depend on a query's position or head beyond its product with the key cannot be shared.
[[nodiscard]] inline fault find_shared_scores_fault(const attention_options& scores) noexcept {
  if (scores.mask || scores.bias || !scores.alibi_slopes.empty() || scores.window.left != -1 ||
      scores.window.right != -1)
    return make_fault(errc::option,
                      "attention options: expected no mask, bias, ALiBi or window, which differ within a group");
  return {};
}
[[nodiscard]] inline fault find_groupwise_fault(const attention_options& scores, const groupwise_options& o) noexcept {
  if (const auto f = find_shared_scores_fault(scores)) return f;
  if (o.top_keys < 0)
    return make_fault(errc::option, "groupwise top_keys: expected 0 or more, got %lld", printable(o.top_keys));
  if (o.form < groupwise_form::dense || o.form > groupwise_form::improved_lse)
    return make_fault(errc::option, "groupwise form: expected one of the enumerators, got %d",
                      static_cast<int>(o.form));
  if (o.without.begin < 0 || o.without.begin > o.without.end || o.without.end > position_limit)
    return make_fault(errc::option, "groupwise without: expected a range within [0, 2^60), got [%lld, %lld)",
                      printable(o.without.begin), printable(o.without.end));
  if (o.form == groupwise_form::improved_lse && scores.softcap != 0)
    return make_fault(errc::option, "softcap: expected 0 with improved_lse, got %g", scores.softcap);
  return {};
}

/// Groups [B * G] fit the pooled rows: q_len * group_size each, of head_dim elements.
template <class A, class RowsOf>
[[nodiscard]] fault find_groups_of_rows_fault(std::span<const query_groups<A>> groups, const call_shape& shape,
                                              const RowsOf& rows_of) {
  if (groups.size() != static_cast<std::size_t>(shape.batch * shape.kv_heads))
    return make_fault(errc::shape, "groups: expected %lld sets (one a sequence and KV head), got %zu",
                      printable(shape.batch * shape.kv_heads), groups.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const query_groups<A>& set = groups[i];
    const index_t rows = rows_of(static_cast<index_t>(i) % shape.kv_heads);
    if (set.rows() != rows || (rows > 0 && set.dim != shape.head_dim))
      return make_fault(errc::shape, "groups[%zu]: expected %lld rows of %lld elements, got %lld of %lld", i,
                        printable(rows), printable(shape.head_dim), printable(set.rows()), printable(set.dim));
    if (rows > 0 && !is_partition(set))
      return make_fault(errc::range, "groups[%zu]: expected order and offsets of a partition, members ascending", i);
  }
  return {};
}

inline namespace GQA_ISA {

template <class Q, class KV, class T, class A>
void attend_groupwise(const tensor_view<const Q, 4>& q, const KV& kv, std::span<const query_groups<A>> groups,
                      const partial_state<T>& out, const attention_options& scores, const groupwise_options& options,
                      context& ctx) {
  using P = typename KV::panel_element;
  const auto p = problem_of<A>(q, kv, out, scores);
  const call_shape& shape = p.shape;
  const auto rows_of = [&](index_t g) { return shape.q_len * p.group_size(g); };
  if (const auto f = find_call_fault(q, kv, out, scores)) return raise(f);
  if (const auto f = find_groupwise_fault(scores, options)) return raise(f);
  if (scores.causal || !scores.sinks.empty())
    return raise(make_fault(errc::option,
                            "options: expected no causal edge and no sinks, which a part of the keys cannot have"));
  if (const auto f = find_groups_of_rows_fault(groups, shape, rows_of)) return raise(f);
  const bool means = options.form == groupwise_form::improved_lse;
  const index_t far_dim = shape.value_dim + (means ? shape.head_dim : 0), stride = round_up(shape.head_dim, 16);
  context* const contexts = ctx.detail_workers();
  ctx.for_each(shape.batch * shape.kv_heads, [&](index_t task, index_t worker) {
    const error_watch watch;
    const index_t b = task / shape.kv_heads, g = task % shape.kv_heads, n = rows_of(g);
    if (n == 0) return;
    const query_groups<A>& own_groups = groups[static_cast<std::size_t>(task)];
    const index_t keys = length_of(kv, scores, b);
    const part_of_source<KV> own(kv, b, g, 1, keys);
    kv_cache<P> far(1, 1, keys, shape.head_dim, far_dim);
    kv_cache<A> top(1, 1, std::min(options.top_keys, keys), shape.head_dim, shape.value_dim);
    if (watch.failed()) return;
    pack_head(own, means, 0, far);

    const typename group_attender<A>::shape dims{
        shape.head_dim, shape.value_dim, far_dim, keys,
        keys - key_range{options.without.begin, std::min(options.without.end, keys)}.size()};
    context& calls = contexts[worker].detail_workers()[0];
    const index_t row_elements = round_up(n * stride, 64), out_elements = round_up(n * shape.value_dim, 64);
    const auto elements = static_cast<std::size_t>(row_elements + out_elements + round_up(n, 64));
    A* const rows = reinterpret_cast<A*>(contexts[worker].detail_scratch(elements * sizeof(A)));
    if (rows == nullptr) return;
    A* const results = rows + row_elements;
    A* const lse = results + out_elements;
    const index_t head = p.first_head(g), heads = p.group_size(g);
    const point_rows<A> x = pool_queries(p.q, shape.head_dim, b, {0, shape.q_len}, {head, head + heads}, rows);
    const typename group_attender<A>::sharing any_radius;
    std::byte* const memory =
        calls.detail_workers()[0].detail_scratch(group_attender<A>::bytes(x, own_groups, dims, options, any_radius));
    if (memory == nullptr) return;
    group_attender<A> attender(x, own_groups, dims, options, any_radius, memory);
    const part_of_source<kv_cache<P>> far_head(far, 0, 0, 1, keys);
    const key_interval seen(options.without, false);
    attender.run(far_head, own, seen, scores, top, results, lse, calls);
    if (watch.failed()) return;
    for (index_t i = 0; i < n; ++i) {
      const index_t s = i / heads, h = head + i % heads;
      p.out.store_finished(b, s, h, shape.value_dim, results + i * shape.value_dim, lse[i]);
    }
  });
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// The state of q [B, S, H, D] over all valid keys of a source, by groups.
/// \param groups   [B * G], of sequence b and KV head g at b G + g: of its rows s * group_size + h
/// \param out      [B, S, H, E], a state; over 16-bit keys a partial_state<float>
/// \param scores   scale, softcap, kv_lengths, group_offsets; offsets mean nothing here, sinks belong to a merge
/// \throws error   as attention() does; (errc::shape, errc::range) for groups that do not fit
/// Cost: detail/group_attender.hpp. Each KV head's keys and values are copied once, one head a worker at a time.
template <tensor_like Q, kv_source KV, class T, class A>
void groupwise_attention(Q&& q, const KV& kv, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options, context& ctx) {
  static_assert(std::is_same_v<A, accumulator_t<typename KV::panel_element>>,
                "gqa: groups must be of the accumulator of the keys");
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  detail::require_dtypes<element, KV, T>();
  detail::attend_groupwise(queries, kv, groups, out, scores, options, ctx);
}

/// The same over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <tensor_like Q, tensor_like K, tensor_like V, class T, class A>
void groupwise_attention(Q&& q, K&& k, V&& v, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options, context& ctx) {
  groupwise_attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), groups, out, scores, options,
                      ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa
