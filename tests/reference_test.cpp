// SPDX-License-Identifier: Apache-2.0
// The oracle itself, against values worked out by hand.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <gqa/reference.hpp>

namespace gqa::test {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

struct result {
  std::vector<double> out, lse;
};

// One sequence; q [S][H][1], k and v [T][G][1].
result attend(std::vector<double> q, index_t heads, std::vector<double> k, std::vector<double> v, index_t kv_heads,
              const attention_options& options) {
  const index_t s = static_cast<index_t>(q.size()) / heads, t = static_cast<index_t>(k.size()) / kv_heads;
  result r{std::vector<double>(q.size()), std::vector<double>(q.size())};
  const partial_state<double> state{tensor_view<double, 4>(r.out.data(), {1, s, heads, 1}),
                                    tensor_view<double, 3>(r.lse.data(), {1, s, heads})};
  reference::attention(view(q.data(), {1, s, heads, 1}), view(k.data(), {1, t, kv_heads, 1}),
                       view(v.data(), {1, t, kv_heads, 1}), state, options);
  return r;
}

// Scores ln 1, ln 2, ln 5 weigh 1/8, 2/8, 5/8.
const std::vector<double> log_keys = {std::log(1.0), std::log(2.0), std::log(5.0)};

TEST(Reference, IsAWeightedMean) {
  const auto r = attend({1}, 1, log_keys, {8, 16, 24}, 1, {});
  EXPECT_NEAR(r.out[0], (8 * 1 + 16 * 2 + 24 * 5) / 8.0, 1e-13);
  EXPECT_NEAR(r.lse[0], std::log(8.0), 1e-15);
}

TEST(Reference, ScalesBeforeEverythingElse) {
  attention_options o;
  o.scale = 2.0;  // weights 1, 4, 25
  EXPECT_NEAR(attend({1}, 1, log_keys, {30, 60, 90}, 1, o).out[0], (30 + 240 + 2250) / 30.0, 1e-12);
}

TEST(Reference, CausalIsBottomRight) {
  attention_options o{.causal = true};
  const auto r = attend({1, 1}, 1, log_keys, {3, 6, 9}, 1, o);  // queries at 1 and 2
  EXPECT_NEAR(r.out[0], (3 * 1 + 6 * 2) / 3.0, 1e-13);
  EXPECT_NEAR(r.out[1], (3 * 1 + 6 * 2 + 9 * 5) / 8.0, 1e-13);
  o.query_offset = -1;
  const auto early = attend({1, 1}, 1, log_keys, {3, 6, 9}, 1, o);  // at -1 and 0
  EXPECT_EQ(early.out[0], 0);
  EXPECT_EQ(early.lse[0], -inf);
  EXPECT_EQ(early.out[1], 3);
}

TEST(Reference, WindowEndsAreInclusive) {
  attention_options o;
  o.window = {1, 0};
  EXPECT_NEAR(attend({1}, 1, log_keys, {0, 7, 14}, 1, o).out[0], (7 * 2 + 14 * 5) / 7.0, 1e-13);
}

TEST(Reference, HeadsShareTheirGroupsKeys) {
  attention_options o;
  // Head 0, 1 read KV head 0; head 2, 3 read KV head 1.
  const auto r = attend({1, 2, 3, 4}, 4, {0.5, 0.25}, {10, 20}, 2, o);
  EXPECT_EQ(r.out, (std::vector<double>{10, 10, 20, 20}));
  const std::array<index_t, 3> groups{0, 1, 4};
  o.group_offsets = groups;
  EXPECT_EQ(attend({1, 2, 3, 4}, 4, {0.5, 0.25}, {10, 20}, 2, o).out, (std::vector<double>{10, 20, 20, 20}));
}

TEST(Reference, SinkTakesItsShare) {
  attention_options o;
  const std::array<float, 1> sinks{static_cast<float>(std::log(8.0))};
  o.sinks = sinks;
  const auto r = attend({1}, 1, log_keys, {8, 16, 24}, 1, o);
  // The sink is log 8 rounded to float, off by up to 2^-23, and half of the weights.
  EXPECT_NEAR(r.out[0], 160 / 16.0, 10 * 0x1p-24);
  EXPECT_NEAR(r.lse[0], std::log(16.0), 0x1p-24);
}

TEST(Reference, SoftcapThenBiasThenAlibi) {
  attention_options o;
  o.softcap = 2.0;
  const std::array<float, 2> bias{0.5f, -0.25f};
  o.bias = tensor_view<const float, 4>(bias.data(), {1, 1, 1, 2});
  const std::array<float, 1> slopes{0.125f};
  o.alibi_slopes = slopes;
  const auto r = attend({1}, 1, {3, 1}, {1, 0}, 1, o);  // query at 1
  const double a = 2 * std::tanh(1.5) + 0.5 - 0.125, b = 2 * std::tanh(0.5) - 0.25;
  EXPECT_NEAR(r.out[0], std::exp(a) / (std::exp(a) + std::exp(b)), 1e-15);
  EXPECT_NEAR(r.lse[0], std::log(std::exp(a) + std::exp(b)), 1e-15);
}

TEST(Reference, MasksAndLengthsHide) {
  attention_options o;
  const std::array<bool, 3> mask{false, true, true};
  o.mask = tensor_view<const bool, 4>(mask.data(), {1, 1, 1, 3});
  EXPECT_NEAR(attend({1}, 1, log_keys, {8, 16, 24}, 1, o).out[0], (16 * 2 + 24 * 5) / 7.0, 1e-13);
  const std::array<index_t, 1> lengths{2};
  o.kv_lengths = lengths;
  EXPECT_EQ(attend({1}, 1, log_keys, {8, 16, 24}, 1, o).out[0], 16);
}

TEST(Reference, LargeScoresDoNotOverflow) {
  const auto r = attend({1e5}, 1, {1, 0.5, -1}, {3, 4, 5}, 1, {});
  EXPECT_EQ(r.out[0], 3);
  EXPECT_EQ(r.lse[0], 1e5);
  EXPECT_EQ(attend({-1e5}, 1, {1, 2}, {3, 4}, 1, {}).lse[0], -1e5);
}

}  // namespace
}  // namespace gqa::test
