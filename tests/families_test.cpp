// SPDX-License-Identifier: Apache-2.0
// Sequences that share their beginnings: found, read once for all, and no bit different.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/ragged.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

// Some tokens for a cache of G heads of D and E; in some of them, one value that is not finite.
template <class T>
void append_random(paged_kv_cache<T>& cache, sequence_id id, index_t tokens, index_t g, index_t d, index_t e,
                   rng& random, double strange = 0) {
  using X = detail::read_element<T>;
  std::vector<X> k, v;
  for (index_t i = 0; i < tokens * g * d; ++i) k.push_back(static_cast<X>(static_cast<float>(random.normal())));
  for (index_t i = 0; i < tokens * g * e; ++i) v.push_back(static_cast<X>(static_cast<float>(random.normal())));
  if (tokens > 0 && random.chance(strange)) {
    const float values[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
    v[static_cast<std::size_t>(random.between(0, static_cast<index_t>(v.size()) - 1))] =
        static_cast<X>(values[random.between(0, 1)]);
  }
  cache.append(id, tensor_view<const X, 3>(k.data(), {tokens, g, d}),
               tensor_view<const X, 3>(v.data(), {tokens, g, e}));
}

// Sequences without keys, in pages of a tile.
struct tables {
  std::vector<std::vector<std::int32_t>> of_sequences;
  std::vector<index_t> of_rows;
  std::vector<index_t> memory;
  detail::families found;

  tables(const std::vector<std::vector<std::int32_t>>& t, const std::vector<index_t>& r, index_t least_tasks = 1)
      : of_sequences(t), of_rows(r), memory(3 * t.size() + 1), found(static_cast<index_t>(t.size()), memory.data()) {
    found.find(*this, least_tasks);
  }
  index_t rows(index_t b) const { return of_rows[static_cast<std::size_t>(b)]; }
  index_t length(index_t b) const { return static_cast<index_t>(pages(b).size()) * page_size(); }
  std::span<const std::int32_t> pages(index_t b) const { return of_sequences[static_cast<std::size_t>(b)]; }
  detail::key_tiles tiles(index_t b) const { return {{0, static_cast<index_t>(pages(b).size())}}; }
  static index_t page_size() { return 64; }
  bool has_shared_pages(index_t b) const { return !pages(b).empty(); }

  std::vector<std::vector<index_t>> members() const {
    std::vector<std::vector<index_t>> all;
    for (index_t n = 0; n < found.count(); ++n) all.emplace_back(found[n].members.begin(), found[n].members.end());
    return all;
  }
};

TEST(Families, AreThoseWhoShareTheirFirstPages) {
  const tables t({{1, 2, 3}, {9, 2, 3}, {1, 2, 4}, {1, 5}, {8}, {9, 2}}, {4, 4, 4, 4, 4, 4});
  const std::vector<std::vector<index_t>> expected{{0, 2, 3}, {4}, {5, 1}};
  EXPECT_EQ(t.members(), expected);
  const std::vector<index_t> shared(t.found[0].shared.begin(), t.found[0].shared.end());
  EXPECT_EQ(shared, (std::vector<index_t>{0, 2, 1}));
}

TEST(Families, LeaveOutManyRowsAndNone) {
  const tables t({{1, 2}, {1, 2}, {1, 2}, {1, 2}}, {49, 4, 0, 48});
  auto members = t.members();
  for (auto& of_family : members) std::sort(of_family.begin(), of_family.end());
  std::sort(members.begin(), members.end());
  EXPECT_EQ(members, (std::vector<std::vector<index_t>>{{0}, {1, 3}, {2}}));
}

TEST(Families, LeaveOutWhoSharesLittle) {
  std::vector<std::int32_t> a(9), b(9);
  for (int i = 0; i < 9; ++i) a[static_cast<std::size_t>(i)] = i, b[static_cast<std::size_t>(i)] = i == 0 ? 0 : 100 + i;
  EXPECT_EQ(tables({a, b}, {4, 4}).found.count(), 2);  // 1 of 9
  a.pop_back(), b.pop_back();
  EXPECT_EQ(tables({a, b}, {4, 4}).found.count(), 1);  // 1 of 8
}

// As many families as keep all workers busy, where splits do not.
TEST(Families, AreEnoughForTheTasks) {
  const std::vector<std::vector<std::int32_t>> of_a_split(24, std::vector<std::int32_t>(16, 1));
  EXPECT_EQ(tables(of_a_split, std::vector<index_t>(24, 4)).found.count(), 1);
  EXPECT_EQ(tables(of_a_split, std::vector<index_t>(24, 4), 8).found.count(), 8);
  EXPECT_EQ(tables(of_a_split, std::vector<index_t>(24, 4), 100).found.count(), 24);
  const std::vector<std::vector<std::int32_t>> of_four(24, std::vector<std::int32_t>(64, 1));
  EXPECT_EQ(tables(of_four, std::vector<index_t>(24, 4), 8).found.count(), 2);
}

// Any tables: everyone once, no more rows than a tile has, even ones, and neighbours that share as much as is said.
TEST(Families, CoverEveryoneOnce) {
  rng random(3);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::vector<std::int32_t>> pages;
    std::vector<index_t> rows;
    for (index_t n = random.between(0, 60); n > 0; --n) {
      std::vector<std::int32_t> own;
      if (!pages.empty() && random.chance(0.8)) {
        own = pages[static_cast<std::size_t>(random.between(0, static_cast<index_t>(pages.size()) - 1))];
        own.resize(static_cast<std::size_t>(random.between(0, static_cast<index_t>(own.size()))));
      }
      for (index_t i = random.between(0, 5); i > 0; --i)
        own.push_back(static_cast<std::int32_t>(random.between(0, 1 << 20)));
      pages.push_back(own);
      rows.push_back(random.chance(0.7) ? 4 : random.between(0, 60));
    }
    const tables t(pages, rows);
    std::vector<int> seen(pages.size(), 0);
    for (index_t n = 0; n < t.found.count(); ++n) {
      const detail::family f = t.found[n];
      index_t all = 0;
      ASSERT_EQ(f.shared[0], 0);
      for (std::size_t m = 0; m < f.members.size(); ++m) {
        const auto b = static_cast<std::size_t>(f.members[m]);
        ++seen[b], all += rows[b];
        if (m == 0) continue;
        const auto& before = pages[static_cast<std::size_t>(f.members[m - 1])];
        ASSERT_GT(f.shared[m], 0);
        ASSERT_LE(f.shared[m], static_cast<index_t>(std::min(before.size(), pages[b].size())));
        ASSERT_TRUE(std::equal(before.begin(), before.begin() + f.shared[m], pages[b].begin()));
      }
      if (f.members.size() > 1) {
        ASSERT_LE(all, 96);
      }
    }
    ASSERT_EQ(seen, std::vector<int>(pages.size(), 1));
  }
}

// A layer that counts the tiles that are read of it.
struct counting_layer : paged_layer<float> {
  index_t* visits;
  counting_layer(const paged_kv_cache<float>& cache, index_t& n) : paged_layer<float>(cache.layer(0)), visits(&n) {}
  auto tile(index_t b, index_t g, index_t i, index_t tokens, float* scratch) const noexcept {
    ++*visits;
    return paged_layer<float>::tile(b, g, i, tokens, scratch);
  }
};

// 8 forks of 2 of a prompt: the prompt is read once a KV head, what a pair of them has in common once for the pair.
TEST(Families, ReadWhatTheyShareOnce) {
  rng random(4);
  const index_t heads = 4, kv_heads = 2, dim = 16;
  paged_kv_cache<float> cache(1, 400, 32, kv_heads, dim);
  const auto append = [&](sequence_id id, index_t tokens) {
    append_random(cache, id, tokens, kv_heads, dim, dim, random);
  };
  const sequence_id prompt = cache.create();
  append(prompt, 640);  // 10 tiles
  std::vector<sequence_id> all;
  for (int turn = 0; turn < 4; ++turn) {
    const sequence_id user = cache.fork(prompt);
    append(user, 320);  // 5 more
    for (int i = 0; i < 2; ++i) {
      all.push_back(cache.fork(user));
      append(all.back(), 64);  // and 1
    }
  }
  ragged_case<float> c(heads, kv_heads, dim, dim, {1}, random);
  for (const sequence_id id : all) c.add(static_cast<index_t>(id), 1, random);
  std::vector<float> out(static_cast<std::size_t>(c.total() * heads * dim));
  context ctx;
  const auto visits_of = [&](bool share) {
    index_t visits = 0;
    batch_options options;
    options.common.softcap = 30;  // no run of tiles in one stream, which looks at each of them once more
    options.share_prefixes = share;
    batch_attention(c.rows(), c.offsets, counting_layer(cache, visits), c.sequences,
                    tensor_view<float, 3>(out.data(), {c.total(), heads, dim}), options, ctx);
    return visits;
  };
  // Every visit looks at the tile after it, too, but the last of a sequence.
  const auto looks = [](index_t tiles, index_t ends) { return 2 * tiles - ends; };
  EXPECT_EQ(visits_of(true), kv_heads * looks(10 + 4 * 5 + 8 * 1, 8));
  EXPECT_EQ(visits_of(false), kv_heads * looks(8 * 16, 8));
}

// Forks of forks, each cut somewhere and gone on with, in a random batch under any options.
template <class T>
void expect_any_tree(index_t rounds, std::uint64_t seed) {
  rng random(seed);
  Eigen::ThreadPool pool(3);
  context serial, threads(pool);
  for (index_t round = 0; round < rounds && !::testing::Test::HasFailure(); ++round) {
    const index_t kv_heads = random.between(1, 3), group = random.between(1, 5), heads = kv_heads * group;
    const index_t dim = random.chance(0.5) ? 32 : random.between(1, 40), value_dim = random.chance(0.5) ? 64 : dim;
    const index_t page_size = 16 * random.between(1, 6);
    paged_kv_cache<T> cache(1, 40 * (2200 / page_size + 1), page_size, kv_heads, dim, value_dim);
    std::vector<sequence_id> all{cache.create()};
    append_random(cache, all[0], random.between(0, random.chance(0.3) ? 2000 : 400), kv_heads, dim, value_dim, random,
                  0.1);
    for (index_t n = random.between(1, 30); n > 0; --n) {
      const auto parent = all[static_cast<std::size_t>(random.between(0, static_cast<index_t>(all.size()) - 1))];
      all.push_back(cache.fork(parent));
      const index_t length = cache.length(parent);
      if (random.chance(0.3)) cache.truncate(all.back(), random.between(length / 2, length));
      append_random(cache, all.back(), random.between(0, 90), kv_heads, dim, value_dim, random, 0.1);
    }
    ragged_case<T> c(heads, kv_heads, dim, value_dim, {1}, random);
    for (index_t n = random.between(1, 40); n > 0; --n) {
      const auto id = all[static_cast<std::size_t>(random.between(0, static_cast<index_t>(all.size()) - 1))];
      const index_t queries = random.chance(0.7) ? 1 : random.between(0, random.chance(0.2) ? 40 : 8);
      c.add(static_cast<index_t>(id), std::min(queries, cache.length(id)), random);
    }
    batch_options options;
    options.common.causal = random.chance(0.8);
    if (random.chance(0.3)) options.common.window = {random.between(0, 300), random.chance(0.5) ? -1 : 5};
    if (random.chance(0.2)) options.common.softcap = 5;
    const std::vector<float> of_heads(static_cast<std::size_t>(heads), 0.25f);
    if (random.chance(0.3)) options.common.sinks = of_heads;
    if (random.chance(0.2)) options.common.alibi_slopes = of_heads;
    std::vector<index_t> lengths, offsets;
    std::vector<std::vector<char>> seen;
    std::vector<tensor_view<const bool, 2>> masks;
    for (std::size_t n = 0; n < c.sequences.size(); ++n) {
      const index_t length = cache.length(c.sequences[n]), queries = c.queries(n);
      lengths.push_back(random.between(queries, length));
      offsets.push_back(random.between(-3, length));
      seen.emplace_back(static_cast<std::size_t>(queries * queries), 1);
      for (char& bit : seen.back()) bit = random.chance(0.7);
    }
    for (std::size_t n = 0; n < c.sequences.size(); ++n) {
      const index_t queries = c.queries(n);
      if (queries == 0 || random.chance(0.5)) {
        masks.emplace_back();
      } else {
        masks.emplace_back(reinterpret_cast<const bool*>(seen[n].data()), std::array<index_t, 2>{queries, queries});
      }
    }
    if (random.chance(0.3)) options.common.kv_lengths = lengths;
    if (random.chance(0.3)) options.query_offsets = offsets;
    if (random.chance(0.3)) options.masks = masks;
    options.share_prefixes = random.chance(0.9);
    expect_single_calls(c, cache.layer(0), options, random.chance(0.5) ? serial : threads,
                        "round " + std::to_string(round) + ", pages of " + std::to_string(page_size));
  }
}
TEST(Families, HaveTheBitsOfSingleCalls) {
  expect_any_tree<float>(60, 1);
  expect_any_tree<Eigen::bfloat16>(40, 2);
}
TEST(Families, HaveTheBitsOfSingleCallsInOtherTypes) {
  expect_any_tree<double>(15, 3);
  expect_any_tree<q8>(40, 5);
}

// Drafts whose last keys lie in tiles that others read without a mask.
TEST(Families, KeepTreesToTheirSequences) {
  rng random(6);
  paged_kv_cache<float> cache(1, 20, 64, 2, 16);
  ragged_case<float> c(4, 2, 16, 16, {1}, random);
  const sequence_id root = cache.create();
  append_random(cache, root, 192, 2, 16, 16, random);
  for (int n = 0; n < 2; ++n) c.add(static_cast<index_t>(cache.fork(root)), n == 0 ? 1 : 2, random);
  const bool tree[4] = {true, false, false, true};
  const std::vector<tensor_view<const bool, 2>> masks{{}, {tree, {2, 2}}};
  batch_options options;
  options.masks = masks;
  context ctx;
  expect_single_calls(c, cache.layer(0), options, ctx, "trees");
}

// NaN in what only some of a family may see.
TEST(Families, KeepHiddenNanFromEachOther) {
  rng random(5);
  const index_t heads = 4, kv_heads = 1, dim = 16;
  for (const index_t length : {300, 64, 130}) {
    paged_kv_cache<float> cache(1, 100, 16, kv_heads, dim);
    const sequence_id root = cache.create();
    append_random(cache, root, length, kv_heads, dim, dim, random);
    const std::vector<float> key(16, 1.0f), nan(16, std::numeric_limits<float>::quiet_NaN());
    cache.write(0, root, 5, tensor_view<const float, 3>(key.data(), {1, 1, 16}),
                tensor_view<const float, 3>(nan.data(), {1, 1, 16}));
    ragged_case<float> c(heads, kv_heads, dim, dim, {1}, random);
    for (int n = 0; n < 6; ++n) {
      const sequence_id id = cache.fork(root);
      append_random(cache, id, 1 + 7 * n, kv_heads, dim, dim, random);
      c.add(static_cast<index_t>(id), 1, random);
    }
    batch_options options;
    options.common.causal = true;
    options.common.window = {length - 6 + 20, -1};  // some see token 5, some do not
    std::vector<float> out(static_cast<std::size_t>(c.total() * heads * dim));
    context ctx;
    batch_attention(c.rows(), c.offsets, cache.layer(0), c.sequences,
                    tensor_view<float, 3>(out.data(), {c.total(), heads, dim}), options, ctx);
    for (index_t n = 0; n < 6; ++n) {
      const bool sees = length + 7 * n - options.common.window.left <= 5;
      for (index_t i = 0; i < heads * dim; ++i)
        ASSERT_EQ(std::isnan(out[static_cast<std::size_t>(n * heads * dim + i)]), sees) << length << ", fork " << n;
    }
  }
}

}  // namespace
}  // namespace gqa::test
