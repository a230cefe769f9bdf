// SPDX-License-Identifier: Apache-2.0
/// \file
/// Loads of stored elements as packets of accumulators. Widening is exact for every type.
#pragma once

#include <cstdint>
#include <type_traits>

#include <gqa/detail/simd/packet.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {

/// What keys and values may be stored as.
template <class T>
concept storable = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, Eigen::half> ||
    std::is_same_v<T, Eigen::bfloat16>;

inline namespace GQA_ISA {

/// packet_size<A> elements of T from memory, widened to A. Generic: lane by lane.
template <class A, class T>
[[nodiscard]] inline packet<A> load_as(const T* from) noexcept {
  if constexpr (std::is_same_v<A, T>) {
    return load(from);
  } else {
    constexpr int width = packet_size<A>;
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (std::is_same_v<T, Eigen::half> && width == 16) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && width == 16) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
#endif
#if defined(EIGEN_VECTORIZE_AVX2) && defined(__F16C__) && !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, Eigen::half> && width == 8) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && width == 8) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
#endif
#if defined(__aarch64__)
    if constexpr (std::is_same_v<T, Eigen::half> && width == 4) {
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from))));
    } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && width == 4) {
      return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from)), 16));
    }
#endif
    alignas(64) A lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = static_cast<A>(from[i]);
    return load(lanes);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
