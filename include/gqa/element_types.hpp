// SPDX-License-Identifier: Apache-2.0
/// \file
/// Element types of caches beside float, double, Eigen::half and Eigen::bfloat16: 8 bits, and two types in one cache.
#pragma once

#include <cstdint>

namespace gqa {

/// Eight bits: an integer under a scale that it shares with its neighbours (quantization.hpp).
enum class q8 : std::uint8_t {};

/// Keys of K and values of V in one cache: q8, and one of float, half and bfloat16 (quantization.hpp). As an element of
/// the cache's memory: a byte.
template <class K, class V>
class kv_types {
 public:
  constexpr kv_types() noexcept = default;
  constexpr explicit kv_types(int byte) noexcept : byte_(static_cast<std::uint8_t>(byte)) {}

 private:
  std::uint8_t byte_ = 0;
};

}  // namespace gqa
