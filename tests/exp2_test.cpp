// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/simd/exp2.hpp>

#include "support/rng.hpp"

namespace gqa::test {
namespace {

using detail::exp2_scalar;

template <class A>
constexpr A inf = std::numeric_limits<A>::infinity();

template <class A>
double ulps(A x) {
  const double exact = std::exp2(static_cast<double>(x));
  const A got = exp2_scalar(x);
  return std::abs(static_cast<double>(got) - exact) / (exact * static_cast<double>(std::numeric_limits<A>::epsilon()));
}

TEST(Exp2, IsExactWhereItMustBe) {
  EXPECT_EQ(exp2_scalar(0.0f), 1.0f);
  EXPECT_EQ(exp2_scalar(-0.0f), 1.0f);
  EXPECT_EQ(exp2_scalar(0.0), 1.0);
  for (const float x : {-inf<float>, -1e30f, -1e5f, -200.0f}) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(exp2_scalar(x)), 0u) << x;
  }
  for (const double x : {-inf<double>, -1e300, -1e5, -1100.0}) {
    EXPECT_EQ(std::bit_cast<std::uint64_t>(exp2_scalar(x)), 0u) << x;
  }
  // Below the normal numbers: the number itself where the ISA scales by powers of two, +0 elsewhere.
  EXPECT_EQ(std::bit_cast<std::uint32_t>(exp2_scalar(-127.0f)),
            std::bit_cast<std::uint32_t>(detail::has_scale<float> ? 0x1p-127f : 0.0f));
  EXPECT_EQ(std::bit_cast<std::uint64_t>(exp2_scalar(-1023.0)),
            std::bit_cast<std::uint64_t>(detail::has_scale<double> ? 0x1p-1023 : 0.0));
  for (int n = 1; n <= 125; ++n) EXPECT_EQ(exp2_scalar(-static_cast<float>(n)), std::ldexp(1.0f, -n));
  for (int n = 1; n <= 1021; ++n) EXPECT_EQ(exp2_scalar(-static_cast<double>(n)), std::ldexp(1.0, -n));
}

TEST(Exp2, PassesNaNOn) {
  EXPECT_TRUE(std::isnan(exp2_scalar(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(exp2_scalar(std::numeric_limits<double>::quiet_NaN())));
}

// The larger of two errors; NaN is larger than any.
double larger(double a, double b) {
  return std::isnan(a) || b <= a ? a : b;
}

// Every 61st float from -0 down to where results stop being normal: all exponents, all parts of the polynomial.
TEST(Exp2, OfFloatsIsWithinOneUlpOverTheWholeRange) {
  double worst = 0;
  const auto last = std::bit_cast<std::uint32_t>(-125.5f);
  for (auto bits = std::bit_cast<std::uint32_t>(-0.0f); bits <= last; bits += 61)
    worst = larger(worst, ulps(std::bit_cast<float>(bits)));
  EXPECT_LE(worst, 1.0);
  RecordProperty("worst_ulp", std::to_string(worst));
}

// What is rounded to bfloat16 next: the polynomial's error alone, and 1 still exactly.
TEST(Exp2, ForBfloat16IsWithinItsPolynomial) {
  const auto exp2_for_bfloat16 = [](float x) {
    return detail::first_lane<float>(detail::exp2_packet<float, Eigen::bfloat16>(detail::broadcast(x)));
  };
  EXPECT_EQ(exp2_for_bfloat16(0.0f), 1.0f);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(exp2_for_bfloat16(-inf<float>)), 0u);
  EXPECT_TRUE(std::isnan(exp2_for_bfloat16(std::numeric_limits<float>::quiet_NaN())));
  double worst = 0;
  const auto last = std::bit_cast<std::uint32_t>(-125.5f);
  for (auto bits = std::bit_cast<std::uint32_t>(-0.0f); bits <= last; bits += 601) {
    const auto x = std::bit_cast<float>(bits);
    worst = larger(worst, std::abs(static_cast<double>(exp2_for_bfloat16(x)) / std::exp2(static_cast<double>(x)) - 1));
  }
  EXPECT_LE(worst, 7.1e-6);
}

// Scores stay up to 8 above what they are weighed by, and weights are 2^-8 of the function's values, exactly.
TEST(Exp2, IsAsGoodWithinTheHeadroom) {
  double worst = 0;
  for (float x = 0; x <= detail::headroom; x += 0x1p-12f) {
    worst = larger(worst, ulps(x));
    const auto weight = detail::exp2_packet<float, float, detail::headroom>(detail::broadcast(x));
    EXPECT_EQ(detail::first_lane<float>(weight), exp2_scalar(x) / (1 << detail::headroom)) << x;
  }
  EXPECT_LE(worst, 1.0);
}

// The last results, below the smallest normal number, are off by at most that number.
TEST(Exp2, UnderflowsGently) {
  for (float x = -125; x > -130; x -= 0x1p-10f)
    EXPECT_NEAR(static_cast<double>(exp2_scalar(x)), std::exp2(static_cast<double>(x)), 0x1p-126);
}

// libm's exp2 of a double is itself rounded: half an ulp more.
TEST(Exp2, OfDoublesIsWithinOneAndAHalfUlp) {
  rng random(7);
  double worst = 0;
  for (int i = 0; i < 2'000'000; ++i) worst = larger(worst, ulps(-1021 * random.uniform()));
  for (int i = 0; i < 1'000'000; ++i) worst = larger(worst, ulps(-random.uniform()));
  EXPECT_LE(worst, 1.5);
}

TEST(Exp2, OfLanesIsThatOfScalars) {
  rng random(11);
  for (int i = 0; i < 1000; ++i) {
    float in[detail::packet_size<float>], out[detail::packet_size<float>];
    for (float& x : in) x = static_cast<float>(-140 * random.uniform());
    detail::store(out, detail::exp2_packet<float>(detail::load(in)));
    for (int lane = 0; lane < detail::packet_size<float>; ++lane)
      EXPECT_EQ(std::bit_cast<std::uint32_t>(out[lane]), std::bit_cast<std::uint32_t>(exp2_scalar(in[lane])));
  }
}

}  // namespace
}  // namespace gqa::test
