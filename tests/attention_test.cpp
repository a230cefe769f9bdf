// SPDX-License-Identifier: Apache-2.0
// The edge cases of attention() that go wrong elsewhere, one test each.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using float_call = operands<float, float>;

float_call make_call(shape n, unsigned options = 0, layout order = layout::bshd) {
  return float_call(attention_case{n, options, order});
}

attended<float> run(const float_call& in) {
  context ctx;
  return test::run(in, ctx);
}

::testing::AssertionResult matches(const float_call& in) {
  context ctx;
  return matches_oracle(in, ctx);
}

bool all_zero(const std::vector<float>& values) {
  for (const float x : values) {
    if (x != 0 || std::signbit(x)) return false;
  }
  return true;
}

bool all_finite(const std::vector<float>& values) {
  for (const float x : values) {
    if (!std::isfinite(x)) return false;
  }
  return true;
}

// --- rows that see nothing ---

TEST(FullyMaskedRow, GivesZeroAndMinusInfinity) {
  auto in = make_call({1, 3, 70, 2, 1, 16, 16}, with_mask);
  std::fill_n(in.mask.get(), 2 * 3 * 70, true);
  std::fill_n(in.mask.get() + 70, 70, false);  // head 0, query 1
  const auto got = run(in);
  EXPECT_TRUE(all_zero({got.out.begin() + 2 * 16, got.out.begin() + 3 * 16}));
  EXPECT_EQ(got.lse[2], -inf);
  EXPECT_TRUE(std::isfinite(got.lse[3]));
  EXPECT_TRUE(matches(in));
}

TEST(FullyMaskedRow, WithASinkGivesZeroAndTheSink) {
  auto in = make_call({1, 2, 70, 2, 1, 16, 16}, with_mask);
  std::fill_n(in.mask.get(), 2 * 2 * 70, false);
  const std::vector<float> sinks{0.7f, -inf};
  in.options.sinks = sinks;
  const auto got = run(in);
  EXPECT_TRUE(all_zero(got.out));
  EXPECT_EQ(got.lse, (std::vector<float>{0.7f, -inf, 0.7f, -inf}));
}

TEST(FullyMaskedRow, HasNoNegativeZero) {
  auto in = make_call({1, 1, 64, 1, 1, 16, 16});
  for (auto& v : in.v.data()) v = -0.0f;
  EXPECT_TRUE(all_zero(run(in).out));
}

// A mean below half of the least half is a zero, and has no sign either.
TEST(SixteenBits, RoundToZeroWithoutASign) {
  using half = Eigen::half;
  operands<half, half> in(attention_case{{1, 1, 64, 1, 1, 16, 16}, 0, layout::bshd});
  std::fill(in.v.data().begin(), in.v.data().end(), half(0.0f));
  std::fill_n(in.v.data().begin(), 16, static_cast<half>(-0x1p-24f));
  std::fill(in.q.data().begin(), in.q.data().end(), half(0.0f));
  context ctx;
  const auto got = test::run(in, ctx);
  for (const half x : got.out) EXPECT_EQ(Eigen::numext::bit_cast<std::uint16_t>(x), 0);
}

TEST(FullyMaskedRow, OfBiasesOfMinusInfinity) {
  auto in = make_call({1, 2, 130, 2, 2, 16, 16}, with_bias);
  for (auto& x : in.bias) x = -inf;
  const auto got = run(in);
  EXPECT_TRUE(all_zero(got.out));
  EXPECT_EQ(got.lse, std::vector<float>(4, -inf));
}

// --- extreme scores ---

::testing::AssertionResult matches_large_scores(const float_call& in, double at_least) {
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  if (expected.max_score < at_least) return ::testing::AssertionFailure() << "largest score " << expected.max_score;
  return matches(in);
}

// The bound of docs/01 for keys that are nearly the same, all of whose products have one sign: no sum cancels, each
// weight matters, and what scores are off by grows with them. Its oracle's form, and that from the head dim alone.
template <class T>
double worst_share_of_bound(double score, index_t keys, index_t dim, std::uint64_t seed) {
  using A = accumulator_t<T>;
  operands<T, T> in(attention_case{{1, 4, keys, 4, 2, dim, 16}, 0, layout::bshd, seed});
  in.options.scale = 1.0;
  const double each = std::sqrt(score / static_cast<double>(dim));
  rng random(seed);
  for (auto& x : in.q.data()) x = static_cast<T>(each * (1 + 0.2 * random.uniform()));
  for (auto& x : in.k.data()) x = static_cast<T>(each);
  for (index_t t = 0; t < keys; ++t)
    for (index_t g = 0; g < 2; ++g)
      for (index_t d = 0; d < dim; ++d) in.k.view()(0, t, g, d) = static_cast<T>(each * (1 + random.uniform() / score));
  context ctx;
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  const auto got = test::run(in, ctx);
  comparison of_row, of_dim;
  for (std::size_t i = 0; i < got.out.size(); ++i) {
    of_row.add(static_cast<double>(got.out[i]), expected.out[i], expected.out_bound(i), "out");
    of_dim.add(static_cast<double>(got.out[i]), expected.out[i],
               output_bound<A>(dim, expected.max_magnitude, expected.max_value), "out");
  }
  for (std::size_t i = 0; i < got.lse.size(); ++i) {
    of_row.add(static_cast<double>(got.lse[i]), expected.lse[i], expected.lse_bound(i), "lse");
    of_dim.add(static_cast<double>(got.lse[i]), expected.lse[i], lse_bound<A>(dim, expected.max_magnitude), "lse");
  }
  EXPECT_TRUE(of_row.result()) << "scores of " << score << ", dim " << dim << ", " << keys << " keys";
  EXPECT_TRUE(of_dim.result()) << "scores of " << score << ", dim " << dim << ", " << keys << " keys";
  return of_row.worst();
}
TEST(ExtremeScores, OfNearlyEqualKeysAreWithinTheBound) {
  double worst = 0;
  for (const double score : {10.0, 1e3, 1e4, 1e5})
    for (const index_t dim : {8, 64, 128, 80})
      for (const index_t keys : {4, 70, 1100}) {
        worst = std::max(worst, worst_share_of_bound<float>(score, keys, dim, 5));
        worst_share_of_bound<double>(score * 1e6, keys, dim, 6);
      }
  EXPECT_GT(worst, 0.02);  // a bound that nothing comes near would hold nothing
  std::printf("largest share of the bound: %g\n", worst);
}

// Queries and keys with one large coordinate: scores near +-1e5.
TEST(ExtremeScores, OfPlusAndMinusOneHundredThousand) {
  for (const double sign : {1.0, -1.0}) {
    auto in = make_call({1, 5, 300, 4, 2, 64, 64});
    for (index_t h = 0; h < 4; ++h)
      for (index_t s = 0; s < 5; ++s) in.q.view()(0, s, h, 0) = static_cast<float>(sign * 1000);
    for (index_t t = 0; t < 300; ++t)
      for (index_t g = 0; g < 2; ++g) in.k.view()(0, t, g, 0) = 800 + static_cast<float>(t % 7);
    EXPECT_TRUE(matches_large_scores(in, 9e4));
  }
}

TEST(ExtremeScores, AllVeryNegative) {
  auto in = make_call({1, 3, 200, 2, 1, 32, 32});
  in.options.scale = 1.0;
  for (index_t t = 0; t < 200; ++t) in.k.view()(0, t, 0, 0) = -3000;
  for (index_t s = 0; s < 3; ++s)
    for (index_t h = 0; h < 2; ++h) in.q.view()(0, s, h, 0) = 30;
  EXPECT_TRUE(matches_large_scores(in, 8.9e4));
}

TEST(ExtremeScores, OneKeyFarAboveAllOthers) {
  auto in = make_call({1, 1, 500, 1, 1, 16, 16});
  for (index_t d = 0; d < 16; ++d) in.k.view()(0, 333, 0, d) = 100 * in.q.view()(0, 0, 0, d);
  const auto got = run(in);
  for (index_t e = 0; e < 16; ++e) EXPECT_EQ(got.out[static_cast<std::size_t>(e)], in.v.view()(0, 333, 0, e));
}

TEST(ConstantValues, ComeOutAsTheyWere) {
  for (const index_t t : {1, 64, 65, 1000, 3000}) {
    auto in = make_call({1, 4, t, 4, 2, 64, 64});
    for (auto& v : in.v.data()) v = 1;
    for (const float x : run(in).out) EXPECT_EQ(x, 1.0f) << t;
    // Other values round differently weight by weight.
    for (auto& v : in.v.data()) v = 0.3f;
    for (const float x : run(in).out) EXPECT_NEAR(static_cast<double>(x), 0.3, 16 * 0x1p-24) << t;
  }
}

// Weights are at most 1, so that sums reach no further than values times keys.
TEST(ConstantValues, MayBeHuge) {
  for (const index_t t : {1, 64, 1000}) {
    auto in = make_call({1, 40, t, 4, 2, 64, 64});
    const float value = std::numeric_limits<float>::max() / static_cast<float>(t + 1);
    for (auto& v : in.v.data()) v = value;
    for (const float x : run(in).out) EXPECT_NEAR(static_cast<double>(x / value), 1.0, 16 * 0x1p-24) << t;
  }
}

TEST(EqualScores, AverageTheValues) {
  auto in = make_call({1, 1, 4096, 1, 1, 8, 8});
  in.options.scale = 0.0;
  for (index_t t = 0; t < 4096; ++t) in.v.view()(0, t, 0, 0) = static_cast<float>(t % 2);
  const auto got = run(in);
  EXPECT_EQ(got.out[0], 0.5f);
  EXPECT_NEAR(static_cast<double>(got.lse[0]), std::log(4096.0), lse_bound<float>(0, std::log(4096.0)));
}

// Adding one vector to all keys adds the same number to all scores of a row: nothing changes but the lse.
TEST(Softmax, IsInvariantToAConstantAddedToAllKeys) {
  auto in = make_call({1, 6, 150, 4, 2, 32, 32}, with_causal);
  const auto before = run(in);
  for (index_t t = 0; t < 150; ++t)
    for (index_t g = 0; g < 2; ++g)
      for (index_t d = 0; d < 32; ++d) in.k.view()(0, t, g, d) += 0.5f * static_cast<float>(d % 3);
  const auto after = run(in);
  EXPECT_TRUE(matches(in));
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);  // off more than before
  for (std::size_t i = 0; i < after.out.size(); ++i)
    EXPECT_NEAR(static_cast<double>(before.out[i]), static_cast<double>(after.out[i]), 2 * expected.out_bound(i));
}

TEST(Softmax, DoesNotDependOnTheOrderOfKeysBeyondRounding) {
  auto in = make_call({1, 2, 333, 2, 2, 24, 24});
  const auto before = run(in);
  auto reversed = make_call({1, 2, 333, 2, 2, 24, 24});
  for (index_t t = 0; t < 333; ++t)
    for (index_t g = 0; g < 2; ++g)
      for (index_t d = 0; d < 24; ++d) {
        reversed.k.view()(0, t, g, d) = in.k.view()(0, 332 - t, g, d);
        reversed.v.view()(0, t, g, d) = in.v.view()(0, 332 - t, g, d);
      }
  const auto after = run(reversed);
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  for (std::size_t i = 0; i < after.out.size(); ++i)
    EXPECT_NEAR(static_cast<double>(before.out[i]), static_cast<double>(after.out[i]), 2 * expected.out_bound(i));
}

// --- positions ---

TEST(Causal, WithFewerQueriesThanKeysIsBottomRight) {
  auto in = make_call({1, 2, 5, 1, 1, 8, 8}, with_causal);
  EXPECT_TRUE(matches(in));
  for (index_t d = 0; d < 8; ++d) in.v.view()(0, 4, 0, d) = 1e30f;  // seen by the last query only
  const auto got = run(in);
  EXPECT_LT(std::abs(got.out[0]), 1e3f);
  EXPECT_GT(std::abs(got.out[8]), 1e20f);
}

TEST(Causal, WithMoreQueriesThanKeysLeavesTheFirstRowsEmpty) {
  auto in = make_call({1, 7, 4, 2, 1, 8, 8}, with_causal);
  const auto got = run(in);
  for (std::size_t i = 0; i < 3 * 2; ++i) EXPECT_EQ(got.lse[i], -inf);
  for (std::size_t i = 3 * 2; i < 7 * 2; ++i) EXPECT_TRUE(std::isfinite(got.lse[i]));
  EXPECT_TRUE(matches(in));
}

TEST(Causal, WithOffsetZeroIsTopLeft) {
  auto in = make_call({1, 3, 9, 1, 1, 8, 8}, with_causal);
  in.options.query_offset = 0;
  const auto got = run(in);
  for (index_t e = 0; e < 8; ++e) EXPECT_EQ(got.out[static_cast<std::size_t>(e)], in.v.view()(0, 0, 0, e));
  EXPECT_TRUE(matches(in));
}

TEST(Causal, WithANegativeOffset) {
  auto in = make_call({2, 70, 66, 2, 1, 8, 8}, with_causal);
  in.options.query_offset = -3;
  EXPECT_EQ(run(in).lse[5], -inf);
  EXPECT_TRUE(matches(in));
}

TEST(Causal, AtEveryDistanceAroundATile) {
  for (index_t t = 60; t <= 68; ++t)
    for (const index_t s : {1, 2, 3, 61, 64, 66}) EXPECT_TRUE(matches(make_call({1, s, t, 3, 1, 16, 16}, with_causal)));
}

TEST(ZeroExtents, AreLegal) {
  for (const shape n : {shape{0, 3, 4, 2, 1, 8, 8}, shape{2, 0, 4, 2, 1, 8, 8}, shape{2, 3, 0, 2, 1, 8, 8}}) {
    auto in = make_call(n, with_causal);
    const auto got = run(in);
    if (n.b * n.s > 0) {
      EXPECT_TRUE(all_zero(got.out));
      EXPECT_EQ(got.lse, std::vector<float>(got.lse.size(), -inf));
    }
  }
}

TEST(ZeroExtents, WithNoKeysAndASinkGiveTheSink) {
  auto in = make_call({1, 1, 0, 1, 1, 8, 8});
  const std::vector<float> sinks{1.5f};
  in.options.sinks = sinks;
  EXPECT_EQ(run(in).lse[0], 1.5f);
}

// --- windows ---

// A window's keys, counted through values that are powers of two of their position.
TEST(Window, EndsAreInclusiveOnBothSides) {
  for (const index_t left : {-1, 0, 1, 2, 5})
    for (const index_t right : {-1, 0, 1, 3}) {
      auto in = make_call({1, 9, 9, 1, 1, 4, 4});
      in.options.scale = 0.0;  // equal weights
      in.options.window = {left, right};
      for (index_t t = 0; t < 9; ++t)
        for (index_t e = 0; e < 4; ++e) in.v.view()(0, t, 0, e) = static_cast<float>(1 << t);
      const auto got = run(in);
      for (index_t s = 0; s < 9; ++s) {
        const index_t first = left < 0 ? 0 : std::max<index_t>(s - left, 0);
        const index_t last = right < 0 ? 8 : std::min<index_t>(s + right, 8);
        double sum = 0;
        for (index_t t = first; t <= last; ++t) sum += 1 << t;
        EXPECT_NEAR(static_cast<double>(got.out[static_cast<std::size_t>(s * 4)]),
                    sum / static_cast<double>(last - first + 1), output_bound<float>(0, 0, 1 << 8))
            << "query " << s << " window {" << left << ", " << right << "}";
      }
    }
}

TEST(Window, OfSelfOnly) {
  auto in = make_call({1, 70, 70, 2, 1, 8, 8});
  in.options.window = {0, 0};
  const auto got = run(in);
  for (index_t s = 0; s < 70; ++s)
    for (index_t e = 0; e < 8; ++e) EXPECT_EQ(got.out[static_cast<std::size_t>(s * 16 + e)], in.v.view()(0, s, 0, e));
}

TEST(Window, WithFewerQueriesThanKeys) {
  auto in = make_call({1, 5, 200, 2, 1, 16, 16}, with_causal);
  in.options.window = {20, 0};
  EXPECT_TRUE(matches(in));
}

TEST(Window, ThatHidesTheWholeFirstTile) {
  auto in = make_call({1, 3, 300, 2, 1, 16, 16}, with_causal);
  in.options.window = {64, -1};
  for (index_t t = 0; t < 230; ++t)
    for (index_t d = 0; d < 16; ++d) in.k.view()(0, t, 0, d) = in.v.view()(0, t, 0, d) = nan;
  const auto got = run(in);
  EXPECT_TRUE(all_finite(got.out));
  EXPECT_TRUE(matches(in));
}

TEST(Window, WithSinks) {
  auto in = make_call({2, 5, 1300, 4, 2, 16, 16}, with_causal | with_sinks);
  in.options.window = {100, 0};
  EXPECT_TRUE(matches(in));
}

TEST(Window, OfTheLargestNumbers) {
  auto in = make_call({1, 5, 70, 2, 1, 16, 16});
  const auto all = run(in);
  in.options.window = {std::numeric_limits<index_t>::max(), std::numeric_limits<index_t>::max()};
  EXPECT_TRUE(run(in).same_bits(all));
}

// --- sinks, softcap, biases ---

TEST(Sinks, AreCountedOnceAcrossSplits) {
  auto in = make_call({1, 1, 5000, 2, 1, 16, 16}, with_causal);
  const std::vector<float> sinks{9.0f, 3.0f};
  in.options.sinks = sinks;
  EXPECT_TRUE(matches(in));
  for (const index_t left : {50, 1100, 2500}) {  // splits that the window skips
    in.options.window = {left, 0};
    EXPECT_TRUE(matches(in));
  }
}

TEST(Sinks, OfMinusInfinityAreNone) {
  auto in = make_call({1, 3, 100, 2, 1, 16, 16});
  const auto without = run(in);
  const std::vector<float> sinks(2, -inf);
  in.options.sinks = sinks;
  EXPECT_TRUE(run(in).same_bits(without));
}

TEST(Softcap, ComesBeforePaddingAndMask) {
  auto in = make_call({2, 3, 100, 2, 1, 16, 16}, with_softcap | with_mask | with_lengths);
  EXPECT_TRUE(matches(in));
  in.options.softcap = 0.01;  // all visible scores nearly equal; hidden ones still weigh nothing
  EXPECT_TRUE(matches(in));
}

TEST(Alibi, WithSoftcapAndOffset) {
  auto in = make_call({2, 5, 130, 6, 2, 16, 16}, with_alibi | with_softcap | with_offset | with_causal);
  EXPECT_TRUE(matches(in));
}

TEST(Bias, OfMinusInfinityHides) {
  auto in = make_call({1, 4, 130, 2, 1, 16, 16}, with_bias);
  for (index_t t = 0; t < 130; ++t) {
    if (t % 3 == 0) continue;
    for (index_t h = 0; h < 2; ++h)
      for (index_t s = 0; s < 4; ++s) in.bias[static_cast<std::size_t>((h * 4 + s) * 130 + t)] = -inf;
    for (index_t d = 0; d < 16; ++d) in.v.view()(0, t, 0, d) = nan;
  }
  EXPECT_TRUE(all_finite(run(in).out));
  EXPECT_TRUE(matches(in));
}

// Only -inf hides a key: finite biases, however far down, are scores as others.
TEST(Bias, OfTheLowestNumbersHidesNothing) {
  constexpr float low = -3.4e38f;
  for (const index_t keys : {70, 1100}) {
    auto in = make_call({1, 2, keys, 2, 1, 16, 16}, with_bias);
    for (auto& x : in.q.data()) x = 0;
    for (auto& x : in.bias) x = -inf;
    for (std::size_t row = 0; row < 4; ++row) in.bias[row * static_cast<std::size_t>(keys) + 66] = low;
    const auto one = run(in);
    for (index_t i = 0; i < 4 * 16; ++i)
      EXPECT_EQ(one.out[static_cast<std::size_t>(i)], in.v.view()(0, 66, 0, i % 16)) << keys;
    EXPECT_EQ(one.lse, std::vector<float>(4, low));

    for (auto& x : in.bias) x = low;  // all alike
    EXPECT_TRUE(matches(in));
    EXPECT_EQ(run(in).lse, std::vector<float>(4, low));

    for (auto& x : in.bias) x = -low;
    EXPECT_TRUE(matches(in));
    EXPECT_EQ(run(in).lse, std::vector<float>(4, -low));

    for (auto& x : in.bias) x = low;  // one above all others
    for (std::size_t row = 0; row < 4; ++row) in.bias[row * static_cast<std::size_t>(keys) + 3] = -low;
    EXPECT_TRUE(matches(in));
  }
}

// Nor does a sum that leaves the range of floats, of terms that do not.
TEST(Bias, AddedToAScoreNeverBecomesInfinite) {
  for (const float sign : {-1.0f, 1.0f}) {
    auto in = make_call({1, 1, 70, 1, 1, 16, 16}, with_bias);
    in.options.scale = 1.0;
    for (auto& x : in.q.data()) x = 1e19f;
    for (auto& x : in.k.data()) x = sign * 1e18f;  // scores of 1.6e38
    for (auto& x : in.bias) x = -inf;
    in.bias[5] = sign * 3e38f;
    const auto got = run(in);
    for (index_t e = 0; e < 16; ++e) EXPECT_EQ(got.out[static_cast<std::size_t>(e)], in.v.view()(0, 5, 0, e));
  }
}

TEST(Alibi, OfTheLargestSlopesHidesNothing) {
  auto in = make_call({1, 1, 3, 1, 1, 16, 16});
  in.options.query_offset = 5;
  const std::vector<float> slopes{3e38f};
  in.options.alibi_slopes = slopes;
  for (auto& x : in.v.data()) x = 1;
  for (const float x : run(in).out) EXPECT_EQ(x, 1);
}

TEST(Sinks, OfTheLargestNumbers) {
  for (const bool with_rules : {false, true}) {
    auto in = make_call({1, 2, 70, 2, 1, 16, 16}, with_rules ? unsigned{with_softcap} : 0u);
    const std::vector<float> sinks{3.4e38f, -3.4e38f};
    in.options.sinks = sinks;
    const auto got = run(in);
    EXPECT_EQ(got.lse[0], 3.4e38f);
    EXPECT_TRUE(all_zero({got.out.begin(), got.out.begin() + 16}));
    in.options.sinks = {};
    const auto without = run(in);
    EXPECT_NEAR(static_cast<double>(got.lse[1]), static_cast<double>(without.lse[1]), 0x1p-21);
    EXPECT_EQ(0, std::memcmp(&got.out[16], &without.out[16], 16 * sizeof(float)));
  }
}

TEST(Scale, OfZeroAndBelow) {
  for (const double scale : {0.0, -0.3, -2.0}) {
    auto in = make_call({1, 4, 100, 4, 2, 16, 16}, with_causal);
    in.options.scale = scale;
    EXPECT_TRUE(matches(in));
  }
}

// --- NaN and infinities ---

// Dim 64 fills packets, so that few rows read whole tiles in place; 65 does not.
constexpr std::array<index_t, 2> packed_and_in_place = {65, 64};

// Everything a query may not see is poisoned, in keys and in values; not a bit may change.
TEST(HiddenNaN, NeverReachesAnOutput) {
  for (const float poison : {nan, inf, -inf}) {
    for (const index_t s : {1, 2, 7, 40}) {
      for (const index_t dim : packed_and_in_place) {
        auto in = make_call({1, s, 150, 6, 2, dim, dim}, with_causal);
        const std::vector<index_t> lengths{101};
        in.options.kv_lengths = lengths;
        in.options.query_offset = 60;  // the causal edge runs through a tile, before the padding
        const auto clean = run(in);
        for (index_t t = 60 + s; t < 150; ++t)
          for (index_t g = 0; g < 2; ++g)
            for (index_t d = 0; d < dim; ++d) in.k.view()(0, t, g, d) = in.v.view()(0, t, g, d) = poison;
        EXPECT_TRUE(run(in).same_bits(clean)) << poison << " q_len " << s << " dim " << dim;
      }
    }
  }
}

TEST(HiddenNaN, InTheTileOfTheCausalEdgeIsKeptOutRowByRow) {
  auto in = make_call({1, 20, 20, 4, 2, 16, 16}, with_causal);
  const auto clean = run(in);
  for (index_t g = 0; g < 2; ++g)
    for (index_t d = 0; d < 16; ++d) in.v.view()(0, 13, g, d) = nan;
  const auto got = run(in);
  for (index_t s = 0; s < 20; ++s) {
    for (index_t i = 0; i < 4 * 16; ++i) {
      const auto at = static_cast<std::size_t>(s * 64 + i);
      if (s < 13) {
        EXPECT_EQ(std::memcmp(&got.out[at], &clean.out[at], sizeof(float)), 0);
      } else {
        EXPECT_TRUE(std::isnan(got.out[at]));
      }
    }
  }
}

TEST(HiddenNaN, BehindAMask) {
  for (const index_t s : {1, 3, 9}) {
    for (const index_t dim : packed_and_in_place) {
      auto in = make_call({2, s, 200, 4, 2, dim, dim});
      const auto size = static_cast<std::size_t>(200 * s);
      auto mask = std::make_unique<bool[]>(size);
      // The first tile is seen whole, a fifth of the others' keys are hidden.
      const auto hidden = [](index_t t) { return t >= 64 && t % 5 == 2; };
      for (std::size_t i = 0; i < size; ++i) mask[i] = !hidden(static_cast<index_t>(i) % 200);
      in.options.mask = tensor_view<const bool, 4>(mask.get(), {1, 1, s, 200});
      const auto clean = run(in);
      for (index_t t = 0; t < 200; ++t) {
        for (index_t i = 0; i < 2 * 2 * dim && hidden(t); ++i)
          in.k.view()(i / (2 * dim), t, i / dim % 2, i % dim) = in.v.view()(i / (2 * dim), t, i / dim % 2, i % dim) =
              nan;
      }
      EXPECT_TRUE(run(in).same_bits(clean)) << "q_len " << s << " dim " << dim;
    }
  }
}

TEST(HiddenNaN, BehindKeyLengthsIsNotEvenRead) {
  for (const index_t dim : packed_and_in_place) {
    auto in = make_call({2, 3, 200, 2, 1, dim, dim}, with_causal);
    const std::vector<index_t> lengths{77, 0};
    in.options.kv_lengths = lengths;
    const auto clean = run(in);
    for (index_t t = 0; t < 200; ++t)
      for (index_t d = 0; d < dim; ++d) {
        if (t >= 77) in.k.view()(0, t, 0, d) = in.v.view()(0, t, 0, d) = nan;
        in.k.view()(1, t, 0, d) = in.v.view()(1, t, 0, d) = nan;
      }
    EXPECT_TRUE(run(in).same_bits(clean)) << "dim " << dim;
  }
}

TEST(VisibleNaN, StaysNaN) {
  for (const index_t dim : packed_and_in_place) {
    const shape n{1, 3, 150, 4, 2, dim, dim};
    const auto all_nan_from = [&](float_call& in, index_t head_from, index_t head_to) {
      const auto got = run(in);
      for (index_t s = 0; s < 3; ++s)
        for (index_t h = 0; h < 4; ++h) {
          const bool expected = h >= head_from && h < head_to;
          EXPECT_EQ(std::isnan(got.out[static_cast<std::size_t>((s * 4 + h) * dim + 5)]), expected) << s << ' ' << h;
        }
    };
    auto key = make_call(n);
    key.k.view()(0, 70, 1, 3) = nan;
    all_nan_from(key, 2, 4);
    for (const index_t t : {149, 5}) {
      auto value = make_call(n);
      value.v.view()(0, t, 0, 5) = nan;
      all_nan_from(value, 0, 2);
    }
    auto query_nan = make_call(n);
    for (index_t s = 0; s < 3; ++s) query_nan.q.view()(0, s, 2, dim - 1) = nan;
    all_nan_from(query_nan, 2, 3);
  }
  auto only_key = make_call({1, 1, 1, 1, 1, 8, 8});
  only_key.k.view()(0, 0, 0, 0) = nan;
  const auto got = run(only_key);
  EXPECT_TRUE(std::isnan(got.out[0]));
  EXPECT_TRUE(std::isnan(got.lse[0]));
}

// An infinite key is visible: its weight of 0 does not keep out a value that is NaN. A bias of -inf would.
TEST(VisibleNaN, OfAKeyWhoseScoreIsMinusInfinity) {
  for (const index_t dim : packed_and_in_place) {
    for (const bool biased : {false, true}) {
      auto in = make_call({1, 2, 130, 2, 1, dim, dim}, biased ? with_bias : 0u);
      std::fill(in.q.data().begin(), in.q.data().end(), 1.0f);
      in.k.view()(0, 20, 0, 3) = -inf;
      in.v.view()(0, 20, 0, 7) = nan;
      const auto got = run(in);
      EXPECT_EQ(std::isnan(got.out[7]), !biased) << "dim " << dim;
      std::vector<float> expected(got.out.size());
      reference::attention(in.q.view(), in.k.view(), in.v.view(), view(expected.data(), {1, 2, 2, dim}), in.options);
      for (std::size_t i = 0; i < expected.size(); ++i)
        EXPECT_EQ(std::isnan(got.out[i]), std::isnan(expected[i])) << "dim " << dim << ", element " << i;
    }
  }
}

TEST(VisibleNaN, IsStoredAsOneBitPattern) {
  auto in = make_call({1, 1, 100, 2, 1, 16, 16});
  in.k.view()(0, 3, 0, 0) = -nan;
  const auto got = run(in);
  const float canonical = std::numeric_limits<float>::quiet_NaN();
  for (const float x : got.out) EXPECT_EQ(std::memcmp(&x, &canonical, sizeof x), 0);
}

// --- views ---

TEST(Views, OfStrideZeroBroadcast) {
  auto in = make_call({3, 4, 90, 4, 2, 16, 16}, with_causal);
  const tensor_view<const float, 4> one = in.k.view();  // sequence 0 for all three
  const tensor_view<const float, 4> shared(one.data(), {3, 90, 2, 16}, {0, one.stride(1), one.stride(2), 1});
  std::vector<float> out(3 * 4 * 4 * 16);
  attention(in.q.view(), shared, in.v.view(), view(out.data(), {3, 4, 4, 16}), in.options);
  for (index_t b = 1; b < 3; ++b)
    for (index_t t = 0; t < 90; ++t)
      for (index_t g = 0; g < 2; ++g)
        for (index_t d = 0; d < 16; ++d) in.k.view()(b, t, g, d) = in.k.view()(0, t, g, d);
  EXPECT_EQ(out, run(in).out);
}

TEST(Views, OfOneFusedProjection) {
  // Rows of [q heads | k heads | v heads | out], as a fused projection leaves them: all views are interleaved.
  const index_t s = 70, h = 4, g = 2, d = 16, width = (2 * h + 2 * g) * d;
  std::vector<float> fused(static_cast<std::size_t>(s * width));
  rng random(3);
  for (auto& x : fused) x = static_cast<float>(random.normal());
  auto in = make_call({1, s, s, h, g, d, d}, with_causal);
  const auto slice = [&](index_t heads, index_t at) {
    return view(fused.data() + at * d, {1, s, heads, d}, {s * width, width, d, 1});
  };
  const auto q = slice(h, 0), k = slice(g, h), v = slice(g, h + g), out = slice(h, h + 2 * g);
  for (index_t t = 0; t < s; ++t)
    for (index_t e = 0; e < d; ++e) {
      for (index_t i = 0; i < h; ++i) in.q.view()(0, t, i, e) = q(0, t, i, e);
      for (index_t i = 0; i < g; ++i) in.k.view()(0, t, i, e) = k(0, t, i, e);
      for (index_t i = 0; i < g; ++i) in.v.view()(0, t, i, e) = v(0, t, i, e);
    }
  attention(q, k, v, out, in.options);
  const auto expected = run(in);
  for (index_t t = 0; t < s; ++t)
    for (index_t i = 0; i < h; ++i)
      for (index_t e = 0; e < d; ++e)
        EXPECT_EQ(out(0, t, i, e), expected.out[static_cast<std::size_t>((t * h + i) * d + e)]);
}

TEST(Views, WithNegativeStrides) {
  auto in = make_call({1, 5, 80, 2, 1, 16, 16});
  const auto expected = run(in);
  std::vector<float> backwards(80 * 16);
  for (index_t t = 0; t < 80; ++t)
    for (index_t d = 0; d < 16; ++d) backwards[static_cast<std::size_t>((79 - t) * 16 + d)] = in.k.view()(0, t, 0, d);
  const tensor_view<const float, 4> k(backwards.data() + 79 * 16, {1, 80, 1, 16}, {0, -16, 16, 1});
  std::vector<float> out(expected.out.size());
  attention(in.q.view(), k, in.v.view(), view(out.data(), {1, 5, 2, 16}));
  EXPECT_EQ(out, expected.out);
}

// Every operand's sequences 2^34 bytes apart, in a mapping that is only touched where they lie.
TEST(Views, WithOffsetsPastTwoToThe31) {
  const index_t apart = (index_t{1} << 32) + 48;  // elements
  const std::size_t bytes = std::size_t{100} << 30;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no sparse mapping of 100 GiB to be had";
  float* next = static_cast<float*>(memory);
  const auto far = [&](const tensor_view<const float, 4>& x) {  // a copy with sequences apart
    const tensor_view<float, 4> to(std::exchange(next, next + x.size()), {2, x.extent(1), x.extent(2), x.extent(3)},
                                   {apart, x.extent(2) * x.extent(3), x.extent(3), 1});
    for (index_t b = 0; b < 2; ++b)
      for (index_t s = 0; s < x.extent(1); ++s)
        for (index_t h = 0; h < x.extent(2); ++h)
          for (index_t d = 0; d < x.extent(3); ++d) to(b, s, h, d) = x(b, s, h, d);
    return to;
  };
  for (const index_t s : {1, 40}) {
    auto in = make_call({2, s, 70, 4, 2, 64, 64}, with_bias);
    const auto expected = run(in);
    const auto bias = far(*in.options.bias);
    const auto q = far(in.q.view()), k = far(in.k.view()), v = far(in.v.view());
    const auto out = far(tensor_view<const float, 4>(expected.out.data(), {2, s, 4, 64}));
    for (index_t b = 0; b < 2; ++b) std::fill_n(&out(b, 0, 0, 0), s * 4 * 64, nan);
    attention(q, k, v, out, {.bias = bias});
    for (index_t b = 0; b < 2; ++b)
      EXPECT_EQ(std::memcmp(&out(b, 0, 0, 0), expected.out.data() + b * s * 4 * 64,
                            static_cast<std::size_t>(s) * 4 * 64 * sizeof(float)),
                0)
          << "sequence " << b << ", q_len " << s;
  }
  munmap(memory, bytes);
}

// Keys and values that end where the memory does: what lies behind kv_lengths is not touched.
TEST(Views, BehindKeyLengthsAreNotRead) {
  const index_t pages = 16, page = 4096, length = 77, row = 64;
  void* const memory = mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  float* const end = static_cast<float*>(memory) + pages / 2 * page / 4;
  ASSERT_EQ(mprotect(end, static_cast<std::size_t>(pages / 2 * page), PROT_NONE), 0);
  const tensor_view<float, 4> keys(end - length * row, {1, 200, 1, row}, {0, row, row, 1});
  for (const index_t s : {1, 3, 40}) {
    auto in = make_call({1, s, length, 2, 1, row, row}, with_causal);
    for (index_t t = 0; t < length; ++t)
      for (index_t d = 0; d < row; ++d) keys(0, t, 0, d) = in.v.view()(0, t, 0, d) = in.k.view()(0, t, 0, d);
    const auto expected = run(in);
    std::vector<float> out(expected.out.size());
    const std::array<index_t, 1> lengths{length};
    attention(in.q.view(), keys, keys, view(out.data(), {1, s, 2, row}), {.causal = true, .kv_lengths = lengths});
    EXPECT_EQ(out, expected.out) << "q_len " << s;
  }
  munmap(memory, pages * page);
}

// Masks and biases of any strides: one row for all queries, every other column, heads before sequences.
TEST(Views, OfMasksAndBiasesMayHaveAnyStrides) {
  auto in = make_call({2, 6, 150, 4, 2, 64, 64}, with_mask | with_bias);
  const auto& n = in.of.shape;
  const auto expect_same = [&](const tensor_view<const bool, 4>& mask, const tensor_view<const float, 4>& bias) {
    auto dense_mask = std::make_unique<bool[]>(static_cast<std::size_t>(mask.size()));
    std::vector<float> dense_bias(static_cast<std::size_t>(bias.size()));
    std::size_t i = 0;
    for (index_t b = 0; b < n.b; ++b)
      for (index_t h = 0; h < n.h; ++h)
        for (index_t s = 0; s < n.s; ++s)
          for (index_t t = 0; t < n.t; ++t, ++i) {
            dense_mask[i] = mask(b, h, s, t);
            dense_bias[i] = bias(b, h, s, t);
          }
    const std::array<index_t, 4> extents{n.b, n.h, n.s, n.t};
    in.options.mask = tensor_view<const bool, 4>(dense_mask.get(), extents);
    in.options.bias = tensor_view<const float, 4>(dense_bias.data(), extents);
    EXPECT_TRUE(matches(in));
    const auto expected = run(in);
    in.options.mask = mask;
    in.options.bias = bias;
    EXPECT_TRUE(run(in).same_bits(expected));
  };
  const std::array<index_t, 4> extents{n.b, n.h, n.s, n.t};
  const bool* const m = in.mask.get();
  const float* const f = in.bias.data();
  expect_same({m, extents, {0, n.t, 0, 1}}, {f, extents, {n.t, 0, 0, 1}});
  expect_same({m, extents, {n.h * n.t, n.t, 0, 2}}, {f, extents, {n.t, n.b * n.s * n.t, n.t, 2}});
  expect_same({m + 3000, extents, {150, -150, -7, 1}}, {f + 3000, extents, {11, 300, -150, -1}});
}

// --- grouping ---

TEST(Groups, OfRepeatedKeysAreMultiHeadAttention) {
  auto grouped = make_call({2, 9, 100, 6, 2, 24, 24}, with_causal);
  auto repeated = make_call({2, 9, 100, 6, 6, 24, 24}, with_causal);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t s = 0; s < 9; ++s)
      for (index_t h = 0; h < 6; ++h)
        for (index_t d = 0; d < 24; ++d) repeated.q.view()(b, s, h, d) = grouped.q.view()(b, s, h, d);
    for (index_t t = 0; t < 100; ++t)
      for (index_t h = 0; h < 6; ++h)
        for (index_t d = 0; d < 24; ++d) {
          repeated.k.view()(b, t, h, d) = grouped.k.view()(b, t, h / 3, d);
          repeated.v.view()(b, t, h, d) = grouped.v.view()(b, t, h / 3, d);
        }
  }
  EXPECT_TRUE(run(grouped).same_bits(run(repeated)));
}

TEST(Groups, MayBeUnequalOrEmpty) {
  for (const std::vector<index_t>& offsets : {std::vector<index_t>{0, 1, 8}, std::vector<index_t>{0, 0, 8},
                                              std::vector<index_t>{0, 8, 8}, std::vector<index_t>{0, 5, 8}}) {
    for (const index_t s : {1, 30}) {
      auto in = make_call({2, s, 150, 8, 2, 64, 64}, with_causal);
      in.options.group_offsets = offsets;
      EXPECT_TRUE(matches(in));
    }
  }
}

// --- types ---

// Sums that would stop growing in 16 bits: small addends after a large one, among the products of a score, among the
// weights and among the weighted values.
template <class T>
void expect_wide_sums(double small /* lost when added to 1 in T */) {
  constexpr index_t keys = 4000, dim = 128;
  const std::vector<T> ones(dim, static_cast<T>(1.0f));
  std::vector<T> k(static_cast<std::size_t>(keys * dim)), v(k.size());
  for (index_t t = 0; t < keys; ++t)
    for (index_t d = 0; d < dim; ++d) {
      k[static_cast<std::size_t>(t * dim + d)] = static_cast<T>(static_cast<float>(d == 0 ? 1 : small));
      v[static_cast<std::size_t>(t * dim + d)] = static_cast<T>(static_cast<float>(t % 64 == 0 ? 1 : small));
    }
  std::vector<float> out(dim), lse(1);
  const partial_state<float> state{view(out.data(), {1, 1, 1, dim}), tensor_view<float, 3>(lse.data(), {1, 1, 1})};
  attention(view(ones.data(), {1, 1, 1, dim}), view(k.data(), {1, keys, 1, dim}), view(v.data(), {1, keys, 1, dim}),
            state, {.scale = 1.0});
  const double score = 1 + (dim - 1) * small;
  const double mean = (63 + (keys - 63) * small) / static_cast<double>(keys);  // 63 multiples of 64 below 4000
  EXPECT_NEAR(static_cast<double>(lse[0]), score + std::log(static_cast<double>(keys)), lse_bound<float>(dim, score));
  for (const float x : out) EXPECT_NEAR(static_cast<double>(x), mean, output_bound<float>(dim, score, 1));
}

TEST(SixteenBits, AreNeverAccumulatedInSixteenBits) {
  expect_wide_sums<Eigen::bfloat16>(0x1p-9);
  expect_wide_sums<Eigen::half>(0x1p-12);
}

// Output types that differ from the queries'.
template <class Q, class K, class Out>
void expect_output_type() {
  const operands<Q, K> in(attention_case{{1, 5, 90, 4, 2, 32, 32}, with_causal, layout::bshd});
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  std::vector<Out> out(5 * 4 * 32);
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {1, 5, 4, 32}), in.options);
  comparison compared;
  for (std::size_t i = 0; i < out.size(); ++i)
    compared.add(static_cast<double>(out[i]), expected.out[i],
                 expected.out_bound(i) + weight_rounding<Q, K>(in.options) * expected.max_value +
                     storing_error<Out>(expected.out[i]),
                 "out " + std::to_string(i));
  EXPECT_TRUE(compared.result());
}

TEST(MixedTypes, OfOutputs) {
  expect_output_type<float, float, double>();
  expect_output_type<double, double, float>();
  expect_output_type<Eigen::half, Eigen::half, float>();
  expect_output_type<Eigen::bfloat16, Eigen::bfloat16, double>();
  expect_output_type<float, Eigen::bfloat16, double>();
}

TEST(MixedTypes, OfKeysValuesAndOutputs) {
  const operands<float, float> in(attention_case{{1, 5, 90, 4, 2, 32, 32}, with_causal, layout::bshd});
  std::vector<Eigen::half> k(in.k.data().size());
  std::vector<Eigen::bfloat16> v(in.v.data().size());
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<Eigen::half>(in.k.data()[i]);
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<Eigen::bfloat16>(in.v.data()[i]);
  const auto k_view = tensor_view<const Eigen::half, 4>(k.data(), {1, 90, 2, 32});
  const auto v_view = tensor_view<const Eigen::bfloat16, 4>(v.data(), {1, 90, 2, 32});
  std::vector<double> out(5 * 4 * 32);
  attention(in.q.view(), k_view, v_view, view(out.data(), {1, 5, 4, 32}), in.options);
  const auto expected = run_oracle_on(in.q.view(), k_view, v_view, in.options);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected.out[i], expected.out_bound(i));
}

}  // namespace
}  // namespace gqa::test
