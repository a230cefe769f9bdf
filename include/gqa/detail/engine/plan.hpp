// SPDX-License-Identifier: Apache-2.0
/// \file
/// The plan: how a call is divided into tasks, so that every worker is busy to the end. It says who computes what and
/// when, never how, so no plan changes a bit. What it divides are families (detail/engine/families.hpp): a sequence
/// each, or several that share keys.
///
/// Cost is counted in visits of a key tile by a row: those of one row tile by its rows, or by eight where it has fewer,
/// for then memory is what takes time. A row tile of a (family, KV head) is a task, unless it is more than a quarter
/// of a worker's share of the call: then each of its splits is a task, if memory for their states allows. The longest
/// families come first, as in longest-processing-time-first scheduling (Graham 1969): what runs last is short. Where
/// no task is more than a quarter of a share, nobody waits for longer than that.
///
/// Where keys are packed beforehand, for sequences of several row tiles, those that fit into packed_bytes together make
/// a wave; of one that does not fit, some heads at a time do.
///
/// A plan stays in the context and serves all calls of its shape: the layers of a model, and the next tokens until a
/// sequence begins a new key tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {

/// Bytes of packed keys and values alive at a time; at least those of one KV head of a sequence.
inline constexpr double packed_bytes = 64 << 20;

/// Bytes of raw states of unmerged splits alive at a time.
inline constexpr double split_state_bytes = 64 << 20;

/// Multiply-adds below which waking another thread (some microseconds) costs more than it saves.
inline constexpr double serial_work = 1 << 21;

/// A visit of a key tile costs what it costs so many rows, at least.
inline constexpr index_t least_rows = 8;

/// Tasks a worker's share of a call is cut into at least, where it can be.
inline constexpr double tasks_of_a_share = 4;

/// Key tiles that one task packs: some 100 KB.
inline constexpr index_t tiles_packed_together = 4;

inline namespace GQA_ISA {

/// What a plan depends on, beside the key tiles of the families.
struct plan_request {
  index_t families = {}, kv_heads = {};
  index_t workers = {};
  index_t visit_products = {};     // multiply-adds of a row with a key tile
  index_t packed_tile_bytes = {};  // of a key tile packed beforehand, 0 where the source has them
  index_t state_bytes = {};        // of a row tile
  bool bundles = {};               // whether the row tiles of several KV heads may be one task

  [[nodiscard]] friend bool operator==(const plan_request&, const plan_request&) = default;
};

/// What a family asks for, of its largest group.
struct family_request {
  key_tiles tiles;    // that some of its queries may see
  index_t row_tiles;  // that its rows are cut into
  index_t most_rows;  // of a row tile

  [[nodiscard]] friend bool operator==(const family_request&, const family_request&) = default;
};

/// A family's part. Counts are of one KV head; firsts follow those of the families before it in its wave.
struct family_plan {
  index_t family;
  family_request asks;
  index_t visits;  // of key tiles by rows
  index_t parts;   // tasks of a row tile: 1, or its splits
  index_t tasks, first_task;
  index_t slots, first_slot;    // for key tiles packed beforehand
  index_t merges, first_merge;  // row tiles whose splits are tasks of their own, and leave
  index_t first_state;          // their states
};

/// Families [first, end) of a plan, so many heads at a time.
struct plan_wave {
  index_t first, end;
  index_t heads;
};

struct call_plan {
  plan_request request;
  index_t workers;                  // 1 where the work is not worth waking others
  index_t bundle;                   // KV heads a task visits together
  index_t most_slots;               // of all heads of a wave at a time
  index_t most_states;              // likewise, of splits apart
  std::span<family_plan> families;  // those of the longest tasks first
  std::span<plan_wave> waves;
};

/// Rows that a visit of a family's fullest row tile counts for.
[[nodiscard]] inline index_t weight_of(const family_request& s) noexcept {
  return (std::max)(s.most_rows, least_rows);
}

/// Visits of its fullest row tile.
[[nodiscard]] inline index_t most_visits_of(const family_plan& f) noexcept {
  return f.asks.row_tiles == 1 ? f.visits : f.asks.tiles.size() * weight_of(f.asks);
}

/// Cuts the families from `first` on into the next wave.
[[nodiscard]] inline plan_wave next_wave(const call_plan& plan, index_t first) noexcept {
  const plan_request& request = plan.request;
  if (request.packed_tile_bytes == 0) return {first, request.families, request.kv_heads};
  const auto bytes_of_head = [&](index_t n) {
    return static_cast<double>(plan.families[static_cast<std::size_t>(n)].slots) *
           static_cast<double>(request.packed_tile_bytes);
  };
  const auto all = static_cast<double>(request.kv_heads);
  const double fit = packed_bytes / (std::max)(bytes_of_head(first), 1.0);
  if (fit < all) return {first, first + 1, (std::max)(static_cast<index_t>(fit), index_t{1})};
  double bytes = 0;
  index_t end = first;
  for (; end < request.families && bytes + all * bytes_of_head(end) <= packed_bytes; ++end)
    bytes += all * bytes_of_head(end);
  return {first, end, request.kv_heads};
}

/// Decides which row tiles of a wave are several tasks, and counts tasks, states and slots.
inline void divide_wave(call_plan& plan, const plan_wave& wave) noexcept {
  const plan_request& request = plan.request;
  const std::span<family_plan> families =
      plan.families.subspan(static_cast<std::size_t>(wave.first), static_cast<std::size_t>(wave.end - wave.first));
  const auto heads = static_cast<double>(wave.heads);
  double cost = 0;
  for (const family_plan& f : families) cost += heads * static_cast<double>(f.visits);
  const double most_of_task = cost / (tasks_of_a_share * static_cast<double>(plan.workers));
  if (request.bundles && plan.workers > 1) {
    const family_plan& longest = families.front();
    const double states_of_all =
        static_cast<double>(plan.families.size()) * static_cast<double>(longest.asks.tiles.splits());
    const bool may_split = heads * states_of_all * static_cast<double>(request.state_bytes) <= split_state_bytes;
    const index_t tiles = (std::max)(longest.asks.tiles.size(), index_t{1});
    const index_t least_of_task = (may_split ? (std::min)(tiles, split_tiles) : tiles) * weight_of(longest.asks);
    plan.bundle = static_cast<index_t>(std::clamp(most_of_task / static_cast<double>(least_of_task), 1.0, heads));
    while (request.kv_heads % plan.bundle != 0) --plan.bundle;
  }
  index_t tasks = 0, slots = 0, states = 0, merges = 0;
  for (family_plan& f : families) {
    const index_t splits = f.asks.tiles.splits();
    const double bytes =
        heads * static_cast<double>(states + f.asks.row_tiles * splits) * static_cast<double>(request.state_bytes);
    const double of_task = static_cast<double>(plan.bundle * most_visits_of(f));
    const bool apart = plan.workers > 1 && splits > 1 && bytes <= split_state_bytes && of_task > most_of_task;
    f.parts = apart ? splits : 1;
    f.tasks = f.asks.row_tiles * f.parts;
    f.merges = apart ? f.asks.row_tiles : 0;
    f.first_task = tasks, f.first_slot = slots, f.first_merge = merges, f.first_state = states;
    tasks += f.tasks, slots += f.slots, merges += f.merges;
    if (apart) states += f.tasks;
  }
  plan.most_slots = (std::max)(plan.most_slots, wave.heads * slots);
  plan.most_states = (std::max)(plan.most_states, wave.heads * states);
}

/// The plan of a call: the context's last one if it fits, else a new one in its place. asks_of(n) is what family n
/// asks for, visits_of(n) how many key tiles the rows of a KV head visit in all. nullptr if there is no memory.
/// Cost: one asks_of() a family; a new plan sorts them, too.
template <class AsksOf, class VisitsOf>
[[nodiscard]] const call_plan* find_plan(const plan_request& request, const AsksOf& asks_of, const VisitsOf& visits_of,
                                         context& ctx) {
  const auto n = static_cast<std::size_t>(request.families);
  static_assert(sizeof(call_plan) <= context::detail_plan_bytes &&
                sizeof(family_plan) + sizeof(plan_wave) <= context::detail_sequence_bytes);
  std::byte* const memory = ctx.detail_plan(request.families);
  if (memory == nullptr) return nullptr;
  call_plan& plan = *reinterpret_cast<call_plan*>(memory);
  const auto fits = [&](const family_plan& f) { return f.asks == asks_of(f.family); };
  if (plan.request == request && std::all_of(plan.families.begin(), plan.families.end(), fits)) return &plan;

  auto* const families = reinterpret_cast<family_plan*>(memory + sizeof(call_plan));
  auto* const waves = reinterpret_cast<plan_wave*>(memory + sizeof(call_plan) + n * sizeof(family_plan));
  plan = {request, request.workers, request.bundles ? request.kv_heads : 1, 0, 0, {families, n}, {}};
  double visits = 0;
  for (index_t i = 0; i < request.families; ++i) {
    const family_request asks = asks_of(i);
    const bool packs = request.packed_tile_bytes > 0 && asks.row_tiles > 1;
    const index_t slots = packs ? round_up(asks.tiles.end() - asks.tiles.begin(), tiles_packed_together) : 0;
    families[i] = {i, asks, visits_of(i), 1, 0, 0, slots, 0, 0, 0, 0};
    visits += static_cast<double>(families[i].visits);
  }
  if (visits * static_cast<double>(request.kv_heads) * static_cast<double>(request.visit_products) < serial_work)
    plan.workers = 1;
  std::sort(families, families + n, [](const family_plan& x, const family_plan& y) {
    const index_t of_x = most_visits_of(x), of_y = most_visits_of(y);
    return of_x != of_y ? of_x > of_y : x.family < y.family;
  });
  index_t count = 0;
  for (index_t first = 0; first < request.families; first = waves[count++].end) {
    waves[count] = next_wave(plan, first);
    divide_wave(plan, waves[count]);
  }
  plan.waves = {waves, static_cast<std::size_t>(count)};
  return &plan;
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
