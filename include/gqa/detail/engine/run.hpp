// SPDX-License-Identifier: Apache-2.0
/// \file
/// engine: runs a call as its plan divides it: pack, attend, merge, finish.
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
///
/// One engine is compiled for each type of panels P and of queries and weights L, whatever sources and variants a
/// program has.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/engine/division.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/families.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/engine/plan.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/row_states.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/engine/walk.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class P, class L>
class engine {
  using A = accumulator_t<P>;
  using member = bundle_member<P, L>;

 public:
  /// A checked call. Nothing is written where a capacity error was raised and exceptions are off.
  static void run(const problem<A, L>& p, const tile_source<P>& kv, const row_rules<A>& rules, context& ctx);

 private:
  /// The plan's families [first, end), and some of their KV heads.
  struct wave {
    index_t first, end;
    index_t first_head, heads;
  };

  /// memory: the lengths of sequences, and what families are found in.
  engine(const problem<A, L>& p, const tile_source<P>& kv, const row_rules<A>& rules, index_t* memory,
         context& ctx) noexcept
      : call_(p, kv, rules, memory),
        walk_(call_),
        division_(call_.rows, call_.sees, kv, memory + p.shape.batch),
        ctx_(ctx) {}

  void run_waves();

  /// Elements from one packed tile to the next; 0 if the source needs no room for them.
  [[nodiscard]] index_t slot_elements() const noexcept { return round_up(call_.kv.about().scratch_elements, 64); }
  [[nodiscard]] index_t bundle_size() const noexcept { return division_.plan().bundle; }

  /// Divides the context's scratch: a workspace a worker, packed tiles, states of splits. False if there is none.
  [[nodiscard]] bool place() {
    const call_plan& plan = division_.plan();
    workspace<P, L> measured;
    workspace_bytes_ = workspace<P, L>::carve(nullptr, call_, division_.tile_rows(), measured);
    source_tile_bytes_ = static_cast<std::size_t>(slot_elements()) * sizeof(P);
    const std::size_t all_workspaces = worker_bytes() * static_cast<std::size_t>(plan.workers);
    const auto all_members =
        static_cast<std::size_t>(round_up(plan.workers * plan.bundle * index_t{sizeof(member)}, 64));
    const std::size_t all_tiles = static_cast<std::size_t>(plan.most_slots * slot_elements()) * sizeof(P);
    const std::size_t all_slots = static_cast<std::size_t>(plan.most_slots) * sizeof(kv_tile<P>);
    const std::size_t all_states = static_cast<std::size_t>(plan.most_states * division_.state_elements()) * sizeof(A);
    std::byte* at = ctx_.detail_scratch(all_workspaces + all_members + all_tiles + all_states + all_slots);
    if (at == nullptr) return false;
    const auto take = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
    workspaces_ = take(all_workspaces);
    members_ = reinterpret_cast<member*>(take(all_members));
    packed_ = reinterpret_cast<P*>(take(all_tiles));
    states_ = reinterpret_cast<A*>(take(all_states));
    tiles_ = reinterpret_cast<kv_tile<P>*>(at);
    return true;
  }
  [[nodiscard]] std::size_t worker_bytes() const noexcept {
    return workspace_bytes_ * static_cast<std::size_t>(bundle_size()) + source_tile_bytes_;
  }
  /// Workspace of a worker for the n-th row tile of a bundle.
  [[nodiscard]] workspace<P, L> workspace_of(index_t worker, index_t n) const noexcept {
    std::byte* const own = workspaces_ + worker_bytes() * static_cast<std::size_t>(worker);
    workspace<P, L> w;
    workspace<P, L>::carve(own + source_tile_bytes_ + workspace_bytes_ * static_cast<std::size_t>(n), call_,
                           division_.tile_rows(), w);
    w.tile = reinterpret_cast<P*>(own);  // one for all: used by one row tile at a time
    return w;
  }

  template <class F>
  void for_each(index_t tasks, const F& f) {
    if (division_.plan().workers == 1) return context::for_each_serially(tasks, f);
    ctx_.for_each(tasks, f);
  }

  /// Where the n-th of a wave's tasks, or of its slots, belongs: each of its families has `count` of them for each of
  /// `heads`, after `first` before it.
  struct place_in_wave {
    const family_plan& plan;
    index_t head, n;
  };
  [[nodiscard]] place_in_wave place_of(const wave& w, index_t heads, index_t n, index_t family_plan::*count,
                                       index_t family_plan::*first) const noexcept {
    const auto families = division_.plan().families;
    const auto begin = families.begin() + w.first, end = families.begin() + w.end;
    const auto after =
        std::upper_bound(begin, end, n / heads, [first](index_t at, const family_plan& f) { return at < f.*first; });
    const family_plan& f = *(after - 1);
    const index_t within = n - heads * f.*first;
    return {f, within / (f.*count), within % (f.*count)};
  }
  [[nodiscard]] const family_plan& last_of(const wave& w) const noexcept {
    return division_.plan().families[static_cast<std::size_t>(w.end - 1)];
  }

  /// Packs the tiles that several row tiles of a wave read.
  void pack(const wave& w) {
    const family_plan& last = last_of(w);
    for_each(w.heads * (last.first_slot + last.slots) / tiles_packed_together, [&](index_t task, index_t) {
      const place_in_wave at =
          place_of(w, w.heads, task * tiles_packed_together, &family_plan::slots, &family_plan::first_slot);
      const family_plan& f = at.plan;
      const index_t g = w.first_head + at.head;
      if (call_.rows.call().group_size(g) == 0) return;
      const index_t begin = f.asks.tiles.begin() + at.n,
                    end = (std::min)(begin + tiles_packed_together, f.asks.tiles.end());
      const index_t b = division_.family_of(f.family).members.front();
      for (const key_range some : f.asks.tiles.read_of({begin, end})) {
        for (index_t i = some.begin; i < some.end; ++i) {
          const index_t slot = slot_of(w, f, g, i);
          tiles_[slot] = call_.tile(b, g, i, packed_ + slot * slot_elements());
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
      if (f.slots == 0) return call_.tile(b, g, i, scratch);
      return tiles_[slot_of(w, f, g, i)];
    };
  }

  /// Runs the tasks of a wave. Late rows see most keys: first.
  void attend(const wave& w) {
    const index_t heads = w.heads / bundle_size();
    const family_plan& last = last_of(w);
    for_each(heads * (last.first_task + last.tasks), [&](index_t task, index_t worker) {
      const place_in_wave at = place_of(w, heads, task, &family_plan::tasks, &family_plan::first_task);
      const family_plan& f = at.plan;
      const bundle item{f.family, w.first_head + at.head * bundle_size(), f.asks.row_tiles - 1 - at.n / f.parts};
      if (f.parts == 1) {
        attend_rows(w, f, item, worker);
      } else {
        attend_part(w, f, item, at.n % f.parts, worker);
      }
    });
  }

  /// A bundle's splits from left to right, merged as they finish.
  void attend_rows(const wave& w, const family_plan& f, const bundle& item, index_t worker) const {
    load_queries_of(item, worker);
    const key_tiles tiles = division_.tiles_of(item);
    bool any = false;  // whether there is a split before
    for (index_t split = 0; split < tiles.splits(); ++split) {
      if (division_.hides(item, tiles.split(split))) continue;
      attend_split(w, f, item, tiles, split, worker,
                   [any](index_t, const workspace<P, L>& own) { return any ? own.current : own.total; });
      for (index_t n = 0; n < bundle_size() && any; ++n) {
        const workspace<P, L> own = workspace_of(worker, n);
        merge_states(call_, division_.row_tile_of(item, n), own.total, own.current);
      }
      any = true;
    }
    for (index_t n = 0; n < bundle_size(); ++n) {
      const raw_states<A> total = workspace_of(worker, n).total;
      const row_tile t = division_.row_tile_of(item, n);
      if (!any) clear_states(call_, t, total);
      finish_rows(call_, t, total);
    }
  }
  /// One split of a bundle, its states left in memory.
  void attend_part(const wave& w, const family_plan& f, const bundle& item, index_t part, index_t worker) const {
    const key_tiles tiles = division_.tiles_of(item);
    if (part >= tiles.splits()) return;  // a row tile that sees less than the family's others
    load_queries_of(item, worker);
    attend_split(w, f, item, tiles, part, worker, [&](index_t n, const workspace<P, L>&) {
      return part_states(w, f, {item.family, item.g + n, item.i}, part);
    });
  }
  /// The n-th split for all row tiles of a bundle. states_of(n, workspace) are the raw states of the n-th of those.
  template <class StatesOf>
  void attend_split(const wave& w, const family_plan& f, const bundle& item, const key_tiles& tiles, index_t split,
                    index_t worker, const StatesOf& states_of) const {
    const std::span<member> all(members_ + worker * bundle_size(), static_cast<std::size_t>(bundle_size()));
    std::size_t count = 0;
    for (index_t n = 0; n < bundle_size(); ++n) {
      const row_tile t = division_.row_tile_of(item, n);
      const workspace<P, L> own = workspace_of(worker, n);
      if (t.rows > 0) all[count++] = {t, own, states_of(n, own)};
    }
    walk_.attend_split(all.first(count), division_.family_of(item.family), tiles, tiles.split(split),
                       tile_reader(w, f));
  }
  void load_queries_of(const bundle& item, index_t worker) const noexcept {
    for (index_t n = 0; n < bundle_size(); ++n) {
      workspace<P, L> w = workspace_of(worker, n);
      load_queries(call_, division_.row_tile_of(item, n), w);
    }
  }

  /// Merges the splits of row tiles from left to right, where they were tasks of their own.
  void merge_apart(const wave& w) {
    const family_plan& last = last_of(w);
    for_each(w.heads * (last.first_merge + last.merges), [&](index_t task, index_t) {
      const place_in_wave at = place_of(w, w.heads, task, &family_plan::merges, &family_plan::first_merge);
      const family_plan& f = at.plan;
      const bundle item{f.family, w.first_head + at.head, at.n};
      const row_tile t = division_.row_tile_of(item, 0);
      if (t.rows == 0) return;
      const key_tiles tiles = call_.sees.tiles_of(t);
      const raw_states<A> total = part_states(w, f, item, 0);
      if (tiles.size() == 0) clear_states(call_, t, total);
      for (index_t n = 1; n < tiles.splits(); ++n) merge_states(call_, t, total, part_states(w, f, item, n));
      finish_rows(call_, t, total);
    });
  }
  /// Raw states of a split that is a task of its own.
  [[nodiscard]] raw_states<A> part_states(const wave& w, const family_plan& f, const bundle& item,
                                          index_t part) const noexcept {
    const index_t row_tile = (item.g - w.first_head) * f.asks.row_tiles + item.i;
    A* const at = states_ + (w.heads * f.first_state + row_tile * f.parts + part) * division_.state_elements();
    A* const sums = at + division_.tile_rows() * call_.out_stride();
    return {sums + division_.tile_rows(), sums, at};
  }

  engine_call<P, L> call_;
  walk<P, L> walk_;
  call_division division_;
  context& ctx_;

  std::size_t workspace_bytes_ = 0;    // of one row tile
  std::size_t source_tile_bytes_ = 0;  // of a worker's tile for the source
  std::byte* workspaces_ = nullptr;
  member* members_ = nullptr;    // [workers, bundle]
  P* packed_ = nullptr;          // [slots, slot elements]
  A* states_ = nullptr;          // [splits apart, state elements]
  kv_tile<P>* tiles_ = nullptr;  // [slots]
};

// Not in the class: so that programs can share the engine's code (extern template), which is most of what they take to
// compile.
template <class P, class L>
void engine<P, L>::run(const problem<A, L>& p, const tile_source<P>& kv, const row_rules<A>& rules, context& ctx) {
  index_t* const memory = ctx.detail_families(p.shape.batch);
  if (memory == nullptr) return;
  for (index_t b = 0; b < p.shape.batch; ++b) memory[b] = p.length(kv, b);
  engine(p, kv, rules, memory, ctx).run_waves();
}

template <class P, class L>
void engine<P, L>::run_waves() {
  const index_t tile_bytes = slot_elements() * index_t{sizeof(P)};
  if (!division_.find({tile_bytes, index_t{sizeof(A)}}, ctx_) || !place() || ctx_.detail_is_dry()) return;
  const index_t kv_heads = call_.shape.kv_heads;
  for (const plan_wave& planned : division_.plan().waves) {
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
