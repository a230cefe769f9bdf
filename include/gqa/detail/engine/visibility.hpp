// SPDX-License-Identifier: Apache-2.0
/// \file
/// Which keys a query sees: the interval that causal edge, window and padding leave, and a tile's part of it as bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/options.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Interval rules of a call. Both ends of keys_of() grow with the query position, so that the keys of a run of queries
/// lie between the begin of its first and the end of its last.
class interval_rule {
 public:
  interval_rule(bool causal, window_t window) noexcept
      : left_(window.left < 0 ? unbounded : (std::min)(window.left, unbounded)),
        right_(causal ? 0 : (window.right < 0 ? unbounded : (std::min)(window.right, unbounded))) {}

  /// Of the query at an absolute position (within 2^60), among `length` keys.
  [[nodiscard]] key_range keys_of(index_t query, index_t length) const noexcept {
    return {std::max<index_t>(query - left_, 0), (std::min)(query + right_ + 1, length)};
  }

 private:
  static constexpr index_t unbounded = index_t{1} << 61;  // sums of two stay in range
  index_t left_, right_;
};

/// Bits [begin, end) of a tile, clipped to it.
[[nodiscard]] constexpr std::uint64_t bits_between(index_t begin, index_t end) noexcept {
  begin = std::clamp<index_t>(begin, 0, tile_tokens);
  end = std::clamp<index_t>(end, begin, tile_tokens);
  const auto below = [](index_t n) {
    return n == tile_tokens ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - std::uint64_t{1};
  };
  return below(end) & ~below(begin);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
