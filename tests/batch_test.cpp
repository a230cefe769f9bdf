// SPDX-License-Identifier: Apache-2.0
// Ragged batches: every row has the bits that it has in a call by itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/doors.hpp"
#include "support/kernels.hpp"
#include "support/pages.hpp"
#include "support/ragged.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

// Queries of a random batch: prefills, appends, drafts, decode steps, nothing.
template <class T>
ragged_case<T> random_case(rng& random) {
  const index_t kv_heads = random.between(1, 3), group = random.between(1, 5);
  const index_t dim = random.chance(0.5) ? 32 : random.between(1, 40), value_dim = random.chance(0.5) ? 64 : dim;
  std::vector<index_t> lengths;
  for (index_t i = random.between(1, 6); i > 0; --i)
    lengths.push_back(random.chance(0.2) ? random.between(1000, 2500) : random.between(0, 200));
  ragged_case<T> c(kv_heads * group, kv_heads, dim, value_dim, lengths, random);
  for (index_t i = random.between(0, 8); i > 0; --i) {
    const index_t sequence = random.between(0, c.count() - 1), length = c.lengths[static_cast<std::size_t>(sequence)];
    const index_t queries = random.chance(0.5) ? 1 : random.between(0, random.chance(0.3) ? 130 : 16);
    c.add(sequence, std::min(queries, length), random);
  }
  return c;
}

template <class T>
void expect_any_batch(index_t rounds, std::uint64_t seed) {
  rng random(seed);
  Eigen::ThreadPool pool(3);
  context serial, threads(pool);
  for (index_t round = 0; round < rounds && !::testing::Test::HasFailure(); ++round) {
    const auto c = random_case<T>(random);
    const std::string what = "round " + std::to_string(round);
    batch_options options;
    options.common.causal = random.chance(0.8);
    if (random.chance(0.3)) options.common.window = {random.between(0, 100), -1};
    if (random.chance(0.2)) options.common.softcap = 5;
    std::vector<float> sinks(static_cast<std::size_t>(c.heads), 0.5f);
    if (random.chance(0.3)) options.common.sinks = sinks;
    std::vector<index_t> lengths, offsets;
    for (std::size_t n = 0; n < c.sequences.size(); ++n) {
      lengths.push_back(random.between(c.queries(n), c.length(n)));
      offsets.push_back(random.between(-3, c.length(n)));
    }
    if (random.chance(0.3)) options.common.kv_lengths = lengths;
    if (random.chance(0.3)) options.query_offsets = offsets;
    const auto cache = c.cache();
    context& ctx = random.chance(0.5) ? serial : threads;
    expect_single_calls(c, cache, options, ctx, what + ", cache");
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Eigen::bfloat16>) {  // the others take long to compile
      expect_single_calls(c, kv_view(c.k.view(), c.v.view()), options, ctx, what + ", tensors");
      const auto order = random.chance(0.5) ? page_order::tokens_first : page_order::heads_first;
      const index_t page_size = random.chance(0.5) ? 16 : random.between(1, 70);
      pages<T> paged(c.k.view(), c.v.view(), c.lengths, page_size, order, random);
      expect_single_calls(c, paged.view(), options, ctx, what + ", pages of " + std::to_string(page_size));
    }
  }
}
TEST(Batch, HasTheBitsOfSingleCalls) {
  expect_any_batch<float>(120, 1);
  expect_any_batch<Eigen::bfloat16>(40, 2);
}
TEST(Batch, HasTheBitsOfSingleCallsInOtherTypes) {
  expect_any_batch<double>(20, 3);
  expect_any_batch<Eigen::half>(20, 4);
}

// Trees of draft tokens: a node sees its ancestors and itself.
TEST(Batch, TakesTreesOfDrafts) {
  rng random(9);
  ragged_case<float> c(4, 2, 16, 24, {100, 300, 64, 1500}, random);
  c.add(1, 7, random), c.add(0, 1, random), c.add(2, 16, random), c.add(3, 5, random), c.add(1, 3, random);
  std::vector<std::vector<char>> trees;
  std::vector<tensor_view<const bool, 2>> masks;
  for (std::size_t n = 0; n < c.sequences.size(); ++n) {
    const index_t nodes = c.queries(n);
    std::vector<char> tree(static_cast<std::size_t>(nodes * nodes));
    for (index_t i = 0; i < nodes; ++i) {
      for (index_t j = i; j >= 0; j = j == 0 ? -1 : random.between(0, j - 1))  // up to the root
        tree[static_cast<std::size_t>(i * nodes + j)] = 1;
    }
    trees.push_back(tree);
  }
  for (std::size_t n = 0; n < trees.size(); ++n) {
    const index_t nodes = c.queries(n);
    if (n == 3) {
      masks.emplace_back();  // a sequence without one
    } else {
      masks.emplace_back(reinterpret_cast<const bool*>(trees[n].data()), std::array<index_t, 2>{nodes, nodes});
    }
  }
  batch_options options;
  options.common.causal = true;
  options.masks = masks;
  const auto cache = c.cache();
  context ctx;
  expect_single_calls(c, cache, options, ctx, "trees");
}

// A draft's mask does not send its neighbours to another kernel: one of them reads pages in place, as it does alone.
TEST(Batch, KeepsTreesToTheirSequences) {
  rng random(14);
  ragged_case<float> c(8, 2, 64, 64, {300, 700}, random);
  c.add(0, 2, random), c.add(1, 1, random);
  const bool tree[4] = {true, false, false, true};
  const std::vector<tensor_view<const bool, 2>> masks{{tree, {2, 2}}, {}};
  batch_options options;
  options.common.causal = true;
  options.masks = masks;
  pages<float> paged(c.k.view(), c.v.view(), c.lengths, 16, page_order::tokens_first, random);
  Eigen::ThreadPool pool(2);
  context ctx(pool);
  expect_single_calls(c, paged.view(), options, ctx, "trees in pages");
}

TEST(Batch, IsWhatTheOracleSays) {
  rng random(10);
  ragged_case<float> c(6, 2, 32, 16, {40, 500}, random);
  c.add(1, 30, random), c.add(0, 1, random);
  const auto cache = c.cache();
  std::vector<float> out(static_cast<std::size_t>(c.total() * 6 * 16));
  context ctx;
  batch_options options;
  options.common.causal = true;
  batch_attention(c.rows(), c.offsets, cache, c.sequences, view(out.data(), {1, c.total(), 6, 16}), options, ctx);
  for (std::size_t n = 0; n < 2; ++n) {
    const auto expected = run_oracle_on(c.rows_of(n), c.of_sequence(c.k, n), c.of_sequence(c.v, n), options.common);
    comparison compared;
    for (std::size_t i = 0; i < expected.out.size(); ++i)
      compared.add(static_cast<double>(out[static_cast<std::size_t>(c.offsets[n] * 6 * 16) + i]), expected.out[i],
                   expected.out_bound(i), "out");
    EXPECT_TRUE(compared.result());
  }
}

TEST(Batch, TakesEigenTensorsAndStrides) {
  rng random(11);
  ragged_case<float> c(4, 2, 16, 16, {40, 50}, random);
  c.add(1, 3, random), c.add(0, 2, random);
  const auto cache = c.cache();
  context ctx;
  std::vector<float> expected(static_cast<std::size_t>(5 * 4 * 16)), apart(static_cast<std::size_t>(5 * 100), 7);
  batch_attention(c.rows(), c.offsets, cache, c.sequences, tensor_view<float, 3>(expected.data(), {5, 4, 16}), {}, ctx);
  Eigen::Tensor<float, 3, Eigen::RowMajor> q(5, 4, 16), out(5, 4, 16);
  std::copy(c.q.begin(), c.q.end(), q.data());
  batch_attention(q, c.offsets, cache, c.sequences, out, {}, ctx);
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), expected.size() * sizeof(float)), 0);
  const tensor_view<float, 3> rows_apart(apart.data(), {5, 4, 16}, {100, 16, 1});
  batch_attention(q, c.offsets, cache, c.sequences, rows_apart, {}, ctx);
  for (index_t i = 0; i < 5 * 64; ++i)
    ASSERT_EQ(rows_apart(i / 64, i % 64 / 16, i % 16), expected[static_cast<std::size_t>(i)]);
  EXPECT_EQ(apart[64], 7);
}

TEST(Batch, MayBeEmpty) {
  rng random(12);
  ragged_case<float> c(4, 2, 16, 16, {40, 0}, random);
  const auto cache = c.cache();
  context ctx;
  float out = 5;
  batch_attention(c.rows(), c.offsets, cache, c.sequences, tensor_view<float, 3>(&out, {0, 4, 16}), {}, ctx);
  c.add(0, 0, random), c.add(1, 0, random);
  batch_attention(c.rows(), c.offsets, cache, c.sequences, tensor_view<float, 3>(&out, {0, 4, 16}), {}, ctx);
  EXPECT_EQ(out, 5);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Batch, RefusesWhatDoesNotFit) {
  rng random(13);
  ragged_case<float> c(4, 2, 16, 16, {40, 50}, random);
  c.add(1, 3, random), c.add(0, 2, random);
  const auto cache = c.cache();
  std::vector<float> out(static_cast<std::size_t>(5 * 64), 7);
  context ctx;
  const bool tree[9] = {true, false, false, true, true, false, true, true, true};
  const index_t most = std::numeric_limits<index_t>::max();
  const auto with = [&](const auto& change) {
    std::vector<index_t> offsets = c.offsets;
    std::vector<sequence_id> sequences = c.sequences;
    batch_options options;
    change(offsets, sequences, options);
    try {
      batch_attention(c.rows(), offsets, cache, sequences, tensor_view<float, 3>(out.data(), {5, 4, 16}), options, ctx);
    } catch (const error& e) {
      EXPECT_EQ(std::count(out.begin(), out.end(), 7.0f), static_cast<std::ptrdiff_t>(out.size())) << e.what();
      return e.code();
    }
    std::fill(out.begin(), out.end(), 7.0f);
    return errc::ok;
  };
  EXPECT_EQ(with([](auto&, auto&, auto&) {}), errc::ok);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets.pop_back(); }), errc::shape);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets.clear(); }), errc::shape);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets[0] = 1; }), errc::range);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets[2] = 4; }), errc::range);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets[2] = 6; }), errc::range);
  EXPECT_EQ(with([](auto& offsets, auto&, auto&) { offsets[1] = -1; }), errc::range);
  EXPECT_EQ(with([&](auto& offsets, auto&, auto&) { offsets[1] = most; }), errc::range);
  EXPECT_EQ(with([](auto&, auto& sequences, auto&) { sequences[0] = sequence_id{2}; }), errc::range);
  EXPECT_EQ(with([](auto&, auto& sequences, auto&) { sequences[1] = sequence_id{-1}; }), errc::range);
  EXPECT_EQ(with([&](auto&, auto& sequences, auto&) { sequences[1] = static_cast<sequence_id>(most); }), errc::range);
  const std::vector<index_t> two{0, 0}, three{0, 0, 0}, long_ones{51, 2};
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.query_offsets = two; }), errc::ok);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.query_offsets = three; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.common.query_offsets = two; }), errc::option);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.query_offsets = two, o.common.query_offset = 3; }), errc::option);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.common.kv_lengths = two; }), errc::ok);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.common.kv_lengths = long_ones; }), errc::length);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.common.softcap = -1; }), errc::option);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) {
              o.common.mask = tensor_view<const bool, 4>(tree, {1, 1, 1, 9});
            }),
            errc::option);
  const std::vector<tensor_view<const bool, 2>> fit{{tree, {3, 3}}, {tree, {2, 2}}}, one{{tree, {3, 3}}},
      other{{tree, {2, 3}}, {}}, null{{nullptr, {3, 3}}, {}}, none{{tree, {3, 0}}, {}},
      wraps{{tree, {index_t{1} << 32, index_t{1} << 32}}, {}};
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = fit; }), errc::ok);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = one; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = other; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = null; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = none; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = wraps; }), errc::shape);
  EXPECT_EQ(with([&](auto&, auto&, auto& o) { o.masks = fit, o.common.kv_lengths = two; }), errc::shape);
  EXPECT_THROW(
      batch_attention(c.rows(), c.offsets, cache, c.sequences, tensor_view<float, 3>(out.data(), {4, 4, 16}), {}, ctx),
      error);
  std::vector<index_t> offsets = c.offsets;  // which an lse may not overwrite
  const partial_state<float> over_offsets{view(out.data(), {1, 5, 4, 16}),
                                          {reinterpret_cast<float*>(offsets.data()), {1, 5, 4}, {0, 1, 0}}};
  EXPECT_THROW(batch_attention(c.rows(), offsets, cache, c.sequences, over_offsets, {}, ctx), error);
  EXPECT_THROW(batch_attention(view(c.q.data(), {5, 1, 4, 16}), c.offsets, cache, c.sequences,
                               view(out.data(), {5, 1, 4, 16}), {}, ctx),
               error);  // more than one batch of rows
  EXPECT_THROW(
      batch_attention(c.rows(), c.offsets, cache, c.sequences, tensor_view<float, 3>(c.q.data(), {5, 4, 16}), {}, ctx),
      error);  // over the queries
}
#endif

// A variant that knows its sequences by their numbers in the batch, scores and hides, in the forms that it may have.
struct from_first_key {
  std::vector<index_t> first;
  [[nodiscard]] float score(float s, const position& p) const noexcept {
    return s + 0.01f * static_cast<float>(p.query - p.key + p.q_head);
  }
  [[nodiscard]] bool visible(const position& p) const noexcept { return p.key >= at(p.batch); }
  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    return b.key_begin >= at(b.batch) ? visibility::all
           : b.key_end <= at(b.batch) ? visibility::none
                                      : visibility::some;
  }
  [[nodiscard]] index_t at(index_t n) const noexcept { return first[static_cast<std::size_t>(n)]; }
};

TEST(Batch, AsksAVariantBySequence) {
  rng random(9);
  ragged_case<float> c(4, 2, 24, 24, {200, 130, 70}, random);
  c.add(1, 1, random), c.add(0, 5, random), c.add(2, 20, random);
  const from_first_key variant{{3, 100, 64}};
  const kv_cache<float> cache = c.cache();
  const bool tree[25] = {true,  false, false, false, false, true, true,  false, false, false, true,  false, true,
                         false, false, false, true,  false, true, false, true,  false, true,  false, true};
  const std::vector<tensor_view<const bool, 2>> masks{{}, {tree, {5, 5}}, {}};
  context ctx;
  for (const bool has_masks : {false, true}) {
    batch_options options;
    options.common.causal = true;
    if (has_masks) options.masks = masks;
    std::vector<float> out(c.q.size());
    batch_attention(c.rows(), c.offsets, cache, c.sequences,
                    tensor_view<float, 3>(out.data(), {c.total(), c.heads, c.value_dim}), options, variant, ctx);
    for (std::size_t n = 0; n < 3; ++n) {
      const index_t queries = c.queries(n), keys = c.length(n);
      std::vector<char> seen(static_cast<std::size_t>(queries * keys), 1);
      if (has_masks && n == 1) {
        for (index_t i = 0; i < 5; ++i)
          for (index_t j = 0; j < 5; ++j) seen[static_cast<std::size_t>((i + 1) * keys - 5 + j)] = tree[i * 5 + j];
      }
      const detail::part_of_source<kv_cache<float>> own(cache, static_cast<index_t>(c.sequences[n]), 0, 2, keys);
      attention_options one{.causal = true};
      one.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(seen.data()), {1, 1, queries, keys});
      std::vector<float> expected(static_cast<std::size_t>(queries * c.heads * c.value_dim));
      attention(c.rows_of(n), own, view(expected.data(), {1, queries, c.heads, c.value_dim}), one,
                from_first_key{{variant.at(static_cast<index_t>(n))}}, ctx);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin() + c.offsets[n] * c.heads * c.value_dim))
          << n << has_masks;
    }
  }
}

// A tree of drafts measures windows and ALiBi by depth, where positions say so: siblings are as far from what was
// before.
TEST(Batch, MeasuresDistancesByPositions) {
  rng random(12);
  ragged_case<float> c(4, 2, 16, 16, {50, 300, 40}, random);
  c.add(0, 5, random), c.add(1, 70, random), c.add(2, 1, random);
  const auto cache = c.cache();
  // The root, its two children, and a child of each: rows see their ancestors and themselves.
  const std::vector<index_t> depth{0, 1, 1, 2, 2}, parent{-1, 0, 0, 1, 2};
  std::array<bool, 25> tree{};
  for (index_t i = 0; i < 5; ++i)
    for (index_t j = i; j >= 0; j = parent[static_cast<std::size_t>(j)])
      tree[static_cast<std::size_t>(i * 5 + j)] = true;
  std::vector<index_t> positions;
  for (const index_t d : depth) positions.push_back(45 + d);
  for (index_t s = 0; s < 70; ++s) positions.push_back(230 + s);  // slots, as by default
  positions.push_back(1000);                                      // far from all but itself
  const std::vector<tensor_view<const bool, 2>> masks{{tree.data(), {5, 5}}, {}, {}};
  const std::vector<float> slopes{0.5f, 0.2f, 0.1f, 0.02f};
  context ctx;
  for (const bool paged : {false, true}) {
    for (const window_t window : {window_t{}, window_t{3, 0}, window_t{100, -1}}) {
      for (const bool alibi : {false, true}) {
        batch_options options;
        options.common.causal = window.right != -1 || window.left == -1;
        options.common.window = window;
        if (alibi) options.common.alibi_slopes = slopes;
        options.masks = masks, options.positions = positions;
        std::vector<float> out(static_cast<std::size_t>(c.total() * 4 * 16));
        const auto to = view(out.data(), {1, c.total(), 4, 16});
        if (paged) {
          pages<float> own(c.k.view(), c.v.view(), c.lengths, 16, page_order::tokens_first, random);
          batch_attention(c.rows(), c.offsets, own.view(), c.sequences, to, options, ctx);
        } else {
          batch_attention(c.rows(), c.offsets, cache, c.sequences, to, options, ctx);
        }
        for (std::size_t n = 0; n < 3; ++n) {
          const auto q = c.rows_of(n);
          const auto k = c.of_sequence(c.k, n), v = c.of_sequence(c.v, n);
          const index_t rows = q.extent(1), keys = k.extent(1);
          const auto own = [&](index_t s) { return positions[static_cast<std::size_t>(c.offsets[n] + s)]; };
          std::vector<float> bias(static_cast<std::size_t>(4 * rows * keys));
          for (index_t h = 0; h < 4; ++h)
            for (index_t s = 0; s < rows; ++s)
              for (index_t t = 0; t < keys; ++t) {
                const index_t draft = t - (keys - rows), key = draft < 0 ? t : own(draft), distance = own(s) - key;
                bool seen = !(options.common.causal && distance < 0) && !(window.left >= 0 && distance > window.left) &&
                            !(window.right >= 0 && -distance > window.right);
                if (n == 0 && draft >= 0) seen = seen && tree[static_cast<std::size_t>(s * 5 + draft)];
                bias[static_cast<std::size_t>((h * rows + s) * keys + t)] =
                    !seen   ? -std::numeric_limits<float>::infinity()
                    : alibi ? -slopes[static_cast<std::size_t>(h)] * static_cast<float>(distance)
                            : 0;
              }
          attention_options single;
          single.bias = tensor_view<const float, 4>(bias.data(), {1, 4, rows, keys});
          const auto expected = run_oracle_on(q, k, v, single);
          comparison compared;
          for (std::size_t i = 0; i < expected.out.size(); ++i)
            compared.add(static_cast<double>(out[static_cast<std::size_t>(c.offsets[n] * 4 * 16) + i]), expected.out[i],
                         expected.out_bound(i), "element " + std::to_string(i));
          EXPECT_TRUE(compared.result()) << "sequence " << n << ", window " << window.left << ", alibi " << alibi;
        }
      }
    }
  }
  // Positions that are those of slots change nothing.
  batch_options plain;
  plain.common.causal = true, plain.common.window = {7, 0}, plain.common.alibi_slopes = slopes;
  std::vector<index_t> slots;
  for (std::size_t n = 0; n < 3; ++n)
    for (index_t s = 0; s < c.offsets[n + 1] - c.offsets[n]; ++s)
      slots.push_back(c.lengths[n] - (c.offsets[n + 1] - c.offsets[n]) + s);
  std::vector<float> by_slots(static_cast<std::size_t>(c.total() * 4 * 16)), by_positions(by_slots.size());
  batch_attention(c.rows(), c.offsets, cache, c.sequences, view(by_slots.data(), {1, c.total(), 4, 16}), plain, ctx);
  plain.positions = slots;
  batch_attention(c.rows(), c.offsets, cache, c.sequences, view(by_positions.data(), {1, c.total(), 4, 16}), plain,
                  ctx);
  EXPECT_EQ(by_slots, by_positions);
}

// With a variant that answers for 64 keys at once, of which a sequence's last tile has fewer; as slots, positions
// change nothing.
TEST(Batch, TakesPositionsBesideAVariant) {
  rng random(14);
  ragged_case<float> c(4, 2, 16, 16, {70, 131}, random);
  c.add(0, 3, random), c.add(1, 40, random);
  const auto cache = c.cache();
  std::vector<index_t> slots;
  for (const auto& [length, count] : {std::pair<index_t, index_t>{70, 3}, {131, 40}})
    for (index_t s = 0; s < count; ++s) slots.push_back(length - count + s);
  std::vector<float> expected(static_cast<std::size_t>(c.total() * 4 * 16)), actual(expected.size());
  context ctx;
  batch_options options;
  options.common.causal = true;
  const auto run = [&](std::vector<float>& out) {
    batch_attention(c.rows(), c.offsets, cache, c.sequences, view(out.data(), {1, c.total(), 4, 16}), options,
                    block_local(32), ctx);
  };
  run(expected);
  options.positions = slots;
  run(actual);
  EXPECT_EQ(actual, expected);
}

TEST(Batch, RefusesPositionsThatDoNotFit) {
  rng random(13);
  ragged_case<float> c(4, 2, 16, 16, {50}, random);
  c.add(0, 5, random);
  const auto cache = c.cache();
  std::vector<float> out(5 * 4 * 16, 7.0f);
  context ctx;
  for (const std::vector<index_t>& positions : {std::vector<index_t>(4), std::vector<index_t>{0, 1, 2, 3, -1},
                                                std::vector<index_t>{0, 1, 2, 3, index_t{1} << 61}}) {
    batch_options options;
    options.positions = positions;
    const errc code = code_of([&] {
      batch_attention(c.rows(), c.offsets, cache, c.sequences, view(out.data(), {1, 5, 4, 16}), options, ctx);
    });
    EXPECT_EQ(code, positions.size() == 4 ? errc::shape : errc::range);
    EXPECT_EQ(out, std::vector<float>(out.size(), 7.0f));
  }
}

TEST(Batch, HasChecks) {
  const std::vector<index_t> offsets{0, 2};
  const std::vector<sequence_id> sequences{sequence_id{0}};
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, offsets, c.cache, sequences, c.out, {.common = c.options}); },
      [&](door_operands& c, context& ctx) {
        batch_attention(c.q, offsets, c.cache, sequences, c.out, {.common = c.options}, ctx);
      });
  // Of a ring whose queries see what is gone, by their masks, which a check asks, too.
  ring_kv_cache<float> ring(1, door_operands::kv_heads, 4, 60, door_operands::dim);
  door_operands c;
  for (index_t t = 0; t < 300; ++t) {
    const auto one = view(c.k_data.data(), {1, 1, door_operands::kv_heads, door_operands::dim});
    ring.append(one, one);
  }
  c.options.causal = true;
  EXPECT_EQ(check(c.q, offsets, ring, sequences, c.out, {.common = c.options}), errc::range);
  c.options.window = {20, 0};
  EXPECT_EQ(check(c.q, offsets, ring, sequences, c.out, {.common = c.options}), errc::ok);
  c.options.window = {};
  EXPECT_EQ(check(c.q, offsets, ring, sequences, c.out, {.common = c.options}, sliding_window(20, 0)), errc::ok);
  EXPECT_EQ(check(c.q, ring, c.out, c.options), errc::range);
  EXPECT_EQ(check(c.q, ring, c.out, c.options, sliding_window(20, 0)), errc::ok);
}

}  // namespace
}  // namespace gqa::test
