// SPDX-License-Identifier: Apache-2.0
#include <gqa/gqa.hpp>

#include <cmath>

float second();

int main() {
  using tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
  tensor q(1, 1, 2, 4), k(1, 3, 1, 4), v(1, 3, 1, 4), out(1, 1, 2, 4);
  q.setRandom(), k.setRandom(), v.setConstant(0.5f);
  gqa::attention(q, k, v, out, {.causal = true});
  return std::abs(out(0, 0, 1, 3) - 0.5f) < 1e-6f && std::abs(second() - 0.25f) < 1e-6f ? 0 : 1;  // means of equals
}
