// SPDX-License-Identifier: Apache-2.0
// The oracle: reference::attention over doubles that hold exactly what the inputs hold; and how far from it a kernel
// may be, row by row, derived from the roundings that its sums can have (matchers.hpp tells the derivation).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::test {

struct oracle_result {
  std::vector<double> out;           // dense [B, S, H, E]
  std::vector<double> lse;           // dense [B, S, H]
  double max_score = 0;              // largest |score| of a visible pair, sinks included
  double max_magnitude = 0;          // largest |scale| sum |q_d k_d| of a visible pair, with what is added to it
  double max_value = 0;              // largest finite |value|
  std::vector<double> weight_error;  // [B, S, H]: of the weights of a row, summed, by what its scores may be off
  std::vector<double> lse_error;     // [B, S, H]: of the log-sum-exp, likewise
  double sum_error = 0;              // relative, of sums over all keys

  // What output element i, and the log-sum-exp of row i, may be off by, of accumulators that are not rounded further.
  [[nodiscard]] double out_bound(std::size_t i) const {
    const double error = weight_error[i / (out.size() / lse.size())];
    return error * (max_value + std::abs(out[i])) + 2 * sum_error * max_value;
  }
  [[nodiscard]] double lse_bound(std::size_t i) const { return lse_error[i] + sum_error; }
};

// What a kernel computes in: the unit roundoff of its accumulators, and how many of them a packet holds, over which it
// may divide a score's sum.
struct kernel_arithmetic {
  double unit;
  int lanes;
};
template <class A>
kernel_arithmetic arithmetic_of();  // matchers.hpp

// Defined in oracle.cpp, so that the naive loops are compiled once.
oracle_result run_oracle(tensor_view<const double, 4> q, tensor_view<const double, 4> k, tensor_view<const double, 4> v,
                         const attention_options& options, const kernel_arithmetic& kernel);

// A dense double copy of a view.
template <class T>
std::vector<double> widened(const tensor_view<T, 4>& x) {
  std::vector<double> copy;
  copy.reserve(static_cast<std::size_t>(std::max<index_t>(x.size(), 1)));
  for (index_t b = 0; b < x.extent(0); ++b)
    for (index_t s = 0; s < x.extent(1); ++s)
      for (index_t h = 0; h < x.extent(2); ++h)
        for (index_t d = 0; d < x.extent(3); ++d) copy.push_back(static_cast<double>(x(b, s, h, d)));
  if (copy.empty()) copy.push_back(0);
  return copy;
}

// Of kernels that compute in A: by default in the accumulators of K.
template <class A = void, class Q, class K, class V>
oracle_result run_oracle_on(const tensor_view<Q, 4>& q, const tensor_view<K, 4>& k, const tensor_view<V, 4>& v,
                            const attention_options& options) {
  const auto extents = [](const auto& x) {
    return std::array<index_t, 4>{x.extent(0), x.extent(1), x.extent(2), x.extent(3)};
  };
  using accumulator = std::conditional_t<std::is_void_v<A>, accumulator_t<K>, A>;
  const auto wide_q = widened(q), wide_k = widened(k), wide_v = widened(v);
  return run_oracle({wide_q.data(), extents(q)}, {wide_k.data(), extents(k)}, {wide_v.data(), extents(v)}, options,
                    arithmetic_of<accumulator>());
}

}  // namespace gqa::test
