// SPDX-License-Identifier: Apache-2.0
/// \file
/// within_group_attention(): each query attends, exactly, to the keys at the positions of its own group.
///
/// For self-attention: query s is at position offset + s, and so is a key. A group of pooled rows (query_groups.hpp)
/// has the positions of its members, whichever head put them there, and all of its members see the keys at those,
/// without options.causal all, with it those up to their own. One group of all rows is exact attention over the keys of
/// the call's queries.
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
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/cache/decoded_kv.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/grouped/far_keys.hpp>
#include <gqa/detail/grouped/part_of_source.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/groupwise_attention.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/local_masks.hpp>
#include <gqa/options.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// A variant: query i sees the first ends[i] keys; ends ascend.
class first_keys_mask : public band_mask<first_keys_mask> {
 public:
  explicit first_keys_mask(std::span<const index_t> ends) noexcept : ends_(ends) {}
  [[nodiscard]] key_range band(index_t query) const noexcept { return {0, ends_[static_cast<std::size_t>(query)]}; }

 private:
  std::span<const index_t> ends_;
};

/// The groups of one head's rows, one after the other.
template <class A>
class within_groups {
 public:
  /// \param x       pooled rows, `heads` a position, the first at position `offset`
  /// \param keys    of the sequence
  within_groups(const point_rows<A>& x, index_t heads, index_t offset, index_t keys, index_t value_dim,
                const attention_options& scores)
      : x_(x),
        heads_(heads),
        offset_(offset),
        causal_(scores.causal),
        value_dim_(value_dim),
        options_(scores_of(scores)),
        own_keys_(1, 1, (std::min)(x.count, keys), x.dim, value_dim) {}

  /// Attends with the members of a group, whose keys are read from `keys`. False after an error where that returns.
  template <class Head>
  [[nodiscard]] bool attend(const Head& keys, std::span<const index_t> members, context& ctx) {
    const auto count = static_cast<index_t>(members.size());
    const error_watch watch;
    own_keys_.clear();
    if (!has_room(count)) return false;
    ends_.clear(), rows_.clear();
    index_t last = (std::numeric_limits<index_t>::min)();
    for (const index_t i : members) {  // ascending, and so are their positions
      const index_t at = offset_ + i / heads_;
      if (at != last && at >= 0 && at < keys.length(0)) {
        read_token(keys, at, key_.data(), value_.data(), value_dim_);
        own_keys_.append(tensor_view<const A, 4>(key_.data(), {1, 1, 1, x_.dim}),
                         tensor_view<const A, 4>(value_.data(), {1, 1, 1, value_dim_}));
      }
      last = at;
      static_cast<void>(ends_.push_back(own_keys_.length(0)));
      static_cast<void>(rows_.append(x_.row(i), x_.row(i) + x_.dim));
    }
    if (!causal_) std::fill(ends_.begin(), ends_.end(), own_keys_.length(0));
    attention(queries_of(rows_.data(), count, x_.dim, x_.dim), own_keys_,
              state_of(out_.data(), lse_.data(), count, value_dim_), options_, first_keys_mask(ends_), ctx);
    return !watch.failed();
  }
  /// What the n-th member found.
  [[nodiscard]] finished_state<A> result(index_t n) const noexcept {
    return {out_.data() + n * value_dim_, lse_[static_cast<std::size_t>(n)]};
  }

 private:
  /// For a group of so many members.
  [[nodiscard]] bool has_room(index_t members) {
    const auto n = static_cast<std::size_t>(members);
    return make_zeros(key_, static_cast<std::size_t>(x_.dim), "a group's keys") &&
           make_zeros(value_, static_cast<std::size_t>(value_dim_), "a group's values") &&
           make_room(ends_, n, "a group's members") &&
           make_room(rows_, n * static_cast<std::size_t>(x_.dim), "a group's members") &&
           make_zeros(out_, n * static_cast<std::size_t>(value_dim_), "a group's results") &&
           make_zeros(lse_, n, "a group's results");
  }

  point_rows<A> x_;
  index_t heads_, offset_;
  bool causal_;
  index_t value_dim_;
  attention_options options_;
  kv_cache<A> own_keys_;            // of the group at work
  reporting_vector<index_t> ends_;  // [members], how many of those a member sees
  reporting_vector<A> rows_;        // [members, D]
  reporting_vector<A> key_, value_, out_, lse_;
};

/// All that is wrong with a call.
template <class Q, class KV, class Out, class A>
[[nodiscard]] fault find_within_groups_fault(const tensor_view<const Q, 4>& q, const KV& kv,
                                             std::span<const query_groups<A>> groups, const Out& out,
                                             const attention_options& options) noexcept {
  if (const auto f = find_call_fault(q, kv, out, options)) return f;
  if (const auto f = find_shared_scores_fault(options)) return f;
  if (!options.alibi_slopes.empty())
    return make_fault(errc::option, "alibi_slopes: expected none, for a group is of all heads of a KV head");
  const auto p = problem_of<A>(q, kv, out, options);
  return find_groups_of_rows_fault<A>(groups, p.shape, head_pools(p));
}

template <class Q, class KV, class Out, class A>
void attend_within_groups(const tensor_view<const Q, 4>& q, const KV& kv, std::span<const query_groups<A>> groups,
                          const Out& out, const attention_options& options, context& ctx) {
  if (const auto f = find_within_groups_fault(q, kv, groups, out, options)) return raise(f);
  const auto p = problem_of<A>(q, kv, out, options);
  const call_shape& shape = p.shape;
  const head_pools pools(p);
  context* const contexts = ctx.detail_workers();
  if (contexts == nullptr) return;
  ctx.for_each(shape.batch * shape.kv_heads, [&](index_t task, index_t worker) {
    const error_watch watch;
    const index_t b = task / shape.kv_heads, length = p.length(kv, b);
    const auto [g, heads] = pools[task % shape.kv_heads];
    const row_block pooled{{b, b + 1}, {0, shape.q_len}, heads};
    if (pooled.size() == 0) return;
    const index_t row_elements = pooled.size() * round_up(shape.head_dim, 16);
    A* const rows = reinterpret_cast<A*>(
        contexts[worker].detail_scratch(static_cast<std::size_t>(row_elements + shape.value_dim) * sizeof(A)));
    context* const calls = contexts[worker].detail_workers();
    if (rows == nullptr || calls == nullptr) return;
    A* const row = rows + row_elements;
    const point_rows<A> x = pool_queries(p.q, shape.head_dim, pooled, rows);
    within_groups<A> within(x, heads.size(), p.query_offset(b, length), length, shape.value_dim, options);
    if (watch.failed()) return;
    const part_of_source<KV> own(kv, b, g, 1, length);
    const auto attend_all = [&](const auto& keys) {
      const query_groups<A>& set = groups[static_cast<std::size_t>(task)];
      for (index_t j = 0; j < set.size(); ++j) {
        const auto members = set.members(j);
        if (!within.attend(keys, members, *calls)) return;
        for (std::size_t m = 0; m < members.size(); ++m) {
          const auto [at_b, s, h] = pooled.at(members[m]);
          const A sink =
              options.sinks.empty() ? minus_infinity<A> : static_cast<A>(options.sinks[static_cast<std::size_t>(h)]);
          const A lse =
              merge_finished<A>({within.result(static_cast<index_t>(m)), {nullptr, sink}}, shape.value_dim, row);
          p.out.store_finished(at_b, s, h, shape.value_dim, row, lse);
        }
      }
    };
    if constexpr (has_rows_in_memory<part_of_source<KV>>) {
      attend_all(own);
    } else {
      kv_cache<typename KV::panel_element> packed(1, 1, length, shape.head_dim, shape.value_dim);
      if (watch.failed() || !pack_head(own, false, 0, packed)) return;
      attend_all(part_of_source<kv_cache<typename KV::panel_element>>(packed, 0, 0, 1, length));
    }
  });
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q [B, S, H, D] within groups.
/// \param groups   [B * G], of sequence b and KV head g at b G + g: of its rows s * group_size + h
/// \param out      [B, S, H, E], or a partial_state
/// \param options  scale, causal, offsets, softcap, sinks, kv_lengths, group_offsets; no others
/// \throws error   as attention() does; (errc::shape, errc::range) for groups that do not fit. Groups ask for memory as
///                 they come: where it is lacking, outputs may be written in part
/// Cost: of a group of n rows at m positions n m (D + E) multiply-adds, and m rows of keys and values copied.
template <tensor_like Q, kv_source KV, detail::attention_output Out, class A>
void within_group_attention(Q&& q, const KV& kv, std::span<const query_groups<A>> groups, Out&& out,
                            const attention_options& options, context& ctx) {
  static_assert(std::is_same_v<A, accumulator_t<typename KV::panel_element>>,
                "gqa: groups must be of the accumulator of the keys");
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  detail::require_dtypes<element, KV, typename decltype(detail::output_view(out))::value_type>();
  detail::attend_within_groups(queries, detail::as_elements(kv), groups, detail::as_output(std::forward<Out>(out)),
                               options, ctx);
}

/// The same over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out, class A>
void within_group_attention(Q&& q, K&& k, V&& v, std::span<const query_groups<A>> groups, Out&& out,
                            const attention_options& options, context& ctx) {
  within_group_attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), groups,
                         std::forward<Out>(out), options, ctx);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <tensor_like Q, kv_source KV, detail::attention_output Out, class A>
[[nodiscard]] errc check(Q&& q, const KV& kv, std::span<const query_groups<A>> groups, Out&& out,
                         const attention_options& options) noexcept {
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> queries = detail::as_view(std::forward<Q>(q));
  return detail::find_within_groups_fault(queries, kv, groups, detail::as_output(std::forward<Out>(out)), options).code;
}

template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out, class A>
[[nodiscard]] errc check(Q&& q, K&& k, V&& v, std::span<const query_groups<A>> groups, Out&& out,
                         const attention_options& options) noexcept {
  return check(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), groups, std::forward<Out>(out),
               options);
}

}  // namespace GQA_ISA
}  // namespace gqa
