// SPDX-License-Identifier: Apache-2.0
/// \file
/// pair_scores: what a call makes of one query and one key, in double. For tools that look at a call pair by pair
/// (diagnostics.hpp, error_bound()); the engine has whole rows of tiles instead (engine/score_rules.hpp).
#pragma once

#include <cmath>
#include <cstddef>

#include <gqa/config.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/engine/visible_keys.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Of a checked call, whose options outlive this.
class pair_scores {
 public:
  pair_scores(const attention_options& options, double scale) noexcept
      : options_(options), interval_(options.causal, options.window), scale_(scale) {}

  /// Whether length, causal edge, window and mask leave a row the key. (A bias of -inf hides it, too: by its score.)
  [[nodiscard]] bool sees(const row_index& row, index_t key) const noexcept {
    const key_range near = interval_.keys_of(row.position, row.keys);
    if (key < near.begin || key >= near.end) return false;
    return !options_.mask || mask_row(*options_.mask, row)[key * options_.mask->stride(3)];
  }
  /// softcap(scale * q.k) + bias + alibi.
  [[nodiscard]] double score(double product, const row_index& row, index_t key) const noexcept {
    const double scaled = scale_ * product, cap = options_.softcap;
    return (cap == 0 ? scaled : cap * std::tanh(scaled / cap)) + bias_of(row, key) + alibi_of(row, key);
  }
  /// The magnitudes of the two that are added.
  [[nodiscard]] double magnitude_added(const row_index& row, index_t key) const noexcept {
    return std::abs(bias_of(row, key)) + std::abs(alibi_of(row, key));
  }

 private:
  [[nodiscard]] double bias_of(const row_index& row, index_t key) const noexcept {
    return options_.bias ? static_cast<double>(mask_row(*options_.bias, row)[key * options_.bias->stride(3)]) : 0;
  }
  [[nodiscard]] double alibi_of(const row_index& row, index_t key) const noexcept {
    if (options_.alibi_slopes.empty()) return 0;
    return static_cast<double>(options_.alibi_slopes[static_cast<std::size_t>(row.q_head)]) *
           static_cast<double>(key - row.position);
  }

  const attention_options& options_;
  interval_rule interval_;
  double scale_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
