// SPDX-License-Identifier: Apache-2.0
/// \file
/// Families: sequences of a batch that read the same keys at their beginning, as forks of one prompt do.
///
/// Rows of all of them meet those keys as one row tile, so that they are read once for all: sequences of R rows and n
/// shared tokens read n (D + E) elements a KV head in the place of as many for each, and a tile of 64 to 96 rows is
/// limited by arithmetic where each alone waits for memory. What they share need not be the same for all: sorted by
/// their page tables, neighbours share most, and what any run of them has in common is the least that two neighbours in
/// it have (the tree of prefixes is that of the longest-common-prefix intervals of suffix arrays; Abouelhoda, Kurtz and
/// Ohlebusch 2004). Attention over shared prefixes in two parts, merged: Hydragen (Juravsky et al. 2024), Cascade
/// Inference (Ye et al. 2024); here rows go on into their own keys without a merge, so no bit depends on the family.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/engine/key_tiles.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// One sequence, or several.
struct family {
  std::span<const index_t> members;  // sequences of the batch
  std::span<const index_t> shared;   // [members]: the first so many key tiles are those of the member before it
};

/// All sequences of a batch, each in one family.
class families {
 public:
  families() noexcept = default;
  /// Every sequence by itself. Keeps `memory`: 3 elements a sequence, and 1.
  families(index_t sequences, index_t* memory) noexcept
      : members_(memory, static_cast<std::size_t>(sequences)),
        shared_(memory + sequences, static_cast<std::size_t>(sequences)),
        firsts_(memory + 2 * sequences),
        count_(sequences) {
    for (index_t b = 0; b < sequences; ++b) memory[b] = firsts_[b] = b;
    std::fill(shared_.begin(), shared_.end(), index_t{0});
    firsts_[sequences] = sequences;
  }

  [[nodiscard]] index_t count() const noexcept { return count_; }
  [[nodiscard]] family operator[](index_t n) const noexcept {
    const auto first = static_cast<std::size_t>(firsts_[n]);
    const std::size_t members = static_cast<std::size_t>(firsts_[n + 1]) - first;
    return {members_.subspan(first, members), shared_.subspan(first, members)};
  }

  /// Finds those who share. `sequences` says of each: rows(b), of a KV head; length(b), in tokens; tiles(b), those that
  /// it reads; pages(b), which hold page_size() tokens each; and has_shared_pages(b), whether others may have some of
  /// them. Those who share make up families enough for `least_tasks` row tiles and splits, where that can be.
  /// Cost: a sort of those who may join, which compares their pages, and nothing where there are none.
  template <class Sequences>
  void find(const Sequences& sequences, index_t least_tasks = 1) {
    const auto alone = std::partition(members_.begin(), members_.end(), [&](index_t b) {
      return sequences.rows(b) > 0 && sequences.rows(b) <= most_rows / 2 && sequences.has_shared_pages(b);
    });
    if (alone - members_.begin() < 2) return;
    std::sort(members_.begin(), alone, [&](index_t b, index_t c) {
      const auto of_b = sequences.pages(b), of_c = sequences.pages(c);
      return std::lexicographical_compare(of_b.begin(), of_b.end(), of_c.begin(), of_c.end());
    });
    for (auto member = members_.begin() + 1; member < alone; ++member)
      shared_[static_cast<std::size_t>(member - members_.begin())] = tiles_to_share(sequences, member[-1], member[0]);
    count_ = 0;
    for (std::size_t first = 0, end = 0; first < members_.size(); first = end) {
      index_t rows = sequences.rows(members_[first]), splits = 1;
      for (end = first + 1; end < members_.size() && shared_[end] > 0; ++end) {
        rows += sequences.rows(members_[end]);
        splits = (std::max)(splits, sequences.tiles(members_[end]).splits());
      }
      const index_t pieces = (std::max)(ceil_div(rows, most_rows), ceil_div(least_tasks, splits));
      cut(sequences, first, end, ceil_div(rows, std::max<index_t>(pieces, 1)));
    }
    firsts_[count_] = static_cast<index_t>(members_.size());
  }

 private:
  /// Neighbours join where what both read is at least this part of what either reads: an eighth.
  static constexpr index_t least_part = 8;

  /// Rows of several members together: a row tile's.
  static constexpr index_t most_rows = row_tile_rows;

  /// Whole key tiles that two sequences have in the same pages, if enough of those that they read are among them.
  template <class Sequences>
  [[nodiscard]] static index_t tiles_to_share(const Sequences& sequences, index_t b, index_t c) {
    const auto of_b = sequences.pages(b), of_c = sequences.pages(c);
    const auto differs = std::mismatch(of_b.begin(), of_b.end(), of_c.begin(), of_c.end()).first;
    const index_t tokens = (differs - of_b.begin()) * sequences.page_size();
    const index_t common = (std::min)({tokens, sequences.length(b), sequences.length(c)}) / tile_tokens;
    const key_tiles by_b = sequences.tiles(b), by_c = sequences.tiles(c);
    const index_t read = common - (std::max)(by_b.begin(), by_c.begin());
    return read > 0 && read * least_part >= (std::max)(by_b.size(), by_c.size()) ? common : 0;
  }

  /// Cuts members [first, end) into families of about so many rows.
  template <class Sequences>
  void cut(const Sequences& sequences, std::size_t first, std::size_t end, index_t about) {
    index_t rows = 0;
    for (std::size_t n = first; n < end; ++n) {
      const index_t own = sequences.rows(members_[n]);
      if (n == first || rows >= about || rows + own > most_rows) {
        firsts_[count_++] = static_cast<index_t>(n);
        shared_[n] = 0;
        rows = 0;
      }
      rows += own;
    }
  }

  std::span<index_t> members_, shared_;
  index_t* firsts_ = nullptr;  // [count + 1]
  index_t count_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
