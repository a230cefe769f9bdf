// SPDX-License-Identifier: Apache-2.0
/// \file
/// What the compiler and its flags decide: exceptions on or off, the instruction set's name, the index type.
///
/// Macros a user may define, the same way in every translation unit of a program:
///   GQA_NO_EXCEPTIONS   report errors to the handler of error.hpp instead of throwing (implied by -fno-exceptions)
/// All other GQA_ macros are internal.
#pragma once

#include <cstdint>
#include <type_traits>

// Sums have their order, quotients their rounding, and hidden keys are infinities, so flags that give these away are
// refused where the compiler tells of them. (Clang tells of no more than the first two; GQA_BEGIN_PACKET_CODE does
// there what is needed, so that its -funsafe-math-optimizations is right.)
#if defined(__FAST_MATH__)
#error \
    "gqa needs IEEE arithmetic: build without -ffast-math (-Ofast), which drops infinities, NaN and the order of sums"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "gqa needs infinities and NaN, which hide keys and show faults: build without -ffinite-math-only"
#elif defined(__ASSOCIATIVE_MATH__)
#error "gqa needs sums in their order: build without -fassociative-math, which -funsafe-math-optimizations implies"
#elif defined(__RECIPROCAL_MATH__)
#error "gqa needs quotients rounded once: build without -freciprocal-math, which -funsafe-math-optimizations implies"
#endif

#if !defined(GQA_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define GQA_NO_EXCEPTIONS
#endif

// Code whose machine instructions depend on the -m flags lives in an inline namespace named after them. Two translation
// units built with different flags then hold different functions instead of two bodies under one name, of which the
// linker would keep one at random. Types shared across such units (views, options, context) stay outside.
#if !defined(EIGEN_DONT_VECTORIZE) && defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && \
    defined(__AVX512VNNI__)
#define GQA_VNNI 1
#else
#define GQA_VNNI 0
#endif
#if defined(EIGEN_DONT_VECTORIZE)
#define GQA_ISA isa_scalar
#elif GQA_VNNI && defined(__AVX512BF16__)
#define GQA_ISA isa_avx512_bf16_vnni
#elif defined(__AVX512F__) && defined(__AVX512BF16__)
#define GQA_ISA isa_avx512_bf16
#elif GQA_VNNI
#define GQA_ISA isa_avx512_vnni
#elif defined(__AVX512F__) && defined(__AVX512DQ__)
#define GQA_ISA isa_avx512
#elif defined(__AVX512F__)
#define GQA_ISA isa_avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define GQA_ISA isa_avx2_fma
#elif defined(__AVX__) && defined(__FMA__)
#define GQA_ISA isa_avx_fma
#elif defined(__AVX2__)
#define GQA_ISA isa_avx2
#elif defined(__AVX__)
#define GQA_ISA isa_avx
#elif defined(__SSE4_1__)
#define GQA_ISA isa_sse4
#elif defined(__SSE2__)
#define GQA_ISA isa_sse2
#elif defined(__ARM_NEON)
#define GQA_ISA isa_neon
#else
#define GQA_ISA isa_generic
#endif

// Loops over a register block only become registers when they are unrolled completely, at any -O level.
#if defined(__clang__)
#define GQA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define GQA_UNROLL _Pragma("GCC unroll 16")
#else
#define GQA_UNROLL
#endif

#if defined(__GNUC__)
#define GQA_INLINE [[gnu::always_inline]] inline
// For functions that run once a call, as its checks do: not inlined, and optimised for size, because copies of them at
// every call are slow to compile.
#define GQA_ONCE [[gnu::noinline, gnu::cold]]
#else
#define GQA_INLINE inline
#define GQA_ONCE
#endif

namespace gqa {

/// Extents, strides, positions and counts: signed and 64-bit everywhere.
using index_t = std::int64_t;

/// A sequence of a cache or of pages. In those that number their sequences from 0 it is that number.
enum class sequence_id : index_t {};

/// The type that scores, sums and log-sum-exps are computed in: double for double, float for everything narrower.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

}  // namespace gqa
