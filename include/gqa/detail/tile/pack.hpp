// SPDX-License-Identifier: Apache-2.0
/// \file
/// Packing: rows of keys and values, wherever they lie, into the panels of a tile (see tile.hpp).
///
/// Reads each element once, rounds it to the panel's type and writes it once: 64 (D + E) elements a tile. Keys are
/// transposed 16 tokens at a time in registers, values are copied. In prefill every tile is packed once and then read
/// by all rows of its KV head; with few rows a worker packs one tile at a time into its own scratch, which stays in
/// cache (whole tiles of very few rows are not packed at all: row_kernel.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// What tiles packed from rows of K and V hold, which are packed once and read often: accumulators, but for pairs that
/// an instruction multiplies.
template <class K, class V>
using packed_element =
    std::conditional_t<std::is_same_v<K, V> && has_dot<K>, K, std::common_type_t<accumulator_t<K>, accumulator_t<V>>>;

/// What a cache may hold, and what a cache of T takes: that, or floats; of 8 bits, any rows but double.
template <class T>
inline constexpr bool is_narrow_or_float = std::is_same_v<T, q8> || (storable<T> && !std::is_same_v<T, double>);
template <class T>
concept cacheable = storable<T> || std::is_same_v<T, q8> ||
    (is_mixed<T>&& is_narrow_or_float<key_type<T>>&& is_narrow_or_float<value_type<T>> &&
     (std::is_same_v<key_type<T>, q8> || std::is_same_v<value_type<T>, q8>));
template <class X, class T>
inline constexpr bool is_taken_by_cache_of = std::is_same_v<std::remove_const_t<X>, float> ||
                                             (std::is_same_v<T, q8> ? sixteen_bit_float<std::remove_const_t<X>>
                                                                    : std::is_same_v<std::remove_const_t<X>, T>);

/// What a stored element reads as.
template <class T>
using read_element = std::conditional_t<is_encoded<T>, float, T>;

/// Element (t, d) of a panel's keys, and (t, e) of its values. (Of 8 bits: q8.hpp.)
template <class P>
requires storable<P>
[[nodiscard]] P key_at(const P* panel, index_t t, index_t d, index_t) noexcept {
  return panel[key_index<P>(t, d)];
}
template <class P>
requires storable<P>
[[nodiscard]] P value_at(const P* panel, index_t t, index_t e, index_t value_dim) noexcept {
  return panel[value_index<P>(t, e, value_dim)];
}

/// How far ahead packing asks for rows: a panel, 8 KB of float keys at D = 128. Half of it costs a quarter of the speed
/// over cold memory, twice of it gains nothing.
inline constexpr index_t prefetch_tokens = panel_tokens;

/// Tokens [begin, end) of a panel. A panel that `starts` has zeros for all other tokens; else those stay as they are.
struct panel_range {
  index_t begin, end;
  bool starts = begin == 0;
};

/// Calls f(first token of the panel, its part) for the panels that tokens [begin, end) lie in.
template <class F>
void for_each_panel(index_t begin, index_t end, const F& f) {
  for (index_t t = begin; t < end;) {
    const index_t first = t / panel_tokens * panel_tokens;
    const panel_range part{t - first, (std::min)(end - first, panel_tokens)};
    f(first, part);
    t = first + part.end;
  }
}

/// Keys: row i of `rows` [end - begin, dim], `stride` elements apart, becomes token begin + i of a panel
/// [dim/p][16][p].
template <class P, class T>
void pack_key_panel(const T* rows, index_t stride, panel_range tokens, index_t dim, P* panel) noexcept {
  using A = accumulator_t<P>;
  constexpr index_t width = packet_size<A>, p = lane_elements<P>;
  const bool whole = tokens.begin == 0 && tokens.end == panel_tokens;
  if (tokens.starts && (!whole || dim % p != 0)) std::fill_n(panel, key_panel_elements<P>(dim), P(0));
  const index_t square_dim = whole && width % p == 0 ? dim / width * width : 0;
  for (index_t d = 0; d < square_dim; d += width) {
    for (index_t t = 0; t < panel_tokens; t += width) {
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) prefetch(rows, ((t + i + prefetch_tokens) * stride + d) * index_t{sizeof(T)});
      packet<A> square[width];
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) square[i] = rounded_to<P, A>(load_as<A>(rows + (t + i) * stride + d));
      transpose<A>(square);
      GQA_UNROLL
      for (index_t i = 0; i + p <= width; i += p) {
        packet<A> parts[p];
        for (index_t j = 0; j < p; ++j) parts[j] = square[i + j];
        store_lanes<P, A>(panel + key_index<P>(t, d + i), parts);
      }
    }
  }
  for (index_t t = tokens.begin; t < tokens.end; ++t) {
    const T* const row = rows + (t - tokens.begin) * stride;
    for (index_t d = square_dim; d < dim; ++d) panel[key_index<P>(t, d)] = static_cast<P>(row[d]);
  }
}

/// Values: the same into a panel [dim/64][16/p][64][p]. Returns whether a value, as stored, is NaN or infinite.
template <class P, class T>
[[nodiscard]] bool pack_value_panel(const T* rows, index_t stride, panel_range tokens, index_t dim, P* panel) noexcept {
  using A = accumulator_t<P>;
  constexpr index_t width = packet_size<A>, p = lane_elements<P>;
  const index_t padded = padded_value_dim(dim);
  if (tokens.starts && (tokens.end < panel_tokens || padded > dim)) std::fill_n(panel, panel_tokens * padded, P(0));
  // + 0 * x: stays 0 over finite values, becomes NaN for good over others. Four, for one would be a chain of latencies.
  packet<A> probes[4] = {zeros<A>(), zeros<A>(), zeros<A>(), zeros<A>()};
  A tail_probe{0};
  const auto pack_one = [&](index_t t, index_t e) {
    P& to = panel[value_index<P>(t, e, dim)];
    to = static_cast<P>(rows[(t - tokens.begin) * stride + e]);
    tail_probe = scalar_madd(static_cast<A>(to), A{0}, tail_probe);
  };
  const index_t square_dim = dim / width * width;
  for (index_t t = tokens.begin; t < tokens.end;) {
    if (t % p != 0 || t + p > tokens.end) {  // a part of a row of lanes
      for (index_t e = 0; e < dim; ++e) pack_one(t, e);
      ++t;
      continue;
    }
    for (index_t e = 0; e < square_dim; e += width) {
      packet<A> parts[p];
      GQA_UNROLL
      for (index_t j = 0; j < p; ++j) {
        const T* const row = rows + (t + j - tokens.begin) * stride;
        prefetch(row, (prefetch_tokens * stride + e) * index_t{sizeof(T)});
        parts[j] = rounded_to<P, A>(load_as<A>(row + e));
        packet<A>& probe = probes[(e / width + j) % 4];
        probe = madd(parts[j], zeros<A>(), probe);
      }
      store_lanes<P, A>(panel + value_index<P>(t, e, dim), parts);
    }
    for (index_t e = square_dim; e < dim; ++e) {
      for (index_t j = 0; j < p; ++j) pack_one(t + j, e);
    }
    t += p;
  }
  alignas(64) A lanes[width];
  store(lanes, add(add(probes[0], probes[1]), add(probes[2], probes[3])));
  for (const A lane : lanes) tail_probe += lane;
  return tail_probe != A{0};  // NaN compares unequal
}

/// Values that are the first `value_dim` channels of keys: from a panel of keys [dim/p][16][p] to one of values. Reads
/// and writes L1; the products of 96 rows on a tile take some thirty times as long, those of 16 two to four times.
template <class P>
void values_of_keys(const P* keys, index_t value_dim, P* values) noexcept {
  using A = accumulator_t<P>;
  constexpr index_t width = packet_size<A>, p = lane_elements<P>;
  const index_t square_dim = width % p == 0 ? value_dim / width * width : 0;
  index_t pair_dim = 0;  // of what is transposed in pairs
#if GQA_TRANSPOSES_PAIRS
  if constexpr (p == 2) {
    for (; pair_dim + 2 * panel_tokens <= value_dim; pair_dim += 2 * panel_tokens)
      transpose_pairs(keys + key_index<P>(0, pair_dim),
                      reinterpret_cast<std::uint16_t*>(values + value_index<P>(0, pair_dim, value_dim)),
                      2 * (std::min)(value_block, padded_value_dim(value_dim) - pair_dim / value_block * value_block));
  }
#endif
  for (index_t e = pair_dim; e < square_dim; e += width) {
    for (index_t t = 0; t < panel_tokens; t += width) {
      packet<A> square[width];
      GQA_UNROLL
      for (index_t i = 0; i + p <= width; i += p) {
        packet<A> parts[p];
        load_lanes<P, A>(keys + key_index<P>(t, e + i), parts);
        for (index_t j = 0; j < p; ++j) square[i + j] = parts[j];
      }
      transpose<A>(square);
      GQA_UNROLL
      for (index_t i = 0; i + p <= width; i += p) {
        packet<A> parts[p];
        for (index_t j = 0; j < p; ++j) parts[j] = square[i + j];
        store_lanes<P, A>(values + value_index<P>(t + i, e, value_dim), parts);
      }
    }
  }
  const index_t padded = padded_value_dim(value_dim);
  for (index_t e = square_dim; e < padded; ++e) {
    for (index_t t = 0; t < panel_tokens; ++t)
      values[value_index<P>(t, e, value_dim)] = e < value_dim ? keys[key_index<P>(t, e)] : P(0);
  }
}

/// A panel's values of the tokens whose bits are set, zeros for the others. (Of 8 bits: q8.hpp.)
template <class P>
requires storable<P>
void keep_values(const P* panel, std::uint64_t bits, index_t columns, P* to) noexcept {
  for (index_t e = 0; e < columns; ++e) {
    for (index_t t = 0; t < panel_tokens; ++t) {
      const index_t at = value_index<P>(t, e, columns);
      to[at] = (bits >> t & 1) != 0 ? panel[at] : P(0);
    }
  }
}

/// A tile of `tokens` <= 64 rows of keys [tokens, head_dim] and values [tokens, value_dim] into `to`, which holds
/// tile_elements<P>(head_dim, value_dim).
template <class P, class K, class V>
[[nodiscard]] kv_tile<P> pack_tile(const K* k, index_t k_stride, index_t head_dim, const V* v, index_t v_stride,
                                   index_t value_dim, index_t tokens, P* to) noexcept {
  P* const values = to + tile_panels * key_panel_elements<P>(head_dim);
  std::uint32_t nonfinite = 0;
  for (index_t panel = 0; panel < tile_panels; ++panel) {
    const index_t first = panel * panel_tokens;
    const panel_range range{0, std::clamp<index_t>(tokens - first, 0, panel_tokens)};
    // Offsets only to rows there are: a pointer past the tensor's end may not even be formed.
    const index_t row = range.end > 0 ? first : 0;
    pack_key_panel(k + row * k_stride, k_stride, range, head_dim, to + panel * key_panel_elements<P>(head_dim));
    if (pack_value_panel(v + row * v_stride, v_stride, range, value_dim,
                         values + panel * value_panel_elements<P>(value_dim)))
      nonfinite |= std::uint32_t{1} << panel;
  }
  return contiguous_tile<P>(to, head_dim, value_dim, nonfinite);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
