// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_attention(): decode that reads the pages of keys which matter, and certifies what it left out.
///
///     cache.keep_key_bounds();                      // once: the caches keep them on append, truncate and fork
///     gqa::page_attention(q, cache, out, {.attention = {.causal = true}, .epsilon = 0.01}, ctx, &report);
///
/// Bounds of the keys of each page say what a query scores with any of them at most (Quest, Tang et al. 2024). Pages
/// are read in rounds by falling bound, for all heads of a group together; a row's rest is certified from
///
///     sum over unread pages of n_p exp(U_p)    beside    exp(lse of what was read, sinks included)
///
/// and reading ends when no row may have lost more than `epsilon` of its mass, rounding of both sums counted in. With m
/// the mass that was really dropped, at most the certificate, the output differs from exact attention's by m (o_S -
/// o_rest): at most m times the largest difference of two values. Where scores are flat nothing can be dropped and all
/// is read, each page once; what that costs more than attention() is the bounds.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/carver.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/key_bounds.hpp>
#include <gqa/detail/page_ranker.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/q8.hpp>
#include <gqa/detail/score_rules.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/options.hpp>
#include <gqa/page_options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// A source that keeps bounds of its keys.
template <class S>
concept keeps_key_bounds = requires(const S& kv) {
  { kv.bound_tokens() } -> std::same_as<index_t>;
  kv.bounds(index_t{}, index_t{}, index_t{});
};

/// Pages of `all` that the first round reads beside those that are always read, and each later one at least.
[[nodiscard]] constexpr index_t pages_of_a_round(index_t all) noexcept {
  return std::clamp<index_t>(all / 8, 1, 16);
}

template <class L, class Queries, class Source>
class page_reader {
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;
  using B = bound_element<P>;
  /// What meets bounds: pairs where queries are held so, else accumulators.
  using S = std::conditional_t<multiplies_pairs<B, queries_of_left<L>>, B, A>;

  /// A variant: the key tiles of a round.
  class round_tiles {
   public:
    explicit round_tiles(const page_reader& of) noexcept : of_(of) {}
    [[nodiscard]] visibility visible(const key_block& b) const noexcept {
      const call_shape& shape = of_.problem_.shape;
      const index_t g = kv_head_of(b.q_head_begin, shape.q_heads, shape.kv_heads, of_.options_.attention.group_offsets);
      const tile_bits tiles = of_.task(b.batch, g).round;
      const index_t first = b.key_begin / tile_tokens, end = ceil_div(b.key_end, tile_tokens);
      if (end == first + 1) return tiles.has(first) ? visibility::all : visibility::none;
      index_t seen = 0;
      for (index_t tile = first; tile < end; ++tile) seen += tiles.has(tile) ? 1 : 0;
      return seen == 0 ? visibility::none : seen == end - first ? visibility::all : visibility::some;
    }

   private:
    const page_reader& of_;
  };

  /// One KV head of a sequence.
  struct head_task {
    index_t b, g;
    key_range tiles;  // that some query sees
    page_ranker<A> ranker;
    tile_bits round;  // what the next round reads, of all tiles
    bool sorted = false;
  };

 public:
  template <class Out>
  page_reader(const Queries& q, const Source& kv, const Out& out, const page_options& options, context& ctx) noexcept
      : q_(q),
        kv_(kv),
        options_(options),
        problem_(problem_of<L>(q, kv, out, options.attention)),
        rules_(problem_, nothing_),
        ctx_(ctx) {}

  template <class Out>
  void run(const Out& out, page_report* report) {
    const call_shape& shape = problem_.shape;
    // Memory of the first worker's context: calls of this one do not use it.
    context* const workers = ctx_.detail_workers();
    const std::size_t bytes = carve(nullptr);
    std::byte* const memory = workers[0].detail_scratch(bytes);
    if (memory == nullptr) return;
    carve(memory);
    const error_watch watch;
    if (options_.epsilon == 0 && !options_.page_budget) {
      attend(q_, kv_, out, options_.attention, nothing_, ctx_);
      if (report != nullptr && !watch.failed()) fill(*report, 1);
      return;
    }
    for_each_task([&](head_task& t) { choose_first(t); });
    attention_options of_round = options_.attention;
    index_t rounds = 0;
    for (bool any = true; any; ++rounds) {
      attend(q_, kv_, rounds == 0 ? total_ : round_, of_round, round_tiles(*this), ctx_);
      if (rounds > 0 && !watch.failed()) merge(total_, partial_state<const A>(round_), ctx_);
      if (watch.failed()) return;
      of_round.sinks = {};  // they count once
      for_each_task([&](head_task& t) { choose_next(t); });
      any = std::any_of(wants_more_, wants_more_ + tasks(), [](std::uint8_t wants) { return wants != 0; });
    }
    for (index_t b = 0; b < shape.batch; ++b)
      for (index_t s = 0; s < shape.q_len; ++s)
        for (index_t h = 0; h < shape.q_heads; ++h)
          problem_.out.store_finished(b, s, h, shape.value_dim, &total_.out(b, s, h, 0), total_.lse(b, s, h));
    if (report != nullptr) fill(*report, rounds);
  }

 private:
  [[nodiscard]] index_t tasks() const noexcept { return problem_.shape.batch * problem_.shape.kv_heads; }
  [[nodiscard]] head_task& task(index_t b, index_t g) const noexcept { return tasks_[b * problem_.shape.kv_heads + g]; }
  template <class F>
  void for_each_task(const F& f) {
    ctx_.for_each(tasks(), [&](index_t n, index_t) { f(tasks_[n]); });
  }

  [[nodiscard]] index_t rows_of(index_t g) const noexcept { return problem_.shape.q_len * problem_.group_size(g); }
  [[nodiscard]] index_t bounds_of_tile() const noexcept { return tile_tokens / kv_.bound_tokens(); }
  /// Elements of a row of bounds, and of queries that meet it.
  [[nodiscard]] index_t bound_length() const noexcept { return 2 * key_bounds<P>::padded(problem_.shape.head_dim); }

  std::size_t carve(std::byte* memory) noexcept {
    const call_shape& shape = problem_.shape;
    const index_t rows = shape.batch * shape.q_len * shape.q_heads;
    const index_t words = tile_bits::words(ceil_div(kv_.kv_len(), tile_tokens));
    carver take(memory);
    A *out = nullptr, *round_out = nullptr, *lse = nullptr, *round_lse = nullptr;
    std::uint64_t* bits = nullptr;
    take(out, rows * shape.value_dim), take(lse, rows);
    take(round_out, rows * shape.value_dim), take(round_lse, rows);
    take(tasks_, tasks()), take(wants_more_, tasks()), take(bits, tasks() * words);
    take(split_queries_, rows * bound_length()), take(sums_, rows);
    take(rows_, tasks() * row_elements()), take(turned_, tasks() * row_elements());
    std::size_t used = take.used();
    std::byte* rankers = memory == nullptr ? nullptr : memory + used;
    for (index_t n = 0; n < tasks(); ++n) {
      head_task measured{n / shape.kv_heads, n % shape.kv_heads, {}, {}, {}};
      find_tiles(measured);
      const std::size_t own =
          measured.ranker.carve(rankers, {rows_of(measured.g), measured.tiles.size(), bounds_of_tile()});
      used += own;
      if (memory == nullptr) continue;
      rankers += own;
      measured.round = tile_bits(bits + n * words);
      measured.round.clear(words * 64);
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
    return std::max(round_up(problem_.shape.head_dim, 64) + 64, q8_query_layout(problem_.shape.head_dim).bytes());
  }
  void find_tiles(head_task& t) const noexcept {
    const index_t keys = problem_.length(kv_, t.b), offset = problem_.query_offset(t.b, keys);
    const interval_rule interval = problem_.interval();
    const index_t begin = interval.keys_of(offset, keys).begin,
                  end = interval.keys_of(offset + problem_.shape.q_len - 1, keys).end;
    if (begin < end && rows_of(t.g) > 0) t.tiles = {begin / tile_tokens, ceil_div(end, tile_tokens)};
  }
  /// The first of its rows, where those of a task lie together.
  [[nodiscard]] index_t first_row_of(const head_task& t) const noexcept {
    return problem_.shape.q_len * (t.b * problem_.shape.q_heads + problem_.first_head(t.g));
  }
  /// What row r of a task is: its query, head, and place among all rows.
  struct row_place {
    index_t s, h, at;
  };
  [[nodiscard]] row_place place_of(const head_task& t, index_t r) const noexcept {
    const index_t group = problem_.group_size(t.g), s = r / group, h = problem_.first_head(t.g) + r % group;
    return {s, h, (t.b * problem_.shape.q_len + s) * problem_.shape.q_heads + h};
  }

  /// Queries as the kernel holds them, split in positive and negative parts, in a row each.
  void split_queries(const head_task& t) noexcept {
    const index_t dim = problem_.shape.head_dim, task_at = &t - tasks_;
    queries_of_left<L>* const row = rows_ + task_at * row_elements();
    const bool negative = rules_.score_factor() < 0;
    for (index_t r = 0; r < rows_of(t.g); ++r) {
      const row_place p = place_of(t, r);
      problem_.q.load(t.b, p.s, p.h, dim, rules_.query_factor(), row, turned_ + task_at * row_elements());
      S* const positive_part = split_queries_ + (first_row_of(t) + r) * bound_length();
      S* const negative_part = positive_part + bound_length() / 2;
      std::fill_n(positive_part, bound_length(), S(0));
      double sum = 0;
      for (index_t d = 0; d < dim; ++d) {
        const A loaded = element_of(row, d), x = negative ? -loaded : loaded;
        if (x > 0 || x != x) positive_part[d] = static_cast<S>(x);
        if (x < 0) negative_part[d] = static_cast<S>(x);
        sum += std::abs(static_cast<double>(x));
      }
      sums_[first_row_of(t) + r] = sum;
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

  /// Upper bounds of the scores of all rows of a task, base 2.
  void find_bounds(head_task& t) noexcept {
    static constexpr auto kernels = by_rows([]<int Rows>() { return &multiply_bounds<Rows, A, S, B>; },
                                            std::make_integer_sequence<int, block_rows>{});
    alignas(64) A u[block_rows * panel_tokens];
    const index_t rows = rows_of(t.g), pages = t.tiles.size() * bounds_of_tile(), tokens = kv_.bound_tokens(),
                  first_page = t.tiles.begin * bounds_of_tile(), group = problem_.group_size(t.g),
                  first_row = first_row_of(t);
    const index_t keys = problem_.length(kv_, t.b), offset = problem_.query_offset(t.b, keys);
    for (index_t first = 0; first < pages; first += panel_tokens) {
      const index_t count = std::min(panel_tokens, pages - first);
      std::array<const B*, panel_tokens> bounds{};
      alignas(64) std::array<A, panel_tokens> largest{};
      for (index_t n = 0; n < count; ++n) {
        const index_t number = first_page + first + n;
        if (number * tokens >= keys) {  // nobody sees it, and anything is multiplied
          bounds[static_cast<std::size_t>(n)] = reinterpret_cast<const B*>(split_queries_ + first_row * bound_length());
          continue;
        }
        const auto page = kv_.bounds(t.b, t.g, number);
        bounds[static_cast<std::size_t>(n)] = page.row, largest[static_cast<std::size_t>(n)] = page.largest;
      }
      for (index_t row = 0; row < rows; row += block_rows) {
        const index_t block = std::min<index_t>(block_rows, rows - row);
        kernels[static_cast<std::size_t>(block - 1)](bounds, count, split_queries_ + (first_row + row) * bound_length(),
                                                     bound_length(), bound_length(), u);
        for (index_t r = 0; r < block; ++r) {
          const index_t position = offset + (row + r) / group;
          const key_range seen = problem_.interval().keys_of(position, keys);
          const A* const products = u + r * panel_tokens;
          A* const scores = &t.ranker.bound(row + r, first);
          const double rounding = rounding_of(sums_[first_row + row + r]);
          const bool all_seen =
              seen.begin < (first_page + first + 1) * tokens && (first_page + first + count - 1) * tokens < seen.end;
          if (all_seen && rules_.is_plain()) {
            bound_plain_scores(products, largest.data(), rounding, scores);
            continue;
          }
          for (index_t n = 0; n < count; ++n) {
            const index_t page = first_page + first + n;
            const key_range own{page * tokens, std::min((page + 1) * tokens, keys)};
            const bool hidden = own.end <= seen.begin || seen.end <= own.begin;
            scores[n] = hidden ? page_ranker<A>::unseen
                               : bound_score(products[n], largest[static_cast<std::size_t>(n)], rounding,
                                             problem_.first_head(t.g) + (row + r) % group, position, own);
          }
        }
      }
    }
  }
  /// What a product with bounds, and the kernel's with a key, may round off in all, beside the largest element of the
  /// keys: chains of D and 2 D fused multiply-adds and a tree are off by at most n u sum |q| |k|, u the unit roundoff.
  [[nodiscard]] double rounding_of(double sum_of_query) const noexcept {
    const index_t terms = problem_.shape.head_dim + bound_length() / 4 + 16;
    return static_cast<double>(terms) * unit * sum_of_query;
  }
  static constexpr double unit = std::numeric_limits<A>::epsilon();  // twice the unit roundoff
  /// Scaling, capping, adding and storing: some roundings, and the kernel's tanh within 8 of them.
  static constexpr double roundings = 32 * unit;

  /// The most that the kernel computes for a score, base 2.
  [[nodiscard]] A bound_score(A product, A largest, double rounding, index_t q_head, index_t position,
                              key_range keys) const noexcept {
    const double factor = std::abs(static_cast<double>(rules_.score_factor()));
    double score = (static_cast<double>(product) + rounding * static_cast<double>(largest)) * factor;
    double size = std::abs(score);
    if (!rules_.is_plain()) {
      if (const double cap = options_.attention.softcap; cap != 0) score = cap * std::tanh(score / cap), size += cap;
      if (!options_.attention.alibi_slopes.empty()) {
        const double slope = options_.attention.alibi_slopes[static_cast<std::size_t>(q_head)];
        const double near = slope * static_cast<double>((slope > 0 ? keys.end - 1 : keys.begin) - position);
        score += near, size += std::abs(near);
      }
      score *= std::numbers::log2e, size *= std::numbers::log2e;
    }
    return static_cast<A>(score + roundings * size);
  }
  /// The same of 16 pages, where a score is a product and its factor.
  void bound_plain_scores(const A* products, const A* largest, double rounding, A* scores) const noexcept {
    const packet<A> factor = broadcast(std::abs(rules_.score_factor())), off = broadcast(static_cast<A>(rounding));
    for (index_t n = 0; n < panel_tokens; n += packet_size<A>) {
      const packet<A> score = mul<A>(madd(load(largest + n), off, load(products + n)), factor);
      const packet<A> size = max_or_nan(score, sub(zeros<A>(), score));
      store(scores + n, madd(size, broadcast(static_cast<A>(roundings)), score));
    }
  }

  /// Pages that a task may still read.
  [[nodiscard]] index_t budget_of(const head_task& t) const noexcept {
    if (!options_.page_budget) return t.ranker.unread();
    return std::clamp<index_t>(*options_.page_budget - t.ranker.read(), 0, t.ranker.unread());
  }
  void choose_first(head_task& t) noexcept {
    if (t.tiles.size() == 0) return;
    const index_t keys = problem_.length(kv_, t.b), offset = problem_.query_offset(t.b, keys);
    split_queries(t);
    t.ranker.begin();
    find_bounds(t);
    const auto take = [&](index_t tile) { t.ranker.take(tile), t.round.add(t.tiles.begin + tile); };
    const auto take_keys = [&](key_range some) {
      if (some.size() == 0) return;
      const index_t begin = std::max(floor_div(some.begin, tile_tokens), t.tiles.begin);
      const index_t end = std::min(ceil_div(std::max<index_t>(some.end, 0), tile_tokens), t.tiles.end);
      for (index_t tile = begin; tile < end; ++tile) take(tile - t.tiles.begin);
    };
    const index_t tokens = kv_.bound_tokens(), first_page = t.tiles.begin * bounds_of_tile();
    const index_t last = std::min(ceil_div(keys, tokens), t.tiles.end * bounds_of_tile()) - 1;
    t.ranker.weigh(tokens, last - first_page, std::min(keys - last * tokens, tokens), take);
    take_keys({0, options_.sink_tokens});
    if (options_.window > 0) take_keys({offset - options_.window + 1, offset + problem_.shape.q_len});
    t.ranker.drop_taken();
    t.ranker.sort([&](index_t r) { return t.ranker.total(r); });
    t.ranker.take_first(std::min(pages_of_a_round(t.tiles.size()), budget_of(t)),
                        [&](index_t tile) { t.round.add(t.tiles.begin + tile); });
  }

  /// What row r has read, in the unit of its masses; no more than that, whatever its sums rounded.
  [[nodiscard]] double mass_read(const head_task& t, index_t r) const noexcept {
    const row_place p = place_of(t, r);
    const auto lse = static_cast<double>(total_.lse(t.b, p.s, p.h));
    if (lse == -std::numeric_limits<double>::infinity()) return 0;
    const double weights = sums_in_lanes<L> ? 0x1p-8 : 0;
    const index_t sums = 256 + kv_.kv_len() / split_tokens;
    const double off = weights + unit * (static_cast<double>(sums) + 8 * std::abs(lse));
    return std::exp2(lse * std::numbers::log2e - static_cast<double>(t.ranker.unit(r))) * std::max(1 - off, 0.0);
  }
  void choose_next(head_task& t) noexcept {
    std::uint8_t& wants = wants_more_[&t - tasks_];
    if (t.sorted && wants == 0) return;  // nothing has changed since
    wants = 0;
    if (t.tiles.size() == 0) return;
    t.round.clear(t.tiles.end);
    const double share = options_.epsilon / (1 - options_.epsilon);
    const auto limit = [&](index_t r) { return share * mass_read(t, r) * (1 - 0x1p-16); };
    if (!std::exchange(t.sorted, true)) t.ranker.sort(limit);
    const index_t needed = t.ranker.count_needed(limit), unread = t.ranker.unread();
    // What is needed shrinks as more is read, so only a half of it is, unless hardly anything could be spared.
    const index_t least = std::min(needed, pages_of_a_round(t.tiles.size()));
    const index_t next = 4 * needed >= 3 * unread ? needed : std::max(needed / 2, least);
    const index_t count = std::min(next, budget_of(t));
    if (count == 0) return;
    wants = 1;
    t.ranker.take_first(count, [&](index_t tile) { t.round.add(t.tiles.begin + tile); });
  }

  void fill(page_report& report, index_t rounds) const {
    const call_shape& shape = problem_.shape;
    report = {};
    report.rounds = rounds;
    report.rows.resize(static_cast<std::size_t>(shape.batch * shape.q_len * shape.q_heads));
    const auto tile_bytes = static_cast<double>(tile_elements<P>(shape.head_dim, shape.value_dim)) * sizeof(P);
    for (index_t n = 0; n < tasks(); ++n) {
      const head_task& t = tasks_[n];
      const index_t pages = t.tiles.size(), read = pages - (pages == 0 ? 0 : t.ranker.unread());
      report.bytes_read += static_cast<double>(read) * tile_bytes;
      report.bytes_exact += static_cast<double>(pages) * tile_bytes;
      if (options_.epsilon > 0 || options_.page_budget)
        report.bytes_of_bounds += static_cast<double>(pages * bounds_of_tile() * bound_length()) * sizeof(B);
      std::vector<index_t> tiles;
      for (index_t i = t.tiles.begin; i < t.tiles.end; ++i) {
        if (read == pages || t.ranker.is_read(i - t.tiles.begin)) tiles.push_back(i);
      }
      report.read.push_back(std::move(tiles));
      for (index_t r = 0; r < rows_of(t.g); ++r) {
        const double rest = read == pages ? 0 : t.ranker.rest(r) * (1 + 0x1p-16);
        const double dropped = rest == 0 ? 0 : rest / (rest + mass_read(t, r));
        report.rows[static_cast<std::size_t>(place_of(t, r).at)] = {dropped, read, pages};
      }
    }
  }

  const Queries& q_;
  const Source& kv_;
  const page_options& options_;
  problem<A, L> problem_;
  no_variant nothing_;
  score_rules<A, L, no_variant> rules_;
  context& ctx_;

  partial_state<A> total_, round_;
  head_task* tasks_ = nullptr;          // [B, G]
  std::uint8_t* wants_more_ = nullptr;  // [B, G]
  S* split_queries_ = nullptr;          // [B, G, rows, bound length]
  double* sums_ = nullptr;              // [B, G, rows], of a row's magnitudes
  queries_of_left<L>* rows_ = nullptr;  // [B, G, row], as loaded
  A* turned_ = nullptr;                 // [B, G, row]
};

[[nodiscard]] inline fault find_page_fault(const page_options& options, index_t bound_tokens) noexcept {
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
  if (bound_tokens == 0)
    return make_fault(errc::option, "kv: expected bounds of its keys (keep_key_bounds()), got none");
  return {};
}

template <class Queries, class Source, class Out>
void attend_pages(const Queries& q, const Source& kv, const Out& out, const page_options& options, context& ctx,
                  page_report* report) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  using P = typename Source::panel_element;
  require_dtypes<Q, Source, typename decltype(output_view(out))::value_type>();
  if (const auto f = find_plain_fault(q, kv, out, options.attention)) return raise(f);
  if (const auto f = find_page_fault(options, kv.bound_tokens())) return raise(f);
  if (report != nullptr) *report = {};
  if (output_view(out).size() == 0) return;
  if constexpr (has_dot<P>) {
    if (takes_dot<Q, P>(options.attention))
      return page_reader<dot_left<P>, Queries, Source>(q, kv, out, options, ctx).run(out, report);
  }
  page_reader<accumulator_t<P>, Queries, Source>(q, kv, out, options, ctx).run(out, report);
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of q over the pages that matter of a cache that keeps bounds of its keys.
/// \param q       [B, S, H, D], or turned(): few queries, as in decode, for all rows of a KV head choose together
/// \param kv      kv_cache, ring_kv_cache or paged_layer of a cache after keep_key_bounds(). (Of a ring all keys that a
///                query may see must be there: a window, once some are gone.)
/// \param out     [B, S, H, E], or a partial_state, whose lse is of what was read
/// \param report  what became of each row, where it is wanted
/// \throws error  as attention() does, and errc::option for a bias, for options out of range, or without bounds
/// Cost: bounds of all keys, 1/64 (or 1/16) of the bytes of those and their values, twice that of 8 bits; and the pages
/// that were read.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
requires detail::keeps_key_bounds<KV>
void page_attention(Q&& q, const KV& kv, Out&& out, const page_options& options, context& ctx,
                    page_report* report = nullptr) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  if constexpr (detail::output_state<Out>) {
    detail::attend_pages(queries, kv, out, options, ctx, report);
  } else {
    detail::attend_pages(queries, kv, detail::as_view(std::forward<Out>(out)), options, ctx, report);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa
