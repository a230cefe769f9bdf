// SPDX-License-Identifier: Apache-2.0
/// \file
/// Products of 8-bit integers: AVX-512 VNNI, where has_dot<q8> says so.
///
/// Sums are of 32 bits and exact: a block of 32 channels is at most 32 x 127 x 127 (with 128 added to keys, as the
/// instruction wants them, 32 x 127 x 255), a tile of 64 weights of 16 bits 64 x 32,767 x 127 = 2.7e8 < 2^31.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include <gqa/config.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/element_types.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

#if GQA_VNNI
template <>
inline constexpr bool has_dot<q8> = true;

/// 16 sums. (A vector of words: sums that are 8 double words between instructions, GCC copies before and after each.)
typedef std::int32_t packet_sums __attribute__((vector_size(64)));

/// 16 lanes of 4 bytes or of 2 words.
using packet_bytes = __m512i;

[[nodiscard]] GQA_INLINE packet_sums zero_sums() noexcept {
  return packet_sums{};
}
[[nodiscard]] GQA_INLINE std::int32_t load_word(const void* from) noexcept {
  std::int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}
[[nodiscard]] GQA_INLINE packet_sums broadcast_sum(const void* from) noexcept {
  return std::bit_cast<packet_sums>(_mm512_set1_epi32(load_word(from)));
}

[[nodiscard]] GQA_INLINE packet<float> broadcast_scale(const void* from) noexcept {
  return _mm512_castsi512_ps(_mm512_set1_epi32(load_word(from)));
}

/// 4 channels of 16 keys, and sum[t] += their products with 4 signed bytes.
[[nodiscard]] GQA_INLINE packet_bytes load_keys(const q8* from) noexcept {
  return _mm512_loadu_si512(from);
}
[[nodiscard]] GQA_INLINE packet_sums add_dot4(const packet_sums& sum, const packet_bytes& keys,
                                              const void* four) noexcept {
  return std::bit_cast<packet_sums>(
      _mm512_dpbusd_epi32(std::bit_cast<__m512i>(sum), keys, _mm512_set1_epi32(load_word(four))));
}

/// 16 columns of a pair of tokens, and sum[e] += their products with 2 weights.
[[nodiscard]] GQA_INLINE packet_bytes load_value_pairs(const q8* from) noexcept {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
[[nodiscard]] GQA_INLINE packet_sums add_dot2(const packet_sums& sum, const packet_bytes& values,
                                              const void* two) noexcept {
  return std::bit_cast<packet_sums>(
      _mm512_dpwssd_epi32(std::bit_cast<__m512i>(sum), values, _mm512_set1_epi32(load_word(two))));
}

[[nodiscard]] GQA_INLINE packet<float> floats_of(const packet_sums& sums) noexcept {
  return _mm512_cvtepi32_ps(std::bit_cast<__m512i>(sums));
}
/// 16 floats as integers of 16 bits, rounded to nearest even and held at the ends of their range.
GQA_INLINE void store_words(std::int16_t* to, const packet<float>& x) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
/// Whether a lane is NaN.
[[nodiscard]] GQA_INLINE bool any_nan(const packet<float>& x) noexcept {
  return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
}
/// 16 scales of a panel.
[[nodiscard]] GQA_INLINE packet<float> load_scales(const q8* from) noexcept {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
#endif

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
