// SPDX-License-Identifier: Apache-2.0
/// \file
/// key_tiles: which key tiles some rows read, and the splits that they lie in.
#pragma once

#include <algorithm>
#include <array>

#include <gqa/config.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Tiles [begin, end) but for those of `gone`, which lie between two that are read. Splits that have none of them are
/// left out: merging the state of one that saw nothing changes no state.
class key_tiles {
 public:
  constexpr key_tiles() noexcept = default;
  constexpr key_tiles(key_range all, key_range gone = {0, 0}) noexcept : all_(all) {
    gone = {(std::max)(gone.begin, all.begin), (std::min)(gone.end, all.end)};
    if (all.size() == 0) {
      all_ = {0, 0};
    } else if (gone.size() > 0) {
      if (gone.begin == all.begin) {
        all_.begin = gone.end;
      } else if (gone.end == all.end) {
        all_.end = gone.begin;
      } else {
        gone_ = gone;
      }
    }
    if (all_.size() == 0) all_ = {0, 0};
  }

  [[nodiscard]] constexpr index_t begin() const noexcept { return all_.begin; }
  [[nodiscard]] constexpr index_t end() const noexcept { return all_.end; }
  [[nodiscard]] constexpr index_t size() const noexcept { return all_.size() - gone_.size(); }

  [[nodiscard]] constexpr index_t splits() const noexcept {
    if (size() == 0) return 0;
    return (all_.end - 1) / split_tiles - all_.begin / split_tiles + 1 - gone_splits().size();
  }
  /// What the n-th of them has of [begin, end).
  [[nodiscard]] constexpr key_range split(index_t n) const noexcept {
    index_t number = all_.begin / split_tiles + n;
    if (const key_range none = gone_splits(); none.size() > 0 && number >= none.begin) number += none.size();
    return {(std::max)(all_.begin, number * split_tiles), (std::min)(all_.end, (number + 1) * split_tiles)};
  }
  /// Of some tiles in a row, those that are read: before what is gone, and after.
  [[nodiscard]] constexpr std::array<key_range, 2> read_of(key_range some) const noexcept {
    if (gone_.size() == 0) return {some, {0, 0}};
    return {key_range{some.begin, (std::min)(some.end, gone_.begin)}, {(std::max)(some.begin, gone_.end), some.end}};
  }

  [[nodiscard]] friend constexpr bool operator==(const key_tiles&, const key_tiles&) = default;

 private:
  [[nodiscard]] constexpr key_range gone_splits() const noexcept {
    return {ceil_div(gone_.begin, split_tiles), gone_.end / split_tiles};
  }

  key_range all_, gone_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
