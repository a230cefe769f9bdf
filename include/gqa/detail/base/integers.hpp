// SPDX-License-Identifier: Apache-2.0
/// \file
/// Quotients of extents and positions, rounded as shapes want them.
#pragma once

#include <gqa/config.hpp>

namespace gqa::detail {

[[nodiscard]] constexpr index_t round_up(index_t n, index_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}
[[nodiscard]] constexpr index_t ceil_div(index_t n, index_t by) noexcept {
  return (n + by - 1) / by;
}

/// n / by rounded down, of a negative n, too.
[[nodiscard]] constexpr index_t floor_div(index_t n, index_t by) noexcept {
  return n >= 0 ? n / by : -ceil_div(-n, by);
}

}  // namespace gqa::detail
