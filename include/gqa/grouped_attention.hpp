// SPDX-License-Identifier: Apache-2.0
/// \file
/// grouped_attention(): the five steps in one call. Queries of a block are grouped by what they say, groups attend to
/// the far keys, every query exactly to the near ones, and the scores are combined.
///
/// An approximation, with a bound or a measure for each of its errors (grouped_options.hpp, docs). Where groups do not
/// pay, by a model of their cost, it is attention() itself, to the bit.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/cache/decoded_kv.hpp>
#include <gqa/detail/grouped/grouped_runner.hpp>
#include <gqa/error.hpp>
#include <gqa/grouped_options.hpp>
#include <gqa/groupwise_attention.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/query_clustering.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {

[[nodiscard]] inline fault find_grouped_options_fault(const grouped_options& o) noexcept {
  if (const auto f = find_groupwise_options_fault(o.attention, o.groupwise)) return f;
  if (o.groupwise.without.size() > 0)
    return make_fault(errc::option,
                      "options.groupwise.without: expected no keys, for blocks leave out their near ones");
  if (o.block < 1) return make_fault(errc::option, "options.block: expected 1 or more, got %lld", printable(o.block));
  if (o.block > position_limit || o.window < 0 || o.window > position_limit)
    return make_fault(errc::option, "options.block, window: expected lengths within 2^60, got %lld and %lld",
                      printable(o.block), printable(o.window));
  if (o.tolerance && !(*o.tolerance >= 0 && *o.tolerance <= 2))
    return make_fault(errc::option, "options.tolerance: expected 0 to 2, got %g", *o.tolerance);
  if (o.strict_causal && !o.attention.causal)
    return make_fault(errc::option, "options.strict_causal: expected attention.causal beside it");
  grouping_options grouping = o.grouping;
  if (grouping.groups == 0) grouping.groups = 1;
  return find_grouping_fault(grouping);
}

inline namespace GQA_ISA {

/// Sequences whose rows are to be pooled have the same keys, and queries at the same positions.
template <class KV>
[[nodiscard]] fault find_pooling_fault(const KV& kv, const attention_options& o) noexcept {
  bool share = kv.batch() <= 1;
  if constexpr (requires { kv.sequences_share_keys(); }) share = kv.sequences_share_keys();
  for (index_t b = 1; b < kv.batch(); ++b) share = share && kv.length(b) == kv.length(0);
  if (!share)
    return make_fault(errc::option,
                      "options.pool_batch: expected keys and values that all sequences share (stride 0), and as many");
  const auto are_equal = [](const auto& x) {
    return std::adjacent_find(x.begin(), x.end(), std::not_equal_to<>()) == x.end();
  };
  if (!are_equal(o.kv_lengths) || !are_equal(o.query_offsets))
    return make_fault(errc::option, "options.pool_batch: expected equal kv_lengths and query_offsets");
  return {};
}

/// All that is wrong with a call.
template <class Q, class KV, class Out>
[[nodiscard]] fault find_grouped_fault(const tensor_view<const Q, 4>& q, const KV& kv, const Out& out,
                                       const grouped_options& options) noexcept {
  if (const auto f = find_call_fault(q, kv, out, options.attention)) return f;
  if (const auto f = find_grouped_options_fault(options)) return f;
  if (options.pool_batch) {
    if (const auto f = find_pooling_fault(kv, options.attention)) return f;
  }
  const auto is_far_off = [&](index_t offset) { return offset > position_limit - q.extent(1); };
  if ((options.attention.query_offset && is_far_off(*options.attention.query_offset)) ||
      std::any_of(options.attention.query_offsets.begin(), options.attention.query_offsets.end(), is_far_off))
    return make_fault(errc::range, "options.attention.query_offset: expected positions below 2^60 for all queries");
  return {};
}

template <class Q, class KV, class Out>
void attend_grouped(const tensor_view<const Q, 4>& q, const KV& kv, const Out& out, const grouped_options& options,
                    context& ctx, grouped_report* report) {
  require_dtypes<Q, KV, typename decltype(output_view(out))::value_type>();
  if (const auto f = find_grouped_fault(q, kv, out, options)) return raise(f);
  if (report != nullptr) report->blocks.clear();
  if (output_view(out).size() == 0) return;
  const auto& elements = as_elements(kv);
  grouped_runner<Q, std::remove_cvref_t<decltype(elements)>, Out>(q, elements, out, options, report, ctx).run();
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q [B, S, H, D] over the keys and values of a source, by query groups.
/// \param out     [B, S, H, E], or a partial_state
/// \param report  what each block did, where it is wanted
/// \throws error  as attention() does, and (errc::option) for what groups cannot share: masks, biases, windows. Memory
///                for groups is asked for as they are made: where it is lacking, outputs may be written in part
/// Cost: of a block of n rows in C groups over T far keys C T (2 D + E) multiply-adds, with improved_lse C T (3 D + E),
/// and n k (D + E) on k top keys, instead of n T (D + E); near keys exactly. Keys and values are copied once, 64 MiB of
/// them at a time or one KV head's, into memory that each call takes anew.
template <tensor_like Q, kv_source KV, detail::attention_output Out>
void grouped_attention(Q&& q, const KV& kv, Out&& out, const grouped_options& options, context& ctx,
                       grouped_report* report = nullptr) {
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  detail::attend_grouped(queries, kv, detail::as_output(std::forward<Out>(out)), options, ctx, report);
}

/// The same over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out>
void grouped_attention(Q&& q, K&& k, V&& v, Out&& out, const grouped_options& options, context& ctx,
                       grouped_report* report = nullptr) {
  grouped_attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out),
                    options, ctx, report);
}

/// Its checks, and nothing else: errc::ok if the call would run. (Options by their name: {} are attention()'s.)
template <tensor_like Q, kv_source KV, detail::attention_output Out, std::same_as<grouped_options> Options>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const Options& options) noexcept {
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  return detail::find_grouped_fault(queries, kv, detail::as_output(std::forward<Out>(out)), options).code;
}

template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out,
          std::same_as<grouped_options> Options>
[[nodiscard]] errc check(Q&& q, K&& k, V&& v, Out&& out, const Options& options) noexcept {
  return check(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options);
}

}  // namespace GQA_ISA
}  // namespace gqa
