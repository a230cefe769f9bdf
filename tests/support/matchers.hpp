// SPDX-License-Identifier: Apache-2.0
// How near a result must be to the oracle's, by derivation, and what a failure prints.
//
// float. Let u = 2^-24, s the largest |score| and m the largest |value|.
//   scores     a dot product of D terms errs by about sqrt(D) u sum|q k|; folding the scale into q adds u, so that a
//              weight is off by a factor of about 1 + c u max(1, s): for the scores of random data c < 10.
//   weights    exp2 errs by 1 ulp = 2 u.
//   sums       64 terms in a chain, then 16 tiles, then the splits: at most (64 + 16 + T / 1024) u each, of both the
//              numerator and the denominator; rounding errors of either sign leave a fraction of it.
// Together below 40 u max(1, s) m = 2.4e-6 max(1, s) m. Beyond s = 60 the weights that matter differ by less than 60
// from the top, and only the scores' own error grows: the bound stops at 60 for random data, and is c eps s m for data
// made of large scores. double: the same multiple of its own u, 4.5e-15.
// 16-bit outputs add their own rounding, half an ulp of the result.
//
// bfloat16 where the ISA multiplies pairs of it: weights are rounded to 8 bits, each by a factor 1 + d, |d| <= 2^-8,
// and their sum is that of the rounded ones. So an output moves by the mean of d (v - out), at most 2^-8 times the mean
// deviation of the values, which is at most m; and a log-sum-exp by the mean of d, at most 2^-8. (Queries are rounded
// too; these tests draw them from what bfloat16 holds.)
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/options.hpp>

namespace gqa::test {

template <class A>
inline constexpr double base_bound = std::is_same_v<A, double> ? 4.5e-15 : 2.4e-6;

// Half an ulp of x when it is stored as T, at most.
template <class T>
double storing_error(double x) {
  const double a = std::abs(x);
  if constexpr (std::is_same_v<T, Eigen::half>) return std::max(a * 0x1p-11, 0x1p-25);
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return a * 0x1p-8;
  if constexpr (std::is_same_v<T, float>) return std::max(a * 0x1p-24, 0x1p-150);
  return 0;
}

// The share of m, and of a log-sum-exp, that rounded weights of keys in K may cost.
template <class Q, class K>
double weight_rounding(const attention_options& options) {
  return detail::has_dot<K> && !options.float_products.value_or(std::is_same_v<Q, float>) ? 0x1p-8 + 0x1p-17 : 0;
}

// What a call may be off by, from the largest score and value that it sees.
template <class A>
double output_bound(double max_score, double max_value) {
  return base_bound<A> * std::max(1.0, std::min(max_score, 60.0)) * max_value;
}
template <class A>
double lse_bound(double max_score) {
  return base_bound<A> * std::max(1.0, max_score);
}

// The worst element of `actual` against `expected`, each with its own bound; NaN must meet NaN, infinity itself.
class comparison {
 public:
  void add(double actual, double expected, double bound, const std::string& where) {
    const bool same = (std::isnan(actual) && std::isnan(expected)) || actual == expected;
    double excess = same ? 0 : std::abs(actual - expected) / bound;
    if (std::isnan(excess)) excess = std::numeric_limits<double>::infinity();
    if (excess <= worst_) return;
    worst_ = excess;
    std::ostringstream text;
    text.precision(17);
    text << where << ": got " << actual << ", expected " << expected << ", off by " << std::abs(actual - expected)
         << " with " << bound << " allowed (" << excess << " of it)";
    report_ = text.str();
  }
  [[nodiscard]] double worst() const { return worst_; }
  [[nodiscard]] ::testing::AssertionResult result() const {
    if (worst_ <= 1) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << report_;
  }

 private:
  double worst_ = 0;
  std::string report_;
};

}  // namespace gqa::test
