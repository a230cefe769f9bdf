// SPDX-License-Identifier: Apache-2.0
/// \file
/// Key tiles as one stream from memory: most of a decode step.
///
/// Where a single row block sees all of the tiles, with plain scores, it waits for memory more than it computes. So
/// nothing stands between the products but the softmax, and each tile is read from front to back while what follows is
/// asked for. The bits are those of tile_step.hpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/tile_step.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

template <class P, class L>
class tile_stream {
  using A = accumulator_t<P>;

 public:
  explicit tile_stream(const engine_call<P, L>& call) noexcept
      : call_(call),
        streams_(call.scores.is_plain() && call.kernels.tiles != nullptr && !call.sees.has_mask()),
        scattered_(call.kv.about().scatters_panels),
        panel_bytes_(key_panel_elements<P>(call.shape.head_dim) * index_t{sizeof(P)}) {}

  /// Attends to the first of the key tiles, as far as they can be streamed, and leaves out those that rules hide.
  /// Returns where it stopped.
  [[nodiscard]] index_t attend(const row_tile& t, key_range tiles, workspace<P, L>& w,
                               const raw_states<A>& states) const {
    if (!streams_ || t.rows > stream_rows<A> || tiles.begin < w.whole.begin) return tiles.begin;
    const auto& rules = call_.sees.rules().about();
    const bool sees_intervals = call_.sees.sees_intervals(t);
    if (!sees_intervals && !rules.hides_blocks) return tiles.begin;
    const key_range whole{tiles.begin, (std::min)(tiles.end, w.whole.end)};
    if (whole.size() == 0) return tiles.begin;
    w.all_seen = true;
    if (rules.shows_panels && call_.kernels.panels != nullptr && t.members.size() == 1) {
      attend_panels(t, whole, w, states);
      return whole.end;
    }
    if (!sees_intervals) return attend_seen(t, whole, w, states);
    if (scattered_) {
      attend_scattered(t, whole, w, states);
    } else {  // nobody asks where the next tile is: it would cost 3 %
      for (index_t i = whole.begin; i < whole.end; ++i) {
        const kv_tile<P> now = call_.tile(t.b(), t.g, i, nullptr);
        attend_tile(t, now, now, w, states);
      }
    }
    return whole.end;
  }

 private:
  void attend_tile(const row_tile& t, const kv_tile<P>& tile, const kv_tile<P>& next, workspace<P, L>& w,
                   const raw_states<A>& states) const noexcept {
    attend_slots(t, {tile, all_panels}, {next, all_panels}, *call_.kernels.tiles, w, states);
  }

  /// A tile, and the slots of it whose panels are seen, a bit each.
  struct slots_in {
    const kv_tile<P>& tile;
    std::uint32_t slots;
  };

  /// The seen panels of a tile, moved to slots as near to the front as the order of sums allows: where weights are
  /// summed in lanes, a panel of even number goes to an even slot, an odd one to an odd slot. A slot that is skipped so
  /// holds the next panel, too, and is hidden.
  struct seen_slots {
    kv_tile<P> tile;
    std::uint32_t slots = 0;

    operator slots_in() const noexcept { return {tile, slots}; }
  };
  [[nodiscard]] static seen_slots slots_of(const kv_tile<P>& tile, std::uint32_t panels) noexcept {
    if (panels == all_panels) return {tile, all_panels};
    seen_slots seen;
    for (std::size_t slot = 0; panels != 0; ++slot) {
      const auto panel = static_cast<std::size_t>(std::countr_zero(panels));
      seen.tile.k[slot] = tile.k[panel], seen.tile.v[slot] = tile.v[panel];
      seen.tile.nonfinite_values |= (tile.nonfinite_values >> panel & 1) << slot;
      if (sums_in_lanes<L> && slot % 2 != panel % 2) continue;
      seen.slots |= std::uint32_t{1} << slot;
      panels &= panels - 1;
    }
    return seen;
  }

  /// Attends to the seen slots of a tile. Slots before the last seen one are computed with the others, and then hidden.
  void attend_slots(const row_tile& t, const slots_in& now, const slots_in& next, const stream_table<P, L>& kernels,
                    workspace<P, L>& w, const raw_states<A>& states) const noexcept {
    const auto rows = static_cast<std::size_t>(t.rows - 1);
    block_operands<P, L> op = operands_of(call_, now.tile, w, states);
    op.panel_end = std::bit_width(now.slots);
    if (kernels.scattered)
      op.ahead =
          find_panels_ahead(now.tile, next.tile, panel_bytes_, op.panel_end, index_t{std::bit_width(next.slots)});
    kernels.scores[rows](op);
    fetch_start(now.tile.v[0]);
    for (std::uint32_t left = all_panels & ~now.slots; left != 0; left &= left - 1) {
      A* const hidden = op.s + std::countr_zero(left) * panel_tokens;
      for (index_t r = 0; r < t.rows; ++r) std::fill_n(hidden + r * tile_tokens, panel_tokens, minus_infinity<A>);
    }
    softmax_steps<L>(t.rows, op.s, w.p, states.max, w.lanes, w.alpha);
    kernels.values[rows](op);
    fetch_start(kernels.scattered ? next.tile.k[0] : now.tile.next);
  }
  /// Asks for the start of what is read next, so that memory stays busy while something else is computed. (More of it,
  /// by the rows' softmax, gains nothing for 1 row and costs 4 rows a twentieth.)
  static void fetch_start(const P* from) noexcept {
    for (index_t byte = 0; byte < 512; byte += 64) prefetch(from, byte);
  }

  void attend_scattered(const row_tile& t, key_range tiles, workspace<P, L>& w,
                        const raw_states<A>& states) const noexcept {
    kv_tile<P> now = call_.tile(t.b(), t.g, tiles.begin, nullptr);
    for (index_t i = tiles.begin; i < tiles.end; ++i) {
      const kv_tile<P> next = i + 1 < tiles.end ? call_.tile(t.b(), t.g, i + 1, nullptr) : now;
      attend_tile(t, now, next, w, states);
      now = next;
    }
  }

  /// The panels that rules show of some key tiles, without the others, as if there were none: the bits are those of a
  /// tile with the others hidden, for which zeros would be added.
  void attend_panels(const row_tile& t, key_range tiles, workspace<P, L>& w, const raw_states<A>& states) const {
    const index_t first_head = call_.rows.call().first_head(t.g);
    const auto find_from = [&](index_t i) { return call_.sees.rules().find_panels(t.b(), first_head, {i, tiles.end}); };
    const auto slots_at = [&](const key_rules::seen_panels& seen) {
      return slots_of(call_.tile(t.b(), t.g, seen.tile, nullptr), seen.panels);
    };
    key_rules::seen_panels at = find_from(tiles.begin);
    if (at.tile >= tiles.end) return;
    for (seen_slots now = slots_at(at), next; at.tile < tiles.end; now = next) {
      const key_rules::seen_panels then = find_from(at.tile + 1);
      next = then.tile < tiles.end ? slots_at(then) : now;
      // Whole tiles in a row are read as they follow in memory, as far as this split knows.
      const bool follows = at.panels == all_panels &&
                           (at.tile + 1 == tiles.end || (then.tile == at.tile + 1 && then.panels == all_panels));
      attend_slots(t, now, next, follows ? *call_.kernels.tiles : *call_.kernels.panels, w, states);
      at = then;
    }
  }

  /// The tiles that rules show all of, without those that they hide, up to the first of which they show some.
  [[nodiscard]] index_t attend_seen(const row_tile& t, key_range tiles, workspace<P, L>& w,
                                    const raw_states<A>& states) const {
    visibility seen = visibility::none;
    const bool single = t.members.size() == 1;
    const key_block rows = call_.rows.block_of(t, t.b());  // once: its divisions cost a hundredth of a decode step's
    const index_t keys = call_.rows.length(t.b());         // time over a tile
    const auto find_seen = [&](index_t i) {
      for (; i < tiles.end; ++i) {
        seen = single ? call_.sees.find_block_visible(rows, keys, {i, i + 1})
                      : call_.sees.find_block_visible(t, {i, i + 1});
        if (seen != visibility::none) break;
      }
      return i;
    };
    index_t i = find_seen(tiles.begin);
    if (i == tiles.end || seen == visibility::some) return i;
    for (kv_tile<P> now = call_.tile(t.b(), t.g, i, nullptr), next;; now = next) {
      const index_t following = find_seen(i + 1);
      next = following < tiles.end ? call_.tile(t.b(), t.g, following, nullptr) : now;
      if (following > i + 1) now.next = next.k[0];
      attend_tile(t, now, next, w, states);
      i = following;
      if (i == tiles.end || seen == visibility::some) return i;
    }
  }

  const engine_call<P, L>& call_;
  bool streams_;  // whether tiles lie in memory, and scores and options allow it
  bool scattered_;
  index_t panel_bytes_;  // of keys
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
