// SPDX-License-Identifier: Apache-2.0
// attention() on queries, keys and values of a trained model (after RoPE), against its output in double.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/matchers.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

TEST(RealActivations, AreWithinTheBoundOfTheStoredOutput) {
  GQA_NEED_TEST_DATA();
  for (const real_layer& layer : read_real_layers()) {
    const index_t s = layer.positions, h = layer.q_heads, g = layer.kv_heads, d = layer.dim;
    std::vector<float> out(layer.q.size());
    attention(view(layer.q.data(), {1, s, h, d}), view(layer.k.data(), {1, s, g, d}),
              view(layer.v.data(), {1, s, g, d}), view(out.data(), {1, s, h, d}), {.causal = true});
    const auto expected = run_oracle_on(view(layer.q.data(), {1, s, h, d}), view(layer.k.data(), {1, s, g, d}),
                                        view(layer.v.data(), {1, s, g, d}), {.causal = true});
    comparison compared;
    for (std::size_t i = 0; i < out.size(); ++i)
      compared.add(static_cast<double>(out[i]), layer.out[i], expected.out_bound(i), "element " + std::to_string(i));
    EXPECT_TRUE(compared.result());
  }
}

}  // namespace
}  // namespace gqa::test
