// SPDX-License-Identifier: Apache-2.0
/// \file
/// One key tile for the rows of a row tile, in row blocks of up to 6.
///
/// For one key tile of n = 64 tokens and R rows:
///
///     visible bits -> S [R, n] = Q K^T -> rules -> hide -> weights P, alpha [R] -> O [R, E] = alpha O + P V
///
/// 2 R n (D + E) operations on R n scores in L1 and n (D + E) elements of K and V, which stay in L1 and L2 while R rows
/// use them: at R = 96, D = E = 128 that is 48 multiply-adds per element loaded.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/engine/engine_call.hpp>
#include <gqa/detail/engine/row_geometry.hpp>
#include <gqa/detail/engine/visible_keys.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/mixed_kernel.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// The operands of a row tile's first row on a key tile, all of whose panels are seen.
template <class P, class L, class A>
[[nodiscard]] block_operands<P, L> operands_of(const engine_call<P, L>& call, const kv_tile<P>& tile,
                                               workspace<P, L>& w, const raw_states<A>& states) noexcept {
  const index_t out_stride = call.out_stride();
  return {.tile = tile,
          .q = w.q,
          .q_stride = call.q_stride(),
          .head_dim = call.shape.head_dim,
          .s = w.s,
          .score_factor = call.scores.score_factor(),
          .p = w.p,
          .out = states.out,
          .out_stride = out_stride,
          .weight_sums = sums_in_lanes<L> ? nullptr : states.sum,
          .alpha = w.alpha,
          .value_dim = out_stride,
          .panel_begin = 0,
          .panel_end = tile_panels,
          .tile_sums = w.tile_sums,
          .tile_weights = w.tile_weights,
          .next = at_hand(tile)};
}

/// Divides the next tile among row blocks, each of which asks memory for its part while it computes.
template <class P>
class next_tile_reader {
  using A = accumulator_t<P>;

 public:
  next_tile_reader(index_t head_dim, index_t value_dim, const source_facts& source) noexcept
      : all_keys_(tile_panels * key_panel_elements<P>(head_dim) * index_t{sizeof(P)}),
        all_values_(tile_panels * value_panel_elements<P>(padded_value_dim(value_dim)) * index_t{sizeof(P)}),
        keys_(bytes_fetched(tile_tokens / lane_elements<key_type<P>> * head_dim / block_columns<A>)),
        values_(bytes_fetched(tile_tokens / value_lane_elements<value_type<P>> *
                              ceil_div(padded_value_dim(value_dim), block_columns<A>))),
        scattered_(source.scatters_panels),
        has_keys_alone_(source.makes_tiles_in_cache) {}

  [[nodiscard]] index_t panel_bytes() const noexcept { return all_keys_ / tile_panels; }

  /// For row block `block` of `blocks`.
  [[nodiscard]] next_tile<P> part_of(const kv_tile<P>& tile, const kv_tile<P>& next, index_t block,
                                     index_t blocks) const noexcept {
    const index_t keys = block * keys_, values = block * values_;
    if (keys >= all_keys_ && values >= all_values_) return at_hand(tile);
    if (scattered_) return {place_in(next.k, all_keys_, keys), place_in(next.v, all_values_, values)};
    // Where a tile's values are made from its keys, only keys are in memory, and both parts are of those.
    const index_t begin = has_keys_alone_ ? (std::min)(blocks * keys_, all_keys_) : all_keys_;
    return {{tile.next, keys}, {tile.next, begin + values}};
  }

 private:
  [[nodiscard]] static fetched_from<P> place_in(const std::array<const P*, tile_panels>& panels, index_t all,
                                                index_t byte) noexcept {
    const index_t panel = (std::min)(byte * tile_panels / all, tile_panels - 1);
    return {panels[static_cast<std::size_t>(panel)], byte - panel * (all / tile_panels)};
  }

  index_t all_keys_, all_values_;  // bytes of a tile
  index_t keys_, values_;          // those that a row block asks for
  bool scattered_, has_keys_alone_;
};

template <class P, class L>
class tile_step {
  using A = accumulator_t<P>;
  using kernels = row_block_kernels<P, L>;

 public:
  explicit tile_step(const engine_call<P, L>& call) noexcept
      : call_(call), next_(call.shape.head_dim, call.shape.value_dim, call.kv.about()) {}

  /// Attends to key tile i, unless no row sees any of it; tile_at(b, g, i, scratch) finds or packs it.
  template <class TileAt>
  void attend(const row_tile& t, index_t i, const TileAt& tile_at, workspace<P, L>& w,
              const raw_states<A>& states) const {
    const visibility block = call_.sees.find_block_visible(t, {i, i + 1});
    w.all_seen = block == visibility::all && w.whole.begin <= i && i < w.whole.end && !call_.sees.has_mask();
    if (block == visibility::none) return;
    if (w.all_seen) {
      std::fill_n(w.visible, t.rows, all_keys);
    } else if (!call_.sees.find_bits(t, i, block, w.visible)) {
      return;
    }
    const kv_tile<P> now = tile_at(t.b(), t.g, i, w.tile);
    const auto& source = call_.kv.about();
    const bool looks_ahead = source.scatters_panels && source.scratch_elements == 0;
    const bool follows = looks_ahead && (i + 1) * tile_tokens < call_.rows.length(t.b());
    attend_tile(t, i, now, follows ? call_.tile(t.b(), t.g, i + 1, nullptr) : now, w, states);
  }

 private:
  /// Scores and weights of all row blocks while K is hot, then their outputs while V is.
  void attend_tile(const row_tile& t, index_t i, const kv_tile<P>& tile, const kv_tile<P>& next, workspace<P, L>& w,
                   const raw_states<A>& states) const {
    const index_t blocks = ceil_div(t.rows, block_rows);
    const auto first_row = [&](index_t block) { return block * t.rows / blocks; };  // blocks of even size
    block_operands<P, L> op = operands_of(call_, tile, w, states);
    const auto for_each_block = [&](const auto& f) {
      for (index_t block = 0; block < blocks; ++block) {
        const index_t row = first_row(block), row_end = first_row(block + 1);
        move_to(row, row_end, w, states, op);
        op.next = next_.part_of(tile, next, block, blocks);
        f(row, row_end);
      }
    };
    for_each_block([&](index_t row, index_t row_end) { weigh_block(t, row, row_end, i, op, w, states); });
    for_each_block([&](index_t row, index_t row_end) { apply_block(row, row_end, op, w, states); });
  }

  /// The operands of rows [row, row_end), on the panels that some of them see.
  static void move_to(index_t row, index_t row_end, const workspace<P, L>& w, const raw_states<A>& states,
                      block_operands<P, L>& op) noexcept {
    op.q = w.q + row * op.q_stride;
    op.s = w.s + row * tile_tokens;
    op.p = w.p + row * tile_tokens;
    op.out = states.out + row * op.out_stride;
    if constexpr (!sums_in_lanes<L>) op.weight_sums = states.sum + row;
    op.alpha = w.alpha + row;
    if (w.all_seen) return;
    std::uint64_t any = 0;
    for (index_t r = row; r < row_end; ++r) any |= w.visible[r];
    op.panel_begin = any == 0 ? 0 : std::countr_zero(any) / panel_tokens;
    op.panel_end = ceil_div(tile_tokens - std::countl_zero(any), panel_tokens);
  }

  /// S = Q K^T, rules, hiding, softmax step of rows [row, row_end).
  void weigh_block(const row_tile& t, index_t row, index_t row_end, index_t i, const block_operands<P, L>& op,
                   workspace<P, L>& w, const raw_states<A>& states) const {
    if (op.panel_end == op.panel_begin) return;
    kernels::scores[static_cast<std::size_t>(row_end - row - 1)](op);
    if (w.all_seen && call_.scores.is_plain())
      return softmax_steps<L>(row_end - row, op.s, w.p + row * tile_tokens, states.max + row,
                              w.lanes + row * packet_size<A>, w.alpha + row);
    call_.rows.for_each_row(t, row, row_end, [&](index_t r, const row_index& index) {
      weigh_row(r, index, i * tile_tokens, op, w, states);
    });
  }
  /// Rules, hiding and softmax step of one row on the keys from first_key on.
  void weigh_row(index_t r, const row_index& index, index_t first_key, const block_operands<P, L>& op,
                 workspace<P, L>& w, const raw_states<A>& states) const {
    const auto& rules = call_.scores;
    A* const s = w.s + r * tile_tokens;
    weight_element<L>* const p = w.p + r * tile_tokens;
    if (w.visible[r] == 0) {  // the state stays as it is
      std::fill_n(p, tile_tokens, weight_element<L>(0));
      w.alpha[r] = A{1};
      return;
    }
    if (!rules.is_plain())
      rules.apply(s, op.panel_begin * panel_tokens, op.panel_end * panel_tokens, w.visible[r], index, first_key);
    if (w.visible[r] != all_keys) hide(s, w.visible[r]);
    if (op.tile.nonfinite_values != 0 && rules.may_hide()) w.visible[r] = drop_hidden_scores(s, w.visible[r]);
    A* const lanes = w.lanes + r * packet_size<A>;
    w.alpha[r] = rules.is_plain() ? softmax_step<L>(s, p, states.max[r], lanes)
                                  : softmax_step<L, score_base::e>(s, p, states.max[r], lanes);
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
  void apply_block(index_t row, index_t row_end, const block_operands<P, L>& op, workspace<P, L>& w,
                   const raw_states<A>& states) const noexcept {
    if (op.panel_end == op.panel_begin) return;
    const auto sees_all = [](std::uint64_t bits) { return bits == all_keys; };
    if (op.tile.nonfinite_values != 0 && !std::all_of(w.visible + row, w.visible + row_end, sees_all)) {
      for (index_t r = row; r < row_end; ++r) apply_visible_only(r, op.tile, w, states);
      return;
    }
    kernels::values[static_cast<std::size_t>(row_end - row - 1)](op);
  }
  /// 0 times NaN is NaN: a row meets zeros in the place of values that it may not see. Same sums, so the same bits.
  void apply_visible_only(index_t r, const kv_tile<P>& tile, workspace<P, L>& w,
                          const raw_states<A>& states) const noexcept {
    const index_t columns = call_.out_stride(), panel_elements = value_panel_elements<P>(columns);
    kv_tile<P> seen = tile;
    for (index_t panel = 0; panel < tile_panels; ++panel) {
      const std::uint64_t bits = w.visible[r] >> panel * panel_tokens;
      const P* const from = tile.v[static_cast<std::size_t>(panel)];
      P* const to = w.seen_values + panel * panel_elements;
      keep_values(from, bits, columns, to);
      seen.v[static_cast<std::size_t>(panel)] = to;
    }
    block_operands<P, L> op = operands_of(call_, seen, w, states);
    move_to(r, r + 1, w, states, op);
    kernels::values[0](op);
  }

  const engine_call<P, L>& call_;
  next_tile_reader<P> next_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
