// SPDX-License-Identifier: Apache-2.0
/// \file
/// How far ahead of its reads a kernel asks for memory that it streams: decode.
///
/// A core waits for as many cache lines at once as loads fit its window, and prefetchers of hardware go little further
/// ahead than they have to for a loop of loads. What is computed between the loads takes room in the window: with 4
/// multiply-adds a line two thirds as much comes as a bare loop gets, with 8 half. Lines asked for by software leave
/// the window at once.
///
/// Measured on Zen 4 and 5 (docs/03_performance.md): 8 KiB, into L2, is best for 4 and 8 rows, but for 4 of float on
/// Zen 4, whose own prefetchers keep up with those; a single row is as fast or faster without. Of 8-bit tiles, which
/// take as long to compute as others and half as long to come, 16 KiB for any rows: 1.7 times as fast as with 8 for 4
/// rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of queries from which on it pays.
inline constexpr int rows_that_read_ahead = 3;

template <class P>
inline constexpr index_t read_ahead_bytes = std::is_same_v<P, q8> || is_mixed<P> ? 16384 : 8192;

/// Asks for the cache line so many bytes after `at`, the i-th element of a piece of memory that is read in steps of
/// `Step` elements, if `Rows` rows are enough for it to pay: once a line.
template <int Rows, index_t Step, class T>
GQA_INLINE void fetch_ahead(const T* at, index_t i, index_t bytes) noexcept {
  constexpr index_t line = 64 / index_t{sizeof(T)};
  if constexpr (Rows >= rows_that_read_ahead) {
    if (Step >= line || i % line == 0) prefetch<2>(at, bytes);
  }
}

/// Whether a source says so: that what follows a panel in memory may not be what is read next.
template <class Source>
inline constexpr bool has_scattered_panels = requires {
  requires Source::scatters_panels;
};

/// Where pages scatter panels, the place read_ahead_bytes further on is another head's: what is read next lies so many
/// bytes from each panel of a tile.
struct panels_ahead {
  std::array<index_t, tile_panels> k, v;
};

/// To the panels, of this tile or the next, that are read some read_ahead_bytes later. Of both the first so many are
/// read.
template <class P>
[[nodiscard]] panels_ahead find_panels_ahead(const kv_tile<P>& tile, const kv_tile<P>& next, index_t panel_bytes,
                                             index_t panels = tile_panels, index_t next_panels = tile_panels) noexcept {
  std::array<const P*, static_cast<std::size_t>(4 * tile_panels)> in_order{};
  auto* to = in_order.data();
  for (const auto* const some : {&tile.k, &tile.v}) to = std::copy_n(some->data(), panels, to);
  for (const auto* const some : {&next.k, &next.v}) to = std::copy_n(some->data(), next_panels, to);
  const index_t later = std::clamp<index_t>(read_ahead_bytes<P> / panel_bytes, 1, 2 * tile_panels);
  const auto bytes_from = [&](index_t n) {
    const index_t then = (std::min)(n + later, 2 * (panels + next_panels) - 1);
    return reinterpret_cast<std::intptr_t>(in_order[static_cast<std::size_t>(then)]) -
           reinterpret_cast<std::intptr_t>(in_order[static_cast<std::size_t>(n)]);
  };
  panels_ahead ahead{};
  for (index_t n = 0; n < panels; ++n) {
    ahead.k[static_cast<std::size_t>(n)] = bytes_from(n);
    ahead.v[static_cast<std::size_t>(n)] = bytes_from(panels + n);
  }
  return ahead;
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
