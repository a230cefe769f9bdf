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
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/decoded_kv.hpp>
#include <gqa/detail/far_keys.hpp>
#include <gqa/detail/online_softmax.hpp>
#include <gqa/detail/part_of_source.hpp>
#include <gqa/detail/problem.hpp>
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

  /// Attends with the members of a group, whose keys are read from `keys`.
  template <class Head>
  void attend(const Head& keys, std::span<const index_t> members, context& ctx) {
    const auto count = static_cast<index_t>(members.size());
    own_keys_.clear();
    ends_.clear(), rows_.clear();
    key_.resize(static_cast<std::size_t>(x_.dim)), value_.resize(static_cast<std::size_t>(value_dim_));
    out_.resize(static_cast<std::size_t>(count * value_dim_)), lse_.resize(members.size());
    index_t last = (std::numeric_limits<index_t>::min)();
    for (const index_t i : members) {  // ascending, and so are their positions
      const index_t at = offset_ + i / heads_;
      if (at != last && at >= 0 && at < keys.length(0)) {
        read_token(keys, at, key_.data(), value_.data(), value_dim_);
        own_keys_.append(tensor_view<const A, 4>(key_.data(), {1, 1, 1, x_.dim}),
                         tensor_view<const A, 4>(value_.data(), {1, 1, 1, value_dim_}));
      }
      last = at;
      ends_.push_back(own_keys_.length(0));
      rows_.insert(rows_.end(), x_.row(i), x_.row(i) + x_.dim);
    }
    if (!causal_) std::fill(ends_.begin(), ends_.end(), own_keys_.length(0));
    attention(queries_of(rows_.data(), count, x_.dim, x_.dim), own_keys_,
              state_of(out_.data(), lse_.data(), count, value_dim_), options_, first_keys_mask(ends_), ctx);
  }
  /// What the n-th member found.
  [[nodiscard]] finished_state<A> result(index_t n) const noexcept {
    return {out_.data() + n * value_dim_, lse_[static_cast<std::size_t>(n)]};
  }

 private:
  point_rows<A> x_;
  index_t heads_, offset_;
  bool causal_;
  index_t value_dim_;
  attention_options options_;
  kv_cache<A> own_keys_;       // of the group at work
  std::vector<index_t> ends_;  // [members], how many of those a member sees
  std::vector<A> rows_;        // [members, D]
  std::vector<A> key_, value_, out_, lse_;
};

template <class Q, class KV, class Out, class A>
void attend_within_groups(const tensor_view<const Q, 4>& q, const KV& kv, std::span<const query_groups<A>> groups,
                          const Out& out, const attention_options& options, context& ctx) {
  const auto p = problem_of<A>(q, kv, out, options);
  const call_shape& shape = p.shape;
  if (const auto f = find_call_fault(q, kv, out, options)) return raise(f);
  if (const auto f = find_shared_scores_fault(options)) return raise(f);
  if (!options.alibi_slopes.empty())
    return raise(make_fault(errc::option, "alibi_slopes: expected none, for a group is of all heads of a KV head"));
  const std::vector<head_pool> pools = head_pools_of(p);
  if (const auto f = find_groups_of_rows_fault<A>(groups, shape, pools)) return raise(f);
  context* const contexts = ctx.detail_workers();
  ctx.for_each(shape.batch * shape.kv_heads, [&](index_t task, index_t worker) {
    const error_watch watch;
    const index_t b = task / shape.kv_heads, length = p.length(kv, b);
    const auto [g, heads] = pools[static_cast<std::size_t>(task % shape.kv_heads)];
    const row_block pooled{{b, b + 1}, {0, shape.q_len}, heads};
    if (pooled.size() == 0) return;
    const index_t row_elements = pooled.size() * round_up(shape.head_dim, 16);
    A* const rows = reinterpret_cast<A*>(
        contexts[worker].detail_scratch(static_cast<std::size_t>(row_elements + shape.value_dim) * sizeof(A)));
    if (rows == nullptr) return;
    A* const row = rows + row_elements;
    const point_rows<A> x = pool_queries(p.q, shape.head_dim, pooled, rows);
    within_groups<A> within(x, heads.size(), p.query_offset(b, length), length, shape.value_dim, options);
    if (watch.failed()) return;
    const part_of_source<KV> own(kv, b, g, 1, length);
    const auto attend_all = [&](const auto& keys) {
      const query_groups<A>& set = groups[static_cast<std::size_t>(task)];
      for (index_t j = 0; j < set.size(); ++j) {
        const auto members = set.members(j);
        within.attend(keys, members, contexts[worker].detail_workers()[0]);
        if (watch.failed()) return;
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
      if (watch.failed()) return;
      pack_head(own, false, 0, packed);
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

}  // namespace GQA_ISA
}  // namespace gqa
