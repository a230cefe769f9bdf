// SPDX-License-Identifier: Apache-2.0
/// \file
/// Grouped attention of a call: blocks of queries, near keys exactly, far keys by groups.
///
/// Blocks for which groups cannot pay, by their shape, are runs of queries for the exact kernel. The others are tasks,
/// one a (sequence, KV head, block), each the five steps in a row: define groups, attend group-wise to the far keys,
/// attend to the near ones, combine, write. What they read of far keys is packed beforehand, for some KV heads at a
/// time, into a cache, with [v | k] as its values where the form needs the mean of keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/carver.hpp>
#include <gqa/detail/group_attender.hpp>
#include <gqa/detail/online_softmax.hpp>
#include <gqa/detail/part_of_source.hpp>
#include <gqa/detail/plan.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/row_grouper.hpp>
#include <gqa/grouped_options.hpp>
#include <gqa/kv_cache.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// What the parts of a block cost, in multiply-adds of the engine, by their times on Zen 4: top keys are gathered line
/// by line, seeds and norms run at the speed of L2, rows are copied in and out.
inline constexpr double cost_of_gathered = 8, cost_of_seeded = 8, cost_of_row_element = 60, cost_of_packed = 3;
/// Rows of a block that tell whether a cover of all is worth its time: it is not if more than half of them differ.
inline constexpr index_t sampled_rows = 128;
/// Groups pay where they promise to take less than this part of the exact kernel's time.
inline constexpr double paying_share = 0.9;

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
        problem_(problem_of<A>(q, kv, out, options.attention)) {}

  void run() {
    list_blocks();
    if (report_ != nullptr) {
      report_->blocks.clear();
      report_->blocks.reserve(blocks_.size());
      for (const block& b : blocks_) report_->blocks.push_back(empty_report(b));
    }
    run_grouped();
    if (!failed_) run_exact();
  }

 private:
  /// Queries [begin, end) of the call, of KV head g of sequence b, in one block of positions.
  struct block {
    index_t b, g;
    index_t begin, end;
    key_range near;  // keys that are not far
    index_t keys;    // of the sequence
    bool exact;
    std::size_t number;  // in the report
  };

  /// What a worker keeps from block to block.
  struct worker_state {
    query_groups<A> groups, before;
    std::optional<kv_cache<A>> top;
  };

  // Shapes.

  [[nodiscard]] index_t head_end(index_t g) const noexcept { return problem_.first_head(g) + problem_.group_size(g); }
  [[nodiscard]] index_t length(index_t b) const noexcept { return length_of(kv_, options_.attention, b); }
  [[nodiscard]] index_t offset(index_t b) const noexcept { return problem_.query_offset(b, length(b)); }
  [[nodiscard]] bool needs_means() const noexcept { return options_.groupwise.form == groupwise_form::improved_lse; }
  [[nodiscard]] index_t far_value_dim() const noexcept {
    return problem_.shape.value_dim + (needs_means() ? problem_.shape.head_dim : 0);
  }
  [[nodiscard]] index_t rows_of(const block& k) const noexcept { return (k.end - k.begin) * problem_.group_size(k.g); }
  /// Rows that decisions go by: of a strict call's blocks all that there may be, for it may not matter how many tokens
  /// follow.
  [[nodiscard]] index_t planned_rows(const block& k) const noexcept {
    return options_.strict_causal ? std::min(options_.block, problem_.shape.kv_len) * problem_.group_size(k.g)
                                  : rows_of(k);
  }
  [[nodiscard]] index_t far_keys(const block& k) const noexcept { return seen_keys(k) - k.near.size(); }
  [[nodiscard]] bool covers() const noexcept {
    return options_.tolerance.has_value() || options_.grouping.method == grouping_method::cover;
  }

  /// Keys of the sequence that some of a block's queries see.
  [[nodiscard]] index_t seen_keys(const block& k) const noexcept {
    return options_.attention.causal ? k.near.end : k.keys;
  }

  /// Groups of a block's rows that are asked for; of a cover at most.
  [[nodiscard]] index_t wanted_groups(const block& k) const noexcept {
    const index_t rows = planned_rows(k);
    if (options_.grouping.groups > 0) return std::min(options_.grouping.groups, rows);
    if (!covers()) return std::max<index_t>(rows / 32, 1);
    if (options_.always_group) return rows;
    index_t most = 1;  // that pay: fewer cost less
    for (index_t step = rows / 2; step > 0; step /= 2) {
      if (most + step <= rows && pays(k, most + step, 0)) most += step;
    }
    return most;
  }
  [[nodiscard]] double dims() const noexcept {
    return static_cast<double>(problem_.shape.head_dim + problem_.shape.value_dim);
  }
  /// Whether so many representatives, and rows alone, are faster than the exact kernel.
  [[nodiscard]] bool pays(const block& k, index_t groups, index_t alone) const noexcept {
    if (options_.always_group) return far_keys(k) > 0;
    if (options_.groupwise.form == groupwise_form::dense) return false;
    const auto n = static_cast<double>(planned_rows(k)), far = static_cast<double>(far_keys(k));
    const auto dim = static_cast<double>(problem_.shape.head_dim), shared = static_cast<double>(groups);
    const double top = options_.groupwise.form == groupwise_form::clustered
                           ? 0
                           : std::min(static_cast<double>(options_.groupwise.top_keys), far);
    const double attending =
        (shared + static_cast<double>(alone)) * far * (dim + static_cast<double>(far_value_dim())) +
        (top > 0 ? shared * far * dim : 0) + n * top * dims() + shared * top * dims() * cost_of_gathered;
    const double seeding = covers() ? n : std::min(n, 8 * shared);
    const double iterations = covers() ? 0 : static_cast<double>(options_.grouping.iterations) + 1;
    const double grouping = dim * (n * shared * iterations + seeding * shared * cost_of_seeded);
    const double rows = n * dims() * cost_of_row_element;
    const double packing = far * (dim + static_cast<double>(far_value_dim())) * cost_of_packed;
    return attending + grouping + rows + packing < paying_share * n * far * dims();
  }

  void list_blocks() {
    for (index_t b = 0; b < problem_.shape.batch; ++b) {
      const index_t keys = length(b), first = offset(b);
      for (index_t begin = 0; begin < problem_.shape.q_len;) {
        const index_t position = floor_div(first + begin, options_.block) * options_.block;
        const index_t end = std::min(position + options_.block - first, problem_.shape.q_len);
        const index_t near_begin = std::clamp<index_t>(position - options_.window, 0, keys);
        const index_t after = position + options_.block + (options_.attention.causal ? 0 : options_.window);
        const key_range near{near_begin, std::clamp<index_t>(after, near_begin, keys)};
        for (index_t g = 0; g < problem_.shape.kv_heads; ++g) {
          block k{b, g, begin, end, near, keys, false, blocks_.size()};
          const bool has_groups = !options_.strict_causal || begin > 0;
          k.exact = rows_of(k) == 0 || far_keys(k) <= 0 || !has_groups || !pays(k, covers() ? 1 : wanted_groups(k), 0);
          blocks_.push_back(k);
        }
        begin = end;
      }
    }
  }

  // Exact attention.

  [[nodiscard]] tensor_view<const Q, 4> queries(index_t b, index_t begin, index_t end, index_t head,
                                                index_t heads) const noexcept {
    return {&q_(b, begin, head, 0),
            {1, end - begin, heads, problem_.shape.head_dim},
            {q_.stride(0), q_.stride(1), q_.stride(2), 1}};
  }
  [[nodiscard]] auto outputs(index_t b, index_t begin, index_t end, index_t head, index_t heads) const noexcept {
    const auto slice = [&](const auto& out) {
      return std::remove_cvref_t<decltype(out)>(&out(b, begin, head, 0),
                                                {1, end - begin, heads, problem_.shape.value_dim},
                                                {out.stride(0), out.stride(1), out.stride(2), 1});
    };
    if constexpr (output_state<Out>) {
      const auto& lse = out_.lse;
      using lse_view = std::remove_cvref_t<decltype(lse)>;
      return std::remove_cvref_t<Out>{slice(out_.out), lse_view(&lse(b, begin, head), {1, end - begin, heads},
                                                                {lse.stride(0), lse.stride(1), lse.stride(2)})};
    } else {
      return slice(out_);
    }
  }
  /// The call's options for queries from `begin` on of sequence b and of KV heads [g, g + kv_heads), one or all.
  [[nodiscard]] attention_options options_of(index_t b, index_t begin, index_t g, index_t kv_heads) const noexcept {
    const index_t head = problem_.first_head(g), heads = head_end(g + kv_heads - 1) - head;
    attention_options o = options_.attention;
    o.query_offset = offset(b) + begin;
    o.query_offsets = {}, o.kv_lengths = {};
    if (kv_heads != problem_.shape.kv_heads) o.group_offsets = {};
    if (!o.sinks.empty()) o.sinks = o.sinks.subspan(static_cast<std::size_t>(head), static_cast<std::size_t>(heads));
    return o;
  }

  /// Runs of blocks that are exact: for all KV heads in one call, else head by head.
  void run_exact() {
    const auto heads = static_cast<std::size_t>(problem_.shape.kv_heads);
    const auto is_exact = [](const block& k) { return k.exact; };
    if (std::all_of(blocks_.begin(), blocks_.end(), is_exact))
      return attention(q_, kv_, out_, options_.attention, ctx_);
    for_each_run(
        heads, [&](std::size_t i) { return std::all_of(&blocks_[i], &blocks_[i] + heads, is_exact); },
        [&](const block& first, index_t end) {
          attend_exactly(first, end, 0, problem_.shape.kv_heads);
          for (block& k : blocks_) {
            if (k.b == first.b && first.begin <= k.begin && k.end <= end) k.exact = false;  // done
          }
        });
    for (std::size_t g = 0; g < heads; ++g)
      for_each_run(
          heads, [&](std::size_t i) { return blocks_[i + g].exact; },
          [&](const block& first, index_t end) {
            if (problem_.group_size(static_cast<index_t>(g)) > 0)
              attend_exactly(first, end, static_cast<index_t>(g), 1);
          });
  }
  /// Calls f(first block, end) for runs of neighbouring blocks of a sequence that belongs(number) takes.
  template <class Belongs, class F>
  void for_each_run(std::size_t heads, const Belongs& belongs, const F& f) {
    for (std::size_t i = 0; i < blocks_.size();) {
      const block& first = blocks_[i];
      index_t end = first.begin;
      for (; i < blocks_.size() && blocks_[i].b == first.b && belongs(i); i += heads) end = blocks_[i].end;
      if (end > first.begin) {
        f(first, end);
      } else {
        i += heads;
      }
    }
  }
  /// Queries from those of `first` to `end`, of KV heads [g, g + kv_heads).
  void attend_exactly(const block& first, index_t end, index_t g, index_t kv_heads) const {
    const index_t head = problem_.first_head(g), heads = head_end(g + kv_heads - 1) - head;
    const auto q = queries(first.b, first.begin, end, head, heads);
    const part_of_source<KV> kv(kv_, first.b, g, kv_heads, first.keys);
    const auto out = outputs(first.b, first.begin, end, head, heads);
    const attention_options options = options_of(first.b, first.begin, g, kv_heads);
    // Few rows of plain tensors are read in place by a kernel of their own. Which of the two a row takes may not depend
    // on what its neighbours decided: a mask that hides nothing keeps short runs of a long call to the kernel of tiles.
    if (problem_.shape.q_len > end - first.begin)
      return attention(q, kv, out, options, key_interval({0, 0}, false), ctx_);
    attention(q, kv, out, options, ctx_);
  }

  // Grouped attention.

  void run_grouped() {
    std::vector<block*> work;
    for (block& k : blocks_) {
      if (!k.exact) work.push_back(&k);
    }
    // By (sequence, KV head), the blocks that see most keys first.
    std::sort(work.begin(), work.end(), [](const block* x, const block* y) {
      return x->b != y->b ? x->b < y->b : x->g != y->g ? x->g < y->g : x->begin > y->begin;
    });
    workers_.resize(static_cast<std::size_t>(ctx_.concurrency()));
    for (std::size_t first = 0; first < work.size() && !failed_;) first = run_wave(work, first);
  }

  /// Blocks from `first` on, as many KV heads as fit packed_bytes; returns where it stopped.
  std::size_t run_wave(const std::vector<block*>& work, std::size_t first) {
    std::vector<std::size_t> heads;  // the first block of each
    index_t most_keys = 0;
    std::size_t end = first;
    for (; end < work.size(); ++end) {
      const block& k = *work[end];
      if (end > first && k.b == work[end - 1]->b && k.g == work[end - 1]->g) continue;
      const index_t keys = std::max(most_keys, k.keys);
      const double bytes = static_cast<double>(heads.size() + 1) * static_cast<double>(keys) *
                           (dims() + static_cast<double>(far_value_dim() - problem_.shape.value_dim)) * sizeof(P);
      if (bytes > packed_bytes && !heads.empty()) break;
      heads.push_back(end);
      most_keys = keys;
    }
    kv_cache<P> far(static_cast<index_t>(heads.size()), 1, most_keys, problem_.shape.head_dim, far_value_dim());
    if (far.batch() == 0) return fail(), work.size();
    ctx_.for_each(static_cast<index_t>(heads.size()), [&](index_t n, index_t) {
      const block& k = *work[heads[static_cast<std::size_t>(n)]];
      pack_head(part_of_source<KV>(kv_, k.b, k.g, 1, k.keys), needs_means(), n, far);
    });
    context* const contexts = ctx_.detail_workers();
    ctx_.for_each(static_cast<index_t>(end - first), [&](index_t task, index_t worker) {
      const std::size_t at = first + static_cast<std::size_t>(task);
      const auto head = std::upper_bound(heads.begin(), heads.end(), at) - heads.begin() - 1;
      block& k = *work[at];
      k.exact = !attend_block(k, part_of_source<kv_cache<P>>(far, head, 0, 1, k.keys),
                              workers_[static_cast<std::size_t>(worker)], contexts[worker]);
    });
    return end;
  }

  /// One block: the five steps; false, and nothing written, if its groups do not pay. `far`: its head's keys, packed.
  template <class Far>
  bool attend_block(const block& k, const Far& far, worker_state& own, context& ctx) {
    const error_watch watch;
    context& calls = ctx.detail_workers()[0];
    const index_t n = rows_of(k), stride = round_up(problem_.shape.head_dim, 16), value_dim = problem_.shape.value_dim;
    const index_t before = options_.strict_causal ? std::min(k.begin, options_.block) * problem_.group_size(k.g) : 0;
    block_scratch scratch;
    const auto carve = [&](std::byte* memory) {
      carver take(memory);
      take(scratch.rows, n * stride), take(scratch.rows_before, before * stride);
      take(scratch.near, n * value_dim), take(scratch.near_lse, n);
      take(scratch.far, n * value_dim), take(scratch.far_lse, n), take(scratch.row, value_dim);
      return take.used();
    };
    std::byte* const own_memory = ctx.detail_scratch(carve(nullptr));
    if (own_memory == nullptr) return fail();
    carve(own_memory);

    // 1. Define query groups.
    const point_rows<A> x = pool(k, k.begin, k.end, scratch.rows);
    const double reach = options_.tolerance || report_ != nullptr ? reach_of(k, far) : 0;
    const double radius = largest_radius(reach);
    const bool finds = find_groups(k, x, scratch.rows_before, radius, own, calls);
    if (watch.failed()) return fail();
    if (!finds) return false;
    typename group_attender<A>::sharing sharing{radius};
    if (options_.strict_causal) sharing = {std::numeric_limits<double>::max(), true};  // too far rows are apart already
    const attention_options& scores = options_.attention;
    const typename group_attender<A>::shape dims{problem_.shape.head_dim, value_dim, far_value_dim(), k.keys,
                                                 far_keys(k)};
    std::byte* const memory = calls.detail_workers()[0].detail_scratch(
        group_attender<A>::bytes(x, own.groups, dims, options_.groupwise, sharing));
    if (memory == nullptr) return fail();
    group_attender<A> attender(x, own.groups, dims, options_.groupwise, sharing, memory);
    // Nothing about a block of a strict call is decided by all of its rows.
    const auto found = attender.counts();
    if (!options_.strict_causal && !pays(k, found.groups, found.alone)) return false;

    // 2. Group-wise attention to the far keys.
    if (!own.top)
      own.top.emplace(1, 1, std::min(options_.groupwise.top_keys, problem_.shape.kv_len), problem_.shape.head_dim,
                      value_dim);
    if (watch.failed()) return fail();
    const part_of_source<Far> far_part(far, 0, 0, 1, seen_keys(k));
    attender.run(far_part, part_of_source<KV>(kv_, k.b, k.g, 1, k.keys), key_interval(k.near, false), scores, *own.top,
                 scratch.far, scratch.far_lse, calls);
    // 3. Local attention to the near ones.
    attend_near(k, scratch, calls);
    if (watch.failed()) return fail();
    // 4. and 5. Combine the scores, apply.
    write(k, scratch);
    if (report_ != nullptr) describe(k, own.groups, attender, reach);
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
  };

  [[nodiscard]] point_rows<A> pool(const block& k, index_t begin, index_t end, A* to) const noexcept {
    return pool_queries(problem_.q, problem_.shape.head_dim, k.b, {begin, end},
                        {problem_.first_head(k.g), head_end(k.g)}, to);
  }

  /// Sets own.groups; false if groups do not pay.
  [[nodiscard]] bool find_groups(const block& k, const point_rows<A>& x, A* rows_before, double radius,
                                 worker_state& own, context& calls) const {
    if (options_.groupwise.form == groupwise_form::dense) return leave_alone(x, own.groups);
    if (options_.strict_causal) return assign(k, x, rows_before, radius, own, calls);
    return group(k, x, radius, own.groups, calls);
  }
  [[nodiscard]] grouping_options grouping_of(const block& k, double radius) const noexcept {
    grouping_options o = options_.grouping;
    o.groups = wanted_groups(k);
    if (options_.tolerance) o.method = grouping_method::cover;
    if (options_.tolerance) o.radius = radius;
    return o;
  }
  /// Groups rows; false if a tolerance takes more groups than may be. A sample of the rows tells at little cost
  /// whether they group at all.
  [[nodiscard]] bool group(const block& k, const point_rows<A>& x, double radius, query_groups<A>& groups,
                           context& calls) const {
    const grouping_options o = grouping_of(k, radius);
    if (options_.tolerance && !options_.always_group && x.count > sampled_rows) {
      const point_rows<A> sample{x.at, sampled_rows, x.dim, x.count / sampled_rows * x.stride};
      if (!group_rows_of(sample, o, groups, calls) || groups.size() > sampled_rows / 2) return false;
    }
    if (!group_rows_of(x, o, groups, calls)) return false;
    return !options_.tolerance || std::all_of(groups.radii.begin(), groups.radii.end(), [&o](A r) {
      return static_cast<double>(r) <= o.radius || r == std::numeric_limits<A>::infinity();
    });
  }
  [[nodiscard]] static bool group_rows_of(const point_rows<A>& x, const grouping_options& o, query_groups<A>& groups,
                                          context& calls) {
    std::byte* const memory = calls.detail_scratch(row_grouper<A>::bytes(x.count, x.dim, o, 0, calls));
    if (memory == nullptr) return false;
    row_grouper<A> grouper(x, o, 0, calls, memory);
    grouper.by_content();
    grouper.write(groups);
    return true;
  }
  /// Sends rows to the representatives of the block before; those too far from all attend for themselves. False if
  /// those representatives are too many.
  [[nodiscard]] bool assign(const block& k, const point_rows<A>& x, A* rows_before, double radius, worker_state& own,
                            context& calls) const {
    const index_t begin = std::max<index_t>(k.begin - options_.block, 0);
    if (!group(k, pool(k, begin, k.begin, rows_before), radius, own.before, calls)) return false;
    // Those of rows that are not finite cannot be compared with.
    index_t count = own.before.size();
    while (count > 0 && own.before.radius(count - 1) == std::numeric_limits<A>::infinity()) --count;
    if (count == 0 || !pays(k, count, 0)) return false;
    grouping_options o;
    o.groups = count;
    o.radius = options_.tolerance ? radius : std::numeric_limits<double>::infinity();
    std::byte* const memory = calls.detail_scratch(row_grouper<A>::bytes(x.count, x.dim, o, count, calls));
    if (memory == nullptr) return false;
    row_grouper<A> grouper(x, o, count, calls, memory);
    grouper.by_representatives(
        std::span<const A>(own.before.representatives).first(static_cast<std::size_t>(count * x.dim)));
    grouper.write(own.groups);
    return true;
  }
  [[nodiscard]] static bool leave_alone(const point_rows<A>& x, query_groups<A>& groups) {
    groups.dim = x.dim;
    groups.order.resize(static_cast<std::size_t>(x.count));
    for (std::size_t i = 0; i < groups.order.size(); ++i) groups.order[i] = static_cast<index_t>(i);
    groups.offsets = {0, x.count};
    groups.representatives.assign(x.row(0), x.row(0) + x.dim);
    groups.radii = {std::numeric_limits<A>::infinity()};
    return true;
  }

  /// How far scores of rows one unit apart differ, but for what the softmax does not see. A softcap sees all of it.
  template <class Far>
  [[nodiscard]] double reach_of(const block& k, const Far& far) const {
    return std::abs(problem_.scale()) *
           spread_of(far, key_interval(k.near, false), seen_keys(k), options_.attention.softcap == 0);
  }
  /// The radius of a group whose members' weights are off by at most the tolerance.
  [[nodiscard]] double largest_radius(double reach) const noexcept {
    if (!options_.tolerance || reach == 0) return std::numeric_limits<double>::max();
    return 2 * std::atanh(std::min(*options_.tolerance / 2, 1 - 0x1p-53)) / reach;
  }

  void attend_near(const block& k, const block_scratch& scratch, context& calls) const {
    const index_t head = problem_.first_head(k.g), heads = problem_.group_size(k.g), queries_of = k.end - k.begin;
    attention_options o = options_of(k.b, k.begin, k.g, 1);
    o.sinks = {};
    const partial_state<A> state{tensor_view<A, 4>(scratch.near, {1, queries_of, heads, problem_.shape.value_dim}),
                                 tensor_view<A, 3>(scratch.near_lse, {1, queries_of, heads})};
    attention(queries(k.b, k.begin, k.end, head, heads), part_of_source<KV>(kv_, k.b, k.g, 1, k.keys), state, o,
              key_interval(k.near, true), calls);
  }

  /// Merges near and far keys and the sinks, which have values of 0, and writes the rows.
  void write(const block& k, const block_scratch& scratch) const noexcept {
    const auto& sinks = options_.attention.sinks;
    const index_t head = problem_.first_head(k.g), heads = problem_.group_size(k.g), dim = problem_.shape.value_dim;
    for (index_t i = 0; i < rows_of(k); ++i) {
      const index_t s = k.begin + i / heads, h = head + i % heads;
      const A sink = sinks.empty() ? minus_infinity<A> : static_cast<A>(sinks[static_cast<std::size_t>(h)]);
      const A lse = merge_finished<A>(
          {{scratch.near + i * dim, scratch.near_lse[i]}, {scratch.far + i * dim, scratch.far_lse[i]}, {nullptr, sink}},
          dim, scratch.row);
      problem_.out.store_finished(k.b, s, h, dim, scratch.row, lse);
    }
  }

  [[nodiscard]] block_report empty_report(const block& k) const {
    block_report r;
    r.batch = k.b, r.kv_head = k.g, r.query_begin = k.begin, r.query_end = k.end;
    return r;
  }
  void describe(const block& k, const query_groups<A>& groups, const group_attender<A>& attender, double reach) {
    block_report& r = report_->blocks[k.number];
    const groupwise_counts& counts = attender.counts();
    r.exact = false;
    r.groups = counts.groups, r.alone = counts.alone;
    r.products = counts.products;
    r.exact_products = static_cast<double>(rows_of(k)) * static_cast<double>(far_keys(k)) * dims();
    index_t sharing = 0;
    attender.for_each_shared([&](index_t j, double retained) {
      const auto members = static_cast<index_t>(groups.members(j).size());
      const auto radius = static_cast<double>(groups.radius(j));
      r.shared.push_back({members, radius, retained, 2 * std::tanh(reach * radius / 2)});
      r.largest_radius = std::max(r.largest_radius, radius);
      r.error_bound = std::max(r.error_bound, r.shared.back().error_bound);
      r.retained_mass += static_cast<double>(members) * retained;
      sharing += members;
    });
    if (sharing > 0) r.retained_mass /= static_cast<double>(sharing);
  }

  const tensor_view<const Q, 4>& q_;
  const KV& kv_;
  const Out& out_;
  const grouped_options& options_;
  grouped_report* report_;
  context& ctx_;
  problem<A, A> problem_;
  std::vector<block> blocks_;  // by sequence, position, KV head
  std::vector<worker_state> workers_;
  std::atomic<bool> failed_{false};
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
