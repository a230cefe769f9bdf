// SPDX-License-Identifier: Apache-2.0
/// \file
/// Blocks of 8-bit integers: up to 32 neighbouring channels of one token and the scale on them.
///
/// An element x becomes the integer nearest to x / scale, of [-127, 127]. The scale is a bfloat16 of at least a 127th
/// of the block's largest magnitude: with a float's range, so that nothing a float holds overflows, and rounded up, so
/// that x is off by half a scale at most, wherever the block's largest element lies. It depends on the token alone: a
/// stored token never changes. (Symmetric blocks of 32 as in the GGML format Q8_0, whose scales are half.)
///
/// A block with an element that is NaN or infinite is all NaN: integers 0 under a scale that is NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

inline constexpr float most_q8 = 127;

/// Elements past the block's count are 0.
struct q8_block {
  alignas(64) std::int8_t elements[scale_channels];
  Eigen::bfloat16 scale;
};

/// A 127th of `magnitude`, a float of at least 0, as a bfloat16 not below it.
[[nodiscard]] inline Eigen::bfloat16 scale_of(float magnitude) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(magnitude / most_q8);
  const auto up = static_cast<std::uint16_t>((bits + 0xffffu) >> 16);
  return Eigen::numext::bit_cast<Eigen::bfloat16>(magnitude > 0 ? std::max<std::uint16_t>(up, 1) : up);
}

/// x [32].
[[nodiscard]] GQA_INLINE q8_block encode_floats(const float* x) noexcept {
  constexpr index_t width = packet_size<float>;
  packet<float> top = zeros<float>(), probe = zeros<float>();  // 0 times x stays 0 over finite elements
  for (index_t i = 0; i < scale_channels; i += width) {
    const packet<float> part = load(x + i);
    top = max_or_nan(top, max_or_nan(part, sub(zeros<float>(), part)));
    probe = madd(part, zeros<float>(), probe);
  }
  q8_block block;
  if (!(lane_sum<float>(probe) == 0)) {
    std::fill_n(block.elements, scale_channels, std::int8_t{0});
    block.scale = Eigen::bfloat16(std::numeric_limits<float>::quiet_NaN());
    return block;
  }
  block.scale = scale_of(max_lane<float>(top));
  const auto scale = static_cast<float>(block.scale);
  const packet<float> divisor = broadcast(scale > 0 ? scale : 1.0F);
  // Adding 1.5 * 2^23 rounds to an integer, nearest even, and leaves it in the low bits.
  constexpr float magic = 0x1.8p23F;
  alignas(64) float rounded[scale_channels];
  for (index_t i = 0; i < scale_channels; i += width)
    store(rounded + i, add(div(load(x + i), divisor), broadcast(magic)));
  for (index_t i = 0; i < scale_channels; ++i)
    block.elements[i] = static_cast<std::int8_t>(std::bit_cast<std::uint32_t>(rounded[i]) & 0xffu);
  return block;
}

/// x [count], count <= 32, of any type but double, times a factor.
template <class T>
[[nodiscard]] GQA_INLINE q8_block encode_block(const T* x, index_t count, double factor = 1) noexcept {
  constexpr index_t width = packet_size<float>;
  alignas(64) float floats[scale_channels];
  index_t i = 0;
  for (; i + width <= count; i += width) store(floats + i, load_as<float>(x + i));
  for (; i < count; ++i) floats[i] = static_cast<float>(x[i]);
  std::fill(floats + count, floats + scale_channels, 0.0F);
  for (i = 0; i < scale_channels && factor != 1; i += width) store(floats + i, scaled<float>(load(floats + i), factor));
  return encode_floats(floats);
}

/// A row of queries as integers meet it: [dim rounded up to 32] signed bytes, then [blocks] scales, then [blocks] times
/// -128 times the sum of the block's integers, for keys are stored with 128 added.
struct q8_query_layout {
  index_t blocks;

  explicit constexpr q8_query_layout(index_t dim) noexcept : blocks(ceil_div(dim, scale_channels)) {}
  [[nodiscard]] constexpr index_t scales_at() const noexcept { return blocks * scale_channels; }
  [[nodiscard]] constexpr index_t offsets_at() const noexcept {
    return scales_at() + blocks * static_cast<index_t>(sizeof(float));
  }
  [[nodiscard]] constexpr index_t bytes() const noexcept {
    return offsets_at() + blocks * static_cast<index_t>(sizeof(std::int32_t));
  }
};

template <class Q>
void encode_query(const Q* row, index_t dim, double factor, q8* to) noexcept {
  const q8_query_layout layout(dim);
  for (index_t n = 0; n < layout.blocks; ++n) {
    const index_t first = n * scale_channels;
    const q8_block block = encode_block(row + first, (std::min)(scale_channels, dim - first), factor);
    const auto scale = static_cast<float>(block.scale);
    std::int32_t offset = 0;
    for (const std::int8_t element : block.elements) offset -= 128 * std::int32_t{element};
    std::memcpy(to + first, block.elements, sizeof(block.elements));
    std::memcpy(to + layout.scales_at() + n * index_t{sizeof(scale)}, &scale, sizeof(scale));
    std::memcpy(to + layout.offsets_at() + n * index_t{sizeof(offset)}, &offset, sizeof(offset));
  }
}

// Panels of tile.hpp.

/// Keys: bytes with 128 added, which the instruction takes for its unsigned operand.
template <class T>
void pack_key_panel(const T* rows, index_t stride, panel_range tokens, index_t dim, q8* panel) noexcept {
  const bool whole = tokens.begin == 0 && tokens.end == panel_tokens;
  if (tokens.starts && !whole) std::fill_n(panel, key_panel_elements<q8>(dim), q8{0});
  for (index_t t = tokens.begin; t < tokens.end; ++t) {
    const T* const row = rows + (t - tokens.begin) * stride;
    for (index_t first = 0; first < dim; first += scale_channels) {
      q8_block block = encode_block(row + first, (std::min)(scale_channels, dim - first));
      for (std::int8_t& element : block.elements) element = static_cast<std::int8_t>(element ^ -128);
      const index_t end = (std::min)(scale_channels, round_up(dim, lane_elements<q8>) - first);
      for (index_t d = 0; d < end; d += lane_elements<q8>)
        std::memcpy(panel + key_index<q8>(t, first + d), block.elements + d, lane_elements<q8>);
      std::memcpy(static_cast<void*>(panel + key_scale_index(t, first, dim)), &block.scale, sizeof(block.scale));
    }
  }
}

/// Values: signed bytes. Returns whether a value is NaN or infinite.
template <class T>
[[nodiscard]] bool pack_value_panel(const T* rows, index_t stride, panel_range tokens, index_t dim,
                                    q8* panel) noexcept {
  const bool whole = tokens.begin == 0 && tokens.end == panel_tokens && dim % panel_tokens == 0;
  if (tokens.starts && !whole) std::fill_n(panel, value_panel_elements<q8>(dim), q8{0});
  bool nonfinite = false;
  for (index_t t = tokens.begin; t < tokens.end; ++t) {
    const T* const row = rows + (t - tokens.begin) * stride;
    for (index_t first = 0; first < dim; first += scale_channels) {
      const index_t count = (std::min)(scale_channels, dim - first);
      const q8_block block = encode_block(row + first, count);
      nonfinite = nonfinite || Eigen::numext::isnan(block.scale);
      q8* const to = panel + value_index<q8>(t, first, dim);  // a block of 32 lies within one of 64
      for (index_t e = 0; e < count; ++e) to[e * value_lane_elements<q8>] = static_cast<q8>(block.elements[e]);
      std::memcpy(static_cast<void*>(panel + value_scale_index(t, first, dim)), &block.scale, sizeof(block.scale));
    }
  }
  return nonfinite;
}

/// Integers under a scale of 0 are as good as zeros.
inline void keep_values(const q8* panel, std::uint64_t bits, index_t columns, q8* to) noexcept {
  std::copy_n(panel, value_panel_elements<q8>(columns), to);
  for (index_t t = 0; t < panel_tokens; ++t) {
    for (index_t e = 0; e < columns && (bits >> t & 1) == 0; e += scale_channels)
      std::fill_n(to + value_scale_index(t, e, columns), 2, q8{0});
  }
}

/// An element of a panel's keys, or of its values, exactly.
[[nodiscard]] inline float scale_at(const q8* at) noexcept {
  Eigen::bfloat16 scale;
  std::memcpy(static_cast<void*>(&scale), at, sizeof(scale));
  return static_cast<float>(scale);
}
[[nodiscard]] inline float key_at(const q8* panel, index_t t, index_t d, index_t dim) noexcept {
  const auto element = static_cast<float>(static_cast<int>(panel[key_index<q8>(t, d)]) - 128);
  return element * scale_at(panel + key_scale_index(t, d, dim));
}
[[nodiscard]] inline float value_at(const q8* panel, index_t t, index_t e, index_t dim) noexcept {
  const auto element = static_cast<float>(static_cast<std::int8_t>(panel[value_index<q8>(t, e, dim)]));
  return element * scale_at(panel + value_scale_index(t, e, dim));
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
