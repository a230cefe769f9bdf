// SPDX-License-Identifier: Apache-2.0
/// \file
/// The products over tiles of kv_types<K, V> (tile/mixed.hpp): those of the types' own kernels, on operands that look
/// at the keys or at the values alone.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/q8_kernel.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// What queries and weights are held in where panels of P are multiplied as they lie: pairs of bfloat16 where an
/// instruction multiplies those, floats under other floats, q8 under q8.
template <class P>
using left_of = std::conditional_t<std::is_same_v<P, q8> || has_dot<P>, P, accumulator_t<P>>;
template <class P>
using lefts_of = lefts<left_of<key_type<P>>, left_of<value_type<P>>>;

template <class K, class V>
inline constexpr bool has_dot<kv_types<K, V>> = has_dot<q8>;

/// The operands of the keys' product, or of the values', as a cache of K or V would have them.
template <class To, class L, class From>
[[nodiscard]] block_operands<To, L> operands_with(const From& op, const kv_tile<To>& tile) noexcept {
  const auto place = [](const auto& from) {
    return fetched_from<To>{reinterpret_cast<const To*>(from.at), from.bytes};
  };
  block_operands<To, L> own{.tile = tile, .next = {place(op.next.keys), place(op.next.values)}};
  own.q_stride = op.q_stride, own.head_dim = op.head_dim;
  own.s = op.s, own.score_factor = op.score_factor;
  own.out = op.out, own.out_stride = op.out_stride;
  own.weight_sums = op.weight_sums, own.alpha = op.alpha;
  own.value_dim = op.value_dim;
  own.panel_begin = op.panel_begin, own.panel_end = op.panel_end;
  own.tile_sums = op.tile_sums, own.tile_weights = op.tile_weights;
  own.ahead = op.ahead;
  return own;
}

/// Which table of kernels: row_block_kernels or stream_kernels of some way of reading.
template <class P, class L, reading How>
struct kernels_for : stream_kernels<P, L, How> {};
template <class P, class L>
struct kernels_for<P, L, reading::blocks> : row_block_kernels<P, L> {};

/// Kernels of either type ask as far ahead as they are told: at two distances lines between them would be asked for by
/// neither.
template <reading How>
inline constexpr reading told_ahead = How == reading::in_order ? reading::scattered : How;

template <class K, class V, class L, int Rows, reading How>
void score_mixed(const block_operands<kv_types<K, V>, L>& op) noexcept {
  kv_tile<K> tile;
  for (std::size_t n = 0; n < tile.k.size(); ++n) tile.k[n] = keys_in(op.tile.k[n]);
  auto own = operands_with<K, left_of<K>>(op, tile);
  own.q = op.q;
  if constexpr (How == reading::in_order) own.ahead.k.fill(read_ahead_bytes<kv_types<K, V>>);
  kernels_for<K, left_of<K>, told_ahead<How>>::scores[Rows - 1](own);
}
template <class K, class V, class L, int Rows, reading How>
void value_mixed(const block_operands<kv_types<K, V>, L>& op) noexcept {
  kv_tile<V> tile;
  for (std::size_t n = 0; n < tile.v.size(); ++n) tile.v[n] = values_in(op.tile.v[n]);
  tile.nonfinite_values = op.tile.nonfinite_values;
  auto own = operands_with<V, left_of<V>>(op, tile);
  own.p = op.p;
  if constexpr (How == reading::in_order) own.ahead.v.fill(read_ahead_bytes<kv_types<K, V>>);
  kernels_for<V, left_of<V>, told_ahead<How>>::values[Rows - 1](own);
}

template <class K, class V, class Q, class W>
struct row_block_kernels<kv_types<K, V>, lefts<Q, W>> {
  using L = lefts<Q, W>;
  static constexpr std::make_integer_sequence<int, block_rows> blocks{};
  static constexpr auto scores =
      by_rows([]<int Rows>() { return &score_mixed<K, V, L, Rows, reading::blocks>; }, blocks);
  static constexpr auto values =
      by_rows([]<int Rows>() { return &value_mixed<K, V, L, Rows, reading::blocks>; }, blocks);
};
template <class K, class V, class Q, class W, reading How>
struct stream_kernels<kv_types<K, V>, lefts<Q, W>, How> {
  using L = lefts<Q, W>;
  static constexpr std::make_integer_sequence<int, stream_rows<float>> streams{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_mixed<K, V, L, Rows, How>; }, streams);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_mixed<K, V, L, Rows, How>; }, streams);
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
