// SPDX-License-Identifier: Apache-2.0
// A small seeded generator, the same on every standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>

#include <gqa/config.hpp>

namespace gqa::test {

class rng {
 public:
  explicit rng(std::uint64_t seed) noexcept : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {}

  // splitmix64
  std::uint64_t bits() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // [0, 1)
  double uniform() noexcept { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // [low, high]
  index_t between(index_t low, index_t high) noexcept {
    return low + static_cast<index_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool chance(double p) noexcept { return uniform() < p; }
  double normal() noexcept {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * std::numbers::pi * uniform());
  }
  index_t pick(std::initializer_list<index_t> values) noexcept {
    return values.begin()[between(0, static_cast<index_t>(values.size()) - 1)];
  }

 private:
  std::uint64_t state_;
};

}  // namespace gqa::test
