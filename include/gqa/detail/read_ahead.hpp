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
/// Zen 4, whose own prefetchers keep up with those; a single row is as fast or faster without.
#pragma once

#include <gqa/config.hpp>
#include <gqa/detail/simd/packet.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of queries from which on it pays.
inline constexpr int rows_that_read_ahead = 3;

inline constexpr index_t read_ahead_bytes = 8192;

/// Asks for the cache line read_ahead_bytes after `at`, the i-th element of a piece of memory that is read in steps of
/// `Step` elements, if `Rows` rows are enough for it to pay: once a line.
template <int Rows, index_t Step, class T>
GQA_INLINE void fetch_ahead(const T* at, index_t i) noexcept {
  constexpr index_t line = 64 / index_t{sizeof(T)};
  if constexpr (Rows >= rows_that_read_ahead) {
    if (Step >= line || i % line == 0) prefetch<2>(at, read_ahead_bytes);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
