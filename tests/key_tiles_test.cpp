// SPDX-License-Identifier: Apache-2.0
// Tiles with a gap: the splits that have some of them, each tile once.
#include <gtest/gtest.h>

#include <vector>

#include <gqa/gqa.hpp>

namespace gqa::test {
namespace {

TEST(KeyTiles, AreReadOnceInTheirSplits) {
  const index_t n = detail::split_tiles;
  for (const index_t begin : {index_t{0}, index_t{3}, n, 2 * n - 1})
    for (const index_t end : {index_t{0}, index_t{3}, index_t{7}, n, n + 1, 5 * n, 9 * n + 4})
      for (const index_t gone_begin : {index_t{0}, index_t{3}, index_t{5}, n, n + 2, 3 * n})
        for (const index_t gone_end : {index_t{0}, index_t{4}, n, n + 1, 4 * n, 4 * n + 3, 20 * n}) {
          const detail::key_tiles tiles({begin, end}, {gone_begin, gone_end});
          std::vector<index_t> expected, read;
          index_t splits = 0, last_split = -1;
          for (index_t i = begin; i < end; ++i) {
            if (gone_begin <= i && i < gone_end) continue;
            expected.push_back(i);
            if (i / n != last_split) last_split = i / n, ++splits;
          }
          ASSERT_EQ(tiles.size(), static_cast<index_t>(expected.size()));
          ASSERT_EQ(tiles.splits(), splits);
          for (index_t split = 0; split < tiles.splits(); ++split) {
            const std::size_t before = read.size();
            for (const key_range some : tiles.read_of(tiles.split(split)))
              for (index_t i = some.begin; i < some.end; ++i) read.push_back(i);
            ASSERT_GT(read.size(), before);
            ASSERT_EQ(read[before] / n, read.back() / n);
          }
          ASSERT_EQ(read, expected) << begin << ' ' << end << ' ' << gone_begin << ' ' << gone_end;
        }
}

}  // namespace
}  // namespace gqa::test
