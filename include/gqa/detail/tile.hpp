// SPDX-License-Identifier: Apache-2.0
/// \file
/// The tile: 64 keys and values of one KV head in the order the micro-kernel reads them.
///
/// A panel is 16 consecutive tokens: keys as [D][16], values as [E/64][16][64] (column blocks of 64, the last one
/// narrower, E rounded up to 16 with zeros). Both products then stream a panel from front to back: step d of q.k reads
/// the 16 tokens' d-th elements, step t of p.v reads one token's next 64 value columns. A tile is four panels, each
/// anywhere in memory, so that pages of any multiple of 16 tokens can hold them. Tokens past the end are zeros.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <gqa/config.hpp>

namespace gqa::detail {

inline constexpr index_t panel_tokens = 16;
inline constexpr index_t tile_tokens = 64;
inline constexpr index_t tile_panels = tile_tokens / panel_tokens;
inline constexpr index_t value_block = 64;

/// KV is cut at multiples of this many tokens into splits that finish on their own and merge left to right, always,
/// so that a long row may be computed by several workers without changing a bit.
inline constexpr index_t split_tokens = 1024;
inline constexpr index_t split_tiles = split_tokens / tile_tokens;

[[nodiscard]] constexpr index_t round_up(index_t n, index_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}
[[nodiscard]] constexpr index_t ceil_div(index_t n, index_t by) noexcept {
  return (n + by - 1) / by;
}

/// Value columns of a panel and of an output row: E rounded up to whole packets of any ISA.
[[nodiscard]] constexpr index_t padded_value_dim(index_t value_dim) noexcept {
  return round_up(value_dim, panel_tokens);
}

/// One tile's panels.
template <class A>
struct kv_tile {
  std::array<const A*, tile_panels> k{};  // each [D][16]
  std::array<const A*, tile_panels> v{};  // each [E/64][16][64]
  std::uint32_t nonfinite_values = 0;     // bit i: panel i holds a value that is NaN or infinite
};

/// Four panels side by side, keys first: what packing a tile fills.
template <class A>
[[nodiscard]] kv_tile<A> contiguous_tile(const A* k, const A* v, index_t head_dim, index_t value_dim,
                                         std::uint32_t nonfinite_values) noexcept {
  kv_tile<A> tile;
  for (index_t panel = 0; panel < tile_panels; ++panel) {
    tile.k[static_cast<std::size_t>(panel)] = k + panel * panel_tokens * head_dim;
    tile.v[static_cast<std::size_t>(panel)] = v + panel * panel_tokens * padded_value_dim(value_dim);
  }
  tile.nonfinite_values = nonfinite_values;
  return tile;
}

}  // namespace gqa::detail
