// SPDX-License-Identifier: Apache-2.0
// Causal attention as a user of Eigen would write it: for 64 queries of a head at a time a matrix product with the keys
// that they see, a softmax by rows, a product for the output. The demo and the benches compare with it.
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <cmath>

#include <gqa/context.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::bench {

using row_major_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// The [S, D] matrix of one head of a [B, S, H, D] view.
template <class T>
auto head_of(const tensor_view<T, 4>& x, index_t b, index_t h) {
  using matrix = std::conditional_t<std::is_const_v<T>, const row_major_matrix, row_major_matrix>;
  return Eigen::Map<matrix, 0, Eigen::OuterStride<>>(&x(b, 0, h, 0), x.extent(1), x.extent(3),
                                                     Eigen::OuterStride<>(x.stride(1)));
}

// The last query meets the last key. q, out [B, S, H, D]; k, v [B, T, G, D]; heads are divided among the threads.
inline void eigen_attention(tensor_view<const float, 4> q, tensor_view<const float, 4> k, tensor_view<const float, 4> v,
                            tensor_view<float, 4> out, context& ctx) {
  const index_t q_len = q.extent(1), kv_len = k.extent(1), heads = q.extent(2);
  const index_t group_size = heads / k.extent(2);
  const float scale = 1 / std::sqrt(static_cast<float>(q.extent(3)));
  ctx.for_each(q.extent(0) * heads, [&](index_t task, index_t) {
    const index_t b = task / heads, h = task % heads;
    const auto queries = head_of(q, b, h);
    const auto keys = head_of(k, b, h / group_size), values = head_of(v, b, h / group_size);
    auto result = head_of(out, b, h);
    if (q_len == 1) {  // matrix-vector products, for which Eigen has better loops
      Eigen::VectorXf weights = scale * (keys * queries.row(0).transpose());
      weights = (weights.array() - weights.maxCoeff()).exp();
      result.row(0).noalias() = weights.transpose() * values / weights.sum();
      return;
    }
    row_major_matrix weights;
    for (index_t first = 0; first < q_len; first += 64) {
      const index_t count = std::min<index_t>(64, q_len - first);
      const index_t seen = std::clamp<index_t>(kv_len - q_len + first + count, 0, kv_len);
      weights.noalias() = scale * (queries.middleRows(first, count) * keys.topRows(seen).transpose());
      for (index_t s = 0; s < count; ++s) {
        const index_t visible = std::clamp<index_t>(seen - count + s + 1, 0, seen);
        auto row = weights.row(s);
        row.tail(seen - visible).setZero();
        row.head(visible) = (row.head(visible).array() - row.head(visible).maxCoeff()).exp();
        row.head(visible) /= row.head(visible).sum();
      }
      result.middleRows(first, count).noalias() = weights * values.topRows(seen);
    }
  });
}

}  // namespace gqa::bench
