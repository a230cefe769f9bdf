// SPDX-License-Identifier: Apache-2.0
/// \file
/// The walk: the row tiles of a task past the key tiles of one split.
///
/// A task has the row tiles of one KV head, or of several (a bundle). Each key tile is visited by all of them before
/// the next one, by the way of reading that fits: as one stream from memory (tile_stream.hpp), in place as rows
/// (strip_step.hpp), or by row blocks (tile_step.hpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/families.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/row_states.hpp>
#include <gqa/detail/engine/strip_step.hpp>
#include <gqa/detail/engine/tile_step.hpp>
#include <gqa/detail/engine/tile_stream.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// One row tile of a bundle at work.
template <class P, class L>
struct bundle_member {
  row_tile rows;
  workspace<P, L> w;
  raw_states<accumulator_t<P>> states;
};

template <class P, class L>
class walk {
  using member = bundle_member<P, L>;

 public:
  explicit walk(const engine_call<P, L>& call) noexcept : call_(call), step_(call), stream_(call), strips_(call) {}

  /// Attends to the key tiles of one split for all members of a bundle, whose rows are of family f; tile_at(b, g, i,
  /// scratch) finds or packs a tile.
  template <class TileAt>
  void attend_split(std::span<member> members, const family& f, const key_tiles& tiles, key_range split,
                    const TileAt& tile_at) const {
    for (member& m : members) begin_split(call_, m.rows, m.w, m.states);
    if (f.members.size() == 1) {
      for (const key_range some : tiles.read_of(split)) attend_tiles(members, some, tile_at);
    } else {
      for (const member& m : members) attend_shared(m, f, split, tile_at);
    }
    for (member& m : members) end_split(m.rows, m.w, m.states);
  }

 private:
  /// Key tiles for all rows of a family's row tile as far as its members have them in common, and the rest for those
  /// who share more of it, and so on, until each is alone with its own. A row's state goes on from one to the next.
  template <class TileAt>
  void attend_shared(member m, const family& f, key_range tiles, const TileAt& tile_at) const {
    const bool alone = f.members.size() == 1;
    const index_t common = alone ? tiles.end : *std::min_element(f.shared.begin() + 1, f.shared.end());
    const index_t end = std::clamp(common, tiles.begin, tiles.end);
    const key_tiles seen = call_.sees.tiles_of(m.rows);
    const key_range together{(std::max)(tiles.begin, seen.begin()), (std::min)(end, seen.end())};
    if (together.size() > 0) attend_tiles(std::span(&m, 1), together, tile_at);
    if (end == tiles.end) return;
    for (std::size_t first = 0, next = 0; first < f.members.size(); first = next) {
      for (next = first + 1; next < f.members.size() && f.shared[next] > end;) ++next;
      const family some{f.members.subspan(first, next - first), f.shared.subspan(first, next - first)};
      member part = m;
      narrow_to(call_, some.members, part.rows, part.w, part.states);
      attend_shared(part, some, {end, tiles.end}, tile_at);
    }
  }

  /// Key tiles one by one, each for all row tiles of a bundle.
  template <class TileAt>
  void attend_tiles(std::span<member> members, key_range tiles, const TileAt& tile_at) const {
    // Members of a bundle have their sequence's positions in common, and so the tiles that they see whole.
    key_range in_place{0, 0};
    index_t readers = 0;
    for (const member& m : members) {
      if (m.w.in_place) in_place = m.w.whole, ++readers;
    }
    for (member& m : members) {
      if (m.w.in_place) strips_.look_ahead(m.rows, readers, m.w);
    }
    for (index_t i = tiles.begin; i < tiles.end;) {
      if (members.size() == 1) i = stream_.attend(members[0].rows, {i, tiles.end}, members[0].w, members[0].states);
      if (i == tiles.end) break;
      const bool runs = in_place.begin <= i && i < in_place.end;
      const key_range run{i, runs ? (std::min)({i + run_tiles, in_place.end, tiles.end}) : i + 1};
      if (runs) attend_in_place(members, run);
      for (; i < run.end; ++i) {
        for (member& m : members) {
          if (!(runs && m.w.in_place)) step_.attend(m.rows, i, tile_at, m.w, m.states);
        }
      }
    }
  }

  /// A run of key tiles for those of a bundle who read it in place: all heads of a strip before the next strip, which
  /// is memory from front to back where a token's heads lie together.
  void attend_in_place(std::span<member> members, key_range run) const noexcept {
    const auto for_each_reader = [&](const auto& f) {
      for (member& m : members) {
        if (m.w.in_place) f(m);
      }
    };
    const auto for_each_strip = [&](const auto& f) {
      for (strip_place at{run.begin, 0, 0}; at.i < run.end; ++at.i, ++at.slot) {
        for_each_reader([&](member& m) { strips_.find_strips(m.rows, at.i, m.w); });
        for (at.n = 0; at.n < tile_panels; ++at.n) for_each_reader([&](member& m) { f(m, at); });
      }
    };
    for_each_strip([this](member& m, const strip_place& at) { strips_.score(m.rows, at, m.w); });
    for_each_reader([&](member& m) { strips_.weigh(m.rows, run.size(), m.w, m.states); });
    for_each_strip([this](member& m, const strip_place& at) { strips_.apply(m.rows, at, m.w, m.states); });
  }

  const engine_call<P, L>& call_;
  tile_step<P, L> step_;
  tile_stream<P, L> stream_;
  strip_step<P, L> strips_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
