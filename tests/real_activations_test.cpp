// SPDX-License-Identifier: Apache-2.0
// attention() on queries, keys and values of a trained model (after RoPE), against its output in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/matchers.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

TEST(RealActivations, AreWithinTenToTheMinusFiveOfTheStoredOutput) {
  GQA_NEED_TEST_DATA();
  std::ifstream file(test_data_folder() + "/models/stories260K_attn512.bin", std::ios::binary);
  ASSERT_TRUE(file);
  char magic[8];
  std::int32_t header[5];  // layers, positions, query heads, KV heads, head dim
  file.read(magic, sizeof magic);
  file.read(reinterpret_cast<char*>(header), sizeof header);
  ASSERT_EQ(std::memcmp(magic, "ATTNREF1", 8), 0);
  const index_t s = header[1], h = header[2], g = header[3], d = header[4];
  const auto read = [&]<class T>(T, index_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    file.read(reinterpret_cast<char*>(values.data()), count * static_cast<index_t>(sizeof(T)));
    return values;
  };
  for (int layer = 0; layer < header[0]; ++layer) {
    const auto q = read(float{}, s * h * d), k = read(float{}, s * g * d), v = read(float{}, s * g * d);
    const auto expected = read(double{}, s * h * d);
    ASSERT_TRUE(file);
    std::vector<float> out(q.size());
    attention(view(q.data(), {1, s, h, d}), view(k.data(), {1, s, g, d}), view(v.data(), {1, s, g, d}),
              view(out.data(), {1, s, h, d}), {.causal = true});
    comparison compared;
    for (std::size_t i = 0; i < out.size(); ++i)
      compared.add(static_cast<double>(out[i]), expected[i], 1e-5, "element " + std::to_string(i));
    EXPECT_TRUE(compared.result()) << "layer " << layer;
  }
}

}  // namespace
}  // namespace gqa::test
