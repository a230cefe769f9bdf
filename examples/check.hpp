// SPDX-License-Identifier: Apache-2.0
// What the examples check themselves with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "printed.hpp"

namespace example {

// Different values in [-1, 1) at every call.
inline std::vector<float> random(std::int64_t count) {
  static std::uint32_t state = 1;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    x = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
  }
  return values;
}

// Exit code 0 if the largest difference is a rounding error.
inline int same(const std::vector<float>& actual, const std::vector<float>& expected) {
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double off = std::abs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    worst = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(worst, off);
  }
  std::printf("largest error %.1e\n", worst);
  return worst <= 2e-6 ? 0 : 1;
}

inline bool same_bits(const float* a, const float* b, std::int64_t count) {
  const bool same = std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(float)) == 0;
  std::printf("%s\n", same ? "same bits" : "DIFFERENT BITS");
  return same;
}

}  // namespace example
