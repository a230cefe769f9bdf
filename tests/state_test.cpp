// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// A state [B, S, H, E] that owns its memory.
template <class T = float>
struct owned_state {
  std::array<index_t, 4> extents;
  std::vector<T> out;
  std::vector<accumulator_t<T>> lse;

  explicit owned_state(std::array<index_t, 4> n)
      : extents(n),
        out(static_cast<std::size_t>(n[0] * n[1] * n[2] * n[3])),
        lse(static_cast<std::size_t>(n[0] * n[1] * n[2]), -std::numeric_limits<accumulator_t<T>>::infinity()) {}
  partial_state<T> state() {
    return {tensor_view<T, 4>(out.data(), extents),
            tensor_view<accumulator_t<T>, 3>(lse.data(), {extents[0], extents[1], extents[2]})};
  }
};

// The keys [begin, end) of a call, attended to on their own.
owned_state<> attend_part(const operands<float, float>& in, index_t begin, index_t end, bool with_sink = false) {
  const auto& n = in.of.shape;
  const auto part = [&](const tensor_view<const float, 4>& x) { return slice(x, 1, begin, end - begin); };
  auto options = in.options;
  options.query_offset = n.t - n.s - begin;  // sharded by hand: positions relative to the part
  if (!with_sink) options.sinks = {};
  owned_state<> result({n.b, n.s, n.h, n.e});
  attention(in.q.view(), part(in.k.view()), part(in.v.view()), result.state(), options);
  return result;
}

const attention_case sharded_case{{2, 5, 300, 4, 2, 32, 40}, with_causal | with_sinks, layout::bshd};

::testing::AssertionResult is_whole(owned_state<>& merged, const operands<float, float>& in) {
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  comparison compared;
  // Each merge adds a few roundings to those of attention itself.
  for (std::size_t i = 0; i < merged.out.size(); ++i)
    compared.add(static_cast<double>(merged.out[i]), expected.out[i], 2 * expected.out_bound(i),
                 "out " + std::to_string(i));
  for (std::size_t i = 0; i < merged.lse.size(); ++i)
    compared.add(static_cast<double>(merged.lse[i]), expected.lse[i], 2 * expected.lse_bound(i), "lse");
  return compared.result();
}

TEST(Merge, OfPartsIsTheWholeForAnyTree) {
  const operands<float, float> in(sharded_case);
  context ctx;
  const std::vector<index_t> cuts = {0, 1, 64, 130, 131, 299, 300};
  std::vector<owned_state<>> parts;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) parts.push_back(attend_part(in, cuts[i], cuts[i + 1], i == 2));

  auto left = parts[0];  // (((0 1) 2) 3) ...
  for (std::size_t i = 1; i < parts.size(); ++i) merge(left.state(), parts[i].state(), ctx);
  EXPECT_TRUE(is_whole(left, in));

  auto right = parts.back();  // from the other end
  for (std::size_t i = parts.size() - 1; i-- > 0;) merge(right.state(), parts[i].state(), ctx);
  EXPECT_TRUE(is_whole(right, in));

  auto pairs = parts;  // a balanced tree
  for (std::size_t step = 1; step < pairs.size(); step *= 2)
    for (std::size_t i = 0; i + step < pairs.size(); i += 2 * step)
      merge(pairs[i].state(), pairs[i + step].state(), ctx);
  EXPECT_TRUE(is_whole(pairs[0], in));

  std::vector<partial_state<const float>> all;
  for (auto& part : parts) all.push_back(part.state());
  owned_state<> many({2, 5, 4, 40});
  merge_many<float>(all, many.state(), ctx);
  EXPECT_TRUE(is_whole(many, in));
}

// Weights 1 and 3, by hand; the result is a handful of roundings away.
TEST(Merge, WeighsStatesByTheirSums) {
  owned_state<> a({1, 1, 1, 3}), b({1, 1, 1, 3});
  a.out = {1, -2, 0};
  b.out = {5, 2, 0.125f};
  a.lse = {0};
  b.lse = {std::log(3.0f)};
  context ctx;
  merge(a.state(), b.state(), ctx);
  const std::vector<double> expected = {4, 1, 0.09375};
  for (std::size_t i = 0; i < 3; ++i)
    EXPECT_NEAR(static_cast<double>(a.out[i]), expected[i], 4 * 0x1p-23 * expected[i]);
  EXPECT_NEAR(static_cast<double>(a.lse[0]), std::log(4.0), 4 * 0x1p-23);
}

TEST(Merge, OfTwoEmptyStatesIsEmpty) {
  owned_state<> a({1, 2, 3, 8}), b({1, 2, 3, 8});
  context ctx;
  merge(a.state(), b.state(), ctx);
  for (const float x : a.out) EXPECT_EQ(x, 0.0f);
  for (const float x : a.lse) EXPECT_EQ(x, -inf);
}

TEST(Merge, WithAnEmptyStateChangesNotABit) {
  const operands<float, float> in(sharded_case);
  context ctx;
  auto full = attend_part(in, 0, 200);
  const auto before = full;
  owned_state<> empty({2, 5, 4, 40});
  merge(full.state(), empty.state(), ctx);
  EXPECT_EQ(full.out, before.out);
  EXPECT_EQ(full.lse, before.lse);
  merge(empty.state(), full.state(), ctx);
  EXPECT_EQ(empty.out, before.out);
  EXPECT_EQ(empty.lse, before.lse);
}

TEST(Merge, IsTheSameOnAnyExecutor) {
  const operands<float, float> in(sharded_case);
  Eigen::ThreadPool pool(3);
  context serial, on_pool(pool);
  auto a = attend_part(in, 0, 200), b = a;
  auto rest = attend_part(in, 200, 300);
  merge(a.state(), rest.state(), serial);
  merge(b.state(), rest.state(), on_pool);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.lse, b.lse);
}

TEST(Merge, KeepsLargeLogSumExpsApart) {
  owned_state<> a({1, 1, 1, 2}), b({1, 1, 1, 2});
  a.out = {1, 2};
  a.lse = {-5e4f};
  b.out = {3, 4};
  b.lse = {5e4f};
  context ctx;
  merge(a.state(), b.state(), ctx);
  EXPECT_EQ(a.out, (std::vector<float>{3, 4}));
  EXPECT_EQ(a.lse[0], 5e4f);
}

TEST(Merge, CarriesNaNOn) {
  owned_state<> a({1, 1, 1, 2}), b({1, 1, 1, 2});
  a.lse = {std::numeric_limits<float>::quiet_NaN()};
  b.out = {3, 4};
  b.lse = {0};
  context ctx;
  merge(b.state(), a.state(), ctx);
  EXPECT_TRUE(std::isnan(b.out[0]));
  EXPECT_TRUE(std::isnan(b.lse[0]));
}

TEST(Merge, OfSixteenBitStatesRoundsOnce) {
  using half = Eigen::half;
  std::vector<owned_state<half>> parts(9, owned_state<half>({1, 1, 1, 1}));
  std::vector<partial_state<const half>> all;
  double sum = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parts[i].out[0] = static_cast<half>(1.0f + 0.1f * static_cast<float>(i));
    parts[i].lse[0] = 0;
    sum += static_cast<double>(static_cast<float>(parts[i].out[0]));
    all.push_back(parts[i].state());
  }
  owned_state<half> result({1, 1, 1, 1});
  context ctx;
  merge_many<half>(all, result.state(), ctx);
  EXPECT_EQ(result.out[0], static_cast<half>(static_cast<float>(sum / 9)));
  EXPECT_NEAR(static_cast<double>(result.lse[0]), std::log(9.0), 8 * 0x1p-23);  // nine exponentials and their sum
}

TEST(MergeMany, OfNothingIsTheEmptyState) {
  owned_state<> result({1, 2, 2, 3});
  std::fill(result.out.begin(), result.out.end(), 7.0f);
  context ctx;
  merge_many<float>({}, result.state(), ctx);
  for (const float x : result.out) EXPECT_EQ(x, 0.0f);
  for (const float x : result.lse) EXPECT_EQ(x, -inf);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Merge, RefusesOtherShapesAndLeavesSelfUntouched) {
  owned_state<> a({1, 2, 3, 8});
  std::iota(a.out.begin(), a.out.end(), 1.0f);
  const auto before = a.out;
  context ctx;
  for (const std::array<index_t, 4> n : {std::array<index_t, 4>{1, 2, 3, 9}, {1, 2, 2, 8}, {2, 2, 3, 8}}) {
    owned_state<> b(n);
    try {
      merge(a.state(), b.state(), ctx);
      FAIL();
    } catch (const error& e) {
      EXPECT_EQ(e.code(), errc::shape);
    }
    EXPECT_EQ(a.out, before);
  }
}

TEST(Merge, RefusesSharedMemory) {
  owned_state<> a({1, 2, 3, 8}), b({1, 2, 3, 8});
  context ctx;
  const auto expect_refused = [&](const partial_state<float>& self, const partial_state<const float>& other) {
    try {
      merge(self, other, ctx);
      ADD_FAILURE() << "not refused";
    } catch (const error& e) {
      EXPECT_EQ(e.code(), errc::stride);
    }
  };
  auto shifted = partial_state<const float>(b.state());
  shifted.out = {a.out.data() + 1, {1, 2, 3, 8}, {0, 0, 8, 1}};
  expect_refused(a.state(), shifted);
  auto crossed = partial_state<const float>(b.state());
  crossed.lse = {a.out.data(), {1, 2, 3}};
  expect_refused(a.state(), crossed);
  auto knotted = a.state();
  knotted.lse = {a.out.data(), {1, 2, 3}};
  expect_refused(knotted, b.state());
}
#endif

TEST(PartialState, OverSixteenBitInputsMayBeFloat) {
  const operands<Eigen::half, Eigen::half> in(attention_case{{1, 3, 80, 4, 2, 32, 32}, with_causal, layout::bshd});
  context ctx;
  const auto got = test::run<float>(in, ctx);
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  for (std::size_t i = 0; i < got.out.size(); ++i)
    EXPECT_NEAR(static_cast<double>(got.out[i]), expected.out[i], expected.out_bound(i));
}

}  // namespace
}  // namespace gqa::test
