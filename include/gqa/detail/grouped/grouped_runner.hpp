// SPDX-License-Identifier: Apache-2.0
/// \file
/// Grouped attention of a call: blocks of queries, near keys exactly, far keys by groups.
///
/// Blocks for which groups cannot pay, by their shape, are runs of queries for the exact kernel. The others are tasks,
/// one a (sequence, KV head, block), each the five steps in a row: define groups, attend group-wise to the far keys,
/// attend to the near ones, combine, write. (With ALiBi one a query head; sequences that share keys may be one.) What
/// they read of far keys is packed beforehand, for some KV heads at a time, into a cache, with [v | k] as its values
/// where the form needs the mean of keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/plan.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/grouped/alibi_terms.hpp>
#include <gqa/detail/grouped/far_keys.hpp>
#include <gqa/detail/grouped/group_attender.hpp>
#include <gqa/detail/grouped/grouped_cost.hpp>
#include <gqa/detail/grouped/part_of_source.hpp>
#include <gqa/detail/grouped/row_grouper.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/grouped_options.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of a block that tell whether a tolerance is worth a cover of all: not if they take more groups than pay, or
/// than half as many as they are.
inline constexpr index_t sampled_rows = 128;

template <class Q, class KV, class Out>
class grouped_runner {
  using P = typename KV::panel_element;
  using A = accumulator_t<P>;

 public:
  grouped_runner(const tensor_view<const Q, 4>& q, const KV& kv, const Out& out, const grouped_options& options,
                 grouped_report* report, context& ctx)
      : q_(q),
        kv_(kv),
        out_(out),
        options_(options),
        report_(report),
        ctx_(ctx),
        problem_(problem_of<A>(q, kv, out, options.attention)),
        pools_(problem_) {}

  void run();

 private:
  /// Rows of the call in one block of positions, of heads of KV head g.
  struct block {
    index_t g;
    row_block rows;
    key_range near;  // keys that are not far
    index_t keys;    // of the sequence
    bool exact;
    std::size_t number;  // in the report
    double reach = 0;    // reach_of() it, where that is wanted

    /// The sequence whose keys are read: the others have the same.
    [[nodiscard]] index_t b() const noexcept { return rows.sequences.begin; }
    [[nodiscard]] index_t begin() const noexcept { return rows.queries.begin; }
    [[nodiscard]] index_t end() const noexcept { return rows.queries.end; }
  };

  /// What a worker keeps from block to block.
  struct worker_state {
    groups_memory<A> groups, before;
    std::optional<kv_cache<A>> top;
  };

  // Shapes.

  [[nodiscard]] index_t length(index_t b) const noexcept { return problem_.length(kv_, b); }
  [[nodiscard]] index_t offset(index_t b) const noexcept { return problem_.query_offset(b, length(b)); }
  [[nodiscard]] bool needs_means() const noexcept { return options_.groupwise.form == groupwise_form::improved_lse; }
  [[nodiscard]] index_t far_value_dim() const noexcept {
    return problem_.shape.value_dim + (needs_means() ? problem_.shape.head_dim : 0);
  }
  [[nodiscard]] bool has_alibi() const noexcept { return !options_.attention.alibi_slopes.empty(); }
  /// Rows that decisions go by: of a strict call's blocks all that there may be, for it may not matter how many tokens
  /// follow.
  [[nodiscard]] index_t planned_rows(const block& k) const noexcept {
    if (!options_.strict_causal) return k.rows.size();
    return k.rows.sequences.size() * (std::min)(options_.block, problem_.shape.kv_len) * k.rows.heads.size();
  }
  [[nodiscard]] index_t far_keys(const block& k) const noexcept { return seen_keys(k) - k.near.size(); }
  /// Keys of the sequence that some of a block's queries see.
  [[nodiscard]] index_t seen_keys(const block& k) const noexcept {
    return options_.attention.causal ? k.near.end : k.keys;
  }

  [[nodiscard]] grouped_cost cost_of(const block& k, index_t rows) const noexcept {
    // Under a causal edge the keys of rows between the first and the last grow evenly.
    const auto near_of = [&](index_t s) {
      const index_t end = offset(k.b()) + s + 1;
      return options_.attention.causal ? std::clamp(end, k.near.begin, k.near.end) - k.near.begin : k.near.size();
    };
    const index_t near = (near_of(k.begin()) + near_of(k.end() - 1)) / 2;
    return {options_, {rows, near, far_keys(k), problem_.shape.head_dim, problem_.shape.value_dim}};
  }
  [[nodiscard]] grouped_cost planned_cost(const block& k) const noexcept { return cost_of(k, planned_rows(k)); }

  /// False without memory; here and below an error was raised then.
  [[nodiscard]] bool list_blocks() {
    const index_t together = options_.pool_batch ? problem_.shape.batch : 1;
    for (index_t b = 0; b < problem_.shape.batch; b += together) {
      const index_t keys = length(b), first = offset(b);
      for (index_t begin = 0; begin < problem_.shape.q_len;) {
        const index_t position = floor_div(first + begin, options_.block) * options_.block;
        const index_t end = (std::min)(position + options_.block - first, problem_.shape.q_len);
        const index_t near_begin = std::clamp<index_t>(position - options_.window, 0, keys);
        const index_t after = position + options_.block + (options_.attention.causal ? 0 : options_.window);
        const key_range near{near_begin, std::clamp<index_t>(after, near_begin, keys)};
        for (index_t n = 0; n < pools_.size(); ++n) {
          const auto [g, heads] = pools_[n];
          block k{g, {{b, b + together}, {begin, end}, heads}, near, keys, false, blocks_.size(), 0};
          const bool has_groups = !options_.strict_causal || begin > 0;
          const grouped_cost cost = planned_cost(k);
          const index_t groups = grouped_cost::covers(options_) ? 1 : cost.wanted_groups();
          k.exact = k.rows.size() == 0 || far_keys(k) <= 0 || !has_groups || !cost.pays(groups, 0);
          if (!make_room(blocks_, blocks_.size() + 1, "blocks")) return false;
          static_cast<void>(blocks_.push_back(k));
        }
        begin = end;
      }
    }
    return true;
  }

  // Exact attention.

  /// Of one sequence: what attention() takes.
  [[nodiscard]] tensor_view<const Q, 4> queries(const row_block& rows) const noexcept {
    return {&q_(rows.sequences.begin, rows.queries.begin, rows.heads.begin, 0),
            {1, rows.queries.size(), rows.heads.size(), problem_.shape.head_dim},
            {q_.stride(0), q_.stride(1), q_.stride(2), 1}};
  }
  [[nodiscard]] auto outputs(const row_block& rows) const noexcept {
    const index_t b = rows.sequences.begin, s = rows.queries.begin, h = rows.heads.begin;
    const auto slice = [&](const auto& out) {
      return std::remove_cvref_t<decltype(out)>(&out(b, s, h, 0),
                                                {1, rows.queries.size(), rows.heads.size(), problem_.shape.value_dim},
                                                {out.stride(0), out.stride(1), out.stride(2), 1});
    };
    if constexpr (output_state<Out>) {
      const auto& lse = out_.lse;
      using lse_view = std::remove_cvref_t<decltype(lse)>;
      return std::remove_cvref_t<Out>{slice(out_.out),
                                      lse_view(&lse(b, s, h), {1, rows.queries.size(), rows.heads.size()},
                                               {lse.stride(0), lse.stride(1), lse.stride(2)})};
    } else {
      return slice(out_);
    }
  }
  /// The call's options for such rows, of heads of one KV head or of all.
  [[nodiscard]] attention_options options_of(const row_block& rows, index_t kv_heads) const noexcept {
    attention_options o = options_.attention;
    o.query_offset = offset(rows.sequences.begin) + rows.queries.begin;
    o.query_offsets = {}, o.kv_lengths = {};
    if (kv_heads != problem_.shape.kv_heads || rows.heads.size() != problem_.shape.q_heads) o.group_offsets = {};
    for (std::span<const float>* const of_heads : {&o.sinks, &o.alibi_slopes}) {
      if (!of_heads->empty())
        *of_heads =
            of_heads->subspan(static_cast<std::size_t>(rows.heads.begin), static_cast<std::size_t>(rows.heads.size()));
    }
    return o;
  }

  /// Runs of blocks that are exact: for all heads in one call, else pool by pool.
  void run_exact() {
    const auto is_exact = [](const block& k) { return k.exact; };
    if (std::all_of(blocks_.begin(), blocks_.end(), is_exact))
      return attention(q_, kv_, out_, options_.attention, ctx_);
    const auto pools = static_cast<std::size_t>(pools_.size());
    for_each_run([&](std::size_t i) { return std::all_of(&blocks_[i], &blocks_[i] + pools, is_exact); },
                 [&](const block& first, index_t end) {
                   attend_exactly(first, end, {0, problem_.shape.q_heads}, {0, problem_.shape.kv_heads});
                   for (block& k : blocks_) {
                     if (k.b() == first.b() && first.begin() <= k.begin() && k.end() <= end) k.exact = false;  // done
                   }
                 });
    for (std::size_t n = 0; n < pools; ++n)
      for_each_run([&](std::size_t i) { return blocks_[i + n].exact; },
                   [&](const block& first, index_t end) {
                     const auto [g, heads] = pools_[static_cast<index_t>(n)];
                     if (heads.size() > 0) attend_exactly(first, end, heads, {g, g + 1});
                   });
  }
  /// Calls f(first block, end) for runs of neighbouring blocks of a sequence that belongs(number) takes.
  template <class Belongs, class F>
  void for_each_run(const Belongs& belongs, const F& f) {
    const auto pools = static_cast<std::size_t>(pools_.size());
    for (std::size_t i = 0; i < blocks_.size();) {
      const block& first = blocks_[i];
      index_t end = first.begin();
      for (; i < blocks_.size() && blocks_[i].b() == first.b() && belongs(i); i += pools) end = blocks_[i].end();
      if (end > first.begin()) {
        f(first, end);
      } else {
        i += pools;
      }
    }
  }
  /// Queries from those of `first` to `end`, of some heads and their KV heads.
  void attend_exactly(const block& first, index_t end, key_range heads, key_range kv_heads) const {
    for (index_t b = first.b(); b < first.rows.sequences.end; ++b) {
      const row_block rows{{b, b + 1}, {first.begin(), end}, heads};
      const part_of_source<KV> kv(kv_, b, kv_heads.begin, kv_heads.size(), first.keys);
      const auto out = outputs(rows);
      const attention_options options = options_of(rows, kv_heads.size());
      // Few rows of plain tensors are read in place by a kernel of their own. Which of the two a row takes may not
      // depend on what its neighbours decided: a mask that hides nothing keeps short runs of a long call to the kernel
      // of tiles.
      if (problem_.shape.q_len > rows.queries.size()) {
        attention(queries(rows), kv, out, options, key_interval({0, 0}, false), ctx_);
      } else {
        attention(queries(rows), kv, out, options, ctx_);
      }
    }
  }

  // Grouped attention.

  void run_grouped() {
    contexts_ = ctx_.detail_workers();
    if (contexts_ == nullptr || !make_zeros(workers_, static_cast<std::size_t>(ctx_.concurrency()), "workers"))
      return static_cast<void>(fail());
    if ((options_.tolerance || report_ != nullptr) && !look_at_blocks()) return static_cast<void>(fail());
    reporting_vector<block*> work;
    if (!make_room(work, blocks_.size(), "blocks")) return static_cast<void>(fail());
    for (block& k : blocks_) {
      if (!k.exact) static_cast<void>(work.push_back(&k));
    }
    // By (sequence, KV head), the blocks that see most keys first.
    std::sort(work.begin(), work.end(), [](const block* x, const block* y) {
      if (x->b() != y->b()) return x->b() < y->b();
      return x->g != y->g ? x->g < y->g : x->begin() > y->begin();
    });
    for (std::size_t first = 0; first < work.size() && !failed_;) first = run_wave(work, first);
  }

  /// Blocks from `first` on, as many KV heads as fit packed_bytes; returns where it stopped.
  std::size_t run_wave(std::span<block* const> work, std::size_t first) {
    reporting_vector<std::size_t> heads;  // the first block of each
    index_t most_keys = 0;
    std::size_t end = first;
    for (; end < work.size(); ++end) {
      const block& k = *work[end];
      if (end > first && k.b() == work[end - 1]->b() && k.g == work[end - 1]->g) continue;
      const index_t keys = (std::max)(most_keys, k.keys);
      const double bytes = static_cast<double>(heads.size() + 1) * static_cast<double>(keys) *
                           static_cast<double>(problem_.shape.head_dim + far_value_dim()) * sizeof(P);
      if (bytes > packed_bytes && !heads.empty()) break;
      if (!make_room(heads, heads.size() + 1, "heads")) return fail(), work.size();
      static_cast<void>(heads.push_back(end));
      most_keys = keys;
    }
    kv_cache<P> far(static_cast<index_t>(heads.size()), 1, most_keys, problem_.shape.head_dim, far_value_dim());
    if (far.batch() == 0) return fail(), work.size();
    ctx_.for_each(static_cast<index_t>(heads.size()), [&](index_t n, index_t) {
      const block& k = *work[heads[static_cast<std::size_t>(n)]];
      if (!pack_head(part_of_source<KV>(kv_, k.b(), k.g, 1, k.keys), needs_means(), n, far)) fail();
    });
    if (failed_) return work.size();
    ctx_.for_each(static_cast<index_t>(end - first), [&](index_t task, index_t worker) {
      const std::size_t at = first + static_cast<std::size_t>(task);
      const auto head = std::upper_bound(heads.begin(), heads.end(), at) - heads.begin() - 1;
      block& k = *work[at];
      k.exact = !attend_block(k, part_of_source<kv_cache<P>>(far, head, 0, 1, k.keys),
                              workers_[static_cast<std::size_t>(worker)], contexts_[worker]);
    });
    return end;
  }

  /// Before anything is packed: how far scores reach, and which blocks a tolerance leaves to the exact kernel.
  [[nodiscard]] bool look_at_blocks() {
    reporting_vector<std::pair<std::size_t, std::size_t>> runs;  // of blocks that see the same keys
    for (std::size_t first = 0, end = 0; first < blocks_.size(); first = end) {
      const auto has_keys_of_first = [&](const block& k) {
        return k.b() == blocks_[first].b() && k.g == blocks_[first].g && k.begin() == blocks_[first].begin();
      };
      while (end < blocks_.size() && has_keys_of_first(blocks_[end])) ++end;
      const bool is_needed = std::any_of(&blocks_[first], &blocks_[0] + end, [](const block& k) { return !k.exact; });
      if (!is_needed) continue;
      if (!make_room(runs, runs.size() + 1, "blocks")) return false;
      static_cast<void>(runs.push_back({first, end}));
    }
    ctx_.for_each(static_cast<index_t>(runs.size()), [&](index_t n, index_t worker) {
      const auto [first, end] = runs[static_cast<std::size_t>(n)];
      const std::optional<double> reach = reach_of(blocks_[first]);
      if (!reach) return static_cast<void>(fail());
      for (std::size_t i = first; i < end; ++i) {
        blocks_[i].reach = *reach;
        if (!blocks_[i].exact)
          blocks_[i].exact = !is_promising(blocks_[i], workers_[static_cast<std::size_t>(worker)], contexts_[worker]);
      }
    });
    return true;
  }
  /// Whether a tolerance may be kept by groups that pay. A sample of the rows tells at little cost.
  bool is_promising(const block& k, worker_state& own, context& ctx) {
    const row_block rows = options_.strict_causal ? rows_before(k) : k.rows;
    if (!options_.tolerance || options_.always_group || rows.size() <= sampled_rows) return true;
    const error_watch watch;
    context* const calls = ctx.detail_workers();
    const auto elements = static_cast<std::size_t>(sampled_rows * round_up(problem_.shape.head_dim, 16));
    A* const memory = reinterpret_cast<A*>(ctx.detail_scratch(elements * sizeof(A)));
    if (calls == nullptr || memory == nullptr) return fail();
    grouping_options o = grouping_of(k);
    o.groups = (std::min)(o.groups, sampled_rows / 2);
    const point_rows<A> x = sample_queries(problem_.q, problem_.shape.head_dim, rows, sampled_rows, memory);
    const bool grouped = group_rows_of(x, o, own.groups, *calls) && keeps_tolerance(own.groups, o);
    if (watch.failed()) return fail();
    return grouped;
  }

  /// One block: the five steps; false, and nothing written, if its groups do not pay. `far`: its head's keys, packed.
  template <class Far>
  bool attend_block(const block& k, const Far& far, worker_state& own, context& ctx) {
    const error_watch watch;
    context* const calls_of_worker = ctx.detail_workers();
    if (calls_of_worker == nullptr) return fail();
    context& calls = *calls_of_worker;
    const index_t n = k.rows.size(), stride = round_up(problem_.shape.head_dim, 16),
                  value_dim = problem_.shape.value_dim;
    const index_t before = options_.strict_causal ? rows_before(k).size() : 0;
    block_scratch scratch;
    const auto carve = [&](std::byte* memory) {
      carver take(memory);
      take(scratch.rows, n * stride), take(scratch.rows_before, before * stride);
      take(scratch.near, n * value_dim), take(scratch.near_lse, n);
      take(scratch.far, n * value_dim), take(scratch.far_lse, n), take(scratch.row, value_dim);
      take(scratch.key_terms, has_alibi() ? seen_keys(k) : 0);
      return take.used();
    };
    std::byte* const own_memory = ctx.detail_scratch(carve(nullptr));
    if (own_memory == nullptr) return fail();
    carve(own_memory);

    // 1. Define query groups.
    const point_rows<A> x = pool_queries(problem_.q, problem_.shape.head_dim, k.rows, scratch.rows);
    const double radius = largest_radius(k.reach);
    const bool finds = find_groups(k, x, scratch.rows_before, own, calls);
    if (watch.failed()) return fail();
    if (!finds) return false;
    typename group_attender<A>::sharing sharing{radius};
    if (options_.strict_causal)
      sharing = {(std::numeric_limits<double>::max)(), true};  // too far rows are apart already
    const attention_options& scores = options_.attention;
    const typename group_attender<A>::shape dims{problem_.shape.head_dim, value_dim, far_value_dim(), k.keys,
                                                 far_keys(k)};
    const auto groups = groups_view<A>::of(own.groups);
    std::byte* const memory =
        calls.detail_scratch_aside(group_attender<A>::bytes(x, groups, dims, options_.groupwise, sharing));
    if (memory == nullptr) return fail();
    group_attender<A> attender(x, groups, dims, options_.groupwise, sharing, memory);
    // Nothing about a block of a strict call is decided by all of its rows.
    const auto found = attender.counts();
    if (!options_.strict_causal && !planned_cost(k).pays(found.groups, found.alone)) return false;

    // 2. Group-wise attention to the far keys.
    if (!own.top)
      own.top.emplace(1, 1, (std::min)(options_.groupwise.top_keys, problem_.shape.kv_len), problem_.shape.head_dim,
                      value_dim);
    if (watch.failed()) return fail();
    const part_of_source<Far> far_part(far, 0, 0, 1, seen_keys(k));
    const alibi_terms terms = terms_of(k, scratch.key_terms);
    attender.run(far_part, part_of_source<KV>(kv_, k.b(), k.g, 1, k.keys), key_interval(k.near, false), scores, terms,
                 *own.top, scratch.far, scratch.far_lse, calls);
    // 3. Local attention to the near ones.
    attend_near(k, scratch, calls);
    if (watch.failed()) return fail();
    // 4. and 5. Combine the scores, apply.
    if (report_ != nullptr && !describe(k, groups, attender)) return fail();
    write(k, scratch, terms);
    return true;
  }

  /// Without exceptions: an error was raised, and nothing more is done. (True: nor by the exact kernel.)
  bool fail() noexcept {
    failed_ = true;
    return true;
  }

  /// Rows of a block and of the one before it, their results over the near and the far keys, and one row more.
  struct block_scratch {
    A *rows, *rows_before;
    A *near, *near_lse, *far, *far_lse;
    A* row;
    float* key_terms;  // of ALiBi
  };

  [[nodiscard]] row_block rows_before(const block& k) const noexcept {
    return {k.rows.sequences, {std::max<index_t>(k.begin() - options_.block, 0), k.begin()}, k.rows.heads};
  }
  [[nodiscard]] alibi_terms terms_of(const block& k, float* memory) const noexcept {
    if (!has_alibi()) return {};
    const index_t seen = seen_keys(k), last_far = k.near.end < seen ? seen : k.near.begin;
    return {options_.attention.alibi_slopes[static_cast<std::size_t>(k.rows.heads.begin)], last_far - 1, seen, memory};
  }

  /// Sets own.groups; false if groups do not pay.
  [[nodiscard]] bool find_groups(const block& k, const point_rows<A>& x, A* memory_of_before, worker_state& own,
                                 context& calls) const {
    if (options_.groupwise.form == groupwise_form::dense) return leave_alone(x, own.groups);
    if (options_.strict_causal) return assign(k, x, memory_of_before, own, calls);
    return group(k, x, own.groups, calls);
  }
  [[nodiscard]] grouping_options grouping_of(const block& k) const noexcept {
    grouping_options o = options_.grouping;
    o.groups = planned_cost(k).wanted_groups();
    if (options_.tolerance) o.method = grouping_method::cover;
    if (options_.tolerance) o.radius = largest_radius(k.reach);
    return o;
  }
  /// False if more groups than there may be would be needed for it.
  [[nodiscard]] bool keeps_tolerance(const groups_memory<A>& groups, const grouping_options& o) const {
    return !options_.tolerance || std::all_of(groups.radii.begin(), groups.radii.end(), [&o](A r) {
      return static_cast<double>(r) <= o.radius || r == std::numeric_limits<A>::infinity();
    });
  }
  [[nodiscard]] bool group(const block& k, const point_rows<A>& x, groups_memory<A>& groups, context& calls) const {
    const grouping_options o = grouping_of(k);
    return group_rows_of(x, o, groups, calls) && keeps_tolerance(groups, o);
  }
  [[nodiscard]] static bool group_rows_of(const point_rows<A>& x, const grouping_options& o, groups_memory<A>& groups,
                                          context& calls) {
    std::byte* const memory = calls.detail_scratch(row_grouper<A>::bytes(x.count, x.dim, o, 0, calls));
    if (memory == nullptr) return false;
    row_grouper<A> grouper(x, o, 0, calls, memory);
    grouper.by_content();
    return grouper.write(groups);
  }
  /// Sends rows to the representatives of the block before; those too far from all attend for themselves. False if
  /// those representatives are too many.
  [[nodiscard]] bool assign(const block& k, const point_rows<A>& x, A* memory_of_before, worker_state& own,
                            context& calls) const {
    const point_rows<A> before = pool_queries(problem_.q, problem_.shape.head_dim, rows_before(k), memory_of_before);
    if (!group(k, before, own.before, calls)) return false;
    // Those of rows that are not finite cannot be compared with.
    auto count = static_cast<index_t>(own.before.radii.size());
    while (count > 0 && own.before.radii[static_cast<std::size_t>(count - 1)] == std::numeric_limits<A>::infinity())
      --count;
    if (count == 0 || !planned_cost(k).pays(count, 0)) return false;
    grouping_options o;
    o.groups = count;
    o.radius = options_.tolerance ? largest_radius(k.reach) : std::numeric_limits<double>::infinity();
    std::byte* const memory = calls.detail_scratch(row_grouper<A>::bytes(x.count, x.dim, o, count, calls));
    if (memory == nullptr) return false;
    row_grouper<A> grouper(x, o, count, calls, memory);
    grouper.by_representatives(
        std::span<const A>(own.before.representatives).first(static_cast<std::size_t>(count * x.dim)));
    return grouper.write(own.groups);
  }
  [[nodiscard]] static bool leave_alone(const point_rows<A>& x, groups_memory<A>& groups) {
    if (!make_zeros(groups.order, static_cast<std::size_t>(x.count), "groups") ||
        !make_room(groups.representatives, static_cast<std::size_t>(x.dim), "groups") ||
        !make_room(groups.offsets, 2, "groups") || !make_room(groups.radii, 1, "groups"))
      return false;
    groups.dim = x.dim;
    for (std::size_t i = 0; i < groups.order.size(); ++i) groups.order[i] = static_cast<index_t>(i);
    return groups.offsets.assign({0, x.count}) && groups.representatives.assign(x.row(0), x.row(0) + x.dim) &&
           groups.radii.assign({std::numeric_limits<A>::infinity()});
  }

  /// How far scores of rows one unit apart differ, but for what the softmax does not see. A softcap sees all of it.
  [[nodiscard]] std::optional<double> reach_of(const block& k) const {
    const std::optional<double> spread =
        spread_of(part_of_source<KV>(kv_, k.b(), k.g, 1, k.keys), key_interval(k.near, false), seen_keys(k),
                  options_.attention.softcap == 0);
    if (!spread) return {};
    return std::abs(problem_.scale()) * *spread;
  }
  /// The radius of a group whose members' weights are off by at most the tolerance.
  [[nodiscard]] double largest_radius(double reach) const noexcept {
    if (!options_.tolerance || reach == 0) return (std::numeric_limits<double>::max)();
    return 2 * std::atanh((std::min)(*options_.tolerance / 2, 1 - 0x1p-53)) / reach;
  }

  void attend_near(const block& k, const block_scratch& scratch, context& calls) const {
    const index_t queries_of = k.rows.queries.size(), heads = k.rows.heads.size(), value_dim = problem_.shape.value_dim;
    for (index_t b = k.b(); b < k.rows.sequences.end; ++b) {
      const row_block rows{{b, b + 1}, k.rows.queries, k.rows.heads};
      const index_t first = (b - k.b()) * rows.size();
      attention_options o = options_of(rows, 1);
      o.sinks = {};
      const partial_state<A> state{
          tensor_view<A, 4>(scratch.near + first * value_dim, {1, queries_of, heads, value_dim}),
          tensor_view<A, 3>(scratch.near_lse + first, {1, queries_of, heads})};
      attention(queries(rows), part_of_source<KV>(kv_, b, k.g, 1, k.keys), state, o, key_interval(k.near, true), calls);
    }
  }

  /// Merges near and far keys and the sinks, which have values of 0, and writes the rows.
  void write(const block& k, const block_scratch& scratch, const alibi_terms& terms) const noexcept {
    const auto& sinks = options_.attention.sinks;
    const index_t dim = problem_.shape.value_dim;
    for (index_t i = 0; i < k.rows.size(); ++i) {
      const auto [b, s, h] = k.rows.at(i);
      const A sink = sinks.empty() ? minus_infinity<A> : static_cast<A>(sinks[static_cast<std::size_t>(h)]);
      const A far_lse = scratch.far_lse[i] + terms.template of_row<A>(offset(b) + s);
      const A lse = merge_finished<A>(
          {{scratch.near + i * dim, scratch.near_lse[i]}, {scratch.far + i * dim, far_lse}, {nullptr, sink}}, dim,
          scratch.row);
      problem_.out.store_finished(b, s, h, dim, scratch.row, lse);
    }
  }

  [[nodiscard]] block_report empty_report(const block& k) const {
    block_report r;
    r.batch = k.b(), r.sequences = k.rows.sequences.size(), r.kv_head = k.g;
    r.head_begin = k.rows.heads.begin, r.head_end = k.rows.heads.end;
    r.query_begin = k.begin(), r.query_end = k.end();
    const grouped_cost cost = cost_of(k, k.rows.size());
    r.cost = r.exact_cost = cost.of_exact() + cost.of_near();
    return r;
  }
  [[nodiscard]] bool describe(const block& k, const groups_view<A>& groups, const group_attender<A>& attender) {
    block_report& r = report_->blocks[k.number];
    const groupwise_counts& counts = attender.counts();
    if (!make_room(r.shared, static_cast<std::size_t>(counts.groups), "reports of groups")) return false;
    r.exact = false;
    r.groups = counts.groups, r.alone = counts.alone;
    r.products = counts.products;
    r.exact_products = static_cast<double>(k.rows.size()) * static_cast<double>(far_keys(k)) *
                       static_cast<double>(problem_.shape.head_dim + problem_.shape.value_dim);
    const grouped_cost cost = cost_of(k, k.rows.size());
    r.cost = cost.of_groups(counts.groups, counts.alone) + cost.of_near();
    index_t sharing = 0;
    attender.for_each_shared([&](index_t j, double retained) {
      const auto members = static_cast<index_t>(groups.members(j).size());
      const auto radius = static_cast<double>(groups.radius(j));
      r.shared.push_back({members, radius, retained, radius == 0 ? 0 : 2 * std::tanh(k.reach * radius / 2)});
      r.largest_radius = (std::max)(r.largest_radius, radius);
      r.error_bound = (std::max)(r.error_bound, r.shared.back().error_bound);
      r.retained_mass += static_cast<double>(members) * retained;
      sharing += members;
    });
    if (sharing > 0) r.retained_mass /= static_cast<double>(sharing);
    return true;
  }

  const tensor_view<const Q, 4>& q_;
  const KV& kv_;
  const Out& out_;
  const grouped_options& options_;
  grouped_report* report_;
  context& ctx_;
  problem<A, A> problem_;
  head_pools<problem<A, A>> pools_;
  reporting_vector<block> blocks_;  // by sequence, position, pool
  reporting_vector<worker_state> workers_;
  context* contexts_ = nullptr;  // of the workers
  std::atomic<bool> failed_{false};
};

// Not in the class, as scheduler::run().
template <class Q, class KV, class Out>
void grouped_runner<Q, KV, Out>::run() {
  if (!list_blocks()) return;
  if (report_ != nullptr) {
    report_->blocks.clear();
    if (!make_room(report_->blocks, blocks_.size(), "reports of blocks")) return;
    for (const block& b : blocks_) report_->blocks.push_back(empty_report(b));
  }
  run_grouped();
  if (!failed_) run_exact();
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
