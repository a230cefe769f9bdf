// SPDX-License-Identifier: Apache-2.0
/// \file
/// How many elements lie together in a 32-bit lane, so that one lane feeds a hardware dot product.
#pragma once

#include <type_traits>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/element_types.hpp>

namespace gqa::detail {

/// Neighbours of the depth that lie together in a panel of P: of keys, and of values.
template <class P>
inline constexpr index_t lane_elements = std::is_same_v<P, q8>                ? 4
                                         : std::is_same_v<P, Eigen::bfloat16> ? 2
                                                                              : 1;
template <class P>
inline constexpr index_t value_lane_elements = std::is_same_v<P, q8> ? 2 : lane_elements<P>;

}  // namespace gqa::detail
