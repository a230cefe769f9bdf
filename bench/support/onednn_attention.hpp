// SPDX-License-Identifier: Apache-2.0
// Causal attention as a user of oneDNN would write it: its matrix products over blocks of queries and the keys that
// they see, all heads of a group in one product, with a softmax by rows in between. Only where oneDNN was found.
#pragma once

#include <omp.h>
#include <Eigen/Core>
#include <dnnl.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include <gqa/context.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::bench {

// Element types whose products it has wherever this program runs.
template <class T>
inline constexpr bool onednn_multiplies = std::is_same_v<T, float> || detail::has_dot<T>;

// A batch of matrices [batch, rows, columns] of a tensor; a batch of 1 serves all of the other operand's.
template <class T>
struct matrices {
  T* data;
  dnnl::memory::dims extents, strides;

  [[nodiscard]] dnnl::memory::desc desc() const {
    constexpr auto type =
        std::is_same_v<std::remove_const_t<T>, float> ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
    return {extents, type, strides};
  }
  [[nodiscard]] dnnl::memory memory(const dnnl::engine& on) const {
    return {desc(), on, const_cast<std::remove_const_t<T>*>(data)};  // it takes no pointer to const
  }
};

// c = a b. oneDNN keeps what it compiles for a shape.
template <class A, class B, class C>
void multiply(const matrices<A>& a, const matrices<B>& b, const matrices<C>& c) {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  thread_local dnnl::stream stream(cpu);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc product(cpu, a.desc(), b.desc(), c.desc());
#else
  const dnnl::matmul::primitive_desc product(dnnl::matmul::desc(a.desc(), b.desc(), c.desc()), cpu);
#endif
  dnnl::matmul(product).execute(
      stream, {{DNNL_ARG_SRC, a.memory(cpu)}, {DNNL_ARG_WEIGHTS, b.memory(cpu)}, {DNNL_ARG_DST, c.memory(cpu)}});
  stream.wait();
}

// The last query meets the last key. q, out [B, S, H, D]; k, v [B, T, G, D]; KV heads and blocks of 64 queries are
// divided among the threads.
template <class T>
void onednn_attention(tensor_view<const T, 4> q, tensor_view<const T, 4> k, tensor_view<const T, 4> v,
                      tensor_view<T, 4> out, context& ctx) {
  const index_t q_len = q.extent(1), kv_len = k.extent(1), kv_heads = k.extent(2), group = q.extent(2) / kv_heads;
  const index_t block = 64, blocks = (q_len + block - 1) / block;
  const float scale = 1 / std::sqrt(static_cast<float>(q.extent(3)));
  ctx.for_each(q.extent(0) * kv_heads * blocks, [&](index_t task, index_t) {
    omp_set_num_threads(1);  // of this worker's products
    const index_t b = task / (kv_heads * blocks), g = task / blocks % kv_heads, first = task % blocks * block;
    const index_t count = std::min(block, q_len - first), seen = kv_len - q_len + first + count;
    // The queries of all heads of the group are the rows of one matrix, head by head, copied into it and out of it.
    const index_t rows = group * count, dim = q.extent(3), value_dim = v.extent(3);
    thread_local std::vector<T> own_q, own_out;
    own_q.resize(static_cast<std::size_t>(rows * dim));
    own_out.resize(static_cast<std::size_t>(rows * value_dim));
    for (index_t r = 0; r < rows; ++r)
      std::copy_n(&q(b, first + r % count, g * group + r / count, 0), dim, own_q.data() + r * dim);
    const matrices<const T> queries{own_q.data(), {1, rows, dim}, {rows * dim, dim, 1}};
    const matrices<const T> keys{&k(b, 0, g, 0), {1, k.extent(3), seen}, {seen * k.stride(1), 1, k.stride(1)}};
    const matrices<const T> values{&v(b, 0, g, 0), {1, seen, v.extent(3)}, {seen * v.stride(1), v.stride(1), 1}};
    const dnnl::memory::dims extents{1, rows, seen}, strides{rows * seen, seen, 1};

    thread_local std::vector<float> scores;
    thread_local std::vector<T> weights;
    scores.resize(static_cast<std::size_t>(rows * seen));
    weights.resize(scores.size());
    multiply(queries, keys, matrices<float>{scores.data(), extents, strides});
    for (index_t r = 0; r < rows; ++r) {
      const index_t visible = seen - count + 1 + r % count;
      Eigen::Map<Eigen::ArrayXf> row(scores.data() + r * seen, visible);
      Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>> to(weights.data() + r * seen, seen);
      row = ((row - row.maxCoeff()) * scale).exp();
      to.head(visible) = (row / row.sum()).template cast<T>();
      to.tail(seen - visible).setConstant(T(0));
    }
    multiply(matrices<const T>{weights.data(), extents, strides}, values,
             matrices<T>{own_out.data(), {1, rows, value_dim}, {rows * value_dim, value_dim, 1}});
    for (index_t r = 0; r < rows; ++r)
      std::copy_n(own_out.data() + r * value_dim, value_dim, &out(b, first + r % count, g * group + r / count, 0));
  });
}

}  // namespace gqa::bench
