// SPDX-License-Identifier: Apache-2.0
// A second translation unit with the whole library, and the same calls: nothing may be defined twice.
#include <gqa/gqa.hpp>

float second() {
  using tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
  tensor q(1, 1, 2, 4), k(1, 3, 1, 4), v(1, 3, 1, 4), out(1, 1, 2, 4);
  q.setRandom(), k.setRandom(), v.setConstant(0.25f);
  gqa::attention(q, k, v, out, {.causal = true});
  return out(0, 0, 0, 0);
}
