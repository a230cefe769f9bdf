// SPDX-License-Identifier: Apache-2.0
/// \file
/// groupwise_attention(): the representatives of query groups attend to all keys, the members share what they find.
///
/// The far part of grouped_attention(), by itself: groups are given, one set for each sequence and KV head (with ALiBi
/// query head), every query sees all valid keys, and the result is a state, to be merged with others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/cache/decoded_kv.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/grouped/alibi_terms.hpp>
#include <gqa/detail/grouped/far_keys.hpp>
#include <gqa/detail/grouped/group_attender.hpp>
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

/// Scores that depend on a query's position beyond its product with the key and terms of the key cannot be shared.
[[nodiscard]] inline fault find_shared_scores_fault(const attention_options& scores) noexcept {
  if (scores.mask || scores.bias || scores.window.left != -1 || scores.window.right != -1)
    return make_fault(errc::option, "attention options: expected no mask, bias or window, which differ within a group");
  return {};
}
[[nodiscard]] inline fault find_groupwise_options_fault(const attention_options& scores,
                                                        const groupwise_options& o) noexcept {
  if (const auto f = find_shared_scores_fault(scores)) return f;
  if (scores.softcap != 0 && !scores.alibi_slopes.empty())
    return make_fault(errc::option, "softcap: expected 0 beside alibi_slopes, got %g", scores.softcap);
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

/// Groups [B * pools] fit the pooled rows: q_len times the pool's heads each, of head_dim elements.
template <class A, class Pools>
[[nodiscard]] fault find_groups_of_rows_fault(std::span<const query_groups<A>> groups, const call_shape& shape,
                                              const Pools& pools) noexcept {
  const std::size_t sets = static_cast<std::size_t>(shape.batch * pools.size());
  if (groups.size() != sets)
    return make_fault(errc::shape, "groups: expected %zu sets (one a sequence and KV head; with ALiBi head), got %zu",
                      sets, groups.size());
  index_t most_rows = 0;
  for (index_t n = 0; n < pools.size(); ++n) most_rows = (std::max)(most_rows, shape.q_len * pools[n].heads.size());
  reporting_vector<std::uint64_t> seen;
  if (!seen.resize(static_cast<std::size_t>(ceil_div(most_rows, 64)))) return make_room_fault("rows of groups");
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const query_groups<A>& set = groups[i];
    const index_t rows = shape.q_len * pools[static_cast<index_t>(i) % pools.size()].heads.size();
    if (set.rows() != rows || (rows > 0 && set.dim != shape.head_dim))
      return make_fault(errc::shape, "groups[%zu]: expected %lld rows of %lld elements, got %lld of %lld", i,
                        printable(rows), printable(shape.head_dim), printable(set.rows()), printable(set.dim));
    if (rows > 0 && !is_partition(groups_view<A>::of(set), std::span(seen.data(), seen.size())))
      return make_fault(errc::range, "groups[%zu]: expected order and offsets of a partition, members ascending", i);
  }
  return {};
}

inline namespace GQA_ISA {

/// All that is wrong with a call.
template <class Q, class KV, class T, class A>
[[nodiscard]] fault find_groupwise_fault(const tensor_view<const Q, 4>& q, const KV& kv,
                                         std::span<const query_groups<A>> groups, const partial_state<T>& out,
                                         const attention_options& scores, const groupwise_options& options) noexcept {
  if (const auto f = find_call_fault(q, kv, out, scores)) return f;
  if (const auto f = find_groupwise_options_fault(scores, options)) return f;
  if (scores.causal || !scores.sinks.empty())
    return make_fault(errc::option,
                      "options: expected no causal edge and no sinks, which a part of the keys cannot have");
  const auto p = problem_of<A>(q, kv, out, scores);
  return find_groups_of_rows_fault<A>(groups, p.shape, head_pools(p));
}

template <class Q, class KV, class T, class A>
void attend_groupwise(const tensor_view<const Q, 4>& q, const KV& kv, std::span<const query_groups<A>> groups,
                      const partial_state<T>& out, const attention_options& scores, const groupwise_options& options,
                      context& ctx) {
  using P = typename KV::panel_element;
  if (const auto f = find_groupwise_fault(q, kv, groups, out, scores, options)) return raise(f);
  const auto p = problem_of<A>(q, kv, out, scores);
  const call_shape& shape = p.shape;
  const head_pools pools(p);
  const index_t pool_count = pools.size();
  const bool means = options.form == groupwise_form::improved_lse, has_alibi = !scores.alibi_slopes.empty();
  const index_t far_dim = shape.value_dim + (means ? shape.head_dim : 0), stride = round_up(shape.head_dim, 16);
  context* const contexts = ctx.detail_workers();
  if (contexts == nullptr) return;
  ctx.for_each(shape.batch * pool_count, [&](index_t task, index_t worker) {
    const error_watch watch;
    const index_t b = task / pool_count;
    const auto [g, heads] = pools[task % pool_count];
    const row_block rows{{b, b + 1}, {0, shape.q_len}, heads};
    const index_t n = rows.size(), keys = p.length(kv, b);
    if (n == 0) return;
    const auto own_groups = groups_view<A>::of(groups[static_cast<std::size_t>(task)]);
    const part_of_source<KV> own(kv, b, g, 1, keys);
    kv_cache<P> far(1, 1, keys, shape.head_dim, far_dim);
    kv_cache<A> top(1, 1, (std::min)(options.top_keys, keys), shape.head_dim, shape.value_dim);
    if (watch.failed() || !pack_head(own, means, 0, far)) return;

    const key_range without{options.without.begin, (std::min)(options.without.end, keys)};
    const typename group_attender<A>::shape dims{shape.head_dim, shape.value_dim, far_dim, keys, keys - without.size()};
    context* const calls = contexts[worker].detail_workers();
    if (calls == nullptr) return;
    A *queries, *results, *lse;
    float* key_terms;
    const auto carve = [&](std::byte* memory) {
      carver take(memory);
      take(queries, n * stride), take(results, n * shape.value_dim), take(lse, n),
          take(key_terms, has_alibi ? keys : 0);
      return take.used();
    };
    std::byte* const own_memory = contexts[worker].detail_scratch(carve(nullptr));
    if (own_memory == nullptr) return;
    carve(own_memory);
    const point_rows<A> x = pool_queries(p.q, shape.head_dim, rows, queries);
    const typename group_attender<A>::sharing any_radius;
    std::byte* const memory =
        calls->detail_scratch_aside(group_attender<A>::bytes(x, own_groups, dims, options, any_radius));
    if (memory == nullptr) return;
    group_attender<A> attender(x, own_groups, dims, options, any_radius, memory);
    const part_of_source<kv_cache<P>> far_head(far, 0, 0, 1, keys);
    alibi_terms terms;
    if (has_alibi) terms = {scores.alibi_slopes[static_cast<std::size_t>(heads.begin)], keys - 1, keys, key_terms};
    attender.run(far_head, own, key_interval(without, false), scores, terms, top, results, lse, *calls);
    if (watch.failed()) return;
    for (index_t i = 0; i < n; ++i) {
      const auto [at_b, s, h] = rows.at(i);
      const A row_term = terms.template of_row<A>(p.query_offset(b, keys) + s);
      p.out.store_finished(at_b, s, h, shape.value_dim, results + i * shape.value_dim, lse[i] + row_term);
    }
  });
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// The state of q [B, S, H, D] over all valid keys of a source, by groups.
/// \param groups   [B * G], of sequence b and KV head g at b G + g: of its rows s * group_size + h;
///                 with alibi_slopes [B * H], of sequence b and head h at b H + h: of its rows s
/// \param out      [B, S, H, E], a state; over 16-bit keys a partial_state<float>
/// \param scores   scale, softcap, alibi_slopes, kv_lengths, group_offsets; query offsets mean something beside
///                 alibi_slopes only; sinks belong to a merge
/// \throws error   as attention() does; (errc::shape, errc::range) for groups that do not fit
/// Cost: detail/grouped/group_attender.hpp. Each KV head's keys and values are copied once, one head a worker at a
/// time; with alibi_slopes once for each of its query heads.
template <tensor_like Q, kv_source KV, class T, class A>
void groupwise_attention(Q&& q, const KV& kv, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options, context& ctx) {
  static_assert(std::is_same_v<A, accumulator_t<typename KV::panel_element>>,
                "gqa: groups must be of the accumulator of the keys");
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  detail::require_dtypes<element, KV, T>();
  detail::attend_groupwise(queries, detail::as_elements(kv), groups, out, scores, options, ctx);
}

/// The same over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <tensor_like Q, tensor_like K, tensor_like V, class T, class A>
void groupwise_attention(Q&& q, K&& k, V&& v, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options, context& ctx) {
  groupwise_attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), groups, out, scores, options,
                      ctx);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <tensor_like Q, kv_source KV, class T, class A>
[[nodiscard]] errc check(Q&& q, const KV& kv, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options) noexcept {
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  return detail::find_groupwise_fault(queries, kv, groups, out, scores, options).code;
}

template <tensor_like Q, tensor_like K, tensor_like V, class T, class A>
[[nodiscard]] errc check(Q&& q, K&& k, V&& v, std::span<const query_groups<A>> groups, const partial_state<T>& out,
                         const attention_options& scores, const groupwise_options& options) noexcept {
  return check(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), groups, out, scores, options);
}

}  // namespace GQA_ISA
}  // namespace gqa
