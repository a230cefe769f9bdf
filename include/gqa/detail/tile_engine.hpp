// SPDX-License-Identifier: Apache-2.0
/// \file
/// The tile engine: a tile of query rows against a run of key tiles, by the one micro-kernel (or, for few rows of plain
/// tensors, row_kernel.hpp).
///
/// The rows of a (sequence, KV head) are its query positions times the heads of the group, position-major: row r is
/// position r / group_size, head r % group_size. All of them read the same keys, so a tile of up to 96 rows mixes heads
/// and positions, and each key tile is read once for all. For one key tile of n = 64 tokens and R rows:
///
///     visible bits -> S [R, n] = Q K^T -> rules -> hide -> weights P, alpha [R] -> O [R, E] = alpha O + P V
///
/// 2 R n (D + E) operations on R n scores in L1 and n (D + E) elements of K and V, which stay in L1 and L2 while R rows
/// use them: at R = 96, D = E = 128 that is 48 multiply-adds per element loaded.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/carver.hpp>
#include <gqa/detail/key_tiles.hpp>
#include <gqa/detail/mixed.hpp>
#include <gqa/detail/online_softmax.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/row_cut.hpp>
#include <gqa/detail/row_kernel.hpp>
#include <gqa/detail/score_rules.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_kernel.hpp>
#include <gqa/detail/visibility.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Key tiles that few rows read in place at a time: keys of all, then values of all, because memory comes faster in
/// longer streams: a split's. Their scores take the place of a full row tile's.
inline constexpr index_t run_tiles = split_tiles;

/// Some rows of a KV head: of one sequence, or all those of each of several that share keys (families.hpp).
struct row_tile {
  std::span<const index_t> members;  // sequences of the batch
  index_t g;
  index_t first, rows;  // rows [first, first + rows); of several members first is 0

  /// Whose keys are read.
  [[nodiscard]] index_t b() const noexcept { return members.front(); }
};

/// Scratch of one worker, carved from one piece of memory.
template <class P, class L>
struct workspace {
  using A = accumulator_t<P>;
  queries_of_left<L>* q;   // [rows, q_stride]
  A* turned;               // [q_stride], a row of queries that is turned before it is loaded
  A* s;                    // [rows, 64], scores; of rows read in place [run_tiles, rows, 64]
  weight_element<L>* p;    // the same of weights; in the place of the scores where they have one type
  A* lanes;                // [rows, packet_size], of weights that the softmax sums
  A* alpha;                // [rows]; of rows read in place [run_tiles, rows]
  raw_states<A> current;   // of the split at work
  raw_states<A> total;     // of the splits before it
  std::uint64_t* visible;  // [rows], a bit a key of the tile at work
  A* tile_sums;            // [rows <= 8, out_stride], of the tile at work where memory is read in order
  A* tile_weights;         // [rows <= 8]
  P* seen_values;          // values of one tile without those that a row may not see
  bool all_seen = false;   // whether every row sees all of it
  bool in_place = false;   // whether rows read whole tiles in place, and
  kv_ahead ahead;          // what they ask for meanwhile
  key_range whole;         // tiles that every row sees all of, as far as the interval rules go
  P* tile = nullptr;       // of the source

  /// Gives out pieces of `memory`, each on its own cache lines, and the bytes used; with nullptr, only the bytes.
  static std::size_t carve(std::byte* memory, index_t rows, index_t score_rows, index_t q_stride, index_t out_stride,
                           workspace& w) noexcept {
    carver take(memory);
    const auto take_states = [&](raw_states<A>& states) {
      take(states.max, rows);
      take(states.sum, rows);
      take(states.out, rows * out_stride);
    };
    take(w.q, rows * q_stride);
    take(w.turned, q_stride);
    take(w.s, score_rows * tile_tokens);
    if constexpr (std::is_same_v<A, weight_element<L>>) {
      w.p = w.s;
    } else {
      take(w.p, score_rows * tile_tokens);
    }
    take(w.lanes, sums_in_lanes<L> ? rows * packet_size<A> : 0);
    take(w.alpha, score_rows);
    take(w.visible, rows);
    take_states(w.current);
    take_states(w.total);
    take(w.tile_sums, std::min<index_t>(rows, stream_rows<A>) * out_stride);
    take(w.tile_weights, std::min<index_t>(rows, stream_rows<A>));
    take(w.seen_values, tile_panels * value_panel_elements<P>(out_stride));
    return take.used();
  }
};

/// Panels of the source's P, queries and weights in L, everything else in A.
template <class Source, class Variant, class L>
class tile_engine {
 public:
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;
  using workspace = detail::workspace<P, L>;

  // What a source has of what it may have (kv_source.hpp).
  static constexpr bool has_rows = requires(const Source& kv) {
    kv.rows(index_t{}, index_t{}, index_t{});
    kv.ahead(index_t{}, group_visit{});
  };
  static constexpr bool makes_tiles_in_cache = requires { requires Source::makes_tiles_in_cache; };
  static constexpr bool has_pages = requires(const Source& kv) { kv.pages_of(index_t{}); };
  static constexpr bool has_gaps = requires(const Source& kv) { kv.gone_tiles(index_t{}); };
  static_assert(!(has_pages && (has_rows || has_gaps)),
                "gqa: sequences of a source that share pages have no rows to be read in place, and no tiles gone");

  tile_engine(const problem<A, L>& p, const Source& kv, const Variant& variant) noexcept
      : problem_(p),
        kv_(kv),
        variant_(variant),
        rules_(p, variant),
        interval_(p.interval()),
        fetched_(fetched_of(p.shape)),
        streams_(rules_.is_plain() && kv.scratch_elements() == 0),
        looks_ahead_(scattered && kv.scratch_elements() == 0),
        reads_rows_(rules_.is_plain() && has_whole_groups(kv) && takes_rows(p.shape)) {}

  /// Row strides of queries and outputs: padded, so that rows of a power of two do not share cache sets.
  [[nodiscard]] index_t q_stride() const noexcept {
    const index_t dim = problem_.shape.head_dim;
    if constexpr (std::is_same_v<queries_of_left<L>, q8>) return round_up(q8_query_layout(dim).bytes(), 64) + 64;
    return round_up(dim, 16) + 16;
  }
  [[nodiscard]] index_t out_stride() const noexcept { return padded_value_dim(problem_.shape.value_dim); }
  /// Rows of scores in a workspace for row tiles of up to `rows` rows.
  [[nodiscard]] static constexpr index_t score_rows(index_t rows) noexcept {
    return has_rows ? (std::max)(rows, run_tiles * std::min<index_t>(rows, block_rows)) : rows;
  }

  [[nodiscard]] index_t length(index_t b) const noexcept { return problem_.length(kv_, b); }
  [[nodiscard]] index_t rows_of(index_t b, index_t g) const noexcept {
    return problem_.q_len(b) * problem_.group_size(g);
  }
  [[nodiscard]] index_t rows_of(std::span<const index_t> members, index_t g) const noexcept {
    index_t rows = 0;
    for (const index_t b : members) rows += rows_of(b, g);
    return rows;
  }
  /// Key tile i, where the source has it or packed into scratch.
  [[nodiscard]] kv_tile<P> tile(index_t b, index_t g, index_t i, P* scratch) const noexcept {
    return kv_.tile(problem_.kv_sequence(b), g, i, tokens_of(b, i), scratch);
  }

  /// Key tiles [begin, end) that some of the queries [first, last] of a sequence may see.
  [[nodiscard]] key_tiles tiles_of(index_t b, index_t first, index_t last) const noexcept {
    const index_t keys = length(b), offset = problem_.query_offset(b, keys);
    key_range seen{interval_.keys_of(offset + first, keys).begin, interval_.keys_of(offset + last, keys).end};
    if constexpr (bounds_keys<Variant>) {
      const key_range bound = variant_.keys({offset + first, offset + last + 1});
      seen = {(std::max)(seen.begin, bound.begin), (std::min)(seen.end, bound.end)};
    }
    if (seen.size() == 0) return {};
    const key_range tiles{seen.begin / tile_tokens, ceil_div(seen.end, tile_tokens)};
    if constexpr (has_gaps) return {tiles, kv_.gone_tiles(problem_.kv_sequence(b))};
    return {tiles};
  }
  /// The same of all queries of some sequences together.
  [[nodiscard]] key_tiles tiles_of(std::span<const index_t> members) const noexcept {
    if (members.size() == 1) {
      const index_t b = members.front(), queries = problem_.q_len(b);
      return queries == 0 ? key_tiles{} : tiles_of(b, 0, queries - 1);
    }
    key_range all{0, 0};
    for (const index_t b : members) {
      const key_tiles own = tiles_of(b, 0, problem_.q_len(b) - 1);
      if (own.size() == 0) continue;
      all = all.size() == 0 ? key_range{own.begin(), own.end()}
                            : key_range{(std::min)(all.begin, own.begin()), (std::max)(all.end, own.end())};
    }
    return all;
  }
  [[nodiscard]] key_tiles tiles_of(const row_tile& t) const noexcept {
    if (t.members.size() > 1) return tiles_of(t.members);
    const query_range seen = queries_of(t, t.b());
    return tiles_of(t.b(), seen.first, seen.last);
  }

  /// What a variant says of some key tiles as a block.
  [[nodiscard]] visibility find_block_visible(const row_tile& t, key_range tiles) const {
    if constexpr (hides_blocks<Variant>) {
      const auto says_of = [&](index_t b) { return find_block_visible(block_of(t, b), length(b), tiles); };
      const visibility first = says_of(t.b());
      const bool agree =
          std::all_of(t.members.begin() + 1, t.members.end(), [&](index_t b) { return says_of(b) == first; });
      return agree ? first : visibility::some;
    } else {
      return hides_keys<Variant> ? visibility::some : visibility::all;
    }
  }
  /// The same of the rows of one sequence, `rows`, which has so many keys.
  [[nodiscard]] visibility find_block_visible(key_block rows, index_t keys, key_range tiles) const {
    rows.key_begin = tiles.begin * tile_tokens, rows.key_end = (std::min)(tiles.end * tile_tokens, keys);
    return variant_.visible(rows);
  }
  /// A tile's rows of sequence b, and no keys.
  [[nodiscard]] key_block block_of(const row_tile& t, index_t b) const noexcept {
    const index_t head = problem_.first_head(t.g), offset = problem_.query_offset(b, length(b));
    const query_range queries = queries_of(t, b);
    return {b, head, head + problem_.group_size(t.g), offset + queries.first, offset + queries.last + 1, 0, 0};
  }
  /// How the rows of a sequence are cut where a variant sees the same from all of a block of positions.
  [[nodiscard]] row_cut cut_in_blocks(index_t b, index_t largest_group) const noexcept {
    return {problem_.q_len(b), problem_.query_offset(b, length(b)), variant_.query_block(), largest_group};
  }

  /// Valid tokens of a key tile.
  [[nodiscard]] index_t tokens_of(index_t b, index_t tile) const noexcept {
    return (std::min)(tile_tokens, length(b) - tile * tile_tokens);
  }

  void load_queries(const row_tile& t, workspace& w) const noexcept {
    const index_t dim = problem_.shape.head_dim;
    for_each_row(t, [&](index_t r, const row_index& row) {
      queries_of_left<L>* const to = w.q + r * q_stride();
      problem_.q.load(row.batch, problem_.row_of(row.batch, row.query), row.q_head, dim, rules_.query_factor(), to,
                      w.turned);
      if constexpr (!std::is_same_v<queries_of_left<L>, q8>)
        std::fill(to + dim, to + round_up(dim, lane_elements<key_type<P>>), queries_of_left<L>(0));
    });
  }

  /// Starts a split: rows that have seen nothing.
  void begin_split(const row_tile& t, workspace& w, const raw_states<A>& states) const noexcept {
    clear(t, states);
    if constexpr (sums_in_lanes<L>) std::fill_n(w.lanes, t.rows * packet_size<A>, A{0});
    w.whole = whole_tiles(t);
    // Nothing may be hidden from rows that read in place: values there cannot be kept out of a sum, were they NaN. What
    // decides is the call's shape and options; the contents of a mask would let one head's mask choose another's
    // kernel, and so its bits.
    w.in_place = reads_rows_ && sees_intervals(t) && rows_of(t.b(), t.g) <= block_rows;
  }
  /// The row tile of some members of a family's, with its part of the workspace and the states.
  void narrow(std::span<const index_t> members, row_tile& t, workspace& w, raw_states<A>& states) const noexcept {
    const index_t skipped = rows_of(t.members.first(static_cast<std::size_t>(members.data() - t.members.data())), t.g);
    t.members = members;
    t.rows = rows_of(members, t.g);
    w.q += skipped * q_stride();
    if constexpr (sums_in_lanes<L>) w.lanes += skipped * packet_size<A>;
    w.whole = whole_tiles(t);
    states = {states.max + skipped, states.sum + skipped, states.out + skipped * out_stride()};
  }
  /// What to ask for while rows are read in place by `heads` KV heads, one after the other.
  void look_ahead(const row_tile& t, index_t heads, workspace& w) const noexcept {
    if constexpr (has_rows) w.ahead = kv_.ahead(t.g, {t.rows, heads});
  }

  /// Attends to key tile i of the split; tile_at(b, g, i, scratch) packs it or finds it packed.
  template <class TileAt>
  void attend(const row_tile& t, index_t i, const TileAt& tile_at, workspace& w, const raw_states<A>& states) const {
    const visibility block = find_block_visible(t, {i, i + 1});
    w.all_seen = block == visibility::all && w.whole.begin <= i && i < w.whole.end && !problem_.options.mask;
    if (block == visibility::none || !find_visible(t, i, block, w)) return;
    const kv_tile<P> now = tile_at(t.b(), t.g, i, w.tile);
    const bool follows = looks_ahead_ && (i + 1) * tile_tokens < length(t.b());
    attend_tile(t, i, now, follows ? tile(t.b(), t.g, i + 1, nullptr) : now, w, states);
  }

  /// Attends to the first of the key tiles as far as they lie in memory and a single row block sees all of them, with
  /// plain scores, and leaves out tiles that a variant hides: most of a decode step. It waits for memory more than it
  /// computes, so tiles are read as one stream and nothing stands between the products but the softmax. Returns where
  /// it stopped.
  [[nodiscard]] index_t stream(const row_tile& t, key_range tiles, workspace& w, const raw_states<A>& states) const {
    index_t i = tiles.begin;
    if (!streams_ || !(hides_blocks<Variant> || sees_intervals(t)) || problem_.options.mask) return i;
    if (t.rows > stream_rows<A> || i < w.whole.begin) return i;
    const index_t end = (std::min)(tiles.end, w.whole.end);
    if (i >= end) return i;
    w.all_seen = true;
    if constexpr (shows_panels<Variant>) {
      if (t.members.size() == 1) return stream_panels(t, {i, end}, w, states), end;
    }
    if constexpr (hides_blocks<Variant>) {
      if (!sees_intervals(t)) return stream_seen(t, {i, end}, w, states);
    }
    if constexpr (scattered) {  // of others nobody asks where the next tile is: it would cost 3 %
      for (kv_tile<P> now = tile(t.b(), t.g, i, nullptr), next; i < end; ++i, now = next) {
        next = i + 1 < tiles.end ? tile(t.b(), t.g, i + 1, nullptr) : now;
        stream_tile(t, now, next, w, states);
      }
    } else {
      for (; i < end; ++i) {
        const kv_tile<P> now = tile(t.b(), t.g, i, nullptr);
        stream_tile(t, now, now, w, states);
      }
    }
    return i;
  }

  /// Where a group of tokens read in place stands: the n-th of key tile i, which is the `slot`-th of a run.
  struct group_place {
    index_t i, slot, n;
    [[nodiscard]] index_t first_token() const noexcept { return i * tile_tokens + n * group_tokens; }
  };
  /// In place, first: the scores of a group.
  void score_group(const row_tile& t, const group_place& at, workspace& w) const noexcept {
    if constexpr (has_rows) {
      const auto rows = kv_.rows(problem_.kv_sequence(t.b()), t.g, at.first_token());
      row_kernels_of(rows).scores[static_cast<std::size_t>(t.rows - 1)](
          rows.k, w.ahead.k, w.q, q_stride(), problem_.shape.head_dim,
          w.s + at.slot * t.rows * tile_tokens + at.n * group_tokens);
    }
  }
  /// In place, once all groups of a run of tiles are scored: their weights.
  void weigh_run(const row_tile& t, index_t tiles, workspace& w, const raw_states<A>& states) const noexcept {
    if constexpr (!std::is_same_v<A, L>) multiply(w.s, tiles * t.rows * tile_tokens, rules_.score_factor());
    for (index_t row = 0; row < tiles * t.rows; row += t.rows)
      softmax_steps<L>(t.rows, w.s + row * tile_tokens, w.p + row * tile_tokens, states.max, w.lanes, w.alpha + row);
  }
  /// In place, last: the values of a group.
  void apply_group(const row_tile& t, const group_place& at, workspace& w, const raw_states<A>& states) const noexcept {
    if constexpr (has_rows) {
      if (at.n == 0) {
        std::fill_n(w.tile_sums, t.rows * out_stride(), A{0});
        std::fill_n(w.tile_weights, t.rows, A{0});
      }
      const auto rows = kv_.rows(problem_.kv_sequence(t.b()), t.g, at.first_token());
      row_kernels_of(rows).values[static_cast<std::size_t>(t.rows - 1)](
          rows.v, w.ahead.v, w.p + at.slot * t.rows * tile_tokens + at.n * group_tokens, {w.tile_sums, w.tile_weights},
          out_stride(), problem_.shape.value_dim);
      if (at.n + 1 == tile_tokens / group_tokens)
        add_tile_sums<A>({w.tile_sums, w.tile_weights}, w.alpha + at.slot * t.rows,
                         {states.out, weight_sums_of(states, 0)}, t.rows, out_stride());
    }
  }

  /// Ends a split.
  void end_split(const row_tile& t, const workspace& w, const raw_states<A>& states) const noexcept {
    if constexpr (sums_in_lanes<L>) {
      for (index_t r = 0; r < t.rows; ++r) states.sum[r] = sum_lanes(w.lanes + r * packet_size<A>);
    }
  }

  void merge(const row_tile& t, const raw_states<A>& self, const raw_states<A>& other) const noexcept {
    for (index_t r = 0; r < t.rows; ++r) merge_row(self, other, r, out_stride(), rules_.base());
  }

  /// Joins the sinks, normalises and writes the rows.
  void finish(const row_tile& t, const raw_states<A>& states) const noexcept {
    const auto& sinks = problem_.options.sinks;
    const index_t dim = problem_.shape.value_dim;
    for_each_row(t, [&](index_t r, const row_index& row) {
      const A sink = sinks.empty() ? minus_infinity<A> : static_cast<A>(sinks[static_cast<std::size_t>(row.q_head)]);
      const finished_row<A> done = finish_row(states.max[r], states.sum[r], sink, rules_.base());
      const index_t at = problem_.row_of(row.batch, row.query);
      problem_.out.store(row.batch, at, row.q_head, dim, states.out + r * out_stride(), done.scale, done.sum);
      if (problem_.out.lse == nullptr) return;
      // With only the sink the logarithm is the sink itself, unrounded.
      problem_.out.store_log_sum_exp(row.batch, at, row.q_head, states.sum[r] == A{0} ? sink : log_sum_exp(done));
    });
  }

  /// The states of rows that saw no key at all.
  void clear(const row_tile& t, const raw_states<A>& states) const noexcept {
    std::fill_n(states.max, t.rows, minus_infinity<A>);
    std::fill_n(states.sum, t.rows, A{0});
    std::fill_n(states.out, t.rows * out_stride(), A{0});
  }

 private:
  static constexpr std::uint64_t all_keys = ~std::uint64_t{0};
  static constexpr bool scattered = has_scattered_panels<Source>;
  static constexpr reading own_reading = scattered ? reading::scattered : reading::in_order;  // of whole tiles

  /// Whether the interval rules alone decide what rows see. A variant may say so of some sequences of a batch, whose
  /// bits are then those of a call without it.
  [[nodiscard]] bool sees_intervals(const row_tile& t) const noexcept {
    if (problem_.options.mask) return false;
    if constexpr (requires { variant_.detail_hides_in(t.b()); })
      return std::none_of(t.members.begin(), t.members.end(),
                          [this](index_t b) { return variant_.detail_hides_in(b); });
    return !hides_keys<Variant>;
  }

  /// Whether 16 tokens at a multiple of 16 always lie a stride apart, for the kernel of few rows.
  [[nodiscard]] static bool has_whole_groups(const Source& kv) noexcept {
    if constexpr (requires { kv.has_whole_groups(); }) return has_rows && kv.has_whole_groups();
    return has_rows;
  }

  /// Bytes of a tile, and those of the next one that a row block asks for.
  struct fetched_bytes {
    index_t all_keys, all_values;
    index_t keys, values;
  };
  [[nodiscard]] static fetched_bytes fetched_of(const call_shape& shape) noexcept {
    constexpr index_t steps = tile_tokens / lane_elements<key_type<P>>,
                      value_steps = tile_tokens / value_lane_elements<value_type<P>>;
    const index_t columns = padded_value_dim(shape.value_dim);
    return {tile_panels * key_panel_elements<P>(shape.head_dim) * index_t{sizeof(P)},
            tile_panels * value_panel_elements<P>(columns) * index_t{sizeof(P)},
            bytes_fetched(steps * shape.head_dim / block_columns<A>),
            bytes_fetched(value_steps * ceil_div(columns, block_columns<A>))};
  }

  template <class K, class V>
  [[nodiscard]] static constexpr row_kernels<A, L, K, V> row_kernels_of(const kv_rows<K, V>&) noexcept {
    return {};
  }
  [[nodiscard]] static constexpr bool takes_rows([[maybe_unused]] const call_shape& shape) noexcept {
    if constexpr (has_rows) return row_kernel_takes<A, typename Source::element, L>(shape.head_dim, shape.value_dim);
    return false;
  }

  /// Row r of a sequence.
  [[nodiscard]] row_index index_of(index_t b, index_t g, index_t r) const noexcept {
    const index_t group = problem_.group_size(g), s = r / group, keys = length(b);
    return {b, s, problem_.first_head(g) + r % group, problem_.query_offset(b, keys) + s, keys};
  }

  /// Calls f(r, row) for rows [begin, end) of a tile.
  template <class F>
  void for_each_row(const row_tile& t, index_t begin, index_t end, const F& f) const {
    const index_t first_head = problem_.first_head(t.g), end_head = first_head + problem_.group_size(t.g);
    index_t of_member = 0;  // its first row
    for (std::size_t n = 0; n < t.members.size() && of_member < end; ++n) {
      const index_t b = t.members[n], rows = t.members.size() == 1 ? t.rows : rows_of(b, t.g);
      const index_t from = (std::max)(begin, of_member), to = (std::min)(end, of_member + rows);
      if (from < to) {
        row_index row = index_of(b, t.g, t.first + from - of_member);
        for (index_t r = from; r < to; ++r) {
          f(r, row);
          if (++row.q_head == end_head) row.q_head = first_head, ++row.query, ++row.position;
        }
      }
      of_member += rows;
    }
  }
  template <class F>
  void for_each_row(const row_tile& t, const F& f) const {
    for_each_row(t, 0, t.rows, f);
  }

  /// Queries of sequence b that have rows in a tile.
  struct query_range {
    index_t first, last;
  };
  [[nodiscard]] query_range queries_of(const row_tile& t, index_t b) const noexcept {
    if (t.members.size() > 1) return {0, problem_.q_len(b) - 1};
    const index_t group = problem_.group_size(t.g);
    return {t.first / group, (t.first + t.rows - 1) / group};
  }

  /// Tiles all of whose 64 keys are seen by every row, by the interval rules. (Once a split: its divisions cost a tenth
  /// of a decode step's time over a tile.)
  [[nodiscard]] key_range whole_tiles(const row_tile& t) const noexcept {
    key_range whole{0, position_limit};
    for (const index_t b : t.members) {
      const index_t keys = length(b), offset = problem_.query_offset(b, keys);
      const query_range queries = queries_of(t, b);
      // Interval ends grow with the position: the last row's begin and the first row's end bound all rows.
      const index_t begin = interval_.keys_of(offset + queries.last, keys).begin;
      const index_t end = interval_.keys_of(offset + queries.first, keys).end;
      whole = {(std::max)(whole.begin, ceil_div(begin, tile_tokens)),
               (std::min)(whole.end, std::max<index_t>(end, 0) / tile_tokens)};
    }
    return whole;
  }

  /// Fills the bits of each row for key tile i, and says whether any is set.
  [[nodiscard]] bool find_visible(const row_tile& t, index_t i, visibility block, const workspace& w) const {
    std::uint64_t* const visible = w.visible;
    if (w.all_seen) {
      std::fill_n(visible, t.rows, all_keys);
      return true;
    }
    const index_t first_key = i * tile_tokens;
    std::uint64_t any = 0;
    for_each_row(t, [&](index_t r, const row_index& row) {
      const key_range seen = interval_.keys_of(row.position, row.keys);
      std::uint64_t bits = bits_between(seen.begin - first_key, seen.end - first_key);
      if (problem_.options.mask) bits = keep_unmasked(bits, row, first_key);
      if (block == visibility::some) bits = keep_visible(bits, row, first_key);
      visible[r] = bits;
      any |= bits;
    });
    return any != 0;
  }

  [[nodiscard]] std::uint64_t keep_unmasked(std::uint64_t bits, const row_index& row,
                                            index_t first_key) const noexcept {
    if (bits == 0) return 0;
    const index_t stride = problem_.options.mask->stride(3);
    const bool* const mask = mask_row(*problem_.options.mask, row) + first_key * stride;
    const index_t last = tile_tokens - std::countl_zero(bits);
    for (index_t c = std::countr_zero(bits); c < last; ++c) {
      if (!mask[c * stride]) bits &= ~(std::uint64_t{1} << c);
    }
    return bits;
  }

  [[nodiscard]] std::uint64_t keep_visible(std::uint64_t bits, const row_index& row, index_t first_key) const {
    if constexpr (hides_bits<Variant>) {
      return bits == 0 ? 0 : bits & variant_.visible_bits(position{row.batch, row.q_head, row.position, first_key});
    }
    for (std::uint64_t left = bits; left != 0; left &= left - 1) {
      const index_t c = std::countr_zero(left), key = first_key + c;
      bool seen = true;
      if constexpr (hides_positions<Variant>) {
        seen = variant_.visible(position{row.batch, row.q_head, row.position, key});
      } else if constexpr (hides_blocks<Variant>) {  // a block of one pair
        seen = variant_.visible(key_block{row.batch, row.q_head, row.q_head + 1, row.position, row.position + 1, key,
                                          key + 1}) != visibility::none;
      }
      if (!seen) bits &= ~(std::uint64_t{1} << c);
    }
    return bits;
  }

  /// One key tile: scores and weights of all row blocks while K is hot, then their outputs while V is.
  void attend_tile(const row_tile& t, index_t i, const kv_tile<P>& tile, const kv_tile<P>& next, workspace& w,
                   const raw_states<A>& states) const {
    const index_t blocks = ceil_div(t.rows, block_rows);
    const auto first_row = [&](index_t block) { return block * t.rows / blocks; };  // blocks of even size
    block_operands<P, L> op = operands_of(tile, w, states);
    const auto for_each_block = [&](const auto& f) {
      for (index_t block = 0; block < blocks; ++block) {
        const index_t row = first_row(block), row_end = first_row(block + 1);
        move_to(row, row_end, w, states, op);
        op.next = next_of(tile, next, block, blocks);
        f(row, row_end);
      }
    };
    for_each_block([&](index_t row, index_t row_end) { weigh_block(t, row, row_end, i, op, w, states); });
    for_each_block([&](index_t row, index_t row_end) { apply_block(row, row_end, op, w, states); });
  }

  /// A tile, or the panels in those of its slots whose bits are set: others before the last one are computed, and
  /// hidden.
  template <reading How = own_reading>
  void stream_tile(const row_tile& t, const kv_tile<P>& tile, const kv_tile<P>& next, workspace& w,
                   const raw_states<A>& states, std::uint32_t slots = all_panels,
                   std::uint32_t next_slots = all_panels) const noexcept {
    using kernels = stream_kernels<P, L, How>;
    const auto rows = static_cast<std::size_t>(t.rows - 1);
    block_operands<P, L> op = operands_of(tile, w, states);
    op.panel_end = std::bit_width(slots);
    if constexpr (How == reading::scattered)
      op.ahead = find_panels_ahead(tile, next, fetched_.all_keys / tile_panels, op.panel_end,
                                   index_t{std::bit_width(next_slots)});
    kernels::scores[rows](op);
    fetch_start(tile.v[0]);
    for (std::uint32_t left = all_panels & ~slots; left != 0; left &= left - 1) {
      A* const hidden = op.s + std::countr_zero(left) * panel_tokens;
      for (index_t r = 0; r < t.rows; ++r) std::fill_n(hidden + r * tile_tokens, panel_tokens, minus_infinity<A>);
    }
    softmax_steps<L>(t.rows, op.s, w.p, states.max, w.lanes, w.alpha);
    kernels::values[rows](op);
    fetch_start(How == reading::scattered ? next.k[0] : tile.next);
  }

  /// Streams the panels that a variant shows of some key tiles, and leaves out the others, as if there were none: the
  /// bits are those of a tile with the others hidden, for which zeros would be added.
  void stream_panels(const row_tile& t, key_range tiles, workspace& w, const raw_states<A>& states) const {
    const auto panels_of = variant_.detail_panels_of(t.b(), problem_.first_head(t.g));
    index_t i = tiles.begin;
    std::uint32_t panels = 0;  // of tile i
    const auto find_next = [&] {
      while (i < tiles.end && (panels = panels_of(i)) == 0) ++i;
      return i < tiles.end;
    };
    const auto follows = [&] {  // what is read next in memory, as far as this split knows
      return panels == all_panels && (i + 1 == tiles.end || panels_of(i + 1) == all_panels);
    };
    while (find_next()) {
      for (; i < tiles.end && follows(); ++i) {
        const kv_tile<P> now = tile(t.b(), t.g, i, nullptr);
        const bool looks = scattered && i + 1 < tiles.end;
        stream_tile(t, now, looks ? tile(t.b(), t.g, i + 1, nullptr) : now, w, states);
      }
      if (i == tiles.end) return;
      const seen_panels now = seen_of(tile(t.b(), t.g, i++, nullptr), panels);
      const seen_panels next = find_next() ? seen_of(tile(t.b(), t.g, i, nullptr), panels) : now;
      stream_tile<reading::scattered>(t, now.tile, next.tile, w, states, now.slots, next.slots);
    }
  }
  /// Some panels of a tile, in slots as near to its front as their sums allow: where weights are summed in lanes, those
  /// of even panels meet each other, and those of odd ones. A slot between has a panel that is read anyway.
  struct seen_panels {
    kv_tile<P> tile;
    std::uint32_t slots = 0;
  };
  [[nodiscard]] static seen_panels seen_of(const kv_tile<P>& tile, std::uint32_t panels) noexcept {
    if (panels == all_panels) return {tile, all_panels};
    seen_panels seen;
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

  /// Streams the tiles that a variant shows all of, and leaves out those that it hides, up to the first of which it
  /// shows some.
  [[nodiscard]] index_t stream_seen(const row_tile& t, key_range tiles, workspace& w,
                                    const raw_states<A>& states) const {
    visibility seen = visibility::none;
    const bool single = t.members.size() == 1;
    const key_block rows =
        block_of(t, t.b());  // once: its divisions cost a hundredth of a decode step's time over a tile
    const index_t keys = length(t.b());
    const auto find_seen = [&](index_t i) {
      for (; i < tiles.end; ++i) {
        seen = single ? find_block_visible(rows, keys, {i, i + 1}) : find_block_visible(t, {i, i + 1});
        if (seen != visibility::none) break;
      }
      return i;
    };
    index_t i = find_seen(tiles.begin);
    if (i == tiles.end || seen == visibility::some) return i;
    for (kv_tile<P> now = tile(t.b(), t.g, i, nullptr), next;; now = next) {
      const index_t following = find_seen(i + 1);
      next = following < tiles.end ? tile(t.b(), t.g, following, nullptr) : now;
      if (following > i + 1) now.next = next.k[0];
      stream_tile(t, now, next, w, states);
      i = following;
      if (i == tiles.end || seen == visibility::some) return i;
    }
  }

  /// Asks for the start of what is read next, so that memory stays busy while something else is computed. (More of it,
  /// by the rows' softmax, gains nothing for 1 row and costs 4 rows a twentieth.)
  static void fetch_start(const P* from) noexcept {
    for (index_t byte = 0; byte < 512; byte += 64) prefetch(from, byte);
  }

  [[nodiscard]] static A* weight_sums_of(const raw_states<A>& states, index_t row) noexcept {
    return sums_in_lanes<L> ? nullptr : states.sum + row;
  }

  /// What row block `block` asks for of the next tile, until blocks before it have asked for all of it.
  [[nodiscard]] next_tile<P> next_of(const kv_tile<P>& tile, const kv_tile<P>& next, index_t block,
                                     index_t blocks) const noexcept {
    const index_t keys = block * fetched_.keys, values = block * fetched_.values;
    if (keys >= fetched_.all_keys && values >= fetched_.all_values) return at_hand(tile);
    if constexpr (scattered) {
      const auto byte_of = [](const std::array<const P*, tile_panels>& panels, index_t all, index_t byte) {
        const index_t panel = (std::min)(byte * tile_panels / all, tile_panels - 1);
        return fetched_from<P>{panels[static_cast<std::size_t>(panel)], byte - panel * (all / tile_panels)};
      };
      return {byte_of(next.k, fetched_.all_keys, keys), byte_of(next.v, fetched_.all_values, values)};
    } else {
      // Where values are made of keys, there are only those in memory.
      const index_t begin =
          makes_tiles_in_cache ? (std::min)(blocks * fetched_.keys, fetched_.all_keys) : fetched_.all_keys;
      return {{tile.next, keys}, {tile.next, begin + values}};
    }
  }
  /// Lines that are there already, which costs nothing.
  [[nodiscard]] static next_tile<P> at_hand(const kv_tile<P>& tile) noexcept {
    return {{tile.k[0], 0}, {tile.v[0], 0}};
  }

  /// The operands of the first row on a tile, all of whose panels are seen.
  [[nodiscard]] block_operands<P, L> operands_of(const kv_tile<P>& tile, workspace& w,
                                                 const raw_states<A>& states) const noexcept {
    return {tile,
            w.q,
            q_stride(),
            problem_.shape.head_dim,
            w.s,
            rules_.score_factor(),
            w.p,
            states.out,
            out_stride(),
            weight_sums_of(states, 0),
            w.alpha,
            out_stride(),
            0,
            tile_panels,
            w.tile_sums,
            w.tile_weights,
            at_hand(tile)};
  }
  /// The same of rows [row, row_end), on the panels that some of them see.
  void move_to(index_t row, index_t row_end, const workspace& w, const raw_states<A>& states,
               block_operands<P, L>& op) const noexcept {
    op.q = w.q + row * op.q_stride;
    op.s = w.s + row * tile_tokens;
    op.p = w.p + row * tile_tokens;
    op.out = states.out + row * op.out_stride;
    op.weight_sums = weight_sums_of(states, row);
    op.alpha = w.alpha + row;
    if (w.all_seen) return;
    std::uint64_t any = 0;
    for (index_t r = row; r < row_end; ++r) any |= w.visible[r];
    op.panel_begin = any == 0 ? 0 : std::countr_zero(any) / panel_tokens;
    op.panel_end = ceil_div(tile_tokens - std::countl_zero(any), panel_tokens);
  }

  /// S = Q K^T, rules, hiding, softmax step of rows [row, row_end).
  void weigh_block(const row_tile& t, index_t row, index_t row_end, index_t i, const block_operands<P, L>& op,
                   workspace& w, const raw_states<A>& states) const {
    if (op.panel_end == op.panel_begin) return;
    using kernels = row_block_kernels<P, L>;
    kernels::scores[static_cast<std::size_t>(row_end - row - 1)](op);
    if (w.all_seen && rules_.is_plain())
      return softmax_steps<L>(row_end - row, op.s, w.p + row * tile_tokens, states.max + row,
                              w.lanes + row * packet_size<A>, w.alpha + row);
    for_each_row(t, row, row_end, [&](index_t r, const row_index& index) {
      A* const s = w.s + r * tile_tokens;
      weight_element<L>* const p = w.p + r * tile_tokens;
      if (w.visible[r] == 0) {  // the state stays as it is
        std::fill_n(p, tile_tokens, weight_element<L>(0));
        w.alpha[r] = A{1};
        return;
      }
      if (!rules_.is_plain())
        rules_.apply(s, op.panel_begin * panel_tokens, op.panel_end * panel_tokens, w.visible[r], index,
                     i * tile_tokens);
      if (w.visible[r] != all_keys) hide(s, w.visible[r]);
      if (op.tile.nonfinite_values != 0 && rules_.may_hide()) w.visible[r] = drop_hidden_scores(s, w.visible[r]);
      A* const lanes = w.lanes + r * packet_size<A>;
      w.alpha[r] = rules_.is_plain() ? softmax_step<L>(s, p, states.max[r], lanes)
                                     : softmax_step<L, score_base::e>(s, p, states.max[r], lanes);
    });
  }

  static void multiply(A* s, index_t count, A factor) noexcept {
    for (index_t c = 0; c < count; c += packet_size<A>) store(s + c, mul<A>(load(s + c), broadcast(factor)));
  }

  static void hide(A* s, std::uint64_t visible) noexcept {
    for (index_t c = 0; c < tile_tokens; c += packet_size<A>)
      store(s + c, select_bits<A>(visible >> c, load(s + c), broadcast(minus_infinity<A>)));
  }

  /// Scores that a bias or a variant makes -inf hide their key too.
  [[nodiscard]] static std::uint64_t drop_hidden_scores(const A* s, std::uint64_t visible) noexcept {
    for (index_t c = 0; c < tile_tokens; ++c) {
      if (s[c] == minus_infinity<A>) visible &= ~(std::uint64_t{1} << c);
    }
    return visible;
  }

  /// O = alpha O + P V of rows [row, row_end).
  void apply_block(index_t row, index_t row_end, const block_operands<P, L>& op, workspace& w,
                   const raw_states<A>& states) const noexcept {
    if (op.panel_end == op.panel_begin) return;
    const auto sees_all = [](std::uint64_t bits) { return bits == all_keys; };
    if (op.tile.nonfinite_values != 0 && !std::all_of(w.visible + row, w.visible + row_end, sees_all)) {
      for (index_t r = row; r < row_end; ++r) apply_visible_only(r, op.tile, w, states);
      return;
    }
    using kernels = row_block_kernels<P, L>;
    kernels::values[static_cast<std::size_t>(row_end - row - 1)](op);
  }

  /// 0 times NaN is NaN: a row meets zeros in the place of values that it may not see. Same sums, so the same bits.
  void apply_visible_only(index_t r, const kv_tile<P>& tile, workspace& w, const raw_states<A>& states) const noexcept {
    const index_t columns = out_stride(), panel_elements = value_panel_elements<P>(columns);
    kv_tile<P> seen = tile;
    for (index_t panel = 0; panel < tile_panels; ++panel) {
      const std::uint64_t bits = w.visible[r] >> panel * panel_tokens;
      const P* const from = tile.v[static_cast<std::size_t>(panel)];
      P* const to = w.seen_values + panel * panel_elements;
      keep_values(from, bits, columns, to);
      seen.v[static_cast<std::size_t>(panel)] = to;
    }
    block_operands<P, L> op = operands_of(seen, w, states);
    move_to(r, r + 1, w, states, op);
    row_block_kernels<P, L>::values[0](op);
  }

  const problem<A, L>& problem_;
  const Source& kv_;
  const Variant& variant_;
  score_rules<A, L, Variant> rules_;
  interval_rule interval_;
  fetched_bytes fetched_;
  bool streams_;      // whether few rows stream tiles, which lie in memory then
  bool looks_ahead_;  // whether the next tile is found before its turn, so that row blocks can ask for it
  bool reads_rows_;   // whether few rows read rows of tensors in place
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
