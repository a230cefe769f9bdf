// SPDX-License-Identifier: Apache-2.0
// Random operands of an attention call that own their memory, and the largest error of an output.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <gqa/context.hpp>
#include <gqa/reference.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::bench {

struct shape {
  index_t batch, q_len, kv_len, q_heads, kv_heads, head_dim;
};

// A tensor [B, S, H, D] of values in [-1, 1), the same elements in either order of memory.
template <class T>
class tensor {
 public:
  tensor(std::array<index_t, 4> extents, layout order, std::uint32_t seed) : tensor(extents, order) {
    std::uint32_t state = seed * 2654435761u + 1;  // xorshift
    const auto to = view();
    for (index_t b = 0; b < extents[0]; ++b)
      for (index_t s = 0; s < extents[1]; ++s)
        for (index_t h = 0; h < extents[2]; ++h)
          for (index_t d = 0; d < extents[3]; ++d) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            to(b, s, h, d) = static_cast<T>(static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f);
          }
  }
  tensor(std::array<index_t, 4> extents, layout order)
      : extents_(extents),
        order_(order),
        memory_(static_cast<std::size_t>(extents[0] * extents[1] * extents[2] * extents[3])) {}

  tensor_view<T, 4> view() { return make_view(memory_.data()); }
  tensor_view<const T, 4> view() const { return make_view(memory_.data()); }

 private:
  template <class U>
  tensor_view<U, 4> make_view(U* data) const {
    const auto [b, s, h, d] = extents_;
    if (order_ == layout::bshd) return {data, extents_};
    return {data, extents_, {h * s * d, d, s * d, 1}};
  }

  std::array<index_t, 4> extents_;
  layout order_;
  std::vector<T> memory_;
};

// Queries and output in Q, keys and values in K.
template <class Q, class K>
struct operands {
  tensor<Q> q, out;
  tensor<K> k, v;

  operands(const shape& n, layout kv_order)
      : q({n.batch, n.q_len, n.q_heads, n.head_dim}, layout::bshd, 1),
        out({n.batch, n.q_len, n.q_heads, n.head_dim}, layout::bshd),
        k({n.batch, n.kv_len, n.kv_heads, n.head_dim}, kv_order, 2),
        v({n.batch, n.kv_len, n.kv_heads, n.head_dim}, kv_order, 3) {}
};

// Rows [s, s + rows) and heads [h, h + heads) of a view.
template <class T>
tensor_view<T, 4> part_of(const tensor_view<T, 4>& x, index_t s, index_t rows, index_t h, index_t heads) {
  return {&x(0, s, h, 0), {x.extent(0), rows, heads, x.extent(3)}, {x.stride(0), x.stride(1), x.stride(2), 1}};
}

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
    reference::attention(part_of(q, s, count, h, heads), part_of(k, 0, kv_len, g, groups),
                         part_of(v, 0, kv_len, g, groups), part_of(out, s, count, h, heads), own);
  });
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
