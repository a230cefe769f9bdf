// SPDX-License-Identifier: Apache-2.0
/// \file
/// Group-wise attention of pooled rows over one KV head: representatives attend, members share what they find.
///
/// For a group with representative c and the keys T of its k highest scores, member i has
///     the state of T, exact:                       (o_Ti, lse_Ti)
///     the state of all other keys, from c:         (o_rest, lse_rest)
/// and its result is their merge, for which the forms differ in the log-sum-exps they take:
///     clustered     T is empty
///     improved      lse_Tc and lse_rest, both of c: T keeps the mass that c gives it
///     improved_lse  lse_Ti and lse_rest + scale (q_i - c).mu, mu the mean of the other keys under c's weights: the
///                   first order of how the member's log-sum-exp differs, never above it (Jensen), and what a vector
///                   added to all keys adds
///
/// Cost, for n rows in C groups over T keys: C T (2 D + E) multiply-adds for the representatives (without top keys
/// C T (D + E); improved_lse, whose values are [v | k], D more), n k (D + E) for the members. A group's top keys are
/// gathered once and read by all of its members: one tile for k = 64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/grouped/alibi_terms.hpp>
#include <gqa/detail/grouped/far_keys.hpp>
#include <gqa/detail/grouped/nearest.hpp>
#include <gqa/detail/grouped/part_of_source.hpp>
#include <gqa/detail/grouped/top_keys.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/groupwise_options.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/options.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A variant: what key_interval leaves, without the top keys of the first `rows` queries.
class rest_keys {
 public:
  rest_keys(const key_interval& keys, const std::uint64_t* top, index_t rows, index_t tiles) noexcept
      : keys_(keys), top_(top), rows_(rows), tiles_(tiles) {}

  [[nodiscard]] std::uint64_t visible_bits(const position& p) const noexcept {
    const std::uint64_t bits = keys_.visible_bits(p);
    return p.query < rows_ ? bits & ~top_[p.query * tiles_ + p.key / tile_tokens] : bits;
  }
  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    const visibility seen = keys_.visible(b);
    return seen == visibility::all && b.query_begin < rows_ ? visibility::some : seen;
  }
  [[nodiscard]] key_range keys(key_range queries) const noexcept { return keys_.keys(queries); }

 private:
  const key_interval& keys_;
  const std::uint64_t* top_;  // [rows, tiles], bits of keys
  index_t rows_, tiles_;
};

/// What group-wise attention of one head did.
struct groupwise_counts {
  index_t groups = 0, alone = 0;  // representatives of several rows, and rows that attended for themselves
  double products = 0;            // multiply-adds
};

/// Rows and groups of one head at work. A: accumulators.
template <class A>
class group_attender {
 public:
  struct shape {
    index_t head_dim, value_dim;
    index_t far_value_dim;    // of which the first E are the head's own; improved_lse takes the mean of the other D
    index_t keys, seen_keys;  // of the head, and those of them that are attended to
  };

  /// Groups that share.
  struct sharing {
    double largest_radius = (std::numeric_limits<double>::max)();
    bool alone_too = false;  // also those of one row, whose result may not depend on whether others join it
  };

  group_attender(const point_rows<A>& rows, const groups_view<A>& groups, const shape& dims,
                 const groupwise_options& options, const sharing& shared, std::byte* memory) noexcept
      : x_(rows), groups_(groups), dims_(dims), options_(options), sharing_(shared) {
    for (index_t j = 0; j < groups.size(); ++j) {
      const auto members = static_cast<index_t>(groups.members(j).size());
      counts_.groups += shares(j) ? 1 : 0;
      counts_.alone += shares(j) ? 0 : members;
      if (shares(j)) most_members_ = (std::max)(most_members_, members);
    }
    top_ = options.form == groupwise_form::clustered ? 0 : (std::min)(options.top_keys, dims.keys);
    carve(memory);
  }

  /// Scratch needed.
  [[nodiscard]] static std::size_t bytes(const point_rows<A>& rows, const groups_view<A>& groups, const shape& dims,
                                         const groupwise_options& options, const sharing& shared) noexcept {
    group_attender measured(rows, groups, dims, options, shared, nullptr);
    return measured.bytes_;
  }

  [[nodiscard]] const groupwise_counts& counts() const noexcept { return counts_; }
  /// Calls f(group, retained mass) for the groups that share, after run().
  template <class F>
  void for_each_shared(const F& f) const {
    index_t representative = 0;
    for (index_t j = 0; j < groups_.size(); ++j) {
      if (shares(j)) f(j, retained_[representative++]);
    }
  }

  /// The states of all rows over the keys of `far` that `sees` leaves: out [n, E], lse [n], with the terms that ALiBi
  /// gives the keys. Single keys and values are read from the head's own rows where those lie in memory, and gathered
  /// in `top`, which has room for top_keys.
  template <class Far, class Own>
  void run(const Far& far, const Own& own, const key_interval& sees, const attention_options& scores,
           const alibi_terms& terms, kv_cache<A>& top, A* out, A* lse, context& ctx) {
    if constexpr (!std::is_same_v<Own, Far> && !has_rows_in_memory<Own>)
      return run(far, far, sees, scores, terms, top, out, lse, ctx);
    terms_ = terms;
    list_representatives();
    if (top_ > 0) take_top_keys(far, sees, scale_of(scores));
    attend_rest(far, sees, scores, ctx);
    index_t representative = 0;
    for (index_t j = 0; j < groups_.size(); ++j) {
      if (!shares(j)) continue;
      share(own, j, representative++, scores, top, out, lse, ctx);
    }
    for (index_t j = 0; j < groups_.size(); ++j) {
      if (shares(j)) continue;
      for (const index_t i : groups_.members(j)) {
        std::copy_n(rest_out_ + representative * dims_.far_value_dim, dims_.value_dim, out + i * dims_.value_dim);
        lse[i] = rest_lse_[representative++];
      }
    }
  }

 private:
  void carve(std::byte* memory) noexcept {
    carver take(memory);
    const index_t all = counts_.groups + counts_.alone, shared = top_ > 0 ? counts_.groups : 0;
    const index_t members = top_ > 0 ? most_members_ + 1 : 0;
    take(representatives_, all * x_.stride);
    take(scaled_, shared * x_.stride);
    take(rest_out_, all * dims_.far_value_dim), take(rest_lse_, all), take(retained_, counts_.groups);
    take(taken_, shared * best_keys<A>::capacity(top_)), take(taken_counts_, shared);
    take(top_bits_, shared * tiles());
    take(members_, members * x_.stride);
    take(top_keys_, top_ * dims_.head_dim), take(top_values_, top_ * dims_.value_dim), take(top_terms_, top_);
    take(top_out_, members * dims_.value_dim), take(top_lse_, members);
    bytes_ = take.used();
  }
  [[nodiscard]] index_t tiles() const noexcept { return ceil_div(dims_.keys, tile_tokens); }
  [[nodiscard]] bool shares(index_t j) const noexcept {
    return options_.form != groupwise_form::dense && (sharing_.alone_too || groups_.members(j).size() > 1) &&
           static_cast<double>(groups_.radius(j)) <= sharing_.largest_radius;
  }
  [[nodiscard]] double scale_of(const attention_options& scores) const noexcept {
    return scores.scale.value_or(1.0 / std::sqrt(static_cast<double>(dims_.head_dim)));
  }

  /// Those of groups first, then the rows that attend for themselves.
  void list_representatives() noexcept {
    A* to = representatives_;
    const auto add = [&](const A* row) { std::copy_n(row, dims_.head_dim, to), to += x_.stride; };
    for (index_t j = 0; j < groups_.size(); ++j) {
      if (shares(j)) add(groups_.representative(j).data());
    }
    for (index_t j = 0; j < groups_.size(); ++j) {
      if (shares(j)) continue;
      for (const index_t i : groups_.members(j)) add(x_.row(i));
    }
  }

  template <class Far>
  void take_top_keys(const Far& far, const key_interval& sees, double scale) noexcept {
    for (index_t r = 0; r < counts_.groups; ++r) {
      for (index_t d = 0; d < dims_.head_dim; ++d)
        scaled_[r * x_.stride + d] = static_cast<A>(static_cast<double>(representatives_[r * x_.stride + d]) * scale);
    }
    find_top_keys(far, scaled_, x_.stride, counts_.groups, top_, sees, terms_, taken_, taken_counts_);
    std::fill_n(top_bits_, counts_.groups * tiles(), std::uint64_t{0});
    for (index_t r = 0; r < counts_.groups; ++r) {
      for (const scored_key<A>& taken : taken_by(r))
        top_bits_[r * tiles() + taken.key / tile_tokens] |= std::uint64_t{1} << taken.key % tile_tokens;
    }
    counts_.products += static_cast<double>(counts_.groups * dims_.seen_keys * dims_.head_dim);
  }
  [[nodiscard]] std::span<const scored_key<A>> taken_by(index_t r) const noexcept {
    return {taken_ + r * best_keys<A>::capacity(top_), static_cast<std::size_t>(taken_counts_[r])};
  }

  template <class Far>
  void attend_rest(const Far& far, const key_interval& sees, const attention_options& scores, context& ctx) {
    const index_t all = counts_.groups + counts_.alone;
    const rest_keys rest(sees, top_bits_, top_ > 0 ? counts_.groups : 0, tiles());
    attention_options o = scores_of(scores);
    o.bias = terms_.bias(all, far.kv_len());
    attention(queries_of(representatives_, all, dims_.head_dim, x_.stride), far,
              state_of(rest_out_, rest_lse_, all, dims_.far_value_dim), o, rest, ctx);
    counts_.products += static_cast<double>(all * dims_.seen_keys * (dims_.head_dim + dims_.far_value_dim));
  }

  /// The results of group j's members, of whom r is the representative.
  template <class Own>
  void share(const Own& own, index_t j, index_t r, const attention_options& scores, kv_cache<A>& top, A* out, A* lse,
             context& ctx) {
    const auto members = groups_.members(j);
    const auto count = static_cast<index_t>(members.size());
    const bool has_top = top_ > 0 && taken_counts_[r] > 0;
    if (has_top) attend_top(own, members, r, scores, top, ctx);
    const A* const rest = rest_out_ + r * dims_.far_value_dim;
    const A representative_top = has_top ? top_lse_[count] : minus_infinity<A>;
    retained_[r] = has_top ? share_of(representative_top, rest_lse_[r]) : 0;
    for (index_t m = 0; m < count; ++m) {
      const index_t i = members[static_cast<std::size_t>(m)];
      const bool corrects = options_.form == groupwise_form::improved_lse;
      const A of_top = has_top && corrects ? top_lse_[m] : representative_top;
      const A of_rest = corrects ? rest_lse_[r] + shift(i, r, rest + dims_.value_dim, scores) : rest_lse_[r];
      const A* const top_row = has_top ? top_out_ + m * dims_.value_dim : nullptr;
      lse[i] = merge_finished<A>({{top_row, of_top}, {rest, of_rest}}, dims_.value_dim, out + i * dims_.value_dim);
    }
  }
  /// Members and their representative on the representative's top keys. (From a cache, whose tiles give a row the same
  /// bits whatever rows there are beside it.)
  template <class Own>
  void attend_top(const Own& own, std::span<const index_t> members, index_t r, const attention_options& scores,
                  kv_cache<A>& top, context& ctx) {
    const auto taken = taken_by(r);
    const auto keys = static_cast<index_t>(taken.size()), count = static_cast<index_t>(members.size());
    for (index_t t = 0; t < keys; ++t) {
      const index_t key = taken[static_cast<std::size_t>(t)].key;
      read_token(own, key, top_keys_ + t * dims_.head_dim, top_values_ + t * dims_.value_dim, dims_.value_dim);
      if (!terms_.empty()) top_terms_[t] = terms_[key];
    }
    top.clear();
    top.append(tensor_view<const A, 4>(top_keys_, {1, keys, 1, dims_.head_dim}),
               tensor_view<const A, 4>(top_values_, {1, keys, 1, dims_.value_dim}));
    for (index_t m = 0; m < count; ++m)
      std::copy_n(x_.row(members[static_cast<std::size_t>(m)]), dims_.head_dim, members_ + m * x_.stride);
    std::copy_n(representatives_ + r * x_.stride, dims_.head_dim, members_ + count * x_.stride);
    attention_options o = scores_of(scores);
    if (!terms_.empty()) o.bias = alibi_terms::bias_of(top_terms_, count + 1, keys);
    attention(queries_of(members_, count + 1, dims_.head_dim, x_.stride), top,
              state_of(top_out_, top_lse_, count + 1, dims_.value_dim), o, ctx);
    counts_.products += static_cast<double>((count + 1) * keys * (dims_.head_dim + dims_.value_dim));
  }

  /// scale (q_i - c).mu.
  [[nodiscard]] A shift(index_t i, index_t r, const A* mu, const attention_options& scores) const noexcept {
    const A* const c = representatives_ + r * x_.stride;
    double sum = 0;
    for (index_t d = 0; d < dims_.head_dim; ++d)
      sum += (static_cast<double>(x_.row(i)[d]) - static_cast<double>(c[d])) * static_cast<double>(mu[d]);
    return static_cast<A>(scale_of(scores) * sum);
  }
  /// What a part weighs beside another, by their log-sum-exps.
  [[nodiscard]] static double share_of(A part, A other) noexcept {
    return 1 / (1 + std::exp(static_cast<double>(other) - static_cast<double>(part)));
  }

  point_rows<A> x_;
  groups_view<A> groups_;
  shape dims_;
  const groupwise_options& options_;
  sharing sharing_;
  groupwise_counts counts_;
  alibi_terms terms_;
  index_t top_ = 0, most_members_ = 0;
  std::size_t bytes_ = 0;

  A* representatives_ = nullptr;  // [groups + alone, stride]
  A* scaled_ = nullptr;           // [groups, stride]
  A* rest_out_ = nullptr;         // [groups + alone, far E]
  A* rest_lse_ = nullptr;
  double* retained_ = nullptr;         // [groups], what the top keys weigh of all
  scored_key<A>* taken_ = nullptr;     // [groups, capacity]
  index_t* taken_counts_ = nullptr;    // [groups]
  std::uint64_t* top_bits_ = nullptr;  // [groups, tiles]
  A* members_ = nullptr;               // [members + 1, stride] of the group at work, with its representative
  A* top_keys_ = nullptr;              // [k, D] of it
  A* top_values_ = nullptr;            // [k, E]
  float* top_terms_ = nullptr;         // [k]
  A* top_out_ = nullptr;               // [members + 1, E]
  A* top_lse_ = nullptr;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
