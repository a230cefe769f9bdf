// SPDX-License-Identifier: Apache-2.0
// Rotary embedding: frequencies as the papers and released codes write them, rotations as complex products.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"
#include "support/tensor.hpp"

namespace gqa::test {
namespace {

std::vector<double> frequencies_of(index_t dim, const rope_options& o) {
  const rope r(dim, o);
  return {r.frequencies().begin(), r.frequencies().end()};
}
void expect_near(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) EXPECT_NEAR(actual[i] / expected[i], 1, 1e-12) << i;
}

TEST(Rope, HasTheFrequenciesOfItsPaper) {
  std::vector<double> expected;
  for (int i = 0; i < 64; ++i) expected.push_back(1 / std::pow(10000.0, 2.0 * i / 128));
  expect_near(frequencies_of(128, {}), expected);
  rope_options some;
  some.dims = 32, some.base = 500000;
  expected.clear();
  for (int i = 0; i < 16; ++i) expected.push_back(1 / std::pow(500000.0, i / 16.0));
  expect_near(frequencies_of(80, some), expected);
}

TEST(Rope, InterpolatesPositions) {
  rope_options o;
  o.scaling = rope_scaling::linear, o.factor = 4;
  std::vector<double> expected = frequencies_of(64, {});
  for (double& f : expected) f /= 4;
  expect_near(frequencies_of(64, o), expected);
}

// The lowest frequency is stretched by the factor, the highest not at all.
TEST(Rope, StretchesTheBaseForNtk) {
  rope_options o;
  o.scaling = rope_scaling::ntk, o.factor = 8;
  const auto own = frequencies_of(64, {}), stretched = frequencies_of(64, o);
  EXPECT_EQ(stretched.front(), own.front());
  EXPECT_NEAR(stretched.back(), own.back() / 8, own.back() * 1e-12);
  for (std::size_t i = 0; i < own.size(); ++i)
    EXPECT_NEAR(stretched[i], std::pow(10000 * std::pow(8.0, 64.0 / 62), -static_cast<double>(i) / 32), 1e-12);
}

// yarn's find_correction_dim, find_correction_range and linear_ramp_mask, as its authors' code has them.
TEST(Rope, IsThePublishedYarn) {
  rope_options o;
  o.scaling = rope_scaling::yarn, o.factor = 16, o.trained_length = 4096;
  const double dim = 128, base = 10000;
  const auto correction_dim = [&](double rotations) {
    return dim * std::log(4096 / (rotations * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  const double low = std::floor(correction_dim(32)), high = std::ceil(correction_dim(1));
  EXPECT_EQ(low, 20);  // and in the open between them
  EXPECT_EQ(high, 46);
  std::vector<double> expected;
  for (int i = 0; i < 64; ++i) {
    const double extrapolated = 1 / std::pow(base, 2 * i / dim), interpolated = 1 / (16 * std::pow(base, 2 * i / dim));
    const double ramp = std::min(std::max((i - low) / (high - low), 0.0), 1.0), mask = 1 - ramp;
    expected.push_back(interpolated * (1 - mask) + extrapolated * mask);
  }
  expect_near(frequencies_of(128, o), expected);
  EXPECT_NEAR(rope(128, o).magnitude(), 0.1 * std::log(16) + 1, 1e-15);
  EXPECT_EQ(rope(128).magnitude(), 1);
}

// Llama 3.1's apply_scaling.
TEST(Rope, IsThePublishedLlama3) {
  rope_options o;
  o.base = 500000;
  const auto own = frequencies_of(128, o);
  o.scaling = rope_scaling::llama3, o.factor = 8, o.trained_length = 8192;
  std::vector<double> expected;
  int kept = 0, stretched = 0;
  for (const double freq : own) {
    const double wavelen = 2 * std::numbers::pi / freq;
    if (wavelen < 8192 / 4.0) {
      expected.push_back(freq), ++kept;
    } else if (wavelen > 8192) {
      expected.push_back(freq / 8), ++stretched;
    } else {
      const double smooth = (8192 / wavelen - 1) / (4 - 1);
      expected.push_back((1 - smooth) * freq / 8 + smooth * freq);
    }
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(stretched, 20);
  expect_near(frequencies_of(128, o), expected);
}

template <class T>
void expect_turned(rope_pairing pairing, index_t dim, index_t dims, double tolerance) {
  rng random(3);
  rope_options o;
  o.dims = dims, o.pairing = pairing, o.scaling = rope_scaling::yarn, o.factor = 2, o.trained_length = 100;
  const rope r(dim, o);
  std::vector<T> x;
  for (index_t i = 0; i < 2 * 3 * 2 * dim; ++i) x.push_back(static_cast<T>(static_cast<float>(random.normal())));
  const std::vector<T> before = x;
  const std::vector<index_t> first{5, -70000};
  Eigen::ThreadPool pool(2);
  context ctx(pool);
  r.rotate(view(x.data(), {2, 3, 2, dim}), first, ctx);
  const index_t turned = dims == 0 ? dim : dims;
  for (index_t row = 0; row < 12; ++row) {
    const double position = static_cast<double>(first[static_cast<std::size_t>(row / 6)] + row / 2 % 3);
    const auto at = [&](const std::vector<T>& v, index_t d) {
      return static_cast<double>(v[static_cast<std::size_t>(row * dim + d)]);
    };
    for (index_t i = 0; i < turned / 2; ++i) {
      const index_t a = pairing == rope_pairing::halves ? i : 2 * i;
      const index_t b = pairing == rope_pairing::halves ? i + turned / 2 : 2 * i + 1;
      const auto expected = std::complex<double>(at(before, a), at(before, b)) *
                            std::polar(r.magnitude(), position * r.frequencies()[static_cast<std::size_t>(i)]);
      EXPECT_NEAR(at(x, a), expected.real(), tolerance);
      EXPECT_NEAR(at(x, b), expected.imag(), tolerance);
    }
    for (index_t d = turned; d < dim; ++d) EXPECT_EQ(at(x, d), at(before, d));
  }
}
TEST(Rope, TurnsPairsAsComplexNumbers) {
  for (const auto pairing : {rope_pairing::neighbours, rope_pairing::halves}) {
    for (const auto& [dim, dims] : {std::pair<index_t, index_t>{16, 0}, {20, 12}, {7, 2}}) {
      expect_turned<double>(pairing, dim, dims, 1e-14);
      expect_turned<float>(pairing, dim, dims, 3e-6);
      expect_turned<Eigen::half>(pairing, dim, dims, 5e-3);
      expect_turned<Eigen::bfloat16>(pairing, dim, dims, 4e-2);
    }
  }
}

TEST(Rope, TurnsRowsOfARaggedBatchEachAtItsPosition) {
  rng random(4);
  std::vector<float> x(5 * 2 * 8);
  for (float& y : x) y = static_cast<float>(random.normal());
  const std::vector<float> before = x;
  const rope r(8);
  context ctx;
  const std::vector<index_t> positions{7, 3, 1000, 0, 3};
  r.rotate_each(tensor_view<float, 3>(x.data(), {5, 2, 8}), positions, ctx);
  for (std::size_t n = 0; n < 5; ++n) {
    std::vector<float> one(before.begin() + static_cast<std::ptrdiff_t>(n) * 16,
                           before.begin() + static_cast<std::ptrdiff_t>(n + 1) * 16);
    r.rotate(view(one.data(), {1, 1, 2, 8}), std::span<const index_t>(&positions[n], 1), ctx);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), x.begin() + static_cast<std::ptrdiff_t>(n) * 16));
  }
}

// Turns serve all layers and heads of a step.
TEST(Rope, TurnsManyTensorsByTheSameTurns) {
  rng random(6);
  const rope r(8);
  context ctx;
  const std::vector<index_t> first{3, 50}, all{3, 4, 5, 50, 51, 52};
  const auto turns = r.turns<float>(all, ctx);
  for (const index_t heads : {1, 4}) {
    std::vector<float> x(static_cast<std::size_t>(6 * heads * 8));
    for (float& y : x) y = static_cast<float>(random.normal());
    auto once = x, each = x;
    r.rotate(view(x.data(), {2, 3, heads, 8}), turns, ctx);
    r.rotate(view(once.data(), {2, 3, heads, 8}), first, ctx);
    r.rotate(tensor_view<float, 3>(each.data(), {6, heads, 8}), turns, ctx);
    EXPECT_EQ(x, once);
    EXPECT_EQ(x, each);
  }
}

// Keys turned on their way into a cache of T are those that rotate() has turned before, whatever the pieces.
template <class T, class Row>
void expect_turned_keys() {
  rng random(7);
  context ctx;
  const index_t heads = 2, dim = 40, tokens = 90;
  for (const auto pairing : {rope_pairing::neighbours, rope_pairing::halves}) {
    rope_options o;
    o.pairing = pairing, o.dims = 24;
    const rope r(dim, o);
    std::vector<Row> k;
    for (index_t i = 0; i < 2 * tokens * heads * dim; ++i)
      k.push_back(static_cast<Row>(static_cast<float>(random.normal())));
    auto rotated = k;
    const std::vector<index_t> first{0, 30};
    const auto rows = [&](std::vector<Row>& x) { return view(x.data(), {2, tokens, heads, dim}); };
    r.rotate(rows(rotated), first, ctx);
    kv_cache<T> expected(2, heads, tokens, dim), actual(2, heads, tokens, dim), one(2, heads, tokens, dim);
    paged_kv_cache<T> paged(1, 8, 32, heads, dim);
    const sequence_id id = paged.create();
    expected.append(rows(rotated), rows(rotated));
    for (index_t t = 0; t < tokens;) {
      const index_t piece = std::min<index_t>(random.between(1, 40), tokens - t);
      std::vector<index_t> positions(static_cast<std::size_t>(2 * piece));
      std::iota(positions.begin(), positions.begin() + piece, t);
      std::iota(positions.begin() + piece, positions.end(), t + 30);
      const auto of_both = r.turns<float>(positions, ctx);
      const auto turns = r.turns<float>(std::span(positions).subspan(static_cast<std::size_t>(piece)), ctx);
      actual.append(turned(slice(rows(k), 1, t, piece), of_both), slice(rows(rotated), 1, t, piece));
      const auto of_second = slice(slice(rows(k), 0, 1, 1), 1, t, piece);
      one.append(1, turned(of_second, turns), of_second);
      paged.append(id, turned(of_second, turns), of_second);
      t += piece;
    }
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t g = 0; g < heads; ++g) {
        for (index_t b = 0; b < 2; ++b) ASSERT_EQ(actual.key(b, t, g), expected.key(b, t, g)) << t;
        ASSERT_EQ(one.key(1, t, g), expected.key(1, t, g)) << t;
      }
    }
    const std::vector<float> q(8 * dim, 0.5f);
    std::vector<float> from_pages(q.size()), from_cache(q.size());
    const tensor_view<const float, 4> queries(q.data(), {1, 2, 4, dim});
    attention(queries, paged.layer(0), view(from_pages.data(), {1, 2, 4, dim}));
    const detail::part_of_source<kv_cache<T>> second(one, 1, 0, heads, tokens);
    attention(queries, second, view(from_cache.data(), {1, 2, 4, dim}));
    ASSERT_EQ(from_pages, from_cache);
  }
}
TEST(Rope, TurnsKeysOnTheirWayIntoACache) {
  expect_turned_keys<float, float>();
  expect_turned_keys<Eigen::bfloat16, float>();
  expect_turned_keys<Eigen::bfloat16, Eigen::bfloat16>();
  expect_turned_keys<q8, float>();
}

// Queries turned on their way into a call, and into a ragged batch, as well.
template <class T, class Row>
void expect_turned_queries() {
  rng random(8);
  context ctx;
  const index_t batch = 2, tokens = 5, heads = 6, dim = 20;
  const rope r(dim);
  std::vector<Row> q, kv;
  for (index_t i = 0; i < batch * tokens * heads * dim; ++i)
    q.push_back(static_cast<Row>(static_cast<float>(random.normal())));
  for (index_t i = 0; i < batch * 70 * 2 * dim; ++i)
    kv.push_back(static_cast<Row>(static_cast<float>(random.normal())));
  auto rotated = q;
  const auto rows = [&](std::vector<Row>& x) { return view(x.data(), {batch, tokens, heads, dim}); };
  const std::vector<index_t> first{65, 7};
  r.rotate(rows(rotated), first, ctx);
  std::vector<index_t> positions;
  for (const index_t p : first)
    for (index_t s = 0; s < tokens; ++s) positions.push_back(p + s);
  const auto turns = r.turns<accumulator_t<Row>>(positions, ctx);
  kv_cache<T> cache(batch, 2, 70, dim);
  cache.append(view(kv.data(), {batch, 70, 2, dim}), view(kv.data(), {batch, 70, 2, dim}));
  std::vector<Row> expected(q.size()), actual(q.size()), ragged(q.size());
  attention_options options;
  options.query_offsets = first, options.causal = true;
  attention(rows(rotated), cache, rows(expected), options, ctx);
  attention(turned(rows(q), turns), cache, rows(actual), options, ctx);
  EXPECT_EQ(std::memcmp(actual.data(), expected.data(), q.size() * sizeof(Row)), 0);
  const std::vector<sequence_id> sequences{sequence_id{0}, sequence_id{1}};
  const std::vector<index_t> offsets{0, tokens, 2 * tokens};
  batch_options of_batch;
  of_batch.common.causal = true, of_batch.query_offsets = first;
  batch_attention(turned(tensor_view<const Row, 3>(q.data(), {batch * tokens, heads, dim}), turns), offsets, cache,
                  sequences, tensor_view<Row, 3>(ragged.data(), {batch * tokens, heads, dim}), of_batch, ctx);
  EXPECT_EQ(std::memcmp(ragged.data(), expected.data(), q.size() * sizeof(Row)), 0);
}
TEST(Rope, TurnsQueriesOnTheirWayIntoACall) {
  expect_turned_queries<float, float>();
  expect_turned_queries<double, double>();
  expect_turned_queries<Eigen::half, float>();
  expect_turned_queries<q8, float>();
}

// What it is for.
TEST(Rope, MakesProductsDependOnDistancesAlone) {
  rng random(5);
  std::vector<double> q(32), k(32);
  for (std::vector<double>* x : {&q, &k})
    for (double& y : *x) y = random.normal();
  rope_options o;
  o.scaling = rope_scaling::llama3, o.factor = 8, o.trained_length = 64;
  const rope r(32, o);
  context ctx;
  const auto product = [&](index_t of_q, index_t of_k) {
    auto a = q, b = k;
    r.rotate(view(a.data(), {1, 1, 1, 32}), std::span<const index_t>(&of_q, 1), ctx);
    r.rotate(view(b.data(), {1, 1, 1, 32}), std::span<const index_t>(&of_k, 1), ctx);
    double sum = 0;
    for (std::size_t d = 0; d < 32; ++d) sum += a[d] * b[d];
    return sum;
  };
  EXPECT_NEAR(product(10, 3), product(1010, 1003), 1e-10);
  EXPECT_NEAR(product(-4, 3), product(0, 7), 1e-10);
  EXPECT_GT(std::abs(product(10, 3) - product(10, 4)), 1e-3);
}

TEST(Rope, RefusesTurnsOfOtherRows) {
  context ctx;
  const rope r(8);
  const std::vector<index_t> positions{0, 1, 2};
  const auto turns = r.turns<float>(positions, ctx);
  const rope_turns<float> too_wide(2, 5, rope_pairing::neighbours);
  std::vector<float> x(2 * 8, 1.0f), out(2 * 8, 9.0f);
  const auto rows = view(x.data(), {1, 2, 1, 8});
  kv_cache<float> cache(1, 1, 8, 8);
  EXPECT_EQ(code_of([&] { cache.append(turned(rows, turns), rows); }), errc::shape);
  EXPECT_EQ(code_of([&] { cache.append(turned(rows, too_wide), rows); }), errc::shape);
  EXPECT_EQ(cache.length(0), 0);
  paged_kv_cache<float> paged(1, 2, 16, 1, 8);
  const sequence_id id = paged.create();
  EXPECT_EQ(code_of([&] { paged.append(id, turned(rows, turns), rows); }), errc::shape);
  EXPECT_EQ(paged.length(id), 0);
  cache.append(rows, rows);
  EXPECT_EQ(code_of([&] { attention(turned(rows, turns), cache, view(out.data(), {1, 2, 1, 8})); }), errc::shape);
  EXPECT_EQ(check(turned(rows, turns), cache, view(out.data(), {1, 2, 1, 8})), errc::shape);
  EXPECT_EQ(out, std::vector<float>(16, 9.0f));
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Rope, RefusesWhatCannotBe) {
  const auto with = [](const auto& change, index_t dim = 16) {
    rope_options o;
    o.trained_length = 100, o.factor = 2;
    change(o);
    try {
      const rope r(dim, o);
    } catch (const error& e) {
      return e.code();
    }
    return errc::ok;
  };
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(with([](auto&) {}), errc::ok);
  EXPECT_EQ(with([](auto&) {}, 0), errc::shape);
  EXPECT_EQ(with([](auto&) {}, 15), errc::option);
  EXPECT_EQ(with([](auto& o) { o.dims = 14; }, 15), errc::ok);
  EXPECT_EQ(with([](auto& o) { o.dims = 18; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.dims = -2; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.dims = 3; }), errc::option);
  for (const double base : {1.0, -5.0, infinity, nan})
    EXPECT_EQ(with([&](auto& o) { o.base = base; }), errc::option) << base;
  for (const double factor : {0.5, -1.0, infinity, nan})
    EXPECT_EQ(with([&](auto& o) { o.factor = factor; }), errc::option) << factor;
  EXPECT_EQ(with([](auto& o) { o.scaling = static_cast<rope_scaling>(7); }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.pairing = static_cast<rope_pairing>(2); }), errc::option);
  for (const auto scaling : {rope_scaling::yarn, rope_scaling::llama3})
    EXPECT_EQ(with([&](auto& o) { o.scaling = scaling, o.trained_length = 0; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.scaling = rope_scaling::yarn, o.beta_fast = 1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.scaling = rope_scaling::llama3, o.high_factor = 1; }), errc::option);

  const rope r(8);
  context ctx;
  std::vector<float> x(2 * 3 * 2 * 8, 1.0f);
  const std::vector<index_t> two{0, 0}, far{0, index_t{1} << 61};
  const auto rotate = [&](const tensor_view<float, 4>& rows, std::span<const index_t> positions) {
    try {
      r.rotate(rows, positions, ctx);
    } catch (const error& e) {
      EXPECT_EQ(std::count(x.begin(), x.end(), 1.0f), static_cast<std::ptrdiff_t>(x.size()));
      return e.code();
    }
    return errc::ok;
  };
  EXPECT_EQ(rotate({x.data(), {2, 3, 2, 8}}, std::span(two).first(1)), errc::shape);
  EXPECT_EQ(rotate({x.data(), {2, 3, 4, 4}}, two), errc::shape);
  EXPECT_EQ(rotate({x.data(), {2, 3, 2, 8}}, far), errc::range);
  EXPECT_EQ(rotate({x.data(), {2, 3, 2, 8}, {0, 16, 8, 1}}, two), errc::stride);
  EXPECT_EQ(rotate({x.data(), {2, 0, 2, 8}}, two), errc::ok);
  const std::vector<index_t> positions(6);
  const tensor_view<float, 4> rows(x.data(), {2, 3, 2, 8});
  const rope_turns<float> few = r.turns<float>(two, ctx), of_other_dims = rope(16).turns<float>(positions, ctx);
  EXPECT_THROW(r.rotate(rows, few, ctx), error);
  EXPECT_THROW(r.rotate(rows, of_other_dims, ctx), error);
  EXPECT_THROW((void)r.turns<float>(far, ctx), error);
}
#endif

// gpt-oss: YaRN without whole pairs (its published code and configuration).
TEST(RopeFrequencies, OfYarnWithoutTruncationAreThoseOfGptOss) {
  const rope_frequencies f = yarn_frequencies(
      64, {.base = 150000, .factor = 32, .trained_length = 4096, .beta_fast = 32, .beta_slow = 1, .truncate = false});
  ASSERT_EQ(f.radians.size(), 32u);
  EXPECT_NEAR(f.radians[9], 3.170570e-02, 5e-9);  // as published, to its last digit
  EXPECT_NEAR(f.radians[13], 3.860359e-03, 5e-10);
  EXPECT_EQ(f.radians[0], 1);
  EXPECT_NEAR(f.radians[31], std::pow(150000.0, -62.0 / 64) / 32, 1e-20);
  EXPECT_DOUBLE_EQ(f.magnitude, 0.1 * std::log(32) + 1);
  // With whole pairs it is another model.
  EXPECT_GT(
      std::abs(yarn_frequencies(64, {.base = 150000, .factor = 32, .trained_length = 4096}).radians[9] - f.radians[9]),
      5e-5);
}

// DeepSeek-V3: mscale and mscale_all_dim alike; the softmax's scale carries the square.
TEST(RopeFrequencies, OfDeepSeekLeaveTheMagnitudeToTheScale) {
  const yarn_options o{.base = 10000, .factor = 40, .trained_length = 4096, .mscale = 1, .mscale_all_dim = 1};
  EXPECT_EQ(yarn_frequencies(64, o).magnitude, 1);
  const double m = 0.1 * std::log(40) + 1;
  EXPECT_DOUBLE_EQ(yarn_score_factor(o), m * m);
  EXPECT_EQ(yarn_score_factor({.factor = 40, .trained_length = 4096}), 1);
  // DeepSeek-V2: 0.707 both.
  EXPECT_EQ(
      yarn_frequencies(64, {.factor = 40, .trained_length = 4096, .mscale = 0.707, .mscale_all_dim = 0.707}).magnitude,
      1);
}

// The ramp ends within the pairs there are, however few turns the trained length has, and never divides by nothing.
TEST(RopeFrequencies, OfYarnClampItsRamp) {
  // Pairs of 32 turns would lie before the first one: -9.6 of 32, and the ramp starts at 0.
  const rope_frequencies few = yarn_frequencies(64, {.factor = 4, .trained_length = 10, .truncate = false});
  EXPECT_EQ(few.radians[0], 1);
  const double high = 64 * std::log(10 / (2 * std::numbers::pi)) / (2 * std::log(10000.0)), ramp = 1 / high;
  EXPECT_NEAR(few.radians[1], std::pow(10000.0, -2.0 / 64) * (ramp >= 1 ? 0.25 : 1 - 0.75 * ramp), 1e-12);
  EXPECT_NEAR(few.radians[2], std::pow(10000.0, -4.0 / 64) / 4, 1e-12);
  // Pairs of one turn would lie beyond the last one that there could be: 63 is where the ramp ends, of 32 pairs.
  const yarn_options many{.base = 10, .factor = 4, .trained_length = 1 << 30, .truncate = false};
  const double low = 64 * std::log((1 << 30) / (32 * 2 * std::numbers::pi)) / (2 * std::log(10.0));
  ASSERT_GT(low, 63);
  for (std::size_t i = 0; i < 32; ++i)
    EXPECT_NEAR(yarn_frequencies(64, many).radians[i], std::pow(10.0, -static_cast<double>(i) / 32), 1e-12);
}

// Phi-3's LongRoPE: lists of divisors, and a magnitude by the lengths or of the model's own.
TEST(RopeFrequencies, OfLongRopeDivideByTheListOfTheLength) {
  const std::vector<double> short_list{1, 1.5, 2, 2.5}, long_list{1, 8, 16, 32};
  longrope_options o{.short_factors = short_list, .long_factors = long_list, .trained_length = 4096, .factor = 32};
  const rope_frequencies near = longrope_frequencies(8, o, 4096), far = longrope_frequencies(8, o, 4097);
  for (std::size_t i = 0; i < 4; ++i) {
    const double own = std::pow(10000.0, -static_cast<double>(i) / 4);
    EXPECT_DOUBLE_EQ(near.radians[i], own / short_list[i]);
    EXPECT_DOUBLE_EQ(far.radians[i], own / long_list[i]);
  }
  EXPECT_DOUBLE_EQ(near.magnitude, std::sqrt(1 + std::log(32) / std::log(4096)));
  EXPECT_DOUBLE_EQ(near.magnitude, far.magnitude);
  o.short_magnitude = 1, o.long_magnitude = 1.243163121016122;
  EXPECT_EQ(longrope_frequencies(8, o, 1).magnitude, 1);
  EXPECT_EQ(longrope_frequencies(8, o, 9999).magnitude, 1.243163121016122);
}

TEST(RopeFrequencies, OfDynamicNtkGrowWithTheText) {
  const auto own = own_frequencies(64, 10000), same = dynamic_ntk_frequencies(64, 10000, 2, 2048, 2048),
             longer = dynamic_ntk_frequencies(64, 10000, 2, 2048, 4096);
  EXPECT_EQ(own.radians, same.radians);
  EXPECT_NEAR(longer.radians[31], own.radians[31] / 3, 1e-15);  // 2 * 2 - 1
}

// A rope of any list turns by it, and grows by its magnitude.
TEST(Rope, TakesAnyFrequencies) {
  const rope own(10, rope_frequencies{{0.5, -2, 0}, 3}, rope_pairing::halves);
  EXPECT_EQ(rope(64, {}).magnitude(), 1);  // options
  EXPECT_EQ(own.magnitude(), 3);
  std::vector<double> x(10, 0.0);
  x[0] = 1, x[4] = 1, x[9] = 7;  // pairs (0, 3), (1, 4), (2, 5)
  context ctx;
  const index_t position = 4;
  own.rotate(view(x.data(), {1, 1, 1, 10}), std::span<const index_t>(&position, 1), ctx);
  EXPECT_NEAR(x[0], 3 * std::cos(2), 1e-14);
  EXPECT_NEAR(x[3], 3 * std::sin(2), 1e-14);
  EXPECT_NEAR(x[1], -3 * std::sin(-8), 1e-14);
  EXPECT_NEAR(x[4], 3 * std::cos(-8), 1e-14);
  EXPECT_EQ(x[9], 7);
  const auto of_temporary = rope(64).frequencies();
  EXPECT_EQ(of_temporary.size(), 32u);
  EXPECT_EQ(of_temporary, own_frequencies(64).radians);
}

// Pairs of a section turn by the position on their axis; with one position on all axes, by it.
TEST(Rope, TurnsSectionsByTheirAxes) {
  const rope embedding(16);
  const std::vector<index_t> sections{2, 3, 3};
  const auto axes = axes_of_sections(sections);
  EXPECT_EQ(axes, (std::vector<index_t>{0, 0, 1, 1, 1, 2, 2, 2}));
  const std::vector<index_t> positions{5, 6, /* height */ 9, 2, /* width */ 0, 100};
  context ctx;
  const tensor_view<const index_t, 2> of_tokens(positions.data(), {3, 2});
  const auto turns = embedding.turns_of_axes<double>(of_tokens, axes, ctx);
  for (index_t token = 0; token < 2; ++token)
    for (index_t i = 0; i < 8; ++i) {
      const index_t axis = i < 2 ? 0 : i < 5 ? 1 : 2;
      const double angle = static_cast<double>(positions[static_cast<std::size_t>(axis * 2 + token)]) *
                           std::pow(10000.0, -static_cast<double>(i) / 8);
      EXPECT_NEAR(turns.cosines(token)[i], std::cos(angle), 1e-12);
      EXPECT_NEAR(turns.sines(token)[i], std::sin(angle), 1e-12);
    }
  EXPECT_EQ(
      code_of([&] { static_cast<void>(embedding.turns_of_axes<double>(of_tokens, std::vector<index_t>(7), ctx)); }),
      errc::shape);
  EXPECT_EQ(
      code_of([&] { static_cast<void>(embedding.turns_of_axes<double>(of_tokens, std::vector<index_t>(8, 3), ctx)); }),
      errc::range);
}

TEST(RopeFrequencies, AreRefusedWhereNumbersMakeNoSense) {
  const auto refuses = [](const auto& f) { return code_of([&] { static_cast<void>(f()); }); };
  const std::vector<double> two{1, 2}, zeros{0, 0};
  EXPECT_EQ(refuses([] { return own_frequencies(7); }), errc::option);
  EXPECT_EQ(refuses([] { return own_frequencies(8, 0.5); }), errc::option);
  EXPECT_EQ(refuses([] { return linear_frequencies(8, 10000, 0.5); }), errc::option);
  EXPECT_EQ(refuses([] { return yarn_frequencies(8, {.factor = 2}); }), errc::option);
  EXPECT_EQ(refuses([] { return yarn_frequencies(8, {.trained_length = 9, .beta_fast = 1, .beta_slow = 2}); }),
            errc::option);
  EXPECT_EQ(refuses([] { return yarn_frequencies(8, {.trained_length = 9, .mscale = -1}); }), errc::option);
  EXPECT_EQ(refuses([] { return llama3_frequencies(8, {.trained_length = 0}); }), errc::option);
  EXPECT_EQ(refuses([&] { return longrope_frequencies(8, {.short_factors = two, .trained_length = 9}, 3); }),
            errc::shape);
  EXPECT_EQ(refuses([&] { return longrope_frequencies(4, {.short_factors = zeros, .trained_length = 9}, 3); }),
            errc::option);
  EXPECT_EQ(refuses([] { return dynamic_ntk_frequencies(8, 10000, 2, 0, 5); }), errc::option);
  EXPECT_EQ(refuses([] { return axes_of_sections(std::vector<index_t>{3, -1}); }), errc::option);
  EXPECT_EQ(refuses([] { return rope(8, rope_frequencies{std::vector<double>(5), 1}); }), errc::shape);
  EXPECT_EQ(refuses([] { return rope(8, rope_frequencies{{1, std::nan("")}, 1}); }), errc::option);
  EXPECT_EQ(refuses([] {
              return rope(8, rope_frequencies{{1}, std::numeric_limits<double>::infinity()});
            }),
            errc::option);
}

}  // namespace
}  // namespace gqa::test
