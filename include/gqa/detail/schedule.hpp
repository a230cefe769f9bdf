// SPDX-License-Identifier: Apache-2.0
/// \file
/// Divides a call into tasks and runs them: pack, attend, merge, finish.
///
/// Pairs are the (sequence, KV head) combinations. A pair's rows are cut into tiles of 96 and its keys into splits of
/// 1,024 tokens, both at fixed places. Splits always finish on their own and merge left to right, so who computes which
/// of them cannot be seen in the result:
///   * enough row tiles for everyone: a task is a row tile, its splits one after the other;
///   * few row tiles (decode): a task is one split of a row tile, its raw state goes to memory, a second round merges.
/// Where a token's heads lie together in memory, row tiles of few rows are bundled: a task visits a key tile of all its
/// KV heads before the next tile, and so reads memory from front to back.
/// A pair of several row tiles reads its keys several times; they are packed once beforehand, for as many pairs at a
/// time (a wave) as fit in packed_bytes. The rows of a single row tile pack each key tile when they come to it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_engine.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Bytes of packed keys and values alive at a time; at least one pair.
inline constexpr double packed_bytes = 64 << 20;

/// Bytes of raw states of unmerged splits alive at a time; beyond it splits run one after the other.
inline constexpr double split_state_bytes = 64 << 20;

/// Bundles pay as long as few rows share what is read, and their states stay in L2.
inline constexpr index_t bundle_rows = 32;

/// Multiply-adds below which waking another thread (some microseconds) costs more than it saves.
inline constexpr double serial_work = 1 << 20;

template <class Source, class Variant, class L>
class scheduler {
  using engine = tile_engine<Source, Variant, L>;
  using P = typename engine::P;
  using A = typename engine::A;
  using workspace = typename engine::workspace;

 public:
  scheduler(const problem<A, L>& p, const Source& kv, const Variant& variant, context& ctx)
      : problem_(p), kv_(kv), engine_(p, kv, variant), ctx_(ctx), workers_(ctx.concurrency()) {
    const call_shape& shape = p.shape;
    const index_t rows = shape.q_len * p.largest_group();
    pairs_ = shape.batch * shape.kv_heads;
    row_tiles_ = ceil_div(rows, row_tile_rows);
    tile_rows_ = std::min(rows, row_tile_rows);
    for (index_t b = 0; b < shape.batch; ++b) {
      const key_range tiles = engine_.tiles_of(b, 0, shape.q_len - 1);
      most_tiles_ = std::max(most_tiles_, tiles.end - tiles.begin);
      if (tiles.end > tiles.begin)
        most_splits_ = std::max(most_splits_, (tiles.end - 1) / split_tiles - tiles.begin / split_tiles + 1);
    }
    packs_ = row_tiles_ > 1 && most_tiles_ > 0 && slot_elements() > 0;  // tiles that a source holds lie there already
    wave_pairs_ = pairs_;
    if (packs_)
      wave_pairs_ = static_cast<index_t>(std::clamp(packed_bytes / pair_bytes(), 1.0, static_cast<double>(pairs_)));

    const double work = static_cast<double>(pairs_) * static_cast<double>(most_tiles_) *
                        static_cast<double>(tile_products()) * static_cast<double>(rows);
    if (work < serial_work) workers_ = 1;
    const index_t items = wave_pairs_ * row_tiles_;
    const index_t enough = 4 * workers_;  // tasks to keep everyone busy to the end
    const double state_bytes = static_cast<double>(items) * static_cast<double>(most_splits_) *
                               static_cast<double>(state_elements()) * sizeof(A);
    const bool may_split = workers_ > 1 && most_splits_ > 1 && state_bytes <= split_state_bytes;
    if (heads_lie_together(kv) && row_tiles_ == 1 && rows <= bundle_rows) {
      bundle_ = shape.kv_heads;
      const index_t parts = may_split ? most_splits_ : 1;
      if (workers_ > 1) bundle_ = std::clamp<index_t>(pairs_ * parts / enough, 1, shape.kv_heads);
      while (shape.kv_heads % bundle_ != 0) --bundle_;
    }
    splits_apart_ = may_split && items / bundle_ < enough;
  }

  void run() {
    if (!place()) return;
    for (index_t first = 0; first < pairs_; first += wave_pairs_) {
      const index_t count = std::min(wave_pairs_, pairs_ - first);
      if (packs_) pack_wave(first, count);
      if (splits_apart_) {
        attend_splits(first, count);
      } else {
        attend_rows(first, count);
      }
    }
  }

 private:
  /// Multiply-adds of a row with a tile.
  [[nodiscard]] index_t tile_products() const noexcept {
    return tile_tokens * (problem_.shape.head_dim + problem_.shape.value_dim);
  }
  /// Elements from one packed tile to the next; 0 if the source needs no room for them.
  [[nodiscard]] index_t slot_elements() const noexcept { return round_up(kv_.scratch_elements(), 64); }
  /// Estimates are in floating point: views of stride 0 may have any number of keys.
  [[nodiscard]] double pair_bytes() const noexcept {
    return static_cast<double>(most_tiles_) * static_cast<double>(slot_elements()) * sizeof(P);
  }
  [[nodiscard]] index_t state_elements() const noexcept {
    return round_up(tile_rows_ * (engine_.out_stride() + 2), panel_tokens);
  }

  /// Divides the context's scratch: a workspace a worker, packed tiles, states of splits. False if there is none.
  [[nodiscard]] bool place() {
    workspace measured;
    workspace_bytes_ = carve_workspace(nullptr, measured);
    const index_t packed = packs_ ? wave_pairs_ * most_tiles_ : 0;
    const index_t states = splits_apart_ ? wave_pairs_ * row_tiles_ * most_splits_ : 0;
    source_tile_bytes_ = packs_ ? 0 : static_cast<std::size_t>(slot_elements()) * sizeof(P);
    const std::size_t all_workspaces = (workspace_bytes_ * static_cast<std::size_t>(bundle_) + source_tile_bytes_) *
                                       static_cast<std::size_t>(workers_);
    const std::size_t all_members =
        static_cast<std::size_t>(round_up(workers_ * bundle_ * index_t{sizeof(member)}, 64));
    const std::size_t all_tiles = static_cast<std::size_t>(packed * slot_elements()) * sizeof(P);
    const std::size_t all_slots = static_cast<std::size_t>(packed) * sizeof(kv_tile<P>);
    const std::size_t all_states = static_cast<std::size_t>(states * state_elements()) * sizeof(A);
    std::byte* const memory = ctx_.detail_scratch(all_workspaces + all_members + all_tiles + all_states + all_slots);
    if (memory == nullptr) return false;
    std::byte* at = memory;
    const auto take = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
    workspaces_ = take(all_workspaces);
    members_ = reinterpret_cast<member*>(take(all_members));
    packed_ = reinterpret_cast<P*>(take(all_tiles));
    states_ = reinterpret_cast<A*>(take(all_states));
    tiles_ = reinterpret_cast<kv_tile<P>*>(at);
    return true;
  }

  std::size_t carve_workspace(std::byte* memory, workspace& w) const noexcept {
    return workspace::carve(memory, tile_rows_, engine_.q_stride(), engine_.out_stride(), w);
  }
  /// Workspace of a worker for the n-th row tile of a bundle.
  [[nodiscard]] workspace workspace_of(index_t worker, index_t n) const noexcept {
    std::byte* const own = workspaces_ + (workspace_bytes_ * static_cast<std::size_t>(bundle_) + source_tile_bytes_) *
                                             static_cast<std::size_t>(worker);
    workspace w;
    carve_workspace(own + source_tile_bytes_ + workspace_bytes_ * static_cast<std::size_t>(n), w);
    w.tile = reinterpret_cast<P*>(own);  // one for all: used by one row tile at a time
    return w;
  }

  [[nodiscard]] static bool heads_lie_together(const Source& kv) noexcept {
    if constexpr (requires { kv.heads_lie_together(); }) return kv.heads_lie_together();
    return false;
  }

  template <class F>
  void for_each(index_t tasks, const F& f) {
    if (workers_ == 1) return context::for_each_serially(tasks, f);
    ctx_.for_each(tasks, f);
  }

  /// Row tile `i` of a pair; no rows if a smaller group has fewer tiles.
  [[nodiscard]] row_tile row_tile_of(index_t pair, index_t i) const noexcept {
    const index_t g = pair % problem_.shape.kv_heads, first = i * row_tile_rows;
    return {pair / problem_.shape.kv_heads, g, first,
            std::clamp<index_t>(engine_.rows_of(g) - first, 0, row_tile_rows)};
  }

  [[nodiscard]] key_range pair_tiles(index_t b) const noexcept {
    return engine_.tiles_of(b, 0, problem_.shape.q_len - 1);
  }

  /// Packs the tiles that the pairs [first, first + count) read.
  void pack_wave(index_t first, index_t count) {
    constexpr index_t chunk = 4;  // tiles a task: some 100 KB
    const index_t chunks = ceil_div(most_tiles_, chunk);
    for_each(count * chunks, [&](index_t task, index_t) {
      const index_t slot = task / chunks, pair = first + slot;
      const index_t b = pair / problem_.shape.kv_heads, g = pair % problem_.shape.kv_heads;
      if (problem_.group_size(g) == 0) return;
      const key_range tiles = pair_tiles(b);
      const index_t begin = tiles.begin + task % chunks * chunk, end = std::min(begin + chunk, tiles.end);
      for (index_t i = begin; i < end; ++i) {
        const index_t at = slot * most_tiles_ + i - tiles.begin;
        tiles_[at] = kv_.tile(b, g, i, engine_.tokens_of(b, i), packed_ + at * slot_elements());
      }
    });
  }

  /// How key tile i of a pair of the wave is read: the function tile_at(b, g, i, scratch).
  [[nodiscard]] auto tile_reader(index_t first_pair) const noexcept {
    return [this, first_pair](index_t b, index_t g, index_t i, P* scratch) noexcept {
      if (!packs_) return kv_.tile(b, g, i, engine_.tokens_of(b, i), scratch);
      const index_t slot = b * problem_.shape.kv_heads + g - first_pair;
      return tiles_[slot * most_tiles_ + i - pair_tiles(b).begin];
    };
  }

  /// One row tile of a bundle at work.
  struct member {
    row_tile rows;
    workspace w;
    raw_states<A> states;
  };

  /// What a task works on: row tile `i` of `bundle_` neighbouring pairs of one sequence.
  struct bundle {
    index_t first_pair, i;
  };
  [[nodiscard]] row_tile row_tile_of(const bundle& item, index_t n) const noexcept {
    return row_tile_of(item.first_pair + n, item.i);
  }
  /// Key tiles of a bundle. Those of several pairs have all of their rows in it.
  [[nodiscard]] key_range tiles_of(const bundle& item) const noexcept {
    const row_tile t = row_tile_of(item, 0);
    if (bundle_ > 1) return pair_tiles(t.b);
    return t.rows == 0 ? key_range{0, 0} : engine_.tiles_of(t);
  }

  void load_queries(const bundle& item, index_t worker) const noexcept {
    for (index_t n = 0; n < bundle_; ++n) {
      workspace w = workspace_of(worker, n);
      engine_.load_queries(row_tile_of(item, n), w);
    }
  }

  /// Attends to the key tiles of one split, tile by tile, for all row tiles of a bundle. states_of(n, workspace) are
  /// the raw states of the n-th.
  template <class TileAt, class StatesOf>
  void attend_split(const bundle& item, key_range split, const TileAt& tile_at, index_t worker,
                    const StatesOf& states_of) const {
    const std::span<member> all(members_ + worker * bundle_, static_cast<std::size_t>(bundle_));
    std::size_t count = 0;
    for (index_t n = 0; n < bundle_; ++n) {
      const row_tile t = row_tile_of(item, n);
      const workspace w = workspace_of(worker, n);
      if (t.rows > 0) all[count++] = {t, w, states_of(n, w)};
    }
    const std::span<member> members = all.first(count);
    for (member& m : members) engine_.begin_split(m.rows, m.w, m.states);
    for (index_t i = split.begin; i < split.end; ++i) {
      if (count == 1) i = engine_.stream(members[0].rows, {i, split.end}, members[0].w, members[0].states);
      if (i == split.end) break;
      bool in_place = false;
      for (member& m : members) {
        engine_.attend(m.rows, i, tile_at, m.w, m.states);
        in_place = in_place || m.w.in_place;
      }
      if (in_place) attend_in_place(members, i);
    }
    for (member& m : members) engine_.end_split(m.rows, m.w, m.states);
  }

  /// Key tile i for those of a bundle who read it in place: all heads of a group of tokens before the next group, which
  /// is memory from front to back where a token's heads lie together.
  void attend_in_place(std::span<member> members, index_t i) const noexcept {
    constexpr index_t groups = tile_tokens / group_tokens;
    for (index_t group = 0; group < groups; ++group) {
      for (member& m : members) {
        if (m.w.in_place) engine_.score_group(m.rows, i, group, m.w);
      }
    }
    for (member& m : members) {
      if (m.w.in_place) engine_.weigh_groups(m.rows, m.w, m.states);
    }
    for (index_t group = 0; group < groups; ++group) {
      for (member& m : members) {
        if (m.w.in_place) engine_.apply_group(m.rows, i, group, m.w, m.states);
      }
    }
  }

  /// A task is a bundle: its splits from left to right, merged as they finish. Late rows see most keys: first.
  void attend_rows(index_t first, index_t count) {
    const auto tile_at = tile_reader(first);
    for_each(count / bundle_ * row_tiles_, [&](index_t task, index_t worker) {
      const bundle item{first + task / row_tiles_ * bundle_, row_tiles_ - 1 - task % row_tiles_};
      load_queries(item, worker);
      const key_range tiles = tiles_of(item);
      for (index_t begin = tiles.begin; begin < tiles.end;) {
        const key_range split{begin, std::min(round_up(begin + 1, split_tiles), tiles.end)};
        const bool is_first = begin == tiles.begin;
        attend_split(item, split, tile_at, worker,
                     [&](index_t, const workspace& w) { return is_first ? w.total : w.current; });
        for (index_t n = 0; n < bundle_ && !is_first; ++n) {
          const workspace w = workspace_of(worker, n);
          engine_.merge(row_tile_of(item, n), w.total, w.current);
        }
        begin = split.end;
      }
      for (index_t n = 0; n < bundle_; ++n) {
        const raw_states<A> total = workspace_of(worker, n).total;
        if (tiles.end == tiles.begin) engine_.clear(row_tile_of(item, n), total);
        engine_.finish(row_tile_of(item, n), total);
      }
    });
  }

  /// Raw states of split `split` of a wave's row tile.
  [[nodiscard]] raw_states<A> split_states(index_t item, index_t split) const noexcept {
    A* const at = states_ + (item * most_splits_ + split) * state_elements();
    A* const sums = at + tile_rows_ * engine_.out_stride();
    return {sums + tile_rows_, sums, at};
  }

  /// Split `i` of a row tile's key tiles; empty past the last.
  [[nodiscard]] static key_range split_of(key_range tiles, index_t i) noexcept {
    const index_t boundary = (tiles.begin / split_tiles + i) * split_tiles;
    return {std::max(tiles.begin, boundary), std::min(tiles.end, boundary + split_tiles)};
  }

  /// A task is one split of a bundle; then one task a row tile merges the splits from left to right.
  void attend_splits(index_t first, index_t count) {
    const auto tile_at = tile_reader(first);
    for_each(count / bundle_ * row_tiles_ * most_splits_, [&](index_t task, index_t worker) {
      const index_t i = task / most_splits_, split_index = task % most_splits_;
      const bundle item{first + i / row_tiles_ * bundle_, i % row_tiles_};
      const key_range split = split_of(tiles_of(item), split_index);
      if (split.end <= split.begin) return;
      load_queries(item, worker);
      attend_split(item, split, tile_at, worker, [&](index_t n, const workspace&) {
        return split_states((item.first_pair + n - first) * row_tiles_ + item.i, split_index);
      });
    });
    for_each(count * row_tiles_, [&](index_t i, index_t) {
      const row_tile t = row_tile_of(first + i / row_tiles_, i % row_tiles_);
      if (t.rows == 0) return;
      const key_range tiles = engine_.tiles_of(t);
      const raw_states<A> total = split_states(i, 0);
      if (tiles.end <= tiles.begin) engine_.clear(t, total);
      for (index_t n = 1; n < most_splits_; ++n) {
        const key_range split = split_of(tiles, n);
        if (split.begin < split.end) engine_.merge(t, total, split_states(i, n));
      }
      engine_.finish(t, total);
    });
  }

  const problem<A, L>& problem_;
  const Source& kv_;
  engine engine_;
  context& ctx_;
  index_t workers_;

  index_t pairs_ = 0;        // (sequence, KV head) combinations
  index_t row_tiles_ = 0;    // of the largest pair
  index_t tile_rows_ = 0;    // rows of its fullest row tile
  index_t most_tiles_ = 0;   // key tiles of the longest sequence
  index_t most_splits_ = 0;  // and its splits
  index_t wave_pairs_ = 0;   // pairs at a time
  index_t bundle_ = 1;       // pairs a task visits together
  bool packs_ = false;
  bool splits_apart_ = false;

  std::size_t workspace_bytes_ = 0;    // of one row tile
  std::size_t source_tile_bytes_ = 0;  // of a worker's tile for the source
  std::byte* workspaces_ = nullptr;
  member* members_ = nullptr;    // [workers, bundle]
  P* packed_ = nullptr;          // [wave pairs, most tiles, slot elements]
  A* states_ = nullptr;          // [wave pairs * row tiles, most splits, state elements]
  kv_tile<P>* tiles_ = nullptr;  // [wave pairs, most tiles]
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
