// SPDX-License-Identifier: Apache-2.0
/// \file
/// exp2 of packets: the softmax's only transcendental function. For x <= 64: scores lie at most `headroom` above what
/// they are weighed by, and there is no need to handle overflow.
///
/// 2^x = 2^n 2^f with n = round(x) and |f| <= 1/2; 2^f by a polynomial with constant term 1. Exactly: exp2(0) = 1,
/// exp2(-inf) = +0, NaN stays NaN. Results below the smallest normal number may lose bits or be +0. Relative error of
/// the polynomial: 5.1e-9 (float, degree 6), 8.4e-18 (double, degree 11), so that rounding dominates: at most 1 ulp in
/// all, which the test measures over every 61st float in the range. For results that are rounded to bfloat16 next
/// (2^-9 on average), 7.0e-6 (degree 4).
#pragma once

#include <iterator>
#include <limits>
#include <type_traits>

#include <Eigen/Core>

#include <gqa/detail/simd/packet.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// (2^f - 1) / f on |f| <= 1/2, interpolated at the Chebyshev nodes (60-digit arithmetic); highest power first.
/// For results held in L.
template <class A, class L = A>
inline constexpr A exp2_coefficients[1] = {};
template <>
inline constexpr float exp2_coefficients<float, Eigen::bfloat16>[4] = {0x1.3c6e5cp-7f, 0x1.c96d5ep-5f, 0x1.ebfb3ep-3f,
                                                                       0x1.62e2d2p-1f};
template <>
inline constexpr float exp2_coefficients<float>[6] = {0x1.441390p-13f, 0x1.5f0890p-10f, 0x1.3b2a54p-7f,
                                                      0x1.c6af6cp-5f,  0x1.ebfbe0p-3f,  0x1.62e430p-1f};
template <>
inline constexpr double exp2_coefficients<double>[11] = {
    0x1.e9d3fe3952179p-32, 0x1.e6063f7217bc6p-28, 0x1.b524fae627834p-24, 0x1.62bfd47773353p-20,
    0x1.ffcbfc670dcd4p-17, 0x1.430913096fd9fp-13, 0x1.5d87fe78a5276p-10, 0x1.3b2ab6fba1ddap-7,
    0x1.c6b08d704a0c2p-5,  0x1.ebfbdff82c598p-3,  0x1.62e42fefa39efp-1};

/// 2^(f - Below) of |f| <= 1/2, for results held in L. Every coefficient carries 2^-Below, which rounds nothing.
template <class A, class L, int Below>
[[nodiscard]] inline packet<A> exp2_fraction(const packet<A>& f) noexcept {
  constexpr int terms = static_cast<int>(std::size(exp2_coefficients<A, L>));
  constexpr A unit = A{1} / (1 << Below);
  packet<A> p = broadcast(unit * exp2_coefficients<A, L>[0]);
  GQA_UNROLL
  for (int i = 1; i < terms; ++i) p = madd(p, f, broadcast(unit * exp2_coefficients<A, L>[i]));
  return madd(p, f, broadcast(unit));
}

/// 2^(x - Below) for x <= 64 in every lane, for results held in L: 2^-Below times 2^x, exactly.
template <class A, class L = A, int Below = 0>
[[nodiscard]] inline packet<A> exp2_packet(const packet<A>& x) noexcept {
  if constexpr (has_scale<A>) {
    const packet<A> n = round_to_integer<A>(x);  // x - n is NaN for -inf, whatever it is multiplied by
    return scale_by_power<A>(exp2_fraction<A, L, Below>(sub(x, n)), n);
  } else {
    constexpr int bias = std::numeric_limits<A>::max_exponent - 1;  // 127, 1023
    // Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low bits; the bias rides along.
    constexpr A magic = A{1.5} * (sizeof(A) == 4 ? A{0x1p23} : A{0x1p52}) + A{bias};
    // At -bias the exponent field is 0, so everything below comes out as +0.
    const packet<A> clamped = max_or_nan(x, broadcast(A{-bias}));
    const packet<A> t = add(clamped, broadcast(magic));
    const packet<A> f = sub(clamped, sub(t, broadcast(magic)));
    return mul<A>(exp2_fraction<A, L, Below>(f), shift_into_exponent<A>(t));
  }
}

/// The same function of a scalar, bit for bit.
template <class A>
[[nodiscard]] inline A exp2_scalar(A x) noexcept {
  return first_lane<A>(exp2_packet<A>(broadcast(x)));
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
