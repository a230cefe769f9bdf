// SPDX-License-Identifier: Apache-2.0
#include "oracle.hpp"

#include <gqa/reference.hpp>

namespace gqa::test {

oracle_result run_oracle(tensor_view<const double, 4> q, tensor_view<const double, 4> k, tensor_view<const double, 4> v,
                         const attention_options& options) {
  // A variant that changes nothing and notes the largest score.
  struct recorder {
    double* max_score;
    double score(double s, const position&) const {
      if (std::isfinite(s)) *max_score = std::max(*max_score, std::abs(s));
      return s;
    }
  };
  const index_t rows = q.extent(0) * q.extent(1) * q.extent(2), e = v.extent(3);
  oracle_result result;
  result.out.resize(static_cast<std::size_t>(std::max<index_t>(rows * e, 1)));
  result.lse.resize(static_cast<std::size_t>(std::max<index_t>(rows, 1)));
  const partial_state<double> state{
      tensor_view<double, 4>(result.out.data(), {q.extent(0), q.extent(1), q.extent(2), e}),
      tensor_view<double, 3>(result.lse.data(), {q.extent(0), q.extent(1), q.extent(2)})};
  reference::attention(q, k, v, state, options, recorder{&result.max_score});
  for (const float sink : options.sinks) {
    if (std::isfinite(sink)) result.max_score = std::max(result.max_score, std::abs(static_cast<double>(sink)));
  }
  for (index_t i = 0; i < v.size(); ++i) {
    const double x = std::abs(v.data()[i]);
    if (std::isfinite(x)) result.max_value = std::max(result.max_value, x);
  }
  return result;
}

}  // namespace gqa::test
