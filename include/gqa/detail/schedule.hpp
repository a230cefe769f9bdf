// SPDX-License-Identifier: Apache-2.0
/// \file
/// Runs a call as its plan divides it (detail/plan.hpp): pack, attend, merge, finish.
///
/// Pairs are the (family, KV head) combinations; a family is a sequence, or several that share keys (families.hpp). A
/// pair's rows are cut into tiles of 96 and its keys into splits of 1,024 tokens, both at fixed places. Splits always
/// finish on their own and merge left to right, so who computes which of them cannot be seen in the result:
///   * a task is a row tile, its splits one after the other;
///   * or (decode, long sequences among short ones) one split of a row tile: its raw state goes to memory, and a second
///     round merges.
/// Where a token's heads lie together in memory, row tiles of few rows are bundled: a task visits a key tile, or what
/// is read in place of it, 16 tokens, of all its KV heads before the next, and so reads memory from front to back. A
/// pair of several row tiles reads its keys several times; they are packed once beforehand, for a wave of pairs at a
/// time. The rows of a single row tile pack each key tile when they come to it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/families.hpp>
#include <gqa/detail/key_tiles.hpp>
#include <gqa/detail/plan.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/row_cut.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_engine.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Bundles pay as long as few rows share what is read, and their states stay in L2.
inline constexpr index_t bundle_rows = 32;

template <class Source, class Variant, class L>
class scheduler {
  using engine = tile_engine<Source, Variant, L>;
  using P = typename engine::P;
  using A = typename engine::A;
  using workspace = typename engine::workspace;

 public:
  scheduler(const problem<A, L>& p, const Source& kv, const Variant& variant, context& ctx) noexcept
      : problem_(p), kv_(kv), engine_(p, kv, variant), ctx_(ctx), largest_group_(p.largest_group()) {}

  void run();

 private:
  /// The plan's families [first, end), and some of their KV heads.
  struct wave {
    index_t first, end;
    index_t first_head, heads;
  };

  /// What a task works on: row tile `i` of `bundle` neighbouring KV heads of one family.
  struct bundle {
    index_t family, g, i;
  };

  /// One row tile of a bundle at work.
  struct member {
    row_tile rows;
    workspace w;
    raw_states<A> states;
  };

  /// Finds sequences that share pages, if that is wanted. False if there is no memory.
  [[nodiscard]] bool find_families() {
    const index_t sequences = problem_.shape.batch;
    index_t* const memory = ctx_.detail_families(sequences);
    if (memory == nullptr) return false;
    families_ = families(sequences, memory);
    if constexpr (engine::has_pages) {
      if (!problem_.ragged.shares_prefixes) return true;
      const auto tasks = static_cast<index_t>(tasks_of_a_share) * (ctx_.concurrency() == 1 ? 0 : ctx_.concurrency());
      families_.find(sequences_in_pages{*this}, ceil_div(tasks, problem_.shape.kv_heads));
    }
    return true;
  }

  /// How a family's rows, so many of a KV head, are cut into row tiles.
  [[nodiscard]] row_cut cut_of(const family& f, index_t rows) const noexcept {
    if constexpr (has_query_blocks<Variant>) {
      if (f.members.size() == 1) return engine_.cut_in_blocks(f.members.front(), largest_group_);
    }
    return row_cut(rows);
  }

  /// Rows of a sequence's largest group.
  [[nodiscard]] index_t most_rows_of(index_t b) const noexcept { return problem_.q_len(b) * largest_group_; }

  /// What families are found by.
  struct sequences_in_pages {
    const scheduler& call;
    [[nodiscard]] index_t rows(index_t b) const noexcept { return call.most_rows_of(b); }
    [[nodiscard]] key_tiles tiles(index_t b) const noexcept { return call.engine_.tiles_of(std::span(&b, 1)); }
    [[nodiscard]] index_t length(index_t b) const noexcept { return call.engine_.length(b); }
    [[nodiscard]] index_t page_size() const noexcept { return call.kv_.page_size(); }
    [[nodiscard]] std::span<const std::int32_t> pages(index_t b) const noexcept {
      return call.kv_.pages_of(call.problem_.kv_sequence(b));
    }
    [[nodiscard]] bool has_shared_pages(index_t b) const noexcept {
      return call.kv_.has_shared_pages(call.problem_.kv_sequence(b));
    }
  };

  [[nodiscard]] const call_plan* find_plan() {
    const call_shape& shape = problem_.shape;
    const auto rows_of = [&](index_t n) {
      index_t rows = 0;
      for (const index_t b : families_[n].members) rows += most_rows_of(b);
      return rows;
    };
    index_t most_rows = 0;
    for (index_t n = 0; n < families_.count(); ++n) most_rows = (std::max)(most_rows, rows_of(n));
    tile_rows_ = (std::min)(most_rows, row_tile_rows);
    // A bundle's row tiles have all rows of their KV heads.
    bool single_tiles = true;
    for (index_t n = 0; n < families_.count() && has_query_blocks<Variant>; ++n)
      single_tiles = single_tiles && cut_of(families_[n], rows_of(n)).tiles() <= 1;
    const plan_request request{families_.count(),
                               shape.kv_heads,
                               ctx_.concurrency(),
                               tile_tokens * (shape.head_dim + shape.value_dim),
                               makes_tiles_in_cache ? 0 : slot_elements() * index_t{sizeof(P)},
                               state_elements() * index_t{sizeof(A)},
                               heads_lie_together(kv_) && most_rows <= bundle_rows && single_tiles};
    const auto asks_of = [&](index_t n) -> family_request {
      const family f = families_[n];
      return {engine_.tiles_of(f.members), cut_of(f, rows_of(n)).tiles(), (std::min)(rows_of(n), row_tile_rows)};
    };
    const auto visits_of = [&](index_t n) {
      const family f = families_[n];
      index_t visits = 0;
      if (f.members.size() == 1) {
        const index_t b = f.members.front();
        const row_cut cut = cut_of(f, rows_of(n));
        for (index_t i = 0; i < cut.tiles(); ++i) {
          const auto [first, count] = cut.tile(i, largest_group_, rows_of(n));
          if (count == 0) continue;
          visits += engine_.tiles_of(b, first / largest_group_, (first + count - 1) / largest_group_).size() *
                    (std::max)(count, least_rows);
        }
        return visits;
      }
      for (std::size_t m = 0; m < f.members.size(); ++m) {
        const index_t rows = most_rows_of(f.members[m]);
        const index_t tiles = engine_.tiles_of(f.members.subspan(m, 1)).size(), shared = (std::min)(f.shared[m], tiles);
        visits += shared * rows + (tiles - shared) * (std::max)(rows, least_rows);
      }
      return visits;
    };
    return detail::find_plan(request, asks_of, visits_of, ctx_);
  }

  /// Whether a source's tiles are made anew from memory already in their order, which costs less than packed ones would
  /// to write and read again.
  static constexpr bool makes_tiles_in_cache = tile_engine<Source, Variant, L>::makes_tiles_in_cache;
  /// Elements from one packed tile to the next; 0 if the source needs no room for them.
  [[nodiscard]] index_t slot_elements() const noexcept { return round_up(kv_.scratch_elements(), 64); }
  [[nodiscard]] index_t state_elements() const noexcept {
    return round_up(tile_rows_ * (engine_.out_stride() + 2), panel_tokens);
  }

  /// Divides the context's scratch: a workspace a worker, packed tiles, states of splits. False if there is none.
  [[nodiscard]] bool place() {
    workspace measured;
    workspace_bytes_ = carve_workspace(nullptr, measured);
    source_tile_bytes_ = static_cast<std::size_t>(slot_elements()) * sizeof(P);
    const index_t workers = plan_->workers;
    const std::size_t all_workspaces = worker_bytes() * static_cast<std::size_t>(workers);
    const std::size_t all_members =
        static_cast<std::size_t>(round_up(workers * plan_->bundle * index_t{sizeof(member)}, 64));
    const std::size_t all_tiles = static_cast<std::size_t>(plan_->most_slots * slot_elements()) * sizeof(P);
    const std::size_t all_slots = static_cast<std::size_t>(plan_->most_slots) * sizeof(kv_tile<P>);
    const std::size_t all_states = static_cast<std::size_t>(plan_->most_states * state_elements()) * sizeof(A);
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
    return workspace::carve(memory, tile_rows_, engine::score_rows(tile_rows_), engine_.q_stride(),
                            engine_.out_stride(), w);
  }
  [[nodiscard]] std::size_t worker_bytes() const noexcept {
    return workspace_bytes_ * static_cast<std::size_t>(plan_->bundle) + source_tile_bytes_;
  }
  /// Workspace of a worker for the n-th row tile of a bundle.
  [[nodiscard]] workspace workspace_of(index_t worker, index_t n) const noexcept {
    std::byte* const own = workspaces_ + worker_bytes() * static_cast<std::size_t>(worker);
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
    if (plan_->workers == 1) return context::for_each_serially(tasks, f);
    ctx_.for_each(tasks, f);
  }

  [[nodiscard]] const family_plan& plan_of(index_t n) const noexcept {
    return plan_->families[static_cast<std::size_t>(n)];
  }

  /// Where the n-th of a wave's tasks, or of its slots, belongs: each of its families has `count` of them for each of
  /// `heads`, after `first` before it.
  struct place_in_wave {
    const family_plan& plan;
    index_t head, n;
  };
  [[nodiscard]] place_in_wave place_of(const wave& w, index_t heads, index_t n, index_t family_plan::*count,
                                       index_t family_plan::*first) const noexcept {
    const auto begin = plan_->families.begin() + w.first, end = plan_->families.begin() + w.end;
    const auto after =
        std::upper_bound(begin, end, n / heads, [first](index_t at, const family_plan& f) { return at < f.*first; });
    const family_plan& f = *(after - 1);
    const index_t within = n - heads * f.*first;
    return {f, within / (f.*count), within % (f.*count)};
  }

  /// Packs the tiles that several row tiles of a wave read.
  void pack(const wave& w) {
    const family_plan& last = plan_of(w.end - 1);
    for_each(w.heads * (last.first_slot + last.slots) / tiles_packed_together, [&](index_t task, index_t) {
      const place_in_wave at =
          place_of(w, w.heads, task * tiles_packed_together, &family_plan::slots, &family_plan::first_slot);
      const family_plan& f = at.plan;
      const index_t g = w.first_head + at.head;
      if (problem_.group_size(g) == 0) return;
      const index_t begin = f.asks.tiles.begin() + at.n,
                    end = (std::min)(begin + tiles_packed_together, f.asks.tiles.end());
      for (const key_range some : f.asks.tiles.read_of({begin, end})) {
        for (index_t i = some.begin; i < some.end; ++i) {
          const index_t slot = slot_of(w, f, g, i);
          tiles_[slot] = engine_.tile(families_[f.family].members.front(), g, i, packed_ + slot * slot_elements());
        }
      }
    });
  }

  [[nodiscard]] static index_t slot_of(const wave& w, const family_plan& f, index_t g, index_t tile) noexcept {
    return w.heads * f.first_slot + (g - w.first_head) * f.slots + tile - f.asks.tiles.begin();
  }

  /// How key tile i of a sequence of the wave is read: the function tile_at(b, g, i, scratch).
  [[nodiscard]] auto tile_reader(const wave& w, const family_plan& f) const noexcept {
    return [this, &w, &f](index_t b, index_t g, index_t i, P* scratch) noexcept {
      if (f.slots == 0) return engine_.tile(b, g, i, scratch);
      return tiles_[slot_of(w, f, g, i)];
    };
  }

  /// The n-th row tile of a bundle; no rows if a smaller group has fewer tiles.
  [[nodiscard]] row_tile row_tile_of(const bundle& item, index_t n) const noexcept {
    const index_t g = item.g + n;
    const family f = families_[item.family];
    const index_t all = engine_.rows_of(f.members, g);
    const row_range rows = cut_of(f, all).tile(item.i, problem_.group_size(g), all);
    return {f.members, g, rows.first, rows.count};
  }
  /// Key tiles of a bundle. Those of several KV heads have all of their rows in it.
  [[nodiscard]] key_tiles tiles_of(const bundle& item) const noexcept {
    if (plan_->bundle > 1) return engine_.tiles_of(families_[item.family].members);
    const row_tile t = row_tile_of(item, 0);
    return t.rows == 0 ? key_tiles{} : engine_.tiles_of(t);
  }

  /// Runs the tasks of a wave. Late rows see most keys: first.
  void attend(const wave& w) {
    const index_t heads = w.heads / plan_->bundle;
    const family_plan& last = plan_of(w.end - 1);
    for_each(heads * (last.first_task + last.tasks), [&](index_t task, index_t worker) {
      const place_in_wave at = place_of(w, heads, task, &family_plan::tasks, &family_plan::first_task);
      const family_plan& f = at.plan;
      const bundle item{f.family, w.first_head + at.head * plan_->bundle, f.asks.row_tiles - 1 - at.n / f.parts};
      if (f.parts == 1) {
        attend_rows(item, tile_reader(w, f), worker);
      } else {
        attend_part(w, f, item, at.n % f.parts, worker);
      }
    });
  }

  /// A bundle's splits from left to right, merged as they finish.
  template <class TileAt>
  void attend_rows(const bundle& item, const TileAt& tile_at, index_t worker) const {
    load_queries(item, worker);
    const key_tiles tiles = tiles_of(item);
    bool any = false;  // whether there is a split before
    for (index_t split = 0; split < tiles.splits(); ++split) {
      if (hides(item, tiles.split(split))) continue;
      attend_split(item, tiles, tiles.split(split), tile_at, worker,
                   [any](index_t, const workspace& w) { return any ? w.current : w.total; });
      for (index_t n = 0; n < plan_->bundle && any; ++n) {
        const workspace w = workspace_of(worker, n);
        engine_.merge(row_tile_of(item, n), w.total, w.current);
      }
      any = true;
    }
    for (index_t n = 0; n < plan_->bundle; ++n) {
      const raw_states<A> total = workspace_of(worker, n).total;
      if (!any) engine_.clear(row_tile_of(item, n), total);
      engine_.finish(row_tile_of(item, n), total);
    }
  }

  /// Whether a variant says that none of a bundle's rows sees any of some key tiles.
  [[nodiscard]] bool hides(const bundle& item, key_range tiles) const {
    if constexpr (hides_blocks<Variant>) {
      for (index_t n = 0; n < plan_->bundle; ++n) {
        const row_tile t = row_tile_of(item, n);
        if (t.rows > 0 && engine_.find_block_visible(t, tiles) != visibility::none) return false;
      }
      return true;
    }
    return false;
  }

  /// One split of a bundle, its states left in memory.
  void attend_part(const wave& w, const family_plan& f, const bundle& item, index_t part, index_t worker) const {
    const key_tiles tiles = tiles_of(item);
    if (part >= tiles.splits()) return;  // a row tile that sees less than the family's others
    load_queries(item, worker);
    attend_split(item, tiles, tiles.split(part), tile_reader(w, f), worker, [&](index_t n, const workspace&) {
      return part_states(w, f, {item.family, item.g + n, item.i}, part);
    });
  }

  /// Merges the splits of row tiles from left to right, where they were tasks of their own.
  void merge_apart(const wave& w) {
    const family_plan& last = plan_of(w.end - 1);
    for_each(w.heads * (last.first_merge + last.merges), [&](index_t task, index_t) {
      const place_in_wave at = place_of(w, w.heads, task, &family_plan::merges, &family_plan::first_merge);
      const family_plan& f = at.plan;
      const bundle item{f.family, w.first_head + at.head, at.n};
      const row_tile t = row_tile_of(item, 0);
      if (t.rows == 0) return;
      const key_tiles tiles = engine_.tiles_of(t);
      const raw_states<A> total = part_states(w, f, item, 0);
      if (tiles.size() == 0) engine_.clear(t, total);
      for (index_t n = 1; n < tiles.splits(); ++n) engine_.merge(t, total, part_states(w, f, item, n));
      engine_.finish(t, total);
    });
  }

  /// Raw states of a split that is a task of its own.
  [[nodiscard]] raw_states<A> part_states(const wave& w, const family_plan& f, const bundle& item,
                                          index_t part) const noexcept {
    const index_t row_tile = (item.g - w.first_head) * f.asks.row_tiles + item.i;
    A* const at = states_ + (w.heads * f.first_state + row_tile * f.parts + part) * state_elements();
    A* const sums = at + tile_rows_ * engine_.out_stride();
    return {sums + tile_rows_, sums, at};
  }

  void load_queries(const bundle& item, index_t worker) const noexcept {
    for (index_t n = 0; n < plan_->bundle; ++n) {
      workspace w = workspace_of(worker, n);
      engine_.load_queries(row_tile_of(item, n), w);
    }
  }

  /// Attends to the key tiles of one split, tile by tile, for all row tiles of a bundle. states_of(n, workspace) are
  /// the raw states of the n-th.
  template <class TileAt, class StatesOf>
  void attend_split(const bundle& item, const key_tiles& tiles, key_range split, const TileAt& tile_at, index_t worker,
                    const StatesOf& states_of) const {
    const std::span<member> all(members_ + worker * plan_->bundle, static_cast<std::size_t>(plan_->bundle));
    std::size_t count = 0;
    for (index_t n = 0; n < plan_->bundle; ++n) {
      const row_tile t = row_tile_of(item, n);
      const workspace w = workspace_of(worker, n);
      if (t.rows > 0) all[count++] = {t, w, states_of(n, w)};
    }
    const std::span<member> members = all.first(count);
    for (member& m : members) engine_.begin_split(m.rows, m.w, m.states);
    const family of_rows = families_[item.family];
    if (of_rows.members.size() == 1) {
      for (const key_range some : tiles.read_of(split)) attend_tiles(members, some, tile_at);
    } else {
      for (const member& m : members) attend_shared(m, of_rows, split, tile_at);
    }
    for (member& m : members) engine_.end_split(m.rows, m.w, m.states);
  }

  /// Key tiles for all rows of a family's row tile as far as its members have them in common, and the rest for those
  /// who share more of it, and so on, until each is alone with its own. A row's state goes on from one to the next.
  template <class TileAt>
  void attend_shared(member m, const family& f, key_range tiles, const TileAt& tile_at) const {
    const bool alone = f.members.size() == 1;
    const index_t common = alone ? tiles.end : *std::min_element(f.shared.begin() + 1, f.shared.end());
    const index_t end = std::clamp(common, tiles.begin, tiles.end);
    const key_tiles seen = engine_.tiles_of(m.rows);
    const key_range together{(std::max)(tiles.begin, seen.begin()), (std::min)(end, seen.end())};
    if (together.size() > 0) attend_tiles(std::span(&m, 1), together, tile_at);
    if (end == tiles.end) return;
    for (std::size_t first = 0, next = 0; first < f.members.size(); first = next) {
      for (next = first + 1; next < f.members.size() && f.shared[next] > end;) ++next;
      const family some{f.members.subspan(first, next - first), f.shared.subspan(first, next - first)};
      member part = m;
      engine_.narrow(some.members, part.rows, part.w, part.states);
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
      if (m.w.in_place) engine_.look_ahead(m.rows, readers, m.w);
    }
    for (index_t i = tiles.begin; i < tiles.end;) {
      if (members.size() == 1) i = engine_.stream(members[0].rows, {i, tiles.end}, members[0].w, members[0].states);
      if (i == tiles.end) break;
      const bool runs = in_place.begin <= i && i < in_place.end;
      const key_range run{i, runs ? (std::min)({i + run_tiles, in_place.end, tiles.end}) : i + 1};
      if (runs) attend_in_place(members, run);
      for (; i < run.end; ++i) {
        for (member& m : members) {
          if (!(runs && m.w.in_place)) engine_.attend(m.rows, i, tile_at, m.w, m.states);
        }
      }
    }
  }

  /// A run of key tiles for those of a bundle who read it in place: all heads of a group of tokens before the next
  /// group, which is memory from front to back where a token's heads lie together.
  void attend_in_place(std::span<member> members, key_range run) const noexcept {
    const auto for_each_group = [&](const auto& f) {
      typename engine::group_place at{run.begin, 0, 0};
      for (; at.i < run.end; ++at.i, ++at.slot) {
        for (at.n = 0; at.n < tile_tokens / group_tokens; ++at.n) {
          for (member& m : members) {
            if (m.w.in_place) f(m, at);
          }
        }
      }
    };
    for_each_group([this](member& m, const auto& at) { engine_.score_group(m.rows, at, m.w); });
    for (member& m : members) {
      if (m.w.in_place) engine_.weigh_run(m.rows, run.size(), m.w, m.states);
    }
    for_each_group([this](member& m, const auto& at) { engine_.apply_group(m.rows, at, m.w, m.states); });
  }

  const problem<A, L>& problem_;
  const Source& kv_;
  engine engine_;
  context& ctx_;
  index_t largest_group_;  // query heads of a KV head
  families families_;
  const call_plan* plan_ = nullptr;

  index_t tile_rows_ = 0;  // of the fullest row tile

  std::size_t workspace_bytes_ = 0;    // of one row tile
  std::size_t source_tile_bytes_ = 0;  // of a worker's tile for the source
  std::byte* workspaces_ = nullptr;
  member* members_ = nullptr;    // [workers, bundle]
  P* packed_ = nullptr;          // [slots, slot elements]
  A* states_ = nullptr;          // [splits apart, state elements]
  kv_tile<P>* tiles_ = nullptr;  // [slots]
};

// Not in the class: so that programs can share a call's code (extern template), which is most of what they take to
// compile.
template <class Source, class Variant, class L>
void scheduler<Source, Variant, L>::run() {
  if (!find_families()) return;
  plan_ = find_plan();
  if (plan_ == nullptr || !place() || ctx_.detail_is_dry()) return;
  const index_t kv_heads = problem_.shape.kv_heads;
  for (const plan_wave& planned : plan_->waves) {
    for (index_t g = 0; g < kv_heads; g += planned.heads) {
      const wave w{planned.first, planned.end, g, (std::min)(planned.heads, kv_heads - g)};
      pack(w);
      attend(w);
      merge_apart(w);
    }
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
