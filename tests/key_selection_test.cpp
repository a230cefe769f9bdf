// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/refusal.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

TEST(KeySelection, TopKeysAreThoseOfTheLargestSums) {
  const std::vector<float> weights{0.1F, 0.5F, 0.2F, 0.2F,   //
                                   0.4F, 0.1F, 0.3F, 0.3F};  // sums 0.5, 0.6, 0.5, 0.5
  const tensor_view<const float, 2> both(weights.data(), {2, 4}), first(weights.data(), {1, 4});
  EXPECT_EQ(top_keys(first, 2), (std::vector<index_t>{1, 2}));
  EXPECT_EQ(top_keys(both, 1), (std::vector<index_t>{1}));
  EXPECT_EQ(top_keys(both, 0), std::vector<index_t>{});
  EXPECT_EQ(top_keys(both, 9), (std::vector<index_t>{0, 1, 2, 3}));
  EXPECT_EQ(code_of([&] { static_cast<void>(top_keys(both, -1)); }), errc::shape);
  const std::vector<float> broken{0.5F, std::numeric_limits<float>::quiet_NaN(), 0.1F, 0.4F};
  EXPECT_EQ(top_keys(tensor_view<const float, 2>(broken.data(), {1, 4}), 3), (std::vector<index_t>{0, 2, 3}));
  EXPECT_EQ(top_keys(tensor_view<const float, 2>(nullptr, {0, 0}), 3), std::vector<index_t>{});
}

TEST(KeySelection, NoSelectionOfAsManyKeysHasMoreMass) {
  rng random(2);
  for (int round = 0; round < 300; ++round) {
    const index_t keys = random.between(1, 60), k = random.between(0, keys), rows = random.between(1, 4);
    std::vector<double> weights(static_cast<std::size_t>(rows * keys));
    for (double& x : weights) x = random.chance(0.2) ? 0.25 : random.uniform();
    const tensor_view<const double, 2> view(weights.data(), {rows, keys});
    const auto mass_of = [&](const std::vector<index_t>& selected) {
      double sum = 0;
      for (index_t r = 0; r < rows; ++r)
        sum += mass(std::span<const double>(weights).subspan(static_cast<std::size_t>(r * keys),
                                                             static_cast<std::size_t>(keys)),
                    std::span<const index_t>(selected));
      return sum;
    };
    const auto best = top_keys(view, k);
    ASSERT_TRUE(std::is_sorted(best.begin(), best.end()));
    std::vector<index_t> other;
    for (index_t t = 0; t < keys; ++t) other.push_back(t);
    for (std::size_t i = 0; i < other.size(); ++i)
      std::swap(other[i], other[static_cast<std::size_t>(random.between(0, keys - 1))]);
    other.resize(static_cast<std::size_t>(k));
    ASSERT_GE(mass_of(best) + 1e-9, mass_of(other));
  }
}

TEST(KeySelection, RecallAndMassCountWhatWasSelected) {
  const std::vector<index_t> wanted{2, 5, 7}, some{1, 5, 7, 9}, none;
  EXPECT_DOUBLE_EQ(recall(some, wanted), 2.0 / 3);
  EXPECT_DOUBLE_EQ(recall(none, wanted), 0);
  EXPECT_DOUBLE_EQ(recall(some, none), 1);
  const std::vector<float> weights{0.5F, 0.25F, 0.125F};
  const std::vector<index_t> ends{0, 2}, beyond{3}, negative{-1};
  EXPECT_EQ(mass(std::span<const float>(weights), ends), 0.625);
  EXPECT_EQ(code_of([&] { static_cast<void>(mass(std::span<const float>(weights), beyond)); }), errc::range);
  EXPECT_EQ(code_of([&] { static_cast<void>(mass(std::span<const float>(weights), negative)); }), errc::range);
}

}  // namespace
}  // namespace gqa::test
