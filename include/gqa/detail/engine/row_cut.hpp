// SPDX-License-Identifier: Apache-2.0
/// \file
/// row_cut: how the rows of a sequence and KV head, position by position, are cut into row tiles of at most 96.
///
/// A variant may see the same key tiles from all positions of a block (block_sparse.hpp). Then no row tile has rows of
/// two blocks, for it would visit the tiles of both; a block of more than 96 rows is cut into several tiles.
#pragma once

#include <algorithm>

#include <gqa/config.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

struct row_range {
  index_t first, count;
};

class row_cut {
 public:
  /// Tiles of 96 of `rows` rows.
  explicit row_cut(index_t rows) noexcept : tiles_(ceil_div(rows, row_tile_rows)) {}
  /// Tiles of `queries` queries, the first one at absolute position `offset`, that lie in blocks of `block` positions;
  /// parts are those of the largest group, so that the tiles of all groups have the same numbers.
  row_cut(index_t queries, index_t offset, index_t block, index_t largest_group) noexcept
      : block_(block),
        queries_(queries),
        lead_(offset - floor_div(offset, block) * block),
        parts_(std::max<index_t>(ceil_div((std::min)(queries, block) * largest_group, row_tile_rows), 1)),
        tiles_(ceil_div(lead_ + queries, block) * parts_) {
    if (queries == 0) tiles_ = 0;
  }

  [[nodiscard]] index_t tiles() const noexcept { return tiles_; }

  /// Rows of tile i, of a group of `group` heads that has `rows` in all: none where it has fewer tiles than others.
  [[nodiscard]] row_range tile(index_t i, index_t group, index_t rows) const noexcept {
    if (block_ == 0) {
      const index_t first = i * row_tile_rows;
      return {first, std::clamp<index_t>(rows - first, 0, row_tile_rows)};
    }
    const index_t begin = std::max<index_t>(i / parts_ * block_ - lead_, 0);
    const index_t end = (std::min)((i / parts_ + 1) * block_ - lead_, queries_);
    const index_t in_block = (end - begin) * group;
    const index_t first = (std::min)(i % parts_ * row_tile_rows, in_block);
    return {begin * group + first, (std::min)(in_block - first, row_tile_rows)};
  }

 private:
  index_t block_ = 0;  // none
  index_t queries_ = 0;
  index_t lead_ = 0;  // positions of the first query's block before it
  index_t parts_ = 1;
  index_t tiles_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
