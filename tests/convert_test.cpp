// SPDX-License-Identifier: Apache-2.0
// Results as they are stored: packets by the rule of scalars.
#include <gtest/gtest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>

namespace gqa::detail {
namespace {

// Floats whose packets are not stored as stored() has them: of the special ones, of all that bfloat16 holds with their
// ties and the neighbours of those, and of every 509th there is.
template <class Out>
int wrong_results() {
  constexpr int width = packet_size<float>;
  int wrong = 0;
  std::vector<float> x;
  std::vector<Out> actual(width);
  const auto check = [&](std::uint32_t word) {
    x.push_back(std::bit_cast<float>(word));
    if (x.size() < actual.size()) return;
    store_result<Out, float>(actual.data(), load(x.data()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const Out expected = stored<Out>(x[i]);
      wrong += std::memcmp(&actual[i], &expected, sizeof(Out)) != 0;
    }
    x.clear();
  };
  for (std::uint32_t high = 0; high < 0x10000; ++high) {  // zeros, infinities and NaN of either sign among them
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) check(high << 16 | low);
  }
  for (std::uint64_t word = 0; word < std::uint64_t{1} << 32; word += 509) check(static_cast<std::uint32_t>(word));
  while (!x.empty()) check(0);
  return wrong;
}

TEST(StoreResult, IsStoredOfEveryLane) {
  EXPECT_EQ(wrong_results<float>(), 0);
  EXPECT_EQ(wrong_results<Eigen::half>(), 0);
  EXPECT_EQ(wrong_results<Eigen::bfloat16>(), 0);
}

template <class A>
void expect_sums_of_lanes() {
  constexpr int width = packet_size<A>;
  A packets[width * width], sums[width];
  for (int i = 0; i < width * width; ++i) packets[i] = static_cast<A>(i % 37 - i / 29);  // sums are exact
  store(sums, sum_lanes_each(packets));
  for (int i = 0; i < width; ++i) {
    A expected{0};
    for (int lane = 0; lane < width; ++lane) expected += packets[i * width + lane];
    EXPECT_EQ(sums[i], expected) << "packet " << i;
  }
}

TEST(SumLanesEach, IsTheSumOfEachPacket) {
  expect_sums_of_lanes<float>();
  expect_sums_of_lanes<double>();
}

}  // namespace
}  // namespace gqa::detail
