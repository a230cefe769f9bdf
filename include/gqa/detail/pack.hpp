// SPDX-License-Identifier: Apache-2.0
/// \file
/// Packing: rows of keys and values, wherever they lie, into the panels of a tile (see tile.hpp).
///
/// Reads each element once, widens it, and writes it once: 64 (D + E) elements a tile. Keys are transposed 16 tokens at
/// a time in registers, values are copied. In prefill every tile is packed once and then read by all rows of its KV
/// head; with few rows a worker packs one tile at a time into its own scratch, which stays in cache (whole tiles of
/// very few rows are not packed at all: row_kernel.hpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// How far ahead packing asks for rows: a panel, 8 KB of float keys at D = 128. Half of it costs a quarter of the speed
/// over cold memory, twice of it gains nothing.
inline constexpr index_t prefetch_tokens = panel_tokens;

/// Keys: rows [tokens <= 16, dim], `stride` elements apart, into one panel [dim][16]; missing tokens are zeros.
template <class A, class T>
void pack_key_panel(const T* rows, index_t stride, index_t tokens, index_t dim, A* panel) noexcept {
  constexpr index_t width = packet_size<A>;
  if (tokens < panel_tokens) std::fill_n(panel, panel_tokens * dim, A{0});
  const index_t square_tokens = tokens / width * width, square_dim = dim / width * width;
  for (index_t d = 0; d < square_dim; d += width) {
    for (index_t t = 0; t < square_tokens; t += width) {
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) prefetch(rows, ((t + i + prefetch_tokens) * stride + d) * index_t{sizeof(T)});
      packet<A> square[width];
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) square[i] = load_as<A>(rows + (t + i) * stride + d);
      transpose<A>(square);
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) store(panel + (d + i) * panel_tokens + t, square[i]);
    }
  }
  const auto copy = [&](index_t t, index_t d_begin) {
    for (index_t d = d_begin; d < dim; ++d) panel[d * panel_tokens + t] = static_cast<A>(rows[t * stride + d]);
  };
  for (index_t t = 0; t < square_tokens; ++t) copy(t, square_dim);
  for (index_t t = square_tokens; t < tokens; ++t) copy(t, 0);
}

/// Values: rows [tokens <= 16, dim] into one panel [dim/64][16][64]; missing tokens and columns are zeros.
/// Returns whether a value is NaN or infinite.
template <class A, class T>
[[nodiscard]] bool pack_value_panel(const T* rows, index_t stride, index_t tokens, index_t dim, A* panel) noexcept {
  constexpr index_t width = packet_size<A>;
  const index_t padded = padded_value_dim(dim);
  if (tokens < panel_tokens || padded > dim) std::fill_n(panel, panel_tokens * padded, A{0});
  // + 0 * x: stays 0 over finite values, becomes NaN for good over others. Four, for one would be a chain of latencies.
  packet<A> probes[4] = {zeros<A>(), zeros<A>(), zeros<A>(), zeros<A>()};
  A tail_probe{0};
  for (index_t t = 0; t < tokens; ++t) {
    const T* const row = rows + t * stride;
    for (index_t block = 0; block < dim; block += value_block) {
      const index_t columns = std::min(value_block, padded - block);
      A* const to = panel + block * panel_tokens + t * columns;
      const index_t count = std::min(columns, dim - block), square = count / width * width;
      for (index_t e = 0; e < square; e += width) {
        prefetch(row, (prefetch_tokens * stride + block + e) * index_t{sizeof(T)});
        const packet<A> x = load_as<A>(row + block + e);
        store(to + e, x);
        packet<A>& probe = probes[(e / width) % 4];
        probe = madd(x, zeros<A>(), probe);
      }
      for (index_t e = square; e < count; ++e) {
        to[e] = static_cast<A>(row[block + e]);
        tail_probe = scalar_madd(to[e], A{0}, tail_probe);
      }
    }
  }
  alignas(64) A lanes[width];
  store(lanes, add(add(probes[0], probes[1]), add(probes[2], probes[3])));
  for (const A lane : lanes) tail_probe += lane;
  return tail_probe != A{0};  // NaN compares unequal
}

/// A tile of `tokens` <= 64 rows of keys [tokens, head_dim] and values [tokens, value_dim] into `to`, which holds
/// 64 (head_dim + padded value_dim) elements.
template <class A, class K, class V>
[[nodiscard]] kv_tile<A> pack_tile(const K* k, index_t k_stride, index_t head_dim, const V* v, index_t v_stride,
                                   index_t value_dim, index_t tokens, A* to) noexcept {
  A* const values = to + tile_tokens * head_dim;
  std::uint32_t nonfinite = 0;
  for (index_t panel = 0; panel < tile_panels; ++panel) {
    const index_t first = panel * panel_tokens;
    const index_t count = std::clamp<index_t>(tokens - first, 0, panel_tokens);
    // Offsets only to rows there are: a pointer past the tensor's end may not even be formed.
    const index_t row = count > 0 ? first : 0;
    pack_key_panel(k + row * k_stride, k_stride, count, head_dim, to + first * head_dim);
    if (pack_value_panel(v + row * v_stride, v_stride, count, value_dim, values + first * padded_value_dim(value_dim)))
      nonfinite |= std::uint32_t{1} << panel;
  }
  return contiguous_tile<A>(to, values, head_dim, value_dim, nonfinite);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
