// SPDX-License-Identifier: Apache-2.0
/// \file
/// engine_call: a call as all parts of the engine see it, and what a worker computes in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/score_rules.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/engine/visible_keys.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/options.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Key tiles that few rows read in place at a time: keys of all, then values of all, because memory comes faster in
/// longer streams: a split's. Their scores take the place of a full row tile's.
inline constexpr index_t run_tiles = split_tiles;

/// A call with panels of P, queries and weights in L, everything else in A. What it refers to outlives it.
template <class P, class L>
struct engine_call {
  using A = accumulator_t<P>;

  engine_call(const problem<A, L>& p, const tile_source<P>& source, const row_rules<A>& rules,
              const index_t* lengths) noexcept
      : shape(p.shape),
        options(p.options),
        q(p.q),
        out(p.out),
        kv(source),
        kernels(source.template kernels<L>()),
        rows(p, lengths),
        sees(rows, source, rules),
        scores(p, rules) {}
  engine_call(const engine_call&) = delete;
  engine_call& operator=(const engine_call&) = delete;

  /// Row strides of queries and outputs: padded, so that rows of a power of two do not share cache sets.
  [[nodiscard]] index_t q_stride() const noexcept {
    if constexpr (std::is_same_v<queries_of_left<L>, q8>)
      return round_up(q8_query_layout(shape.head_dim).bytes(), 64) + 64;
    return round_up(shape.head_dim, 16) + 16;
  }
  [[nodiscard]] index_t out_stride() const noexcept { return padded_value_dim(shape.value_dim); }

  /// Whether few rows may read rows of tensors in place.
  [[nodiscard]] bool reads_strips() const noexcept {
    return kernels.strips != nullptr && scores.is_plain() && kernels.strips->takes(shape.head_dim, shape.value_dim);
  }
  /// Key tile i of a sequence, where the source has it or packed into scratch.
  [[nodiscard]] kv_tile<P> tile(index_t b, index_t g, index_t i, P* scratch) const noexcept {
    return kv.tile(rows.call().kv_sequence(b), g, i, rows.tokens_of(b, i), scratch);
  }

  const call_shape& shape;
  const attention_options& options;
  const query_rows<A, queries_of_left<L>>& q;
  const output_rows<A>& out;
  const tile_source<P>& kv;
  const source_kernels<P, L>& kernels;
  row_geometry rows;
  visible_keys sees;
  score_rules<A, L> scores;
};

/// What one row tile computes in: scratch of one worker, carved from one piece of memory.
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
  kv_ahead ahead;          // what they ask for meanwhile,
  tile_strips strips;      // of the tile at work
  key_range whole;         // tiles that every row sees all of, as far as the interval rules go
  P* tile = nullptr;       // of the source

  /// Gives out pieces of `memory`, each on its own cache lines, for row tiles of up to `rows` rows, and the bytes used;
  /// with nullptr, only the bytes.
  static std::size_t carve(std::byte* memory, const engine_call<P, L>& call, index_t rows, workspace& w) noexcept {
    const index_t out_stride = call.out_stride(), streamed = std::min<index_t>(rows, stream_rows<A>);
    const index_t score_rows =
        call.reads_strips() ? (std::max)(rows, run_tiles * std::min<index_t>(rows, block_rows)) : rows;
    carver take(memory);
    const auto take_states = [&](raw_states<A>& states) {
      take(states.max, rows);
      take(states.sum, rows);
      take(states.out, rows * out_stride);
    };
    take(w.q, rows * call.q_stride());
    take(w.turned, call.q_stride());
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
    take(w.tile_sums, streamed * out_stride);
    take(w.tile_weights, streamed);
    take(w.seen_values, tile_panels * value_panel_elements<P>(out_stride));
    return take.used();
  }
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
