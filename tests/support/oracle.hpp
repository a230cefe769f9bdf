// SPDX-License-Identifier: Apache-2.0
// The oracle: reference::attention over doubles that hold exactly what the inputs hold.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::test {

struct oracle_result {
  std::vector<double> out;  // dense [B, S, H, E]
  std::vector<double> lse;  // dense [B, S, H]
  double max_score = 0;     // largest |score| of a visible pair, sinks included
  double max_value = 0;     // largest finite |value|
};

// Defined in oracle.cpp, so that the naive loops are compiled once.
oracle_result run_oracle(tensor_view<const double, 4> q, tensor_view<const double, 4> k, tensor_view<const double, 4> v,
                         const attention_options& options);

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

template <class Q, class K, class V>
oracle_result run_oracle_on(const tensor_view<Q, 4>& q, const tensor_view<K, 4>& k, const tensor_view<V, 4>& v,
                            const attention_options& options) {
  const auto extents = [](const auto& x) {
    return std::array<index_t, 4>{x.extent(0), x.extent(1), x.extent(2), x.extent(3)};
  };
  const auto wide_q = widened(q), wide_k = widened(k), wide_v = widened(v);
  return run_oracle({wide_q.data(), extents(q)}, {wide_k.data(), extents(k)}, {wide_v.data(), extents(v)}, options);
}

}  // namespace gqa::test
