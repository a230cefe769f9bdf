// SPDX-License-Identifier: Apache-2.0
/// \file
/// The micro-kernel over tiles of 8-bit integers: both products as integers.
///
///     scores:  S [rows, 64] = sum over blocks of 32 channels of (q scale)(k scale) (integers of q . integers of k)
///     values:  O [rows, E]  = alpha O + unit (16-bit weights . integers of v)
///
/// Queries are 8-bit blocks themselves (q8.hpp). A value's scale is its token's, inside the sum over tokens, so it goes
/// to the weight: a row's weights times the scales of a block of 32 columns are rounded to 16 bits under one unit, a
/// 32,767th of the largest of the tile. That is 2^-16 of the largest term, far below what the values were rounded to.
///
/// Per row and tile of 64 keys at D = E = 128: 128 + 256 instructions of products (bfloat16: 256 + 256), 48 to bring
/// sums of blocks together, some 110 to round weights. Sums of integers are exact, in any order; those of floats go
/// over blocks ascending, then over tiles: so the shape of a block of rows and the order of reads change no bits.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/vnni.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

using q8_operands = block_operands<q8, q8>;

/// Weights whose largest, times its scale, is below this are lifted before they are rounded, for a 32,767th of it may
/// have no reciprocal; of values about as small as that. (Their unit may be denormal: an output may be off by 2^-114.)
inline constexpr float least_q8_weight = 0x1p-100F, q8_lift = 0x1p100F;

#if GQA_VNNI

/// S[:, Vectors panels from `panel` on]. Sums of a block and of all blocks take 2 x 12 registers at 6 rows x 2 panels.
template <int Rows, int Vectors, reading How>
void score_q8_panels(const q8_operands& op, index_t panel) noexcept {
  constexpr index_t step_bytes = panel_tokens * lane_elements<q8>;
  const q8_query_layout query(op.head_dim);
  const index_t elements = panel_tokens * round_up(op.head_dim, lane_elements<q8>);
  const q8* keys[Vectors];
  const q8* scales[Vectors];
  GQA_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    keys[v] = op.tile.k[static_cast<std::size_t>(panel + v)];
    scales[v] = keys[v] + elements;
  }
  packet<float> sum[Rows][Vectors];
  clear<float>(sum);
  index_t next = op.next.keys.bytes + panel * elements / (tile_panels * step_bytes) * 64;
  const index_t ahead = bytes_ahead<q8, How>(op.ahead.k, panel);
  const q8* q = op.q;
  for (index_t block = 0; block < query.blocks; ++block) {
    packet_sums part[Rows][Vectors];
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const packet_sums start = broadcast_sum(op.q + r * op.q_stride + query.offsets_at() + block * 4);
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) part[r][v] = start;
    }
    const q8* const end = keys[0] + std::min<index_t>(scale_channels * panel_tokens, scales[0] - keys[0]);
    while (keys[0] != end) {
      if constexpr (How == reading::blocks) prefetch<2>(op.next.keys.at, next), next += 64;
      packet_bytes step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        step[v] = load_keys(keys[v]);
        if constexpr (How != reading::blocks) prefetch<2>(keys[v], ahead);
        keys[v] += step_bytes;
      }
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        GQA_UNROLL
        for (int v = 0; v < Vectors; ++v) part[r][v] = add_dot4(part[r][v], step[v], q + r * op.q_stride);
      }
      q += lane_elements<q8>;
    }
    q = op.q + (block + 1) * scale_channels;
    packet<float> key_scale[Vectors];
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      key_scale[v] = load_scales(scales[v] + block * panel_tokens * 2);
      if constexpr (How != reading::blocks) prefetch<2>(scales[v], block * panel_tokens * 2 + ahead);
    }
    GQA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const packet<float> query_scale = broadcast_scale(op.q + r * op.q_stride + query.scales_at() + block * 4);
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v)
        sum[r][v] = madd(floats_of(part[r][v]), mul<float>(query_scale, key_scale[v]), sum[r][v]);
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) store(op.s + r * tile_tokens + (panel + v) * panel_tokens, sum[r][v]);
  }
}

template <int Rows, reading How>
void score_q8_block(const q8_operands& op) noexcept {
  constexpr int vectors = Rows <= block_rows ? 2 : 1;
  index_t panel = op.panel_begin;
  for (; panel + vectors <= op.panel_end; panel += vectors) score_q8_panels<Rows, vectors, How>(op, panel);
  if (panel < op.panel_end) score_q8_panels<Rows, 1, How>(op, panel);
}

/// Weights of a tile times the scales of a block of 32 columns, as integers of 16 bits times `unit`.
template <int Rows>
struct q8_weights {
  alignas(64) std::int16_t words[Rows][tile_tokens];
  float unit[Rows];
};

template <int Rows, reading How>
GQA_INLINE void round_weights(const q8_operands& op, index_t block, q8_weights<Rows>& to) noexcept {
  constexpr int panels = static_cast<int>(tile_panels);
  packet<float> scale[panels];
  GQA_UNROLL
  for (int n = 0; n < panels; ++n) {  // weights of panels that no row sees are 0: those panels' scales may be anything
    const bool is_seen = op.panel_begin <= n && n < op.panel_end;
    const q8* const panel = op.tile.v[static_cast<std::size_t>(n)];
    if constexpr (How != reading::blocks)
      prefetch<2>(panel, panel_tokens * (op.value_dim + 2 * block) + bytes_ahead<q8, How>(op.ahead.v, n));
    scale[n] = is_seen ? load_scales(panel + panel_tokens * (op.value_dim + 2 * block)) : zeros<float>();
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    packet<float> x[panels];
    GQA_UNROLL
    for (int n = 0; n < panels; ++n) x[n] = mul<float>(load(op.p + r * tile_tokens + n * panel_tokens), scale[n]);
    float top = max_lane<float>(max_or_nan(max_or_nan(x[0], x[1]), max_or_nan(x[2], x[3])));
    float unit = top * (1 / 32767.0F);
    if (top < least_q8_weight) {
      for (packet<float>& lifted : x) lifted = mul<float>(lifted, broadcast(q8_lift));
      top *= q8_lift;
    }
    // Integers cannot carry it. (Weights that are NaN have made the row's sum so.)
    if (op.tile.nonfinite_values != 0 && any_nan(add(add(x[0], x[1]), add(x[2], x[3]))))
      unit = std::numeric_limits<float>::quiet_NaN();
    to.unit[r] = unit;
    const packet<float> inverse = broadcast(top == 0 ? 0.0F : 32767.0F / top);
    GQA_UNROLL
    for (int n = 0; n < panels; ++n) store_words(to.words[r] + n * panel_tokens, mul<float>(x[n], inverse));
  }
}

/// O[:, Vectors packets of columns] = alpha O + unit (words . integers), a block of 32 columns every two packets.
template <int Rows, int Vectors, reading How>
GQA_INLINE void add_q8_columns(const q8_operands& op, const value_place& at,
                               const std::array<q8_weights<Rows>, 2>& weights) noexcept {
  constexpr int width = static_cast<int>(panel_tokens);
  constexpr index_t pair = 2;
  packet_sums sum[Rows][Vectors];
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = zero_sums();
  }
  index_t next = op.next.values.bytes + (at.block + at.column) / (2 * scale_channels) * bytes_fetched(32);
  for (index_t panel = op.panel_begin; panel < op.panel_end; ++panel) {
    const index_t ahead = bytes_ahead<q8, How>(op.ahead.v, panel);
    const q8* from = op.tile.v[static_cast<std::size_t>(panel)] + at.block * panel_tokens + at.column * pair;
    for (index_t t = panel * panel_tokens; t < (panel + 1) * panel_tokens; t += pair) {
      if constexpr (How == reading::blocks) prefetch<2>(op.next.values.at, next), next += 64;
      packet_bytes step[Vectors];
      GQA_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        step[v] = load_value_pairs(from + v * width * pair);
        if (How != reading::blocks && v % 2 == 0) prefetch<2>(from, v * width * pair + ahead);
      }
      from += at.columns * pair;
      GQA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        GQA_UNROLL
        for (int v = 0; v < Vectors; ++v)
          sum[r][v] = add_dot2(sum[r][v], step[v], weights[static_cast<std::size_t>(v / 2)].words[r] + t);
      }
    }
  }
  GQA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    float* const out = op.out + r * op.out_stride + at.block + at.column;
    const packet<float> alpha = broadcast(op.alpha[r]);
    GQA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      const packet<float> unit = broadcast(weights[static_cast<std::size_t>(v / 2)].unit[r]);
      store(out + v * width, madd(floats_of(sum[r][v]), unit, mul<float>(load(out + v * width), alpha)));
    }
  }
}

template <int Rows, reading How>
void value_q8_block(const q8_operands& op) noexcept {
  constexpr int most = Rows <= block_rows ? 4 : 2;  // packets at a time
  constexpr int blocks = most / 2;
  std::array<q8_weights<Rows>, 2> weights;
  for (index_t block = 0; block < op.value_dim; block += value_block) {
    const index_t columns = (std::min)(value_block, op.value_dim - block);
    for (index_t column = 0; column < columns; column += most * panel_tokens) {
      const index_t left = std::min<index_t>((columns - column) / panel_tokens, most);
      for (int n = 0; n < blocks && 2 * n < left; ++n)
        round_weights<Rows, How>(op, (block + column) / scale_channels + n, weights[static_cast<std::size_t>(n)]);
      const value_place at{block, columns, column, 0};
      if (left == 1) add_q8_columns<Rows, 1, How>(op, at, weights);
      if (left == 2) add_q8_columns<Rows, 2, How>(op, at, weights);
      if constexpr (most > 2) {
        if (left == 3) add_q8_columns<Rows, 3, How>(op, at, weights);
        if (left == 4) add_q8_columns<Rows, 4, How>(op, at, weights);
      }
    }
  }
}

template <>
struct row_block_kernels<q8, q8> {
  static constexpr std::make_integer_sequence<int, block_rows> blocks{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_q8_block<Rows, reading::blocks>; }, blocks);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_q8_block<Rows, reading::blocks>; }, blocks);
};

template <reading How>
struct stream_kernels<q8, q8, How> {
  static constexpr std::make_integer_sequence<int, stream_rows<float>> streams{};
  static constexpr auto scores = by_rows([]<int Rows>() { return &score_q8_block<Rows, How>; }, streams);
  static constexpr auto values = by_rows([]<int Rows>() { return &value_q8_block<Rows, How>; }, streams);
};

#endif

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
