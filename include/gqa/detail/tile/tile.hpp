// SPDX-License-Identifier: Apache-2.0
/// \file
/// The tile: 64 keys and values of one KV head in the order the micro-kernel reads them.
///
/// A panel is 16 consecutive tokens: keys as [D/p][16][p], values as [E/64][16/p][64][p] (column blocks of 64, the last
/// one narrower, E rounded up to 16 with zeros). p neighbours of the depth lie together, so that one 32-bit lane feeds
/// a hardware dot product: 2 for bfloat16, 4 keys or 2 values of 8 bits, 1 for what is multiplied one by one. Both
/// products then stream a panel from front to back: a step of q.k reads the 16 tokens' next p elements, a step of p.v
/// reads p tokens' next 64 value columns. A tile is four panels, each anywhere in memory, so that pages of any multiple
/// of 16 tokens can hold them. Elements that fill the last p of D, and columns past E, are zeros; tokens past the end
/// may be anything, but values that are not finite are flagged.
///
/// Behind a panel of 8-bit integers lie their scales, bfloat16: [D/32][16] of keys, [E/32][16] of values, up to a whole
/// cache line; its elements are counted in bytes, scales and all.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/integers.hpp>
#include <gqa/detail/simd/lanes.hpp>
#include <gqa/element_types.hpp>

namespace gqa::detail {

inline constexpr index_t panel_tokens = 16;
inline constexpr index_t tile_tokens = 64;
inline constexpr index_t tile_panels = tile_tokens / panel_tokens;
inline constexpr std::uint32_t all_panels = (1U << tile_panels) - 1;  // of a tile, a bit each
inline constexpr index_t value_block = 64;

/// Rows of queries that meet a tile together: a multiple of the register block; its queries, scores and outputs (96 x
/// (128 + 64 + 2 x 128) floats, 172 KB) stay in L2 beside a tile of K and V.
inline constexpr index_t row_tile_rows = 96;

/// KV is cut at multiples of this many tokens into splits that finish on their own and merge left to right, always,
/// so that a long row may be computed by several workers without changing a bit.
inline constexpr index_t split_tokens = 1024;
inline constexpr index_t split_tiles = split_tokens / tile_tokens;

/// Value columns of a panel and of an output row: E rounded up to whole packets of any ISA.
[[nodiscard]] constexpr index_t padded_value_dim(index_t value_dim) noexcept {
  return round_up(value_dim, panel_tokens);
}

/// What panels of P hold.
template <class P>
struct panel_types {
  using key = P;
  using value = P;
};
template <class K, class V>
struct panel_types<kv_types<K, V>> {
  using key = K;
  using value = V;
};
template <class P>
using key_type = typename panel_types<P>::key;
template <class P>
using value_type = typename panel_types<P>::value;
/// Whether panels of both are in one memory of bytes.
template <class P>
inline constexpr bool is_mixed = !std::is_same_v<key_type<P>, P>;
/// Whether tiles are decoded where they are not multiplied as they lie.
template <class P>
inline constexpr bool is_encoded = std::is_same_v<P, q8> || is_mixed<P>;

/// Channels of a token that share a scale.
inline constexpr index_t scale_channels = 32;
/// Bytes of the scales of a panel of 8-bit integers.
[[nodiscard]] constexpr index_t scale_bytes(index_t dim) noexcept {
  return ceil_div(dim, scale_channels) * panel_tokens * 2;
}

/// Elements of a panel's keys and of its values.
template <class P>
[[nodiscard]] constexpr index_t key_panel_elements(index_t head_dim) noexcept {
  if constexpr (is_mixed<P>)
    return round_up(key_panel_elements<key_type<P>>(head_dim) * index_t{sizeof(key_type<P>)}, 64);
  const index_t elements = panel_tokens * round_up(head_dim, lane_elements<P>);
  return std::is_same_v<P, q8> ? round_up(elements + scale_bytes(head_dim), 64) : elements;
}
template <class P>
[[nodiscard]] constexpr index_t value_panel_elements(index_t value_dim) noexcept {
  if constexpr (is_mixed<P>)
    return round_up(value_panel_elements<value_type<P>>(value_dim) * index_t{sizeof(value_type<P>)}, 64);
  const index_t elements = panel_tokens * padded_value_dim(value_dim);
  return std::is_same_v<P, q8> ? round_up(elements + scale_bytes(value_dim), 64) : elements;
}
template <class P>
[[nodiscard]] constexpr index_t tile_elements(index_t head_dim, index_t value_dim) noexcept {
  return tile_panels * (key_panel_elements<P>(head_dim) + value_panel_elements<P>(value_dim));
}

/// Where element d of a panel's token t lies among its keys, and element e among its values.
template <class P>
[[nodiscard]] constexpr index_t key_index(index_t t, index_t d) noexcept {
  constexpr index_t p = lane_elements<P>;
  return (d / p * panel_tokens + t) * p + d % p;
}
template <class P>
[[nodiscard]] constexpr index_t value_index(index_t t, index_t e, index_t value_dim) noexcept {
  constexpr index_t p = value_lane_elements<P>;
  const index_t block = e / value_block * value_block;
  const index_t columns = (std::min)(value_block, padded_value_dim(value_dim) - block);
  return block * panel_tokens + (t / p * columns + e - block) * p + t % p;
}

/// Where the scale of 8-bit element (t, d) of keys lies, and that of (t, e) of values.
[[nodiscard]] constexpr index_t key_scale_index(index_t t, index_t d, index_t head_dim) noexcept {
  return panel_tokens * round_up(head_dim, lane_elements<q8>) + (d / scale_channels * panel_tokens + t) * 2;
}
[[nodiscard]] constexpr index_t value_scale_index(index_t t, index_t e, index_t value_dim) noexcept {
  return panel_tokens * padded_value_dim(value_dim) + (e / scale_channels * panel_tokens + t) * 2;
}

/// One tile's panels.
template <class P>
struct kv_tile {
  std::array<const P*, tile_panels> k{};
  std::array<const P*, tile_panels> v{};
  const P* next = nullptr;             // where the next tile may lie, to be asked for in time; not of scattered panels
  std::uint32_t nonfinite_values = 0;  // bit i: panel i holds a value that is NaN or infinite
};

/// Four panels side by side, keys first, then the next tile: how caches store tiles and packing fills them.
template <class P>
[[nodiscard]] kv_tile<P> contiguous_tile(const P* memory, index_t head_dim, index_t value_dim,
                                         std::uint32_t nonfinite_values) noexcept {
  const index_t keys = key_panel_elements<P>(head_dim), values = value_panel_elements<P>(value_dim);
  kv_tile<P> tile;
  for (index_t panel = 0; panel < tile_panels; ++panel) {
    tile.k[static_cast<std::size_t>(panel)] = memory + panel * keys;
    tile.v[static_cast<std::size_t>(panel)] = memory + tile_panels * keys + panel * values;
  }
  tile.next = memory + tile_panels * (keys + values);
  tile.nonfinite_values = nonfinite_values;
  return tile;
}

}  // namespace gqa::detail
