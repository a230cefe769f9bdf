// SPDX-License-Identifier: Apache-2.0
/// \file
/// score_bound: from the most that a product q . k may be to the most that the kernel computes for its score.
#pragma once

#include <cmath>
#include <limits>
#include <numbers>

#include <gqa/config.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/score_rules.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// The rows of one KV head of a sequence: those of its query s lie at s * group + head.
struct bounded_head {
  index_t b, g;
  index_t first_head, group;  // query heads
  index_t first_row, rows;    // among the rows of all heads
  index_t offset, keys;       // position of the first query; valid keys
  key_range tiles;            // key tiles that some query sees

  [[nodiscard]] index_t position_of(index_t row) const noexcept { return offset + row / group; }
  [[nodiscard]] index_t q_head_of(index_t row) const noexcept { return first_head + row % group; }
};

/// Scores to base 2, also where the kernel has them to base e (online_softmax.hpp); of queries as loaded, negated where
/// the scale is negative.
template <class A, class L>
class score_bound {
 public:
  static constexpr double unit = std::numeric_limits<A>::epsilon();  // twice the unit roundoff

  explicit score_bound(const problem<A, L>& p) noexcept
      : options_(p.options), interval_(p.interval()), rules_(p, nothing_) {}
  score_bound(const score_bound&) = delete;  // rules_ refers to this one
  score_bound& operator=(const score_bound&) = delete;
  ~score_bound() = default;

  /// Keys that the query at a position sees of so many, by the interval rules.
  [[nodiscard]] key_range keys_of(index_t position, index_t keys) const noexcept {
    return interval_.keys_of(position, keys);
  }
  [[nodiscard]] double query_factor() const noexcept { return rules_.query_factor(); }
  [[nodiscard]] bool negates() const noexcept { return rules_.score_factor() < 0; }
  /// Whether a score is a product and its factor: then of_products() has it, too.
  [[nodiscard]] bool is_plain() const noexcept { return rules_.is_plain(); }

  /// Of products up to `product` with some of the keys, by a row of a query head at a position.
  [[nodiscard]] A of(double product, index_t q_head, index_t position, key_range keys) const noexcept {
    double score = product * static_cast<double>(factor()), size = std::abs(score);
    if (!is_plain()) {
      if (const double cap = options_.softcap; cap != 0) score = cap * std::tanh(score / cap), size += cap;
      if (!options_.alibi_slopes.empty()) {
        const double slope = options_.alibi_slopes[static_cast<std::size_t>(q_head)];
        const double near = slope * static_cast<double>((slope > 0 ? keys.end - 1 : keys.begin) - position);
        score += near, size += std::abs(near);
      }
      score *= std::numbers::log2e, size *= std::numbers::log2e;
    }
    return static_cast<A>(score + roundings * size);
  }
  /// The same of a packet of products.
  [[nodiscard]] packet<A> of_products(packet<A> products) const noexcept {
    const packet<A> score = mul<A>(products, broadcast(factor()));
    const packet<A> size = max_or_nan(score, sub(zeros<A>(), score));
    return madd(size, broadcast(static_cast<A>(roundings)), score);
  }

 private:
  /// Scaling, capping, adding and storing: some roundings, and the kernel's tanh within 8 of them.
  static constexpr double roundings = 32 * unit;

  [[nodiscard]] A factor() const noexcept { return std::abs(rules_.score_factor()); }

  const attention_options& options_;
  interval_rule interval_;
  no_rules<A> nothing_;
  score_rules<A, L> rules_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
