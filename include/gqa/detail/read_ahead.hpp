// SPDX-License-Identifier: Apache-2.0
/// \file
/// How far ahead of its reads a kernel asks for memory that it streams: decode.
///
/// A core waits for as many cache lines at once as loads fit its window, and prefetchers of hardware go little further
/// ahead than they have to for a loop of loads. What is computed between the loads takes room in the window: with 4
/// multiply-adds a line two thirds as much comes as a bare loop gets, with 8 half. Lines asked for by software leave
/// the window at once.
///
/// Measured on Zen 5 (docs/03_performance.md): 8 KiB, into L2, is best for 4 and 8 rows; a single row is as fast or
/// faster without. On Zen 4, whose own prefetchers keep up with 4 rows, lines fetched into L1 cost them a tenth to a
/// third.
#pragma once

#include <cstdint>
#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>
#endif

#include <gqa/config.hpp>
#include <gqa/detail/simd/packet.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of queries from which on it pays.
inline constexpr int rows_that_read_ahead = 3;

/// Whether this is a core of AMD's family 0x19, Zen 3 or 4.
[[nodiscard]] inline bool is_zen_3_or_4() noexcept {
#if defined(__GNUC__) && defined(__x86_64__)
  unsigned eax = 0, vendor = 0, ecx = 0, edx = 0, ignored = 0;
  if (__get_cpuid(0, &eax, &vendor, &ecx, &edx) == 0 || __get_cpuid(1, &eax, &ignored, &ecx, &edx) == 0) return false;
  constexpr unsigned auth = 0x68747541;  // "Auth", of "AuthenticAMD"
  return vendor == auth && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 0x19;
#else
  return false;
#endif
}

/// Bytes ahead; 0, which asks for what is at hand, where it does not pay.
[[nodiscard]] inline index_t read_ahead_bytes() noexcept {
  static const index_t bytes = is_zen_3_or_4() ? 0 : 8192;
  return bytes;
}

/// Asks for what lies `ahead` bytes after `at`, the i-th element of a piece of memory that is read in steps of `Step`
/// elements: once a cache line, if `Rows` rows are enough for it to pay.
template <int Rows, index_t Step, class T>
GQA_INLINE void fetch_ahead(const T* at, index_t i, index_t ahead) noexcept {
  constexpr index_t line = 64 / index_t{sizeof(T)};
  if constexpr (Rows >= rows_that_read_ahead) {
    if (Step >= line || i % line == 0) prefetch<2>(at, ahead);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
