// SPDX-License-Identifier: Apache-2.0
/// \file
/// Stored elements as packets of accumulators and back. Widening is exact for every type; narrowing rounds to nearest
/// even and keeps denormal numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <gqa/detail/simd/lanes.hpp>
#include <gqa/detail/simd/packet.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {

/// What keys and values may be read from as they lie: plain elements.
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

/// The bits of a packet of floats, a word a lane.
typedef std::uint32_t packet_words __attribute__((vector_size(sizeof(packet<float>))));

[[nodiscard]] GQA_INLINE packet_words words_of(const packet<float>& x) noexcept {
  return std::bit_cast<packet_words>(x);
}
[[nodiscard]] GQA_INLINE packet<float> packet_of(const packet_words& x) noexcept {
  return std::bit_cast<packet<float>>(x);
}

/// packet_size<float> pairs of bfloat16, a pair a lane; and the first or the second of each pair as a float.
[[nodiscard]] GQA_INLINE packet_words load_pairs(const Eigen::bfloat16* from) noexcept {
  packet_words pairs;
  std::memcpy(&pairs, static_cast<const void*>(from), sizeof(pairs));
  return pairs;
}
[[nodiscard]] GQA_INLINE packet<float> first_of_pairs(const packet_words& pairs) noexcept {
  return packet_of(pairs << 16);
}
[[nodiscard]] GQA_INLINE packet<float> second_of_pairs(const packet_words& pairs) noexcept {
  return packet_of(pairs & 0xffff0000u);
}

/// x rounded to bfloat16, still as floats.
[[nodiscard]] inline packet<float> rounded_to_bfloat16(const packet<float>& x) noexcept {
  const packet_words words = words_of(x);
  const packet_words rounded = words + 0x7fffu + (words >> 16 & 1u);
  const packet_words quiet = words | 0x400000u;  // a NaN: the addition could carry it into infinity or past it
  const auto is_nan = std::bit_cast<packet_words>((words & 0x7fffffffu) > 0x7f800000u);
  return packet_of(((rounded & ~is_nan) | (quiet & is_nan)) & 0xffff0000u);
}

/// The same, of finite numbers that would round to infinity the largest bfloat16. (In a vector of queries one such
/// number would make the row NaN.)
[[nodiscard]] inline packet<float> held_in_bfloat16(const packet<float>& x) noexcept {
  const packet_words words = words_of(x);
  const auto leaves = std::bit_cast<packet_words>((words & 0x7fffffffu) - 0x7f7f8000u < 0x8000u);
  return packet_of((words & ~leaves) | (((words & 0x80000000u) | 0x7f7f0000u) & leaves));
}
[[nodiscard]] inline float held_in_bfloat16(float x) noexcept {
  constexpr float most = std::bit_cast<float>(0x7f7f0000u);
  return std::isfinite(x) ? std::clamp(x, -most, most) : x;
}

/// A packet as elements of T in memory, rounded to nearest even. Generic: lane by lane.
template <class A, class T>
inline void store_as(T* to, const packet<A>& x) noexcept {
  if constexpr (std::is_same_v<A, T>) {
    store(to, x);
  } else {
    constexpr int width = packet_size<A>;
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (std::is_same_v<T, Eigen::half> && width == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
      return;
    } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && width == 16) {
      const auto words = std::bit_cast<__m512i>(words_of(rounded_to_bfloat16(x)) >> 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
      return;
    }
#endif
    alignas(64) A lanes[width];
    store(lanes, x);
    for (int i = 0; i < width; ++i) to[i] = static_cast<T>(lanes[i]);
  }
}

/// x rounded to what T holds, still as A.
template <class T, class A>
[[nodiscard]] inline packet<A> rounded_to(const packet<A>& x) noexcept {
  if constexpr (sizeof(T) >= sizeof(A)) {
    return x;
  } else if constexpr (std::is_same_v<T, Eigen::bfloat16> && std::is_same_v<A, float>) {
    return rounded_to_bfloat16(x);
  } else {
    alignas(64) T narrow[packet_size<A>];
    store_as<A>(narrow, x);
    return load_as<A>(narrow);
  }
}

/// x times a factor, in double and rounded once.
template <class A>
[[nodiscard]] inline packet<A> scaled(const packet<A>& x, double factor) noexcept {
  alignas(64) A lanes[packet_size<A>];
  store(lanes, x);
  for (A& lane : lanes) lane = static_cast<A>(static_cast<double>(lane) * factor);
  return load(lanes);
}

/// A packet as results are stored: see stored() in packet.hpp.
template <class Out, class A>
inline void store_result(Out* to, const packet<A>& x) noexcept {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (std::is_same_v<Out, Eigen::bfloat16> && packet_size<A> == 16) {  // one rounding instead of two
    const packet_words words = words_of(with_one_nan<A>(x));
    const packet_words rounded = words + 0x7fffu + (words >> 16 & 1u);  // nearest even; the one NaN has room for it
    const auto of_zero = std::bit_cast<packet_words>((rounded & 0x7fff0000u) == 0u);
    const auto narrow = std::bit_cast<__m512i>((rounded & ~of_zero) >> 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(narrow));
    return;
  }
#endif
  // Rounding may make a zero; the sum of zeros of either sign is +0.
  store_as<A>(to, add(rounded_to<Out, A>(with_one_nan<A>(x)), zeros<A>()));
}

/// A row of lanes of a panel of P: lane i holds lane i of each part, which P holds exactly.
template <class P, class A>
inline void store_lanes(P* to, const packet<A> (&parts)[lane_elements<P>]) noexcept {
  if constexpr (lane_elements<P> == 1) {
    store_as<A>(to, parts[0]);
  } else {
    const packet_words pairs = (words_of(parts[0]) >> 16) | words_of(parts[1]);
    std::memcpy(static_cast<void*>(to), &pairs, sizeof(pairs));
  }
}

/// The parts of a row of lanes: what store_lanes() stored.
template <class P, class A>
inline void load_lanes(const P* from, packet<A> (&parts)[lane_elements<P>]) noexcept {
  if constexpr (lane_elements<P> == 1) {
    parts[0] = load_as<A>(from);
  } else {
    packet_words pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    parts[0] = std::bit_cast<packet<A>>(pairs << 16);
    parts[1] = std::bit_cast<packet<A>>(pairs & 0xffff0000u);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
