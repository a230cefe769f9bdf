// SPDX-License-Identifier: Apache-2.0
/// \file
/// Random numbers without a state: the n-th of a seed is a function of both, so that who asks for it, and when, cannot
/// be seen in the result.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include <gqa/config.hpp>

namespace gqa::detail {

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of x decides over every bit of the result.
[[nodiscard]] constexpr std::uint64_t mix_bits(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
[[nodiscard]] constexpr std::uint64_t random_bits(std::uint64_t seed, std::uint64_t n) noexcept {
  return mix_bits(seed + 0x9e3779b97f4a7c15u * (n + 1));
}

/// Uniform in (0, 1), ends excluded, from 52 of the bits: with 53 the last one would round to 1.
[[nodiscard]] constexpr double to_uniform(std::uint64_t bits) noexcept {
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

/// Standard normal (Box and Muller 1958).
[[nodiscard]] inline double random_normal(std::uint64_t seed, std::uint64_t n) noexcept {
  const double radius = std::sqrt(-2 * std::log(to_uniform(random_bits(seed, 2 * n))));
  return radius * std::cos(2 * std::numbers::pi * to_uniform(random_bits(seed, 2 * n + 1)));
}

}  // namespace gqa::detail
