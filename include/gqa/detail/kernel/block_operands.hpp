// SPDX-License-Identifier: Apache-2.0
/// \file
/// What the kernels of row blocks take: their operands by name, how large a block is, and how a tile is read.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

inline constexpr int block_rows = 6;
inline constexpr int block_vectors = packet_registers == 32 ? 4 : 2;
template <class A>
inline constexpr index_t block_columns = index_t{block_vectors} * packet_size<A>;

/// Rows of a block that streams a tile from memory: a sum for each in a panel's width, and 2 packets of values for more
/// than 6. (8 rows gain a fifth over two blocks of 4 that fetch ahead, 12 would lose as much.)
template <class A>
inline constexpr int stream_rows = (packet_size<A> == panel_tokens && packet_registers == 32) ? 8 : block_rows;

/// Several row blocks ask for the next tile while they compute, a cache line a step, for one prefetch hides among 24
/// multiply-adds, and two do not. Four blocks ask for all of a tile of floats or bfloat16 (64 D elements of keys in D /
/// p steps, 64 E of values in E / p), two for all of one of half.
[[nodiscard]] constexpr index_t bytes_fetched(index_t steps) noexcept {
  return 64 * steps;
}
/// What a row block asks for: from so many bytes after some place on. (Not one pointer, which may not be formed where
/// there is no next tile.)
template <class P>
struct fetched_from {
  const P* at = nullptr;
  index_t bytes = 0;
};
template <class P>
struct next_tile {
  fetched_from<P> keys, values;
};
/// Lines that are there already, which costs nothing.
template <class P>
[[nodiscard]] next_tile<P> at_hand(const kv_tile<P>& tile) noexcept {
  return {{tile.k[0], 0}, {tile.v[0], 0}};
}

/// Operands of one row block's products: panels of P, queries and weights in L. Shapes: q [Rows, D], s and p [Rows,
/// 64], out [Rows, padded E], alpha [Rows].
template <class P, class L>
struct block_operands {
  using A = accumulator_t<P>;
  const kv_tile<P>& tile;
  const queries_of_left<L>* q = nullptr;
  index_t q_stride = 0;
  index_t head_dim = 0;
  A* s = nullptr;                        // scores; row stride 64
  A score_factor = A{1};                 // on the products of 16-bit queries, which cannot carry it
  const weight_element<L>* p = nullptr;  // row stride 64
  A* out = nullptr;
  index_t out_stride = 0;
  A* weight_sums = nullptr;  // [Rows], null where the softmax sums weights
  const A* alpha = nullptr;
  index_t value_dim = 0;                   // padded
  index_t panel_begin = 0, panel_end = 0;  // the panels that some row of the block sees
  A* tile_sums = nullptr;                  // [Rows, padded E] and
  A* tile_weights = nullptr;               // [Rows]: scratch of products in the order of memory
  next_tile<P> next = {};
  panels_ahead ahead = {};  // what scattered panels ask for
};

/// How a tile is read: by blocks, which ask for the next one meanwhile; or from memory, panel by panel, by a single
/// block, which asks for what follows in memory or, of scattered panels, in its order.
enum class reading { blocks, in_order, scattered };

/// Sums over keys: of weighted values [Rows, padded E] and of the weights themselves [Rows], null where the softmax
/// sums them.
template <class A>
struct weighted_sums {
  A* values;
  A* weights;
};

/// {of.template operator()<1>(), <2>(), ...}: the kernels for 1, 2, ... rows.
template <class F, int... Before>
[[nodiscard]] constexpr auto by_rows(const F& of, std::integer_sequence<int, Before...>) noexcept {
  return std::array{of.template operator()<Before + 1>()...};
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
