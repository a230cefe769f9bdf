// SPDX-License-Identifier: Apache-2.0
// Kernels and the calls around them are most of what takes a compiler its time in a program that calls attention: tests
// share those that kernels.cpp, calls.cpp and others.cpp compile.
#pragma once

#include <gqa/gqa.hpp>

#ifndef GQA_TEST_KERNEL
#define GQA_TEST_KERNEL extern template
#endif
#ifndef GQA_TEST_CALL
#define GQA_TEST_CALL extern template
#endif
#ifndef GQA_TEST_OTHER
#define GQA_TEST_OTHER extern template
#endif

// NOLINTBEGIN(bugprone-macro-parentheses): types in template arguments and declarations take none
// Panels of P, queries and weights in L, accumulators in A.
// Those of a single block have up to 8.
#define GQA_TEST_STREAM_KERNELS(P, L, rows)                                                                        \
  GQA_TEST_KERNEL void score_block_in_order<P, L, rows, reading::in_order>(const block_operands<P, L>&) noexcept;  \
  GQA_TEST_KERNEL void value_block_in_order<P, L, rows, reading::in_order>(const block_operands<P, L>&) noexcept;  \
  GQA_TEST_KERNEL void score_block_in_order<P, L, rows, reading::scattered>(const block_operands<P, L>&) noexcept; \
  GQA_TEST_KERNEL void value_block_in_order<P, L, rows, reading::scattered>(const block_operands<P, L>&) noexcept;
#define GQA_TEST_KERNELS_OF_ROWS(P, L, A, rows)                                                                     \
  GQA_TEST_STREAM_KERNELS(P, L, rows)                                                                               \
  GQA_TEST_KERNEL void score_block<P, L, rows>(const block_operands<P, L>&) noexcept;                               \
  GQA_TEST_KERNEL void value_block_rows<P, L, rows>(const block_operands<P, L>&) noexcept;                          \
  GQA_TEST_KERNEL void score_rows<rows, A, L, P>(row_strip, rows_ahead, const L*, index_t, index_t, A*) noexcept;   \
  GQA_TEST_KERNEL void value_rows<rows, A, L, P>(row_strip, rows_ahead, const L*, const weighted_sums<A>&, index_t, \
                                                 index_t) noexcept;
#define GQA_TEST_KERNELS(P, L, A)      \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 1) \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 2) \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 3) \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 4) \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 5) \
  GQA_TEST_KERNELS_OF_ROWS(P, L, A, 6) \
  GQA_TEST_STREAM_KERNELS(P, L, 7)     \
  GQA_TEST_STREAM_KERNELS(P, L, 8)
// 8 bits.
#define GQA_TEST_Q8_KERNELS(rows, how)                                                  \
  GQA_TEST_KERNEL void score_q8_block<rows, reading::how>(const q8_operands&) noexcept; \
  GQA_TEST_KERNEL void value_q8_block<rows, reading::how>(const q8_operands&) noexcept;
#define GQA_TEST_Q8_STREAM_KERNELS(rows) \
  GQA_TEST_Q8_KERNELS(rows, in_order)    \
  GQA_TEST_Q8_KERNELS(rows, scattered)
// NOLINTEND(bugprone-macro-parentheses)

namespace gqa::detail {
inline namespace GQA_ISA {

GQA_TEST_KERNELS(float, float, float)
GQA_TEST_KERNELS(double, double, double)
GQA_TEST_KERNELS(Eigen::half, float, float)
GQA_TEST_KERNELS(Eigen::bfloat16, float, float)
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
GQA_TEST_KERNELS(Eigen::bfloat16, Eigen::bfloat16, float)
#endif
#if GQA_VNNI
GQA_TEST_Q8_KERNELS(1, blocks)
GQA_TEST_Q8_KERNELS(2, blocks)
GQA_TEST_Q8_KERNELS(3, blocks)
GQA_TEST_Q8_KERNELS(4, blocks)
GQA_TEST_Q8_KERNELS(5, blocks)
GQA_TEST_Q8_KERNELS(6, blocks)
GQA_TEST_Q8_STREAM_KERNELS(1)
GQA_TEST_Q8_STREAM_KERNELS(2)
GQA_TEST_Q8_STREAM_KERNELS(3)
GQA_TEST_Q8_STREAM_KERNELS(4)
GQA_TEST_Q8_STREAM_KERNELS(5)
GQA_TEST_Q8_STREAM_KERNELS(6)
GQA_TEST_Q8_STREAM_KERNELS(7)
GQA_TEST_Q8_STREAM_KERNELS(8)
#endif

// The engines, and what else takes long.
GQA_TEST_CALL void engine<float, float>::run(const problem<float, float>&, const tile_source<float>&,
                                             const row_rules<float>&, context&);
GQA_TEST_CALL void engine<double, double>::run(const problem<double, double>&, const tile_source<double>&,
                                               const row_rules<double>&, context&);
GQA_TEST_CALL void engine<Eigen::half, float>::run(const problem<float, float>&, const tile_source<Eigen::half>&,
                                                   const row_rules<float>&, context&);
GQA_TEST_CALL void engine<Eigen::bfloat16, float>::run(const problem<float, float>&,
                                                       const tile_source<Eigen::bfloat16>&, const row_rules<float>&,
                                                       context&);
GQA_TEST_CALL void grouped_runner<float, dense_kv<float, float>, tensor_view<float, 4>>::run();
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__)
GQA_TEST_CALL void engine<Eigen::bfloat16, Eigen::bfloat16>::run(const problem<float, Eigen::bfloat16>&,
                                                                 const tile_source<Eigen::bfloat16>&,
                                                                 const row_rules<float>&, context&);
#endif
#if GQA_VNNI
GQA_TEST_CALL void engine<q8, q8>::run(const problem<float, q8>&, const tile_source<q8>&, const row_rules<float>&,
                                       context&);
#endif

// What no bench measures.
GQA_TEST_OTHER struct principal_directions<double>;

}  // namespace GQA_ISA
}  // namespace gqa::detail

#undef GQA_TEST_OTHER
#undef GQA_TEST_Q8_STREAM_KERNELS
#undef GQA_TEST_Q8_KERNELS
#undef GQA_TEST_KERNELS
#undef GQA_TEST_KERNELS_OF_ROWS
#undef GQA_TEST_STREAM_KERNELS
#undef GQA_TEST_CALL
#undef GQA_TEST_KERNEL
