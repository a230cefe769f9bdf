// SPDX-License-Identifier: Apache-2.0
/// \file
/// Which keys rows see: causal edge, window, padding, a mask tensor and the rules of a variant, from whole ranges of
/// key tiles down to a bit a key.
///
/// From coarse to fine, and each only where the one before leaves something open: the key tiles that some query of a
/// row tile may see (tiles_of); those that every row sees all of by the interval rules (whole_tiles); what a variant
/// says of a tile as a block (find_block_visible); and the 64 bits of each row (find_bits).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

inline constexpr std::uint64_t all_keys = ~std::uint64_t{0};  // of a tile, a bit each

/// Row (b, h, s) of a [B|1, H|1, S, T] tensor, as a pointer to key 0; the stride between keys is view.stride(3).
template <class T>
[[nodiscard]] inline const T* mask_row(const tensor_view<const T, 4>& view, const row_index& row) noexcept {
  const index_t b = view.extent(0) == 1 ? 0 : row.batch, h = view.extent(1) == 1 ? 0 : row.q_head;
  return view.data() + b * view.stride(0) + h * view.stride(1) + row.query * view.stride(2);
}

class visible_keys {
 public:
  visible_keys(const row_geometry& rows, const key_source& kv, const key_rules& rules) noexcept
      : rows_(rows), kv_(kv), rules_(rules), interval_(rows.call().interval()) {}

  [[nodiscard]] const key_rules& rules() const noexcept { return rules_; }
  [[nodiscard]] bool has_mask() const noexcept { return rows_.call().options.mask.has_value(); }

  /// Key tiles that some of the queries [first, last] of a sequence may see.
  [[nodiscard]] key_tiles tiles_of(index_t b, query_range queries) const {
    const index_t keys = rows_.length(b), offset = rows_.offset(b);
    const key_range bound = rules_.keys({offset + queries.first, offset + queries.last + 1});
    const key_range seen{(std::max)(interval_.keys_of(offset + queries.first, keys).begin, bound.begin),
                         (std::min)(interval_.keys_of(offset + queries.last, keys).end, bound.end)};
    if (seen.size() == 0) return {};
    const key_range tiles{seen.begin / tile_tokens, ceil_div(seen.end, tile_tokens)};
    if (!kv_.about().has_gaps) return {tiles};
    return {tiles, kv_.gone_tiles(rows_.call().kv_sequence(b))};
  }
  /// Key tiles that some of all queries of some sequences may see.
  [[nodiscard]] key_tiles tiles_of(std::span<const index_t> members) const {
    if (members.size() == 1) {
      const index_t b = members.front(), queries = rows_.call().q_len(b);
      return queries == 0 ? key_tiles{} : tiles_of(b, {0, queries - 1});
    }
    key_range all{0, 0};
    for (const index_t b : members) {
      const key_tiles own = tiles_of(b, {0, rows_.call().q_len(b) - 1});
      if (own.size() == 0) continue;
      all = all.size() == 0 ? key_range{own.begin(), own.end()}
                            : key_range{(std::min)(all.begin, own.begin()), (std::max)(all.end, own.end())};
    }
    return all;
  }
  [[nodiscard]] key_tiles tiles_of(const row_tile& t) const {
    return t.members.size() > 1 ? tiles_of(t.members) : tiles_of(t.b(), rows_.queries_of(t, t.b()));
  }

  /// Tiles all of whose 64 keys are seen by every row, by the interval rules. (Once a split: its divisions cost a tenth
  /// of a decode step's time over a tile.)
  [[nodiscard]] key_range whole_tiles(const row_tile& t) const noexcept {
    key_range whole{0, position_limit};
    for (const index_t b : t.members) {
      const index_t keys = rows_.length(b), offset = rows_.offset(b);
      const query_range queries = rows_.queries_of(t, b);
      // Interval ends grow with the position: the last row's begin and the first row's end bound all rows.
      const index_t begin = interval_.keys_of(offset + queries.last, keys).begin;
      const index_t end = interval_.keys_of(offset + queries.first, keys).end;
      whole = {(std::max)(whole.begin, ceil_div(begin, tile_tokens)),
               (std::min)(whole.end, std::max<index_t>(end, 0) / tile_tokens)};
    }
    return whole;
  }
  /// Whether the interval rules alone decide what rows see. Rules may say so of some sequences of a batch, whose bits
  /// are then those of a call without them.
  [[nodiscard]] bool sees_intervals(const row_tile& t) const {
    if (has_mask()) return false;
    return !rules_.about().hides ||
           std::none_of(t.members.begin(), t.members.end(), [this](index_t b) { return rules_.hides_in(b); });
  }

  /// What the rules say of some key tiles as a block.
  [[nodiscard]] visibility find_block_visible(const row_tile& t, key_range tiles) const {
    if (!rules_.about().hides_blocks) return rules_.about().hides ? visibility::some : visibility::all;
    const auto says_of = [&](index_t b) { return find_block_visible(rows_.block_of(t, b), rows_.length(b), tiles); };
    const visibility first = says_of(t.b());
    const bool agree =
        std::all_of(t.members.begin() + 1, t.members.end(), [&](index_t b) { return says_of(b) == first; });
    return agree ? first : visibility::some;
  }
  /// The same for rows of one sequence of `keys` keys; `rows` is their block (row_geometry::block_of).
  [[nodiscard]] visibility find_block_visible(key_block rows, index_t keys, key_range tiles) const {
    rows.key_begin = tiles.begin * tile_tokens, rows.key_end = (std::min)(tiles.end * tile_tokens, keys);
    return rules_.visible(rows);
  }

  /// Fills the bits of each row for key tile i, `block` of which the rules show; says whether any is set.
  [[nodiscard]] bool find_bits(const row_tile& t, index_t i, visibility block, std::uint64_t* bits_of_rows) const {
    const index_t first_key = i * tile_tokens;
    std::uint64_t any = 0;
    rows_.for_each_row(t, [&](index_t r, const row_index& row) {
      const key_range seen = interval_.keys_of(row.position, row.keys);
      std::uint64_t bits = bits_between(seen.begin - first_key, seen.end - first_key);
      if (has_mask()) bits = keep_unmasked(bits, row, first_key);
      if (block == visibility::some) bits = rules_.visible_bits(bits, row, first_key);
      bits_of_rows[r] = bits;
      any |= bits;
    });
    return any != 0;
  }

 private:
  [[nodiscard]] std::uint64_t keep_unmasked(std::uint64_t bits, const row_index& row,
                                            index_t first_key) const noexcept {
    if (bits == 0) return 0;
    const auto& all = *rows_.call().options.mask;
    const index_t stride = all.stride(3);
    const bool* const mask = mask_row(all, row) + first_key * stride;
    const index_t last = tile_tokens - std::countl_zero(bits);
    for (index_t c = std::countr_zero(bits); c < last; ++c) {
      if (!mask[c * stride]) bits &= ~(std::uint64_t{1} << c);
    }
    return bits;
  }

  const row_geometry& rows_;
  const key_source& kv_;
  const key_rules& rules_;
  interval_rule interval_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
