// SPDX-License-Identifier: Apache-2.0
/// \file
/// What a block of grouped attention costs, in multiply-adds of the exact kernel.
///
/// A model: counts of multiply-adds, of gathered and copied elements, each weighed by what it took beside one of the
/// exact kernel's on Zen 4. grouped_bench and gqa_tuner print what it foresees beside what they measure.
#pragma once

#include <algorithm>

#include <gqa/config.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/grouped_options.hpp>
#include <gqa/groupwise_options.hpp>
#include <gqa/query_groups.hpp>

namespace gqa::detail {

class grouped_cost {
 public:
  /// Of `rows` rows that see `near` and `far` keys each.
  struct work {
    index_t rows, near, far, head_dim, value_dim;
  };

  grouped_cost(const grouped_options& options, const work& of) noexcept
      : options_(options),
        rows_(static_cast<double>(of.rows)),
        near_(static_cast<double>(of.near)),
        far_(static_cast<double>(of.far)),
        head_dim_(static_cast<double>(of.head_dim)),
        value_dim_(static_cast<double>(of.value_dim)) {}

  [[nodiscard]] static bool covers(const grouped_options& o) noexcept {
    return o.tolerance.has_value() || o.grouping.method == grouping_method::cover;
  }

  /// Of far keys by the exact kernel; of near ones, which are the same work either way.
  [[nodiscard]] double of_exact() const noexcept { return rows_ * far_ * (head_dim_ + value_dim_); }
  [[nodiscard]] double of_near() const noexcept { return rows_ * near_ * (head_dim_ + value_dim_); }
  /// Of far keys by representatives of groups, and rows alone.
  [[nodiscard]] double of_groups(index_t groups, index_t alone) const noexcept {
    const double shared = static_cast<double>(groups), dims = head_dim_ + value_dim_;
    const bool has_means = options_.groupwise.form == groupwise_form::improved_lse;
    const double far_dims = dims + (has_means ? head_dim_ : 0);
    const double top = options_.groupwise.form == groupwise_form::clustered
                           ? 0
                           : (std::min)(static_cast<double>(options_.groupwise.top_keys), far_);
    const double attending = (shared + static_cast<double>(alone)) * far_ * far_dims;
    const double with_top =
        top > 0 ? shared * far_ * head_dim_ + rows_ * top * dims + shared * top * dims * gathered : 0;
    const double seeding = covers(options_) ? rows_ : (std::min)(rows_, 8 * shared);
    const double iterations = covers(options_) ? 0 : static_cast<double>(options_.grouping.iterations) + 1;
    const auto compared = static_cast<double>(round_up(groups, tile_tokens));  // centres lie in tiles
    const double grouping = head_dim_ * (rows_ * (compared + moved) * iterations + seeding * shared * seeded);
    return attending + with_top * top_work + grouping + rows_ * dims * row_element + far_ * far_dims * packed;
  }

  /// Whether so many representatives, and rows alone, are faster than the exact kernel.
  [[nodiscard]] bool pays(index_t groups, index_t alone) const noexcept {
    if (options_.always_group) return far_ > 0;
    if (options_.groupwise.form == groupwise_form::dense) return false;
    return of_groups(groups, alone) < paying_share * of_exact();
  }
  /// Groups of the rows that are asked for; of a cover at most.
  [[nodiscard]] index_t wanted_groups() const noexcept {
    const auto rows = static_cast<index_t>(rows_);
    if (options_.grouping.groups > 0) return (std::min)(options_.grouping.groups, rows);
    if (!covers(options_)) return std::max<index_t>(rows / 32, 1);
    if (options_.always_group) return rows;
    index_t most = 1;  // that pay: fewer cost less
    for (index_t step = rows / 2; step > 0; step /= 2) {
      if (most + step <= rows && pays(most + step, 0)) most += step;
    }
    return most;
  }

 private:
  /// Top keys are found, and met by a group's members, in small pieces, and gathered line by line; rows are added to
  /// means one by one, seeds run at the speed of L2, rows are copied in and out.
  static constexpr double top_work = 2.5, gathered = 8, moved = 8, seeded = 8, row_element = 60, packed = 3;
  /// Groups pay where they promise to take less than this part of the exact kernel's time.
  static constexpr double paying_share = 0.9;

  const grouped_options& options_;
  double rows_, near_, far_, head_dim_, value_dim_;
};

}  // namespace gqa::detail
