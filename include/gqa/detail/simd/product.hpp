// SPDX-License-Identifier: Apache-2.0
/// \file
/// The multiply-add of the micro-kernel: a row of a panel of P times elements of a left operand of L.
///
///     panel P          left operand L     a row of lanes holds    multiply-adds     instruction
///     float, double    the same           1 element               1                 fused multiply-add
///     half             float              1                       1                 widen, fused multiply-add
///     bfloat16         float              2                       2                 widen, fused multiply-add
///     bfloat16         bfloat16           2                       1                 VDPBF16PS
///
/// VDPBF16PS adds both products of a lane to a float, rounding to nearest even and taking denormal numbers, of operands
/// and results, for zero. It exists where has_dot<P> says so.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/element_types.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Whether products of P with P are an instruction of this ISA.
template <class P>
inline constexpr bool has_dot = false;

/// As an L: queries held in Q, weights in W.
template <class Q, class W>
struct lefts {};
template <class L>
struct left_types {
  using queries = L;
  using weights = L;
};
template <class Q, class W>
struct left_types<lefts<Q, W>> {
  using queries = Q;
  using weights = W;
};
template <class L>
using queries_of_left = typename left_types<L>::queries;
template <class L>
using weights_of_left = typename left_types<L>::weights;

/// What the softmax makes of scores: weights of 8 bits would be too few.
template <class L>
using weight_element = std::conditional_t<std::is_same_v<weights_of_left<L>, q8>, float, weights_of_left<L>>;

/// Whether weights are summed by the softmax, in lanes, or one by one by add_elements(): as products with ones would
/// be.
template <class L>
inline constexpr bool sums_in_lanes =
    std::is_same_v<weights_of_left<L>, Eigen::bfloat16> || std::is_same_v<weights_of_left<L>, q8>;

/// Panels whose lanes hold one element. `part` counts the multiply-adds of a row of lanes.
template <class P, class L>
struct lane_product {
  static constexpr index_t depth = 1;  // elements of the left operand per row of lanes
  static constexpr int parts = 1;
  using right = packet<L>;
  using left = packet<L>;
  [[nodiscard]] GQA_INLINE static right load(const P* lanes, int) noexcept { return load_as<L>(lanes); }
  [[nodiscard]] GQA_INLINE static left broadcast(const L* elements, int) noexcept {
    return detail::broadcast(*elements);
  }
  [[nodiscard]] GQA_INLINE static packet<L> madd(const left& a, const right& b, const packet<L>& c) noexcept {
    return detail::madd(a, b, c);
  }
  [[nodiscard]] GQA_INLINE static L add_elements(const L* elements, L sum) noexcept { return sum + *elements; }
};

/// Pairs of bfloat16 times floats: the first of each pair, then the second.
template <>
struct lane_product<Eigen::bfloat16, float> {
  static constexpr index_t depth = 2;
  static constexpr int parts = 2;
  using right = packet<float>;
  using left = packet<float>;
  [[nodiscard]] GQA_INLINE static right load(const Eigen::bfloat16* lanes, int part) noexcept {
    return part == 0 ? first_of_pairs(load_pairs(lanes)) : second_of_pairs(load_pairs(lanes));
  }
  [[nodiscard]] GQA_INLINE static left broadcast(const float* elements, int part) noexcept {
    return detail::broadcast(elements[part]);
  }
  [[nodiscard]] GQA_INLINE static packet<float> madd(const left& a, const right& b, const packet<float>& c) noexcept {
    return detail::madd(a, b, c);
  }
  [[nodiscard]] GQA_INLINE static float add_elements(const float* elements, float sum) noexcept {
    return sum + elements[0] + elements[1];
  }
};

#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
template <>
inline constexpr bool has_dot<Eigen::bfloat16> = true;

/// Pairs of bfloat16 times pairs of bfloat16.
template <>
struct lane_product<Eigen::bfloat16, Eigen::bfloat16> {
  static constexpr index_t depth = 2;
  static constexpr int parts = 1;
  using right = __m512bh;
  using left = __m512bh;
  [[nodiscard]] GQA_INLINE static right load(const Eigen::bfloat16* lanes, int) noexcept {
    return std::bit_cast<__m512bh>(_mm512_loadu_si512(lanes));
  }
  [[nodiscard]] GQA_INLINE static left broadcast(const Eigen::bfloat16* elements, int) noexcept {
    std::int32_t pair;
    std::memcpy(&pair, elements, sizeof(pair));
    return std::bit_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  [[nodiscard]] GQA_INLINE static packet<float> madd(const left& a, const right& b, const packet<float>& c) noexcept {
    return _mm512_dpbf16_ps(c, a, b);
  }
};

/// Two packets' width of neighbouring columns of two rows, the first row's in the first element of each pair.
GQA_INLINE void load_two_rows(const Eigen::bfloat16* first, const Eigen::bfloat16* second, __m512bh* columns) noexcept {
  alignas(64) static constexpr auto order = [] {
    std::array<std::int16_t, 64> words{};  // word i of the first row, word i of the second (from 32 on), word i + 1 ...
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::int16_t>(i / 2 + i % 2 * 32);
    return words;
  }();
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  for (std::size_t half = 0; half < 2; ++half)
    columns[half] = std::bit_cast<__m512bh>(_mm512_permutex2var_epi16(a, _mm512_load_si512(&order[32 * half]), b));
}

/// Rounds two packets to bfloat16 and stores them one after the other; returns `sum` plus what was stored, two
/// neighbours a lane.
[[nodiscard]] GQA_INLINE packet<float> store_rounded(Eigen::bfloat16* to, const packet<float>& first,
                                                     const packet<float>& second, const packet<float>& sum) noexcept {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(to, std::bit_cast<__m512i>(rounded));
  return _mm512_dpbf16_ps(sum, rounded, std::bit_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80)));
}
#endif

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
