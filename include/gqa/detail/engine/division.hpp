// SPDX-License-Identifier: Apache-2.0
/// \file
/// The division of a call: which sequences go together (families.hpp), how their rows are cut into row tiles
/// (row_cut.hpp), what that costs, and the plan of tasks that follows from it (plan.hpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/engine/families.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/engine/plan.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_cut.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/engine/visible_keys.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Bundles pay as long as few rows share what is read, and their states stay in L2.
inline constexpr index_t bundle_rows = 32;

/// What a task works on: row tile `i` of neighbouring KV heads of one family, the first of which is g.
struct bundle {
  index_t family, g, i;
};

class call_division {
 public:
  /// `memory` has 3 elements a sequence, and 1.
  call_division(const row_geometry& rows, const visible_keys& sees, const key_source& kv, index_t* memory) noexcept
      : rows_(rows), sees_(sees), kv_(kv), families_(rows.call().shape.batch, memory) {}

  /// Bytes of a key tile that is packed beforehand, and of the elements of states.
  struct sizes {
    index_t packed_tile_bytes, accumulator_bytes;
  };
  /// Finds families, if they are wanted, and the plan, or takes the context's. False if there is no memory.
  [[nodiscard]] bool find(const sizes& bytes, context& ctx) {
    find_families(ctx.concurrency());
    index_t most_rows = 0;
    bool single_tiles = true;  // whether the row tiles of each pair are one
    for (index_t n = 0; n < families_.count(); ++n) {
      const index_t own = rows_.most_rows_of(families_[n].members);
      most_rows = (std::max)(most_rows, own);
      if (query_block() > 0) single_tiles = single_tiles && cut_of(families_[n], own).tiles() <= 1;
    }
    tile_rows_ = (std::min)(most_rows, row_tile_rows);
    const call_shape& shape = rows_.call().shape;
    const auto& source = kv_.about();
    // A bundle's row tiles have all rows of their KV heads.
    const plan_request request{.families = families_.count(),
                               .kv_heads = shape.kv_heads,
                               .workers = ctx.concurrency(),
                               .visit_products = tile_tokens * (shape.head_dim + shape.value_dim),
                               .packed_tile_bytes = source.makes_tiles_in_cache ? 0 : bytes.packed_tile_bytes,
                               .state_bytes = state_elements() * bytes.accumulator_bytes,
                               .bundles = source.heads_lie_together && most_rows <= bundle_rows && single_tiles};
    plan_ = find_plan(
        request, [this](index_t n) { return request_of(families_[n]); },
        [this](index_t n) { return visits_of(families_[n]); }, ctx);
    return plan_ != nullptr;
  }

  [[nodiscard]] const call_plan& plan() const noexcept { return *plan_; }
  [[nodiscard]] family family_of(index_t n) const noexcept { return families_[n]; }
  /// Rows of the fullest row tile.
  [[nodiscard]] index_t tile_rows() const noexcept { return tile_rows_; }
  /// Elements of the raw states of such a row tile.
  [[nodiscard]] index_t state_elements() const noexcept {
    return round_up(tile_rows_ * (padded_value_dim(rows_.call().shape.value_dim) + 2), panel_tokens);
  }

  /// The n-th row tile of a bundle; no rows if a smaller group has fewer tiles.
  [[nodiscard]] row_tile row_tile_of(const bundle& item, index_t n) const noexcept {
    const index_t g = item.g + n;
    const family f = families_[item.family];
    const index_t all = rows_.rows_of(f.members, g);
    const row_range rows = cut_of(f, all).tile(item.i, rows_.call().group_size(g), all);
    return {f.members, g, rows.first, rows.count};
  }
  /// Key tiles of a bundle. Those of several KV heads have all of their rows in it.
  [[nodiscard]] key_tiles tiles_of(const bundle& item) const {
    if (plan_->bundle > 1) return sees_.tiles_of(families_[item.family].members);
    const row_tile t = row_tile_of(item, 0);
    return t.rows == 0 ? key_tiles{} : sees_.tiles_of(t);
  }
  /// Whether rules say that none of a bundle's rows sees any of some key tiles.
  [[nodiscard]] bool hides(const bundle& item, key_range tiles) const {
    if (!sees_.rules().about().hides_blocks) return false;
    for (index_t n = 0; n < plan_->bundle; ++n) {
      const row_tile t = row_tile_of(item, n);
      if (t.rows > 0 && sees_.find_block_visible(t, tiles) != visibility::none) return false;
    }
    return true;
  }

 private:
  /// Positions that see the same key tiles, 0 if nothing is known of them.
  [[nodiscard]] index_t query_block() const noexcept { return sees_.rules().about().query_block; }

  /// What families are found by.
  struct sequences_in_pages {
    const call_division& call;
    [[nodiscard]] index_t rows(index_t b) const noexcept { return call.rows_.most_rows_of(b); }
    [[nodiscard]] key_tiles tiles(index_t b) const { return call.sees_.tiles_of(std::span(&b, 1)); }
    [[nodiscard]] index_t length(index_t b) const noexcept { return call.rows_.length(b); }
    [[nodiscard]] index_t page_size() const noexcept { return call.kv_.about().page_size; }
    [[nodiscard]] std::span<const std::int32_t> pages(index_t b) const noexcept {
      return call.kv_.pages_of(call.rows_.call().kv_sequence(b));
    }
    [[nodiscard]] bool has_shared_pages(index_t b) const noexcept {
      return call.kv_.has_shared_pages(call.rows_.call().kv_sequence(b));
    }
  };
  void find_families(index_t workers) {
    if (kv_.about().page_size == 0 || !rows_.call().ragged.shares_prefixes) return;
    const auto tasks = static_cast<index_t>(tasks_of_a_share) * (workers == 1 ? 0 : workers);
    families_.find(sequences_in_pages{*this}, ceil_div(tasks, rows_.call().shape.kv_heads));
  }

  /// How a family's rows, so many of a KV head, are cut into row tiles.
  [[nodiscard]] row_cut cut_of(const family& f, index_t rows) const noexcept {
    if (query_block() > 0 && f.members.size() == 1) {
      const index_t b = f.members.front();
      return {rows_.call().q_len(b), rows_.offset(b), query_block(), rows_.largest_group()};
    }
    return row_cut(rows);
  }
  [[nodiscard]] family_request request_of(const family& f) const {
    const index_t rows = rows_.most_rows_of(f.members);
    return {sees_.tiles_of(f.members), cut_of(f, rows).tiles(), (std::min)(rows, row_tile_rows)};
  }
  /// Visits of key tiles by rows.
  [[nodiscard]] index_t visits_of(const family& f) const {
    index_t visits = 0;
    if (f.members.size() == 1) {
      const index_t b = f.members.front(), group = rows_.largest_group(), rows = rows_.most_rows_of(b);
      const row_cut cut = cut_of(f, rows);
      for (index_t i = 0; i < cut.tiles(); ++i) {
        const auto [first, count] = cut.tile(i, group, rows);
        if (count == 0) continue;
        visits +=
            sees_.tiles_of(b, {first / group, (first + count - 1) / group}).size() * (std::max)(count, least_rows);
      }
      return visits;
    }
    for (std::size_t m = 0; m < f.members.size(); ++m) {
      const index_t rows = rows_.most_rows_of(f.members[m]);
      const index_t tiles = sees_.tiles_of(f.members.subspan(m, 1)).size(), shared = (std::min)(f.shared[m], tiles);
      visits += shared * rows + (tiles - shared) * (std::max)(rows, least_rows);
    }
    return visits;
  }

  const row_geometry& rows_;
  const visible_keys& sees_;
  const key_source& kv_;
  families families_;
  const call_plan* plan_ = nullptr;
  index_t tile_rows_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
