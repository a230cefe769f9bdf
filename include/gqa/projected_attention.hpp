// SPDX-License-Identifier: Apache-2.0
/// \file
/// projected_attention(): decode that ranks keys in a few dimensions and attends exactly to those that matter (Loki,
/// Singhania et al. 2024), with a certificate of what it left out.
///
///     gqa::projected_keys<Eigen::bfloat16> few(cache);   // principal directions of its keys; few.update(cache) later
///     gqa::projected_attention(q, cache, few, out, {.attention = {.causal = true}, .epsilon = 0.01}, ctx, &report);
///
/// As page_attention() (page_selection.hpp) with other bounds, and pages of 16 keys: the bound of each key is its score
/// in the directions that keys vary most in, and at most what lies outside of them, and a page's is the sum over its
/// keys. So it finds single keys among others unlike them, where boxes around pages say nothing; for (r + 2) / 2 D of
/// the bytes of keys and values where boxes take 1 / 64.
#pragma once

#include <cstddef>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/sparse/page_reader.hpp>
#include <gqa/detail/sparse/projected_bounds.hpp>
#include <gqa/error.hpp>
#include <gqa/page_options.hpp>
#include <gqa/projected_keys.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// What finds why projected keys do not fit a call.
template <class KV, class S>
[[nodiscard]] auto finds_other_keys(const KV& kv, const projected_keys<S>& few,
                                    const attention_options& options) noexcept {
  return [&]() noexcept -> fault {
    if (const auto f = few.find_source_fault(kv, kv.batch())) return f;
    for (index_t b = 0; b < kv.batch(); ++b) {
      const auto& lengths = options.kv_lengths;
      const index_t length = lengths.empty() ? kv.length(b) : lengths[static_cast<std::size_t>(b)];
      if (few.length(b) < length)
        return make_fault(errc::length, "few: expected %lld tokens in sequence %lld (update()), got %lld",
                          printable(length), printable(b), printable(few.length(b)));
    }
    return {};
  };
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q over the pages of 16 keys that matter.
/// \param q        [B, S, H, D], or turned(): few queries, for all rows of a KV head choose together
/// \param kv       any source that drops no tokens, of no more than 32 bits an element
/// \param few      its keys, projected: those of all tokens that are attended to (update())
/// \param out      [B, S, H, E], or a partial_state, whose lse is of what was read
/// \param options  `epsilon` 0 and a `page_budget` read the best so many pages, as Loki does; `epsilon` 0 alone all
/// \param report   what became of each row, where it is wanted
/// \throws error   as page_attention() does, errc::shape where `few` has other extents, errc::length where it has fewer
///                 tokens
template <detail::turnable Q, kv_source KV, class S, detail::attention_output Out>
void projected_attention(Q&& q, const KV& kv, const projected_keys<S>& few, Out&& out, const page_options& options,
                         context& ctx, page_report* report = nullptr) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend_pages<detail::projected_bounds>(queries, kv, few, detail::as_output(std::forward<Out>(out)), options,
                                                 ctx, report, detail::finds_other_keys(kv, few, options.attention));
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <detail::turnable Q, kv_source KV, class S, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, const KV& kv, const projected_keys<S>& few, Out&& out,
                         const page_options& options) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_pages_fault(queries, kv, detail::as_output(std::forward<Out>(out)), options,
                                  detail::finds_other_keys(kv, few, options.attention))
      .code;
}

}  // namespace GQA_ISA
}  // namespace gqa
