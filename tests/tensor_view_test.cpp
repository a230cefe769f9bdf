// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include <Eigen/Core>

#include <gqa/tensor_view.hpp>

namespace gqa::test {
namespace {

static_assert(std::is_trivially_copyable_v<tensor_view<float, 4>>);
static_assert(std::is_convertible_v<tensor_view<float, 4>, tensor_view<const float, 4>>);
static_assert(!std::is_convertible_v<tensor_view<const float, 4>, tensor_view<float, 4>>);
static_assert(!std::is_convertible_v<tensor_view<float, 4>, tensor_view<const double, 4>>);
static_assert(tensor_like<tensor_view<float, 4>> && tensor_like<const tensor_view<const double, 4>&>);
static_assert(!tensor_like<tensor_view<float, 3>> && !tensor_like<std::vector<float>>);
static_assert(tensor_view<int, 3>(nullptr, {2, 3, 4}).stride(0) == 12);
static_assert(tensor_view<int, 3>(nullptr, {2, 3, 4}).size() == 24);

TEST(TensorView, WithoutDataIsEmpty) {
  const tensor_view<float, 4> v;
  EXPECT_EQ(v.data(), nullptr);
  EXPECT_EQ(v.size(), 0);
}

TEST(TensorView, OfDenseMemoryHasTheLastAxisFastest) {
  std::vector<int> data(2 * 3 * 4 * 5);
  std::iota(data.begin(), data.end(), 0);
  const auto v = view(data.data(), {2, 3, 4, 5});
  EXPECT_EQ(v(0, 0, 0, 1), 1);
  EXPECT_EQ(v(0, 0, 1, 0), 5);
  EXPECT_EQ(v(0, 1, 0, 0), 20);
  EXPECT_EQ(v(1, 2, 3, 4), 119);
  EXPECT_EQ(v.extent(2), 4);
}

TEST(TensorView, TakesAnyStrides) {
  std::vector<int> data(24);
  std::iota(data.begin(), data.end(), 0);
  const auto v = view(data.data() + 5, {1, 2, 3, 4}, {0, 4, 8, -1});
  EXPECT_EQ(v(0, 0, 0, 0), 5);
  EXPECT_EQ(v(0, 1, 1, 3), 5 + 4 + 8 - 3);
  v(0, 0, 0, 1) = 77;
  EXPECT_EQ(data[4], 77);
}

TEST(ViewAs, SeesRawWordsAsHalves) {
  std::vector<std::uint16_t> words = {0x3c00, 0xc000, 0x7c00, 0x0001};
  const auto halves = view_as<Eigen::half>(words.data(), {1, 1, 2, 2});
  EXPECT_EQ(static_cast<float>(halves(0, 0, 0, 0)), 1.0f);
  EXPECT_EQ(static_cast<float>(halves(0, 0, 0, 1)), -2.0f);
  halves(0, 0, 1, 1) = Eigen::half(1.0f);
  EXPECT_EQ(words[3], 0x3c00);
  const std::vector<std::uint16_t> constant = {0x3f80, 0x4000};
  const auto brain = view_as<Eigen::bfloat16>(constant.data(), {1, 1, 1, 2}, {2, 2, 2, 1});
  static_assert(std::is_same_v<decltype(brain), const tensor_view<const Eigen::bfloat16, 4>>);
  EXPECT_EQ(static_cast<float>(brain(0, 0, 0, 1)), 2.0f);
}

}  // namespace
}  // namespace gqa::test
