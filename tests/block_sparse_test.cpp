// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/doors.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

// Whether query q sees key k in a list, as a pattern's documentation says it, key by key.
using definition = std::function<bool(index_t list, index_t query, index_t key)>;

index_t floor_of(index_t x, index_t by) {  // of negative ones, too
  index_t n = x / by;
  while (n * by > x) --n;
  return n;
}

// Tiles that the queries of a block see: those with any pair that sees() says so of, below the causal edge.
std::vector<index_t> tiles_by_pairs(const block_sparse_shape& shape, index_t list, index_t block,
                                    const definition& sees) {
  std::set<index_t> tiles;
  for (index_t q = shape.offset(); q < shape.offset() + shape.q_len; ++q) {
    if (floor_of(q, shape.query_block) - floor_of(shape.offset(), shape.query_block) != block) continue;
    // Whole tiles are listed, so a pair counts if any query of the block is not before its tile.
    for (index_t k = 0; k < shape.kv_len; ++k) {
      if (sees(list, q, k)) tiles.insert(k / 64);
    }
  }
  if (shape.causal) {
    const index_t last = std::min((floor_of(shape.offset(), shape.query_block) + block + 1) * shape.query_block,
                                  shape.offset() + shape.q_len);
    std::erase_if(tiles, [&](index_t tile) { return tile * 64 >= last; });
  }
  return {tiles.begin(), tiles.end()};
}

// The pairs that a mask's lists and bits show, causal edge aside, read from its lists.
bool shows(const block_sparse_mask& mask, index_t b, index_t head, index_t query, index_t key) {
  const block_sparse_shape& shape = mask.shape();
  const index_t block = floor_of(query, shape.query_block) - floor_of(shape.offset(), shape.query_block);
  const auto row = mask.tiles(b, shape.lists == 1 ? 0 : head / shape.heads_per_list, block);
  return std::find(row.begin(), row.end(), key / 64) != row.end();
}

// The same lists of 1 or B sequences as a mask tensor of B.
std::unique_ptr<bool[]> as_tensor(const block_sparse_mask& mask, const shape& n, index_t offset) {
  std::unique_ptr<bool[]> seen(new bool[static_cast<std::size_t>(n.b * n.h * n.s * n.t)]);
  for (index_t b = 0; b < n.b; ++b)
    for (index_t h = 0; h < n.h; ++h)
      for (index_t s = 0; s < n.s; ++s)
        for (index_t t = 0; t < n.t; ++t)
          seen[static_cast<std::size_t>(((b * n.h + h) * n.s + s) * n.t + t)] = shows(mask, b, h, offset + s, t);
  return seen;
}

template <class Q, class KV>
std::vector<Q> run_sparse(const operands<Q, Q>& in, const KV& kv, const block_sparse_mask& mask, context& ctx) {
  const auto& n = in.of.shape;
  std::vector<Q> out(static_cast<std::size_t>(n.b * n.s * n.h * n.e),
                     static_cast<Q>(std::numeric_limits<float>::quiet_NaN()));
  block_sparse_attention(in.q.view(), kv, view(out.data(), {n.b, n.s, n.h, n.e}), mask, in.options, ctx);
  return out;
}

template <class T>
bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

// block_sparse_attention() is the oracle's under the mask's lists as a tensor, and to the bit attention()'s.
template <class Q>
void expect_oracle(attention_case c, const block_sparse_mask& mask) {
  SCOPED_TRACE(c.name());
  operands<Q, Q> in(c);
  const auto& n = c.shape;
  in.options.query_offset = mask.shape().offset();
  context ctx;
  const auto kv = kv_view(in.k.view(), in.v.view());
  const auto out = run_sparse(in, kv, mask, ctx);
  kv_cache<Q> cache(n.b, n.g, n.t, n.d, n.e);
  cache.append(in.k.view(), in.v.view());
  EXPECT_TRUE(same_bits(run_sparse(in, cache, mask, ctx), out));
  Eigen::ThreadPool pool(3);
  context threads(pool);
  EXPECT_TRUE(same_bits(run_sparse(in, kv, mask, threads), out));

  const auto seen = as_tensor(mask, n, mask.shape().offset());
  in.options.mask = tensor_view<const bool, 4>(seen.get(), {n.b, n.h, n.s, n.t});
  EXPECT_TRUE(matches_oracle(in, ctx));
  std::vector<Q> masked(out.size());
  attention(in.q.view(), kv, view(masked.data(), {n.b, n.s, n.h, n.e}), in.options, ctx);
  EXPECT_TRUE(std::equal(out.begin(), out.end(), masked.begin()));
}

// Over a cache it has the bits of attention() under the mask's lists as a tensor, whose types kv_cache_test covers.
template <class Q>
void expect_bits_of_a_mask(attention_case c, const block_sparse_mask& mask) {
  operands<Q, Q> in(c);
  const auto& n = c.shape;
  in.options.query_offset = mask.shape().offset();
  kv_cache<Q> cache(n.b, n.g, n.t, n.d, n.e);
  cache.append(in.k.view(), in.v.view());
  context ctx;
  const auto out = run_sparse(in, cache, mask, ctx);
  const auto seen = as_tensor(mask, n, mask.shape().offset());
  in.options.mask = tensor_view<const bool, 4>(seen.get(), {n.b, n.h, n.s, n.t});
  std::vector<Q> masked(out.size());
  attention(in.q.view(), cache, view(masked.data(), {n.b, n.s, n.h, n.e}), in.options, ctx);
  EXPECT_TRUE(same_bits(out, masked)) << c.name();
}

block_sparse_shape shape_of(const shape& n, index_t query_block, index_t lists, bool causal) {
  block_sparse_shape s{.q_len = n.s, .kv_len = n.t, .query_block = query_block, .causal = causal, .lists = lists};
  s.heads_per_list = n.h / lists;
  return s;
}

// Random lists of some density.
block_sparse_mask random_mask(const block_sparse_shape& shape, double density, std::uint64_t seed) {
  rng random(seed);
  return block_sparse_mask::from_tiles(shape, [&](index_t, key_range, index_t) { return random.chance(density); });
}

TEST(BlockSparse, IsTheOraclesMask) {
  const shape n{2, 150, 330, 8, 2, 16, 24};
  for (const index_t block : {1, 17, 64, 100, 1000}) {
    for (const index_t lists : {1, 2, 4, 8}) {
      const auto mask = random_mask(shape_of(n, block, lists, false), 0.4, static_cast<std::uint64_t>(block + lists));
      expect_oracle<float>({n, 0, layout::bshd}, mask);
      expect_oracle<float>({n, with_causal | with_sinks | with_lengths, layout::bhsd}, mask);
    }
  }
  const shape decode{2, 1, 330, 8, 2, 16, 24};
  for (const index_t lists : {1, 2, 8})
    expect_oracle<float>({decode, with_causal, layout::bshd},
                         random_mask(shape_of(decode, 64, lists, false), 0.5, static_cast<std::uint64_t>(lists)));
}

TEST(BlockSparse, TakesBfloat16AndTheOtherOptions) {
  const shape n{1, 100, 330, 6, 2, 16, 16};
  const auto mask = random_mask(shape_of(n, 64, 2, false), 0.5, 9);
  expect_bits_of_a_mask<Eigen::bfloat16>({n, with_causal, layout::bshd}, mask);
  expect_oracle<float>({n, with_softcap | with_alibi | with_window, layout::bshd}, mask);
  expect_oracle<float>({n, with_bias | with_scale, layout::bshd}, random_mask(shape_of(n, 64, 6, true), 0.5, 10));
}

TEST(BlockSparse, HasListsOfItsOwnForEachSequenceOfABatch) {
  const shape n{3, 90, 200, 4, 2, 16, 16};
  auto shape = shape_of(n, 32, 4, false);
  shape.batch = n.b;
  expect_oracle<float>({n, with_causal, layout::bshd}, random_mask(shape, 0.5, 11));
}

TEST(BlockSparse, SplitsWithoutListedTilesChangeNothing) {
  const shape n{1, 70, 5000, 4, 2, 16, 16};
  for (const index_t tile : {0, 17, 40, 78}) {
    const auto mask = block_sparse_mask::from_tiles(
        shape_of(n, 64, 1, false), [&](index_t, key_range, index_t t) { return t == tile || t == tile / 2; });
    expect_oracle<float>({n, 0, layout::bshd}, mask);
  }
  const auto none =
      block_sparse_mask::from_tiles(shape_of(n, 64, 1, false), [](index_t, key_range, index_t) { return false; });
  expect_oracle<float>({n, with_sinks, layout::bshd}, none);
}

TEST(BlockSparse, OfAllTilesIsExact) {
  for (const unsigned options : {0U, static_cast<unsigned>(with_causal), with_causal | with_sinks | with_softcap}) {
    operands<float, float> in({{2, 200, 330, 8, 2, 16, 16}, options, layout::bshd});
    const auto& n = in.of.shape;
    context ctx;
    const auto exact = run(in, ctx);
    const auto kv = kv_view(in.k.view(), in.v.view());
    for (const index_t lists : {1, 2, 8}) {
      const auto all = block_sparse_mask::from_tiles(shape_of(n, 64, lists, in.options.causal),
                                                     [](index_t, key_range, index_t) { return true; });
      EXPECT_TRUE(same_bits(run_sparse(in, kv, all, ctx), exact.out));
    }
  }
}

// Few rows of two blocks, over keys whose heads lie together: row tiles of one KV head begin in different splits.
TEST(BlockSparse, DoesNotDependOnThreadsWhereBlocksPartFewRows) {
  operands<float, float> in({{1, 2, 4097, 8, 8, 64, 64}, with_causal, layout::bshd});
  in.options.window.left = 3072, in.options.query_offset = 4095;
  const auto mask = block_sparse_mask::from_tiles({.q_len = 2, .kv_len = 4097, .query_offset = 4095},
                                                  [](index_t, key_range, index_t) { return true; });
  const auto kv = kv_view(in.k.view(), in.v.view());
  context ctx;
  const auto one = run_sparse(in, kv, mask, ctx);
  for (const int workers : {1, 2, 5}) {
    Eigen::ThreadPool pool(workers);
    context threads(pool);
    EXPECT_TRUE(same_bits(run_sparse(in, kv, mask, threads), one)) << workers;
  }
  const auto seen = as_tensor(mask, in.of.shape, 4095);
  in.options.mask = tensor_view<const bool, 4>(seen.get(), {1, 8, 2, 4097});
  EXPECT_TRUE(same_bits(run(in, ctx).out, one));
}

// As a plain variant nobody checks that it fits: what it has no lists for sees nothing.
TEST(BlockSparse, HidesAllFromWhatItHasNoListsFor) {
  operands<float, float> in({{3, 70, 130, 8, 2, 16, 16}, 0, layout::bshd});
  context ctx;
  for (const bool batches : {true, false}) {
    block_sparse_shape shape{.q_len = 70, .kv_len = 130, .causal = false};
    batches ? shape.batch = 2 : shape.lists = shape.heads_per_list = 2;
    const auto mask = random_mask(shape, 1, 1);
    std::vector<float> out(in.q.data().size(), -1.0F);
    attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {3, 70, 8, 16}), in.options, mask, ctx);
    EXPECT_EQ(out.back(), 0.0F);
    EXPECT_NE(out.front(), 0.0F);
  }
}

// Key by key definitions of the builders, and what their lists must be.
TEST(BlockSparse, BuildersListTheTilesOfTheirPatterns) {
  for (const bool causal : {true, false}) {
    for (const index_t block : {48, 64, 128}) {
      for (const index_t offset : {0, 37, 400}) {
        block_sparse_shape shape{.q_len = 300, .kv_len = 700, .query_offset = offset, .query_block = block};
        shape.causal = causal, shape.lists = 2, shape.heads_per_list = 2;
        const auto expect_lists = [&](const char* name, const block_sparse_mask& mask, const definition& sees) {
          index_t listed = 0;
          for (index_t list = 0; list < 2; ++list) {
            for (index_t n = 0; n < mask.blocks(); ++n) {
              const auto tiles = mask.tiles(0, list, n);
              listed += static_cast<index_t>(tiles.size());
              EXPECT_EQ(std::vector<index_t>(tiles.begin(), tiles.end()), tiles_by_pairs(shape, list, n, sees))
                  << name << ": list " << list << ", block " << n << " of " << block << " from " << offset;
            }
          }
          EXPECT_EQ(mask.listed_tiles(), listed);
        };
        const std::vector<index_t> columns{3, 70, 500}, others{640}, slashes{0, 100}, far{17, 350};
        const std::vector<vertical_slash_lines> lines{{columns, slashes}, {others, far}};
        expect_lists("vertical_slash", vertical_slash(shape, lines), [&](index_t list, index_t q, index_t k) {
          const auto& v = list == 0 ? columns : others;
          const auto& s = list == 0 ? slashes : far;
          return std::find(v.begin(), v.end(), k) != v.end() || std::find(s.begin(), s.end(), q - k) != s.end();
        });
        expect_lists("a_shape", a_shape(shape, 70, 100),
                     [](index_t, index_t q, index_t k) { return k < 70 || (k >= q - 100 && k <= q); });
        expect_lists("strided", strided(shape, 90, 3), [&](index_t, index_t q, index_t k) {
          const index_t first = std::max(floor_of(q, block) * block, offset);
          return (floor_of(first, 64) - k / 64) % 3 == 0 || (k >= q - 90 && k <= q);
        });
        expect_lists("big_bird without random tiles", big_bird(shape, {.window = 70, .global = 30, .random_tiles = 0}),
                     [&](index_t, index_t q, index_t k) {
                       const index_t first = std::max(floor_of(q, block) * block, offset);
                       return first < 30 || k / 64 == 0 || (k >= q - 70 && k <= q + 70);
                     });
      }
    }
  }
}

TEST(BlockSparse, BigBirdsRandomTilesAreSoManyAndAllOver) {
  const block_sparse_shape shape{.q_len = 6400, .kv_len = 6400, .causal = false, .lists = 2};
  const big_bird_options without{.window = 64, .global = 64, .random_tiles = 0},
      with{.window = 64, .global = 64, .random_tiles = 5};
  const auto none = big_bird(shape, without), some = big_bird(shape, with), again = big_bird(shape, with);
  std::vector<index_t> hits(100);
  for (index_t list = 0; list < 2; ++list) {
    for (index_t block = 1; block < 100; ++block) {
      const auto base = none.tiles(0, list, block), more = some.tiles(0, list, block),
                 same = again.tiles(0, list, block);
      ASSERT_EQ(more.size(), base.size() + 5);
      ASSERT_TRUE(std::includes(more.begin(), more.end(), base.begin(), base.end()));
      ASSERT_TRUE(std::equal(more.begin(), more.end(), same.begin(), same.end()));
      for (const auto tile : more)
        hits[static_cast<std::size_t>(tile)] += std::find(base.begin(), base.end(), tile) == base.end() ? 1 : 0;
    }
  }
  EXPECT_NE(std::vector(some.tiles(0, 0, 50).begin(), some.tiles(0, 0, 50).end()),
            std::vector(some.tiles(0, 1, 50).begin(), some.tiles(0, 1, 50).end()));
  // 990 draws over 99 tiles: 10 each, of which none is more than 6 standard deviations off.
  for (std::size_t tile = 1; tile < 100; ++tile) EXPECT_LT(hits[tile], 10 + 19) << tile;
  EXPECT_GT(std::count_if(hits.begin() + 1, hits.end(), [](index_t n) { return n > 3; }), 90);
}

TEST(BlockSparse, MapsBlocksOfOtherSizesAndPairs) {
  const shape n{1, 130, 300, 4, 2, 16, 16};
  for (const bool causal : {false, true}) {
    for (const index_t key_block : {16, 48, 64, 128, 300}) {
      for (const index_t query_block : {16, 48, 128}) {
        const auto shape = shape_of(n, query_block, 2, causal);
        const index_t blocks =
            floor_of(shape.offset() + n.s - 1, query_block) - floor_of(shape.offset(), query_block) + 1;
        const index_t key_blocks = (n.t + key_block - 1) / key_block;
        rng random(static_cast<std::uint64_t>(key_block + query_block));
        const std::unique_ptr<bool[]> pattern(new bool[static_cast<std::size_t>(2 * blocks * key_blocks)]);
        for (index_t i = 0; i < 2 * blocks * key_blocks; ++i) pattern[static_cast<std::size_t>(i)] = random.chance(0.5);
        const auto mask = block_sparse_mask::from_blocks(
            shape, key_block, tensor_view<const bool, 3>(pattern.get(), {2, blocks, key_blocks}));
        operands<float, float> in({n, causal ? static_cast<unsigned>(with_causal) : 0U, layout::bshd});
        context ctx;
        const auto out = run_sparse(in, kv_view(in.k.view(), in.v.view()), mask, ctx);
        const std::unique_ptr<bool[]> seen(new bool[static_cast<std::size_t>(n.h * n.s * n.t)]);
        for (index_t h = 0; h < n.h; ++h)
          for (index_t s = 0; s < n.s; ++s)
            for (index_t t = 0; t < n.t; ++t) {
              const index_t block = floor_of(shape.offset() + s, query_block) - floor_of(shape.offset(), query_block);
              seen[static_cast<std::size_t>((h * n.s + s) * n.t + t)] =
                  pattern[static_cast<std::size_t>((h / 2 * blocks + block) * key_blocks + t / key_block)];
            }
        in.options.mask = tensor_view<const bool, 4>(seen.get(), {1, n.h, n.s, n.t});
        EXPECT_TRUE(matches_oracle(in, ctx));
        EXPECT_TRUE(same_bits(run(in, ctx).out, out)) << key_block << " x " << query_block;
      }
    }
  }
}

// A source that counts what is read of it.
class counting_cache : public kv_cache<float> {
 public:
  counting_cache(const shape& n, index_t& count) : kv_cache<float>(n.b, n.g, n.t, n.d, n.e), count_(&count) {}
  [[nodiscard]] detail::kv_tile<float> tile(index_t b, index_t g, index_t i, index_t tokens, float* to) const noexcept {
    ++*count_;
    return kv_cache<float>::tile(b, g, i, tokens, to);
  }

 private:
  index_t* count_;
};

TEST(BlockSparse, ReadsTheListedTilesAndNoOthers) {
  for (const index_t heads : {1, 3, 4, 12}) {
    for (const index_t query_block : {16, 64, 100}) {
      const shape n{1, 500, 2500, 2 * heads, 2, 16, 16};
      operands<float, float> in({n, 0, layout::bshd});  // (with a causal edge, a block's first rows read less of it)
      index_t visits = 0;
      counting_cache cache(n, visits);
      cache.append(in.k.view(), in.v.view());
      for (const index_t lists : {index_t{1}, index_t{2}, 2 * heads}) {
        const auto mask = random_mask(shape_of(n, query_block, lists, false), 0.2, 5);
        context ctx;
        visits = 0;
        run_sparse(in, cache, mask, ctx);
        // Every row tile of a block reads the block's tiles; the first and the last block are cut short. Heads with
        // lists of their own have rows of their own.
        const index_t groups = std::max<index_t>(lists, 2);
        index_t expected = 0;
        for (index_t g = 0; g < groups; ++g) {
          for (index_t block = 0; block < mask.blocks(); ++block) {
            const index_t begin = std::max((2000 / query_block + block) * query_block, index_t{2000});
            const index_t end = std::min((2000 / query_block + block + 1) * query_block, index_t{2500});
            expected += ((end - begin) * 2 * heads / groups + 95) / 96 *
                        static_cast<index_t>(mask.tiles(0, lists == 1 ? 0 : g, block).size());
          }
        }
        EXPECT_EQ(visits, expected) << heads << " heads, blocks of " << query_block;
      }
    }
  }
}

TEST(BlockSparse, KeepsOutWhatIsNotListed) {
  const shape n{1, 130, 400, 4, 2, 16, 16};
  operands<float, float> in({n, 0, layout::bshd});
  const auto mask = random_mask(shape_of(n, 1000, 1, false), 0.5, 3);  // one list for all
  context ctx;
  const auto clean = run_sparse(in, kv_view(in.k.view(), in.v.view()), mask, ctx);
  const auto row = mask.tiles(0, 0, 0);
  for (index_t t = 0; t < n.t; ++t) {
    if (std::find(row.begin(), row.end(), t / 64) != row.end()) continue;
    for (index_t g = 0; g < n.g; ++g) {
      in.k.view()(0, t, g, 3) = std::numeric_limits<float>::quiet_NaN();
      in.v.view()(0, t, g, 5) = std::numeric_limits<float>::infinity();
    }
  }
  EXPECT_TRUE(same_bits(run_sparse(in, kv_view(in.k.view(), in.v.view()), mask, ctx), clean));
}

TEST(BlockSparse, RefusesRowsThatDoNotFit) {
  const block_sparse_shape shape{.q_len = 100, .kv_len = 200};  // blocks 1 to 3 of the positions [100, 200)
  const std::vector<index_t> offsets{0, 1, 3, 4};
  const std::vector<std::int32_t> tiles{0, 1, 2, 3};
  const auto code = [](const block_sparse_shape& s, const block_sparse_rows& rows) {
    return code_of([&] { const block_sparse_mask mask(s, rows); });
  };
  EXPECT_EQ(code(shape, {offsets, tiles}), errc::ok);
  const auto with_offsets = [&](std::vector<index_t> o) { return code(shape, {o, tiles}); };
  EXPECT_EQ(with_offsets({0, 1, 4}), errc::shape);
  EXPECT_EQ(with_offsets({1, 1, 3, 4}), errc::shape);
  EXPECT_EQ(with_offsets({0, 1, 3, 5}), errc::shape);
  EXPECT_EQ(with_offsets({0, 3, 1, 4}), errc::shape);
  EXPECT_EQ(with_offsets({0, index_t{1} << 40, 3, 4}), errc::shape);
  EXPECT_EQ(with_offsets({0, -5, 3, 4}), errc::shape);
  const auto with_tiles = [&](std::vector<std::int32_t> t) { return code(shape, {offsets, t}); };
  EXPECT_EQ(with_tiles({-1, 1, 2, 3}), errc::range);
  EXPECT_EQ(with_tiles({0, 2, 1, 3}), errc::range);
  EXPECT_EQ(with_tiles({0, 1, 1, 3}), errc::range);
  EXPECT_EQ(with_tiles({0, 1, 2, 4}), errc::range);
  EXPECT_EQ(with_tiles({0, 1, 2, std::numeric_limits<std::int32_t>::max()}), errc::range);
  const std::vector<std::int32_t> masks{-1, 0, 1, -1};
  const std::vector<std::uint64_t> bits(128);
  EXPECT_EQ(code(shape, {offsets, tiles, masks, bits}), errc::ok);
  EXPECT_EQ(code(shape, {offsets, tiles, std::span(masks).first(3), bits}), errc::shape);
  EXPECT_EQ(code(shape, {offsets, tiles, masks, std::span(bits).first(100)}), errc::shape);
  EXPECT_EQ(code(shape, {offsets, tiles, masks, std::span(bits).first(64)}), errc::range);
  const std::vector<std::int32_t> below{-2, 0, 1, -1};
  EXPECT_EQ(code(shape, {offsets, tiles, below, bits}), errc::range);

  for (const auto& s :
       {block_sparse_shape{.q_len = -1, .kv_len = 1}, block_sparse_shape{.q_len = 1, .kv_len = -1},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .query_block = 0},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .lists = 0},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .lists = index_t{1} << 21},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .heads_per_list = 0},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .batch = 0},
        block_sparse_shape{.q_len = 1, .kv_len = index_t{1} << 40},
        block_sparse_shape{.q_len = 1, .kv_len = 1, .query_offset = std::numeric_limits<index_t>::min()}})
    EXPECT_EQ(code_of([&] { static_cast<void>(a_shape(s, 1, 1)); }), errc::shape);
}

TEST(BlockSparse, RefusesArgumentsOfPatternsAndCallsThatDoNotFit) {
  const block_sparse_shape shape{.q_len = 100, .kv_len = 200};
  EXPECT_EQ(code_of([&] { static_cast<void>(a_shape(shape, -1, 5)); }), errc::option);
  EXPECT_EQ(code_of([&] { static_cast<void>(a_shape(shape, 1, -5)); }), errc::option);
  EXPECT_EQ(code_of([&] { static_cast<void>(strided(shape, 1, 0)); }), errc::option);
  EXPECT_EQ(code_of([&] { static_cast<void>(big_bird(shape, {.window = -1})); }), errc::option);
  EXPECT_EQ(code_of([&] { static_cast<void>(vertical_slash(shape, {})); }), errc::shape);
  const std::vector<index_t> negative{-1};
  const std::vector<vertical_slash_lines> lines{{negative, {}}};
  EXPECT_EQ(code_of([&] { static_cast<void>(vertical_slash(shape, lines)); }), errc::option);
  const std::unique_ptr<bool[]> blocks(new bool[12]());
  const auto from_blocks = [&](index_t key_block, std::array<index_t, 3> extents) {
    return code_of([&] {
      static_cast<void>(
          block_sparse_mask::from_blocks(shape, key_block, tensor_view<const bool, 3>(blocks.get(), extents)));
    });
  };
  EXPECT_EQ(from_blocks(64, {1, 3, 4}), errc::ok);
  EXPECT_EQ(from_blocks(64, {1, 2, 4}), errc::shape);
  EXPECT_EQ(from_blocks(0, {1, 3, 4}), errc::shape);

  operands<float, float> in({{2, 100, 200, 4, 2, 16, 16}, with_causal, layout::bshd});
  std::vector<float> out(2 * 100 * 4 * 16, -1.0F);
  const auto call = [&](const block_sparse_shape& s) {
    const auto mask = random_mask(s, 0.5, 1);
    context ctx;
    const errc code = code_of([&] {
      block_sparse_attention(in.q.view(), kv_view(in.k.view(), in.v.view()), view(out.data(), {2, 100, 4, 16}), mask,
                             in.options, ctx);
    });
    EXPECT_TRUE(code == errc::ok || std::all_of(out.begin(), out.end(), [](float x) { return x == -1.0F; }));
    return code;
  };
  EXPECT_EQ(call({.q_len = 99, .kv_len = 200, .query_offset = 100}), errc::range);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 200, .query_offset = 99}), errc::range);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 199, .query_offset = 100}), errc::range);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 200, .lists = 3}), errc::shape);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 200, .lists = 2, .heads_per_list = 1}), errc::shape);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 200, .batch = 3}), errc::shape);
  EXPECT_EQ(call({.q_len = 100, .kv_len = 200, .lists = 2, .heads_per_list = 2, .batch = 2}), errc::ok);
}

TEST(RowCut, CoversAllRowsAndNoTileHasTwoBlocks) {
  rng random(1);
  for (int round = 0; round < 2000; ++round) {
    const index_t queries = random.between(0, 300), offset = random.between(-100, 500), block = random.between(1, 150);
    const index_t largest = random.between(1, 40), group = random.between(0, largest);
    const detail::row_cut cut(queries, offset, block, largest);
    index_t next = 0;
    for (index_t i = 0; i < cut.tiles(); ++i) {
      const auto [first, count] = cut.tile(i, group, queries * group);
      ASSERT_LE(count, 96);
      ASSERT_EQ(first, next);
      next += count;
      if (count == 0) continue;
      ASSERT_EQ(floor_of(offset + first / group, block), floor_of(offset + (first + count - 1) / group, block));
    }
    ASSERT_EQ(next, queries * group);
  }
}

// A block of several heads is asked of all their lists, not of the first one's.
TEST(BlockSparseMask, AsksTheListsOfAllHeadsOfABlock) {
  const block_sparse_shape shape{.q_len = 64, .kv_len = 128, .query_block = 64, .lists = 3};
  const auto mask = block_sparse_mask::from_tiles(
      shape, [](index_t list, key_range, index_t tile) { return list == 2 || (list == 1 && tile == 1); });
  const index_t first = shape.offset();
  const auto of = [&](index_t head_begin, index_t head_end, index_t tile) {
    return mask.visible(key_block{0, head_begin, head_end, first, first + 64, tile * 64, tile * 64 + 64});
  };
  EXPECT_EQ(of(0, 1, 0), visibility::none);
  EXPECT_EQ(of(0, 2, 0), visibility::none);
  EXPECT_EQ(of(0, 2, 1), visibility::some);  // the second has it
  EXPECT_EQ(of(0, 3, 0), visibility::some);
  EXPECT_EQ(of(1, 3, 1), visibility::all);
  EXPECT_EQ(of(1, 3, 0), visibility::some);  // the second has not
  EXPECT_EQ(of(2, 3, 0), visibility::all);
}

// What a causal edge hides anyway does not make a tile less than whole: the diagonal's has no bits.
TEST(BlockSparseMask, OfPairsHasWholeTilesUpToTheDiagonal) {
  const block_sparse_shape shape{.q_len = 128, .kv_len = 128, .query_block = 64, .causal = true};
  const auto mask = block_sparse_mask::from_pairs(shape, [](index_t, index_t q, index_t key) { return key <= q; });
  EXPECT_EQ(mask.listed_tiles(), 3);
  EXPECT_EQ(mask.visible(key_block{0, 0, 1, 0, 64, 0, 64}), visibility::all);
  EXPECT_EQ(mask.visible(key_block{0, 0, 1, 64, 128, 64, 128}), visibility::all);
  const auto holed =
      block_sparse_mask::from_pairs(shape, [](index_t, index_t q, index_t key) { return key <= q && key != 70; });
  EXPECT_EQ(holed.visible(key_block{0, 0, 1, 64, 128, 0, 64}), visibility::all);
  EXPECT_EQ(holed.visible(key_block{0, 0, 1, 64, 128, 64, 128}), visibility::some);
}

TEST(BlockSparse, HasACheck) {
  const auto lists = a_shape({.q_len = 2, .kv_len = door_operands::tokens}, 4, 30);
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, c.cache, c.out, lists, c.options); },
      [&](door_operands& c, context& ctx) { block_sparse_attention(c.q, c.cache, c.out, lists, c.options, ctx); });
}

}  // namespace
}  // namespace gqa::test
