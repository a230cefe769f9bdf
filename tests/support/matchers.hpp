// SPDX-License-Identifier: Apache-2.0
// How near a result must be to the oracle's, by derivation, and what a failure prints.
//
// Let u be the unit roundoff of the accumulators (float 2^-24, double 2^-53), D the head dim, m the largest |value|.
//   scores   A product of D terms is a chain of D roundings, each of a partial sum: off by at most u times the sum of
//            the partial sums' magnitudes, which is at most D u a, a = |scale| sum |q_d k_d|. The scaled query's own
//            roundings, and those of products where they are not fused, add u a each; what is added to a score (bias,
//            ALiBi) twice its magnitude. In all c <= (D + 12) u a. It grows with the scores and not with their
//            distances: near-equal keys with scores of 1e5 have weights that are off by 1e5 times more than those with
//            scores of 1.
//   weights  A weight whose score is off by c is off by a factor of e^c, their sum by one of at most e^c: an output
//            moves by at most (e^2c - 1) times the weighted mean of |value - output|, which is at most m. The distance
//            of a score from the row's reference, its exponential (1 ulp = 2 u) and the factors of later tiles and
//            splits add 7 u times that distance, and 60 u, to c.
//   sums     64 terms in a chain, 16 tiles, the splits, the quotient: (100 + 2 splits) u of the numerator and of the
//            denominator, each.
// The oracle computes this row by row from the partial sums there are (oracle_result::out_bound); output_bound() is the
// same from D and a alone, and wider. double: the same multiples of its own u; the oracle's own roundings, which are
// the same in double, double it. 16-bit outputs add their own rounding, half an ulp of the result.
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
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/options.hpp>

#include "oracle.hpp"

namespace gqa::test {

template <class A>
inline constexpr double unit_roundoff = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;

template <class A>
kernel_arithmetic arithmetic_of() {
  return {unit_roundoff<A> * (std::is_same_v<A, double> ? 2 : 1), detail::packet_size<A>};
}

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

// What scores of `dim` products, whose magnitudes and what is added to them sum to `magnitude`, may be off by, with all
// that weights are off by besides; and a call, from that and from its largest value. `passes`: attention that is made
// of so many calls, each off from the one before.
template <class A>
double score_error(index_t dim, double magnitude) {
  return arithmetic_of<A>().unit * (static_cast<double>(dim + 12) * magnitude + 7 * 2 * magnitude + 70);
}
template <class A>
double output_bound(index_t dim, double magnitude, double max_value, double passes = 1) {
  return (std::expm1(2 * passes * score_error<A>(dim, magnitude)) + passes * 210 * arithmetic_of<A>().unit) * max_value;
}
template <class A>
double lse_bound(index_t dim, double magnitude, double passes = 1) {
  return passes * (score_error<A>(dim, magnitude) + (110 + 4 * magnitude) * arithmetic_of<A>().unit);
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
