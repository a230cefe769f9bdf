// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_reader: decode that reads pages of keys in rounds, those that may weigh most first, until the rest is certified
/// not to matter. What page_attention() and projected_attention() have in common, which is all but where bounds of
/// scores come from (box_bounds.hpp, projected_bounds.hpp).
///
///     bounds of all pages -> first pages -> attend, merge -> rest certified? -> next pages -> attend, merge -> ...
///
/// A page is a whole key tile of 64 keys, or one of its panels of 16; all rows of a KV head choose together.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/sparse/chosen_pages.hpp>
#include <gqa/detail/sparse/page_ranker.hpp>
#include <gqa/detail/sparse/score_bound.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/options.hpp>
#include <gqa/page_options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Pages that the first round reads beside those that are always read, and each later one at least.
[[nodiscard]] constexpr index_t pages_of_a_round(index_t all) noexcept {
  return std::clamp<index_t>(all / 8, 1, 16);
}

/// L: what queries and weights are held in; Bounds: where bounds of scores come from, out of a Bounds::source.
template <class L, class Queries, class Source, class Bounds>
class page_reader {
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;

  /// One KV head of a sequence.
  struct head_task {
    bounded_head of;
    key_range pages;  // by key / page_tokens: those of the tiles that some query sees
    page_ranker<A> ranker;
    page_bits round;  // what the next round reads, of all pages
    bool sorted = false;
  };

 public:
  template <class Out>
  page_reader(const Queries& q, const Source& kv, const typename Bounds::source& bounds, const Out& out,
              const page_options& options, context& ctx) noexcept
      : q_(q),
        kv_(kv),
        options_(options),
        problem_(problem_of<L>(q, kv, out, options.attention)),
        scores_(problem_),
        bounds_(problem_, scores_, bounds),
        ctx_(ctx) {}

  template <class Out>
  void run(const Out& out, page_report* report) {
    const call_shape& shape = problem_.shape;
    std::byte* const memory = ctx_.detail_scratch_aside(carve(nullptr));
    if (memory == nullptr) return;
    carve(memory);
    const error_watch watch;
    if (reads_all()) {
      if (report != nullptr && !fill(*report, 1)) return;
      return attend<tile_parts::panels>(q_, kv_, out, options_.attention, no_variant{}, ctx_);
    }
    for_each_task([&](head_task& t) { choose_first(t); });
    attention_options of_round = options_.attention;
    const chosen_pages<A> chosen(shape, options_.attention.group_offsets, page_tokens(), rounds_, words_of_round());
    index_t rounds = 0;
    for (bool any = true; any; ++rounds) {
      attend<tile_parts::panels>(q_, kv_, rounds == 0 ? total_ : round_, of_round, chosen, ctx_);
      if (rounds > 0 && !watch.failed()) merge(total_, partial_state<const A>(round_), ctx_);
      if (watch.failed()) return;
      of_round.sinks = {};  // they count once
      for_each_task([&](head_task& t) { choose_next(t); });
      any = std::any_of(wants_more_, wants_more_ + tasks(), [](std::uint8_t wants) { return wants != 0; });
    }
    if (report != nullptr && !fill(*report, rounds)) return;
    for (index_t b = 0; b < shape.batch; ++b)
      for (index_t s = 0; s < shape.q_len; ++s)
        for (index_t h = 0; h < shape.q_heads; ++h)
          problem_.out.store_finished(b, s, h, shape.value_dim, &total_.out(b, s, h, 0), total_.lse(b, s, h));
  }

 private:
  [[nodiscard]] bool reads_all() const noexcept { return options_.epsilon == 0 && !options_.page_budget; }
  [[nodiscard]] index_t tasks() const noexcept { return problem_.shape.batch * problem_.shape.kv_heads; }
  template <class F>
  void for_each_task(const F& f) {
    ctx_.for_each(tasks(), [&](index_t n, index_t) { f(tasks_[n]); });
  }

  [[nodiscard]] index_t page_tokens() const noexcept { return bounds_.page_tokens(); }
  [[nodiscard]] index_t pages_of_tile() const noexcept { return tile_tokens / page_tokens(); }
  [[nodiscard]] index_t words_of_round() const noexcept {
    return page_bits::words(ceil_div(kv_.kv_len(), tile_tokens) * pages_of_tile());
  }

  std::size_t carve(std::byte* memory) noexcept {
    const call_shape& shape = problem_.shape;
    const index_t rows = shape.batch * shape.q_len * shape.q_heads;
    carver take(memory);
    A *out = nullptr, *round_out = nullptr, *lse = nullptr, *round_lse = nullptr;
    take(out, rows * shape.value_dim), take(lse, rows);
    take(round_out, rows * shape.value_dim), take(round_lse, rows);
    take(tasks_, tasks()), take(wants_more_, tasks()), take(rounds_, tasks() * words_of_round());
    take(rows_, tasks() * row_elements()), take(elements_, tasks() * row_elements());
    bounds_.carve(take, rows);
    std::size_t used = take.used();
    std::byte* rankers = memory == nullptr ? nullptr : memory + used;
    for (index_t n = 0; n < tasks(); ++n) {
      head_task measured{head_of(n / shape.kv_heads, n % shape.kv_heads), {}, {}, {}};
      const key_range tiles = measured.of.tiles;
      measured.pages = {tiles.begin * pages_of_tile(),
                        (std::min)(tiles.end * pages_of_tile(), ceil_div(measured.of.keys, page_tokens()))};
      const std::size_t own =
          measured.ranker.carve(rankers, {measured.of.rows, measured.pages.size(), bounds_.bounds_of_page()});
      used += own;
      if (memory == nullptr) continue;
      rankers += own;
      measured.round = page_bits(rounds_ + n * words_of_round());
      measured.round.clear(words_of_round() * 64);
      tasks_[n] = measured;
    }
    const std::array<index_t, 4> extents{shape.batch, shape.q_len, shape.q_heads, shape.value_dim};
    const std::array<index_t, 3> lse_extents{shape.batch, shape.q_len, shape.q_heads};
    total_ = {tensor_view<A, 4>(out, extents), tensor_view<A, 3>(lse, lse_extents)};
    round_ = {tensor_view<A, 4>(round_out, extents), tensor_view<A, 3>(round_lse, lse_extents)};
    return used;
  }
  /// Elements of a row of queries as they are loaded: of 8 bits with their scales.
  [[nodiscard]] index_t row_elements() const noexcept {
    return (std::max)(round_up(problem_.shape.head_dim, 64) + 64, q8_query_layout(problem_.shape.head_dim).bytes());
  }
  [[nodiscard]] bounded_head head_of(index_t b, index_t g) const noexcept {
    const call_shape& shape = problem_.shape;
    const index_t keys = problem_.length(kv_, b), group = problem_.group_size(g), first = problem_.first_head(g);
    bounded_head head{b,
                      g,
                      first,
                      group,
                      shape.q_len * (b * shape.q_heads + first),
                      shape.q_len * group,
                      problem_.query_offset(b, keys),
                      keys,
                      {0, 0}};
    const index_t begin = scores_.keys_of(head.offset, keys).begin,
                  end = scores_.keys_of(head.offset + shape.q_len - 1, keys).end;
    if (begin < end && head.rows > 0) head.tiles = {begin / tile_tokens, ceil_div(end, tile_tokens)};
    return head;
  }
  /// What row r of a task is: its query, head, and place among all rows.
  struct row_place {
    index_t s, h, at;
  };
  [[nodiscard]] row_place place_of(const head_task& t, index_t r) const noexcept {
    const index_t s = r / t.of.group, h = t.of.q_head_of(r);
    return {s, h, (t.of.b * problem_.shape.q_len + s) * problem_.shape.q_heads + h};
  }

  void load_rows(const head_task& t) noexcept {
    const index_t dim = problem_.shape.head_dim, task_at = &t - tasks_;
    queries_of_left<L>* const row = rows_ + task_at * row_elements();
    A* const elements = elements_ + task_at * row_elements();
    for (index_t r = 0; r < t.of.rows; ++r) {
      const row_place p = place_of(t, r);
      problem_.q.load(t.of.b, p.s, p.h, dim, scores_.query_factor(), row, elements);
      for (index_t d = 0; d < dim; ++d) {
        const A x = element_of(row, d);
        elements[d] = scores_.negates() ? -x : x;
      }
      bounds_.add_row(t.of.first_row + r, t.of, elements);
    }
  }
  [[nodiscard]] A element_of(const queries_of_left<L>* row, index_t d) const noexcept {
    if constexpr (std::is_same_v<queries_of_left<L>, q8>) {
      const q8_query_layout layout(problem_.shape.head_dim);
      float scale = 0;
      std::memcpy(&scale, row + layout.scales_at() + d / scale_channels * index_t{sizeof(scale)}, sizeof(scale));
      return static_cast<float>(static_cast<std::int8_t>(row[d])) * scale;
    } else {
      return static_cast<A>(row[d]);
    }
  }

  /// Pages that a task may still read.
  [[nodiscard]] index_t budget_of(const head_task& t) const noexcept {
    if (!options_.page_budget) return t.ranker.unread();
    return std::clamp<index_t>(*options_.page_budget - t.ranker.read(), 0, t.ranker.unread());
  }
  void take_first(head_task& t, index_t count) noexcept {
    t.ranker.take_first(count, [&](index_t page) { t.round.add(t.pages.begin + page); });
  }
  void choose_first(head_task& t) noexcept {
    if (t.pages.size() == 0) return;
    load_rows(t);
    t.ranker.begin();
    bounds_.find(t.of, t.ranker);
    const auto take = [&](index_t page) { t.ranker.take(page), t.round.add(t.pages.begin + page); };
    const auto take_keys = [&](key_range some) {
      if (some.size() == 0) return;
      const index_t begin = (std::max)(floor_div(some.begin, page_tokens()), t.pages.begin);
      const index_t end = (std::min)(ceil_div(std::max<index_t>(some.end, 0), page_tokens()), t.pages.end);
      for (index_t page = begin; page < end; ++page) take(page - t.pages.begin);
    };
    bounds_.weigh(t.of, t.ranker, take);
    take_keys({0, options_.sink_tokens});
    if (options_.window > 0) take_keys({t.of.offset - options_.window + 1, t.of.offset + problem_.shape.q_len});
    t.ranker.drop_taken();
    t.ranker.sort([&](index_t r) { return t.ranker.total(r); });
    take_first(t, (std::min)(pages_of_a_round(t.pages.size()), budget_of(t)));
  }

  /// What row r has read, in the unit of its masses; no more than that, whatever its sums rounded.
  [[nodiscard]] double mass_read(const head_task& t, index_t r) const noexcept {
    const row_place p = place_of(t, r);
    const auto lse = static_cast<double>(total_.lse(t.of.b, p.s, p.h));
    if (lse == -std::numeric_limits<double>::infinity()) return 0;
    const double weights = sums_in_lanes<L> ? 0x1p-8 : 0;
    const index_t sums = 256 + kv_.kv_len() / split_tokens;
    const double off = weights + score_bound<A, L>::unit * (static_cast<double>(sums) + 8 * std::abs(lse));
    return std::exp2(lse * std::numbers::log2e - static_cast<double>(t.ranker.unit(r))) * (std::max)(1 - off, 0.0);
  }
  void choose_next(head_task& t) noexcept {
    std::uint8_t& wants = wants_more_[&t - tasks_];
    if (t.sorted && wants == 0) return;  // nothing has changed since
    wants = 0;
    if (t.pages.size() == 0) return;
    t.round.clear(t.pages.end);
    const double share = options_.epsilon / (1 - options_.epsilon);
    const auto limit = [&](index_t r) { return share * mass_read(t, r) * (1 - 0x1p-16); };
    if (!std::exchange(t.sorted, true)) t.ranker.sort(limit);
    const index_t needed = t.ranker.count_needed(limit), unread = t.ranker.unread();
    // What is needed by loose bounds shrinks as more is read, so only a half of it is, unless hardly anything could be
    // spared.
    const index_t least = (std::min)(needed, pages_of_a_round(t.pages.size()));
    const bool all = Bounds::are_tight || 4 * needed >= 3 * unread;
    const index_t next = all ? needed : (std::max)(needed / 2, least);
    const index_t count = (std::min)(next, budget_of(t));
    if (count == 0) return;
    wants = 1;
    take_first(t, count);
  }

  /// False after a capacity error, where that returns.
  [[nodiscard]] bool fill(page_report& report, index_t rounds) const {
    const call_shape& shape = problem_.shape;
    const char* const what = "page_report";
    report.rounds = rounds;
    if (!make_zeros(report.rows, static_cast<std::size_t>(shape.batch * shape.q_len * shape.q_heads), what) ||
        !make_room(report.read, static_cast<std::size_t>(tasks()), what))
      return false;
    const double page_bytes = static_cast<double>(tile_elements<P>(shape.head_dim, shape.value_dim)) * sizeof(P) /
                              static_cast<double>(pages_of_tile());
    for (index_t n = 0; n < tasks(); ++n) {
      const head_task& t = tasks_[n];
      const index_t pages = t.pages.size(), read = reads_all() || pages == 0 ? pages : t.ranker.read();
      report.bytes_read += static_cast<double>(read) * page_bytes;
      report.bytes_exact += static_cast<double>(pages) * page_bytes;
      if (!reads_all()) report.bytes_of_bounds += bounds_.bytes_of(t.of);
      std::vector<index_t>& all = report.read.emplace_back();
      if (!make_room(all, static_cast<std::size_t>(read), what)) return false;
      for (index_t page = t.pages.begin; page < t.pages.end; ++page) {
        if (read == pages || t.ranker.is_read(page - t.pages.begin)) all.push_back(page);
      }
      for (index_t r = 0; r < t.of.rows; ++r) {
        const double rest = read == pages ? 0 : t.ranker.rest(r) * (1 + 0x1p-16);
        const double dropped = rest == 0 ? 0 : rest / (rest + mass_read(t, r));
        report.rows[static_cast<std::size_t>(place_of(t, r).at)] = {dropped, read, pages};
      }
    }
    return true;
  }

  const Queries& q_;
  const Source& kv_;
  const page_options& options_;
  problem<A, L> problem_;
  score_bound<A, L> scores_;
  Bounds bounds_;
  context& ctx_;

  partial_state<A> total_, round_;
  head_task* tasks_ = nullptr;          // [B, G]
  std::uint8_t* wants_more_ = nullptr;  // [B, G]
  std::uint64_t* rounds_ = nullptr;     // [B, G, words]
  queries_of_left<L>* rows_ = nullptr;  // [B, G, row], as loaded
  A* elements_ = nullptr;               // [B, G, row]
};

[[nodiscard]] inline fault find_page_fault(const page_options& options) noexcept {
  if (!(options.epsilon >= 0 && options.epsilon < 1))
    return make_fault(errc::option, "options.epsilon: expected 0 to less than 1, got %g", options.epsilon);
  if (options.sink_tokens < 0 || options.window < 0 || options.sink_tokens > position_limit ||
      options.window > position_limit)
    return make_fault(errc::option, "options.sink_tokens, window: expected 0 to 2^60, got %lld, %lld",
                      printable(options.sink_tokens), printable(options.window));
  if (options.page_budget && *options.page_budget < 0)
    return make_fault(errc::option, "options.page_budget: expected 0 or more, got %lld",
                      printable(*options.page_budget));
  if (options.attention.bias)
    return make_fault(errc::option, "options.attention.bias: expected none, for it has no bounds");
  return {};
}

/// All that is wrong with a call. find_fault(): why bounds do not fit it, once it has passed all other checks.
template <class Queries, class Source, class Out, class FindFault>
[[nodiscard]] fault find_pages_fault(const Queries& q, const Source& kv, const Out& out, const page_options& options,
                                     const FindFault& find_fault) noexcept {
  if (const auto f = find_attention_fault(q, kv, out, options.attention, no_variant{})) return f;
  if (const auto f = find_page_fault(options)) return f;
  return find_fault();
}

template <template <class, class> class BoundsOf, class Queries, class Source, class From, class Out, class FindFault>
void attend_pages(const Queries& q, const Source& kv, const From& from, const Out& out, const page_options& options,
                  context& ctx, page_report* report, const FindFault& find_fault) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  using P = typename Source::panel_element;
  require_dtypes<Q, Source, typename decltype(output_view(out))::value_type>();
  if (const auto f = find_pages_fault(q, kv, out, options, find_fault)) return raise(f);
  if (report != nullptr) {
    *report = {};
    report->page_tokens = BoundsOf<accumulator_t<P>, From>::page_tokens();
  }
  if (output_view(out).size() == 0) return;
  const auto run = [&]<class L>(std::type_identity<L>) {
    page_reader<L, Queries, Source, BoundsOf<L, From>>(q, kv, from, out, options, ctx).run(out, report);
  };
  if constexpr (has_dot<P>) {
    if (takes_dot<Q, P>(options.attention)) return run(std::type_identity<dot_left<P>>{});
  }
  run(std::type_identity<accumulator_t<P>>{});
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
