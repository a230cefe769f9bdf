// SPDX-License-Identifier: Apache-2.0
// Random operands of an attention call that own their memory, and the largest error of an output.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include <gqa/context.hpp>
#include <gqa/reference.hpp>
#include <gqa/tensor_view.hpp>

#include "../../tests/support/tensor.hpp"

namespace gqa::bench {

struct shape {
  index_t batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim;
};

using test::slice, test::tensor;

// Values in [-1, 1), the same elements in either order of memory.
template <class T>
tensor<T> random_tensor(std::array<index_t, 4> extents, layout order, std::uint32_t seed) {
  tensor<T> x(extents, order);
  const auto to = x.view();
  std::uint32_t state = seed * 2654435761u + 1;  // xorshift
  for (index_t b = 0; b < extents[0]; ++b)
    for (index_t s = 0; s < extents[1]; ++s)
      for (index_t h = 0; h < extents[2]; ++h)
        for (index_t d = 0; d < extents[3]; ++d) {
          state ^= state << 13, state ^= state >> 17, state ^= state << 5;
          to(b, s, h, d) = static_cast<T>(static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f);
        }
  return x;
}

// Queries and output in Q, keys and values in K.
template <class Q, class K>
struct operands {
  tensor<Q> q, out;
  tensor<K> k, v;

  operands(const shape& n, layout kv_order)
      : q(random_tensor<Q>({n.batch, n.q_len, n.q_heads, n.head_dim}, layout::bshd, 1)),
        out({n.batch, n.q_len, n.q_heads, n.value_dim}, layout::bshd),
        k(random_tensor<K>({n.batch, n.kv_len, n.kv_heads, n.head_dim}, kv_order, 2)),
        v(random_tensor<K>({n.batch, n.kv_len, n.kv_heads, n.value_dim}, kv_order, 3)) {}
};

// The naive reference, divided among the context's workers: a prefill by rows, a decode step by query heads. The last
// query meets the last key.
template <class Q, class K, class Out>
void naive_attention(const tensor_view<const Q, 4>& q, const tensor_view<const K, 4>& k,
                     const tensor_view<const K, 4>& v, const tensor_view<Out, 4>& out, attention_options options,
                     context& ctx) {
  const index_t q_len = q.extent(1), kv_len = k.extent(1), kv_heads = k.extent(2), group = q.extent(2) / kv_heads;
  const bool decode = q_len == 1;
  const index_t rows = decode ? 1 : 16, heads = decode ? 1 : q.extent(2), groups = decode ? 1 : kv_heads;
  const index_t row_tasks = (q_len + rows - 1) / rows, head_tasks = q.extent(2) / heads;
  ctx.for_each(row_tasks * head_tasks, [&](index_t task, index_t) {
    const index_t s = task / head_tasks * rows, count = std::min(rows, q_len - s);
    const index_t h = task % head_tasks * heads, g = h / group;
    attention_options own = options;
    own.query_offset = kv_len - q_len + s;
    const auto rows_of = [&](const auto& x) { return slice(slice(x, 1, s, count), 2, h, heads); };
    reference::attention(rows_of(q), slice(k, 2, g, groups), slice(v, 2, g, groups), rows_of(out), own);
  });
}

// The largest Euclidean norm of a row of x, and of a row's elements the largest.
template <class T>
double largest_row(const tensor_view<T, 4>& x) {
  double most = 0;
  for (index_t b = 0; b < x.extent(0); ++b)
    for (index_t s = 0; s < x.extent(1); ++s)
      for (index_t h = 0; h < x.extent(2); ++h) {
        double sum = 0;
        for (index_t d = 0; d < x.extent(3); ++d) sum += std::pow(static_cast<double>(x(b, s, h, d)), 2);
        most = std::max(most, std::sqrt(sum));
      }
  return most;
}
template <class T>
double largest_element(const tensor_view<T, 4>& x) {
  double most = 0;
  for (index_t b = 0; b < x.extent(0); ++b)
    for (index_t s = 0; s < x.extent(1); ++s)
      for (index_t h = 0; h < x.extent(2); ++h)
        for (index_t d = 0; d < x.extent(3); ++d) most = std::max(most, std::abs(static_cast<double>(x(b, s, h, d))));
  return most;
}

// What an output of a call without rules may be off by (docs/01_numerics.md), the sum of a product's magnitudes being
// no more than the product of the rows' norms; in 16 bits half an ulp more, and 2^-8 where weights are rounded.
template <class Q, class K>
double allowed_error(const operands<Q, K>& in) {
  const double scale = 1 / std::sqrt(static_cast<double>(in.q.view().extent(3)));
  const double magnitude = scale * largest_row(in.q.view()) * largest_row(in.k.view());
  const double value = largest_element(in.v.view());
  const auto dim = static_cast<double>(in.q.view().extent(3)),
             splits = static_cast<double>(in.k.view().extent(1)) / 1024;
  const double unit = std::is_same_v<K, double> ? 0x1p-53 : 0x1p-24;
  const double c = unit * ((dim + 12) * magnitude + 14 * magnitude + 60 + 4 * (splits + 1));
  const double stored = std::is_same_v<Q, Eigen::bfloat16> ? 0x1p-8 : std::is_same_v<Q, Eigen::half> ? 0x1p-11 : 0;
  const bool rounds = detail::has_dot<K> && !std::is_same_v<Q, float>;
  return (std::expm1(2 * c) + 2 * unit * (100 + 2 * (splits + 1)) + stored + (rounds ? 0x1p-8 + 0x1p-17 : 0)) * value;
}

// Largest absolute difference; infinite where there is a NaN.
template <class T, class U>
double largest_difference(const tensor_view<T, 4>& x, const tensor_view<U, 4>& y) {
  double worst = 0;
  for (index_t b = 0; b < x.extent(0); ++b)
    for (index_t s = 0; s < x.extent(1); ++s)
      for (index_t h = 0; h < x.extent(2); ++h)
        for (index_t d = 0; d < x.extent(3); ++d) {
          const double off = std::abs(static_cast<double>(x(b, s, h, d)) - static_cast<double>(y(b, s, h, d)));
          worst = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(worst, off);
        }
  return worst;
}

}  // namespace gqa::bench
