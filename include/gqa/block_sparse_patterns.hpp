// SPDX-License-Identifier: Apache-2.0
/// \file
/// The patterns of published sparse attention, as lists of key tiles (block_sparse.hpp).
///
/// Each is of whole tiles: a query block sees a tile if the pattern has any pair of them, so it sees at least what the
/// pattern says, and up to 63 keys at an edge more. Patterns element by element: block_sparse_mask::from_pairs().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include <gqa/block_sparse.hpp>
#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/random.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/variants.hpp>

namespace gqa {

/// Columns and diagonals of one list.
struct vertical_slash_lines {
  std::span<const index_t> verticals;  ///< key positions that all queries see
  std::span<const index_t> slashes;    ///< distances: query q sees key q - slash
};

namespace detail {
inline namespace GQA_ISA {

[[nodiscard]] constexpr key_range keys_of_tile(index_t tile) noexcept {
  return {tile * tile_tokens, (tile + 1) * tile_tokens};
}
/// Whether some of the queries see some of a tile's keys in a window: keys [query - left, query + right].
[[nodiscard]] constexpr bool is_near(key_range queries, index_t left, index_t right, index_t tile) noexcept {
  const key_range keys = keys_of_tile(tile);
  return keys.begin < queries.end + right && queries.begin - left < keys.end;
}
/// What an argument that cannot be leaves, where errors are no exceptions: a mask of no queries, which calls refuse.
[[nodiscard]] inline block_sparse_mask no_mask() {
  return block_sparse_mask::from_tiles({}, [](index_t, key_range, index_t) { return false; });
}
/// Arguments of a pattern: 0 or more, and small enough to be added to positions.
[[nodiscard]] inline bool are_distances(const char* pattern, std::initializer_list<index_t> values) {
  for (const index_t value : values) {
    if (value >= 0 && value <= position_limit) continue;
    raise(make_fault(errc::option, "%s: expected 0 to 2^60, got %lld", pattern, printable(value)));
    return false;
  }
  return true;
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Vertical lines and slashes of each list. (MInference, Jiang et al. 2024, which finds them by the last queries' maps;
/// diagnostics.hpp has such maps.)
/// \param lines  [shape.lists]
/// \throws error  errc::shape unless there is one a list; errc::option for negative ones
[[nodiscard]] inline block_sparse_mask vertical_slash(const block_sparse_shape& shape,
                                                      std::span<const vertical_slash_lines> lines) {
  bool fits = static_cast<index_t>(lines.size()) == shape.lists;
  if (!fits)
    detail::raise(detail::make_fault(errc::shape, "lines: expected %lld (one a list), got %zu",
                                     detail::printable(shape.lists), lines.size()));
  for (const vertical_slash_lines& of_list : lines) {
    for (const auto& some : {of_list.verticals, of_list.slashes}) {
      for (const index_t at : some) fits = fits && detail::are_distances("vertical_slash", {at});
    }
  }
  if (!fits) return detail::no_mask();
  return block_sparse_mask::from_tiles(shape, [&](index_t list, key_range queries, index_t tile) {
    const vertical_slash_lines& own = lines[static_cast<std::size_t>(list)];
    return std::any_of(own.verticals.begin(), own.verticals.end(),
                       [&](index_t key) { return key / detail::tile_tokens == tile; }) ||
           std::any_of(own.slashes.begin(), own.slashes.end(),
                       [&](index_t slash) { return detail::is_near(queries, slash, -slash, tile); });
  });
}

/// The first keys and the nearest ones: keys below `sinks`, and [query - left, query]. (LM-Infinite, Han et al. 2024;
/// "A-shape" in MInference. Key by key: sinks_and_window.)
[[nodiscard]] inline block_sparse_mask a_shape(const block_sparse_shape& shape, index_t sinks, index_t left) {
  if (!detail::are_distances("a_shape", {sinks, left})) return detail::no_mask();
  return block_sparse_mask::from_tiles(shape, [&](index_t, key_range queries, index_t tile) {
    return tile * detail::tile_tokens < sinks || detail::is_near(queries, left, 0, tile);
  });
}

/// Keys [query - left, query], and every `stride`-th tile, counted back from the one of a block's first query. (The
/// strided pattern of sparse transformers, Child et al. 2019, in tiles.)
/// \throws error  errc::option for a stride below 1
[[nodiscard]] inline block_sparse_mask strided(const block_sparse_shape& shape, index_t left, index_t stride) {
  if (!detail::are_distances("strided", {left, stride})) return detail::no_mask();
  if (stride == 0) {
    detail::raise(detail::make_fault(errc::option, "strided: expected a stride >= 1, got 0"));
    return detail::no_mask();
  }
  return block_sparse_mask::from_tiles(shape, [&](index_t, key_range queries, index_t tile) {
    const index_t back = detail::floor_div(queries.begin, detail::tile_tokens) - tile;
    return back % stride == 0 || detail::is_near(queries, left, 0, tile);
  });
}

/// Sizes of big_bird() in keys, queries and tiles.
struct big_bird_options {
  index_t window = 192;      ///< keys [query - window, query + window]
  index_t global = 64;       ///< the first keys, which all queries see; and the first queries, which see all keys
  index_t random_tiles = 3;  ///< of each block, besides
  std::uint64_t seed = 0;
};

/// A window, global tokens, and random tiles. (Zaheer et al. 2020, in tiles.) The random tiles of a block are those of
/// the least hashes of (seed, list, block, tile) among those that the block may see and does not see otherwise.
[[nodiscard]] inline block_sparse_mask big_bird(const block_sparse_shape& shape, const big_bird_options& options) {
  if (!detail::are_distances("big_bird", {options.window, options.global, options.random_tiles}))
    return detail::no_mask();
  const auto is_structural = [&](key_range queries, index_t tile) {
    return queries.begin < options.global || tile * detail::tile_tokens < options.global ||
           detail::is_near(queries, options.window, options.window, tile);
  };
  using chosen = detail::reporting_vector<index_t>;
  return block_sparse_mask::detail_from_lists(shape, [&](index_t list, key_range queries, chosen& tiles) {
    const auto others =
        std::partition(tiles.begin(), tiles.end(), [&](index_t tile) { return is_structural(queries, tile); });
    const std::uint64_t of_list = detail::random_bits(options.seed, static_cast<std::uint64_t>(list));
    const auto block = static_cast<std::uint64_t>(detail::floor_div(queries.begin, shape.query_block));
    const auto hash_of = [of_block = detail::random_bits(of_list, block)](index_t tile) {
      return std::pair(detail::random_bits(of_block, static_cast<std::uint64_t>(tile)), tile);
    };
    const auto end = others + std::min<std::ptrdiff_t>(options.random_tiles, tiles.end() - others);
    std::partial_sort(others, end, tiles.end(), [&](index_t x, index_t y) { return hash_of(x) < hash_of(y); });
    tiles.cut(end);
    std::sort(tiles.begin(), tiles.end());
  });
}

}  // namespace GQA_ISA
}  // namespace gqa
