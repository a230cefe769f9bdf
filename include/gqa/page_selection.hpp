// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_attention(): decode that reads the pages of keys which matter, and certifies what it left out.
///
///     cache.keep_key_bounds();                      // once: the caches keep them on append, truncate and fork
///     gqa::page_attention(q, cache, out, {.attention = {.causal = true}, .epsilon = 0.01}, ctx, &report);
///
/// Bounds of the keys of each page say what a query scores with any of them at most (Quest, Tang et al. 2024). Pages
/// are read in rounds by falling bound, for all heads of a group together; a row's rest is certified from
///
///     sum over unread pages of n_p exp(U_p)    beside    exp(lse of what was read, sinks included)
///
/// and reading ends when no row may have lost more than `epsilon` of its mass, rounding of both sums counted in. With m
/// the mass that was really dropped, at most the certificate, the output differs from exact attention's by m (o_S -
/// o_rest): at most m times the largest difference of two values. Where scores are flat nothing can be dropped and all
/// is read, each page once; what that costs more than attention() is the bounds.
#pragma once

#include <concepts>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/sparse/box_bounds.hpp>
#include <gqa/detail/sparse/page_reader.hpp>
#include <gqa/error.hpp>
#include <gqa/page_options.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// A source that keeps bounds of its keys.
template <class S>
concept keeps_key_bounds = requires(const S& kv) {
  { kv.bound_tokens() } -> std::same_as<index_t>;
  kv.bounds(index_t{}, index_t{}, index_t{});
};

/// What finds why a source's bounds do not fit a call.
template <class KV>
[[nodiscard]] auto finds_no_bounds(const KV& kv) noexcept {
  return [&kv]() noexcept -> fault {
    if (kv.bound_tokens() != 0) return {};
    return make_fault(errc::option, "kv: expected bounds of its keys (keep_key_bounds()), got none");
  };
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q over the pages that matter of a cache that keeps bounds of its keys.
/// \param q       [B, S, H, D], or turned(): few queries, as in decode, for all rows of a KV head choose together
/// \param kv      kv_cache, ring_kv_cache or paged_layer of a cache after keep_key_bounds(). (Of a ring all keys that a
///                query may see must be there: a window, once some are gone.)
/// \param out     [B, S, H, E], or a partial_state, whose lse is of what was read
/// \param report  what became of each row, where it is wanted
/// \throws error  as attention() does, and errc::option for a bias, for options out of range, or without bounds
/// Cost: bounds of all keys, 1/64 (or 1/16) of the bytes of those and their values, twice that of 8 bits; and the pages
/// that were read.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
requires detail::keeps_key_bounds<KV>
void page_attention(Q&& q, const KV& kv, Out&& out, const page_options& options, context& ctx,
                    page_report* report = nullptr) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend_pages<detail::box_bounds>(queries, kv, kv, detail::as_output(std::forward<Out>(out)), options, ctx,
                                           report, detail::finds_no_bounds(kv));
}

/// Its checks, and nothing else: errc::ok if the call would run. (Options by their name: {} are attention()'s.)
template <detail::turnable Q, kv_source KV, detail::attention_output Out, std::same_as<page_options> Options>
requires detail::keeps_key_bounds<KV>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const Options& options) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_pages_fault(queries, kv, detail::as_output(std::forward<Out>(out)), options,
                                  detail::finds_no_bounds(kv))
      .code;
}

}  // namespace GQA_ISA
}  // namespace gqa
