// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

const attention_case whole{{2, 7, 130, 4, 2, 16, 8}, 0, layout::bshd};

// The state of a case's queries over keys [begin, end).
attended<float> over_keys(const operands<float, float>& in, index_t begin, index_t end) {
  const auto& n = in.of.shape;
  attended<float> r;
  r.out.resize(static_cast<std::size_t>(n.b * n.s * n.h * n.e));
  r.lse.resize(static_cast<std::size_t>(n.b * n.s * n.h));
  context ctx;
  attention(in.q.view(), slice(in.k.view(), 1, begin, end - begin), slice(in.v.view(), 1, begin, end - begin),
            partial_state<float>{tensor_view<float, 4>(r.out.data(), {n.b, n.s, n.h, n.e}),
                                 tensor_view<float, 3>(r.lse.data(), {n.b, n.s, n.h})},
            in.options, ctx);
  return r;
}
partial_state<float> state_of(attended<float>& r) {
  const auto& n = whole.shape;
  return {tensor_view<float, 4>(r.out.data(), {n.b, n.s, n.h, n.e}),
          tensor_view<float, 3>(r.lse.data(), {n.b, n.s, n.h})};
}

// Attention over parts of the keys, combined, against attention over all they cover: each of at most four states is off
// by a bound of its own, each merge by less than another, and what excludes keys magnifies that by `factor`.
void expect_near(const attended<float>& actual, const attended<float>& expected, double factor = 1) {
  const operands<float, float> in(whole);
  const auto oracle = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  const double passes = 6 * factor;
  const double of_out = output_bound<float>(whole.shape.d, oracle.max_magnitude, oracle.max_value, passes);
  const double of_lse = lse_bound<float>(whole.shape.d, oracle.max_magnitude, passes);
  for (std::size_t i = 0; i < actual.out.size(); ++i) ASSERT_NEAR(actual.out[i], expected.out[i], of_out) << i;
  for (std::size_t i = 0; i < actual.lse.size(); ++i) ASSERT_NEAR(actual.lse[i], expected.lse[i], of_lse) << i;
}

TEST(Combine, MergesDisjointRangesToTheirUnion) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 40), b = over_keys(in, 40, 100), c = over_keys(in, 100, 130);
  attended<float> merged = a;
  context ctx;
  const std::array<partial_state<const float>, 3> states{state_of(b), state_of(a), state_of(c)};
  const std::array<key_range, 3> keys{key_range{40, 100}, {0, 40}, {100, 130}};
  merge_disjoint<float>(states, keys, state_of(merged), ctx);
  expect_near(merged, over_keys(in, 0, 130));
}

TEST(Combine, CountsSharedKeysOnce) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), b = over_keys(in, 50, 130), both = over_keys(in, 50, 90);
  context ctx;
  merge<float>(state_of(a), state_of(b), ctx);
  exclude<float>(state_of(a), state_of(both), ctx);
  expect_near(a, over_keys(in, 0, 130), 4);
}

TEST(Combine, ExcludesToTheEmptyState) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), same = a, none = over_keys(in, 0, 0);
  context ctx;
  const auto before = a;
  exclude<float>(state_of(a), state_of(none), ctx);
  EXPECT_TRUE(a.same_bits(before));
  exclude<float>(state_of(a), state_of(same), ctx);
  EXPECT_TRUE(a.same_bits(none));
}

using view4 = tensor_view<const float, 4>;
using gate_view = tensor_view<const float, 3>;

TEST(Combine, GatesOfOneBranchGiveThatBranch) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), b = over_keys(in, 50, 130);
  for (float& x : a.out) x = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> zeros(b.lse.size(), 0), ones(b.lse.size(), 1);
  const std::array<index_t, 3> rows{2, 7, 4};
  const std::array<view4, 3> branches{state_of(a).out, state_of(b).out, state_of(a).out};
  const std::array<gate_view, 3> gates{gate_view(zeros.data(), rows), gate_view(ones.data(), rows),
                                       gate_view(zeros.data(), rows)};
  std::vector<float> out(b.out.size());
  context ctx;
  gated_sum<float>(branches, gates, view(out.data(), {2, 7, 4, 8}), ctx);
  EXPECT_EQ(std::memcmp(out.data(), b.out.data(), out.size() * sizeof(float)), 0);
}

TEST(Combine, GatesWeighBranchesRowByRow) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), b = over_keys(in, 50, 130);
  std::vector<float> of_a(a.lse.size()), of_b(a.lse.size());
  for (std::size_t i = 0; i < of_a.size(); ++i)
    of_a[i] = 0.1f * static_cast<float>(i), of_b[i] = 1 - 0.2f * static_cast<float>(i);
  const std::array<index_t, 3> rows{2, 7, 4};
  const std::array<view4, 2> branches{state_of(a).out, state_of(b).out};
  const std::array<gate_view, 2> gates{gate_view(of_a.data(), rows), gate_view(of_b.data(), rows)};
  std::vector<double> out(b.out.size());
  context ctx;
  gated_sum<float>(branches, gates, view(out.data(), {2, 7, 4, 8}), ctx);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double expected = static_cast<double>(of_a[i / 8]) * static_cast<double>(a.out[i]) +
                            static_cast<double>(of_b[i / 8]) * static_cast<double>(b.out[i]);
    ASSERT_NEAR(out[i], expected, 1e-12);
  }
}

TEST(Combine, MixesTwoOutputs) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), b = over_keys(in, 50, 130);
  std::vector<float> out(b.out.size());
  context ctx;
  mix<float>(state_of(a).out, state_of(b).out, 0.25, view(out.data(), {2, 7, 4, 8}), ctx);
  for (std::size_t i = 0; i < out.size(); ++i)
    ASSERT_NEAR(out[i], 0.25f * a.out[i] + 0.75f * b.out[i], 4 * 0x1p-24f * (std::abs(a.out[i]) + std::abs(b.out[i])));
  mix<float>(state_of(a).out, state_of(b).out, 1, view(out.data(), {2, 7, 4, 8}), ctx);
  EXPECT_EQ(std::memcmp(out.data(), a.out.data(), out.size() * sizeof(float)), 0);
}

TEST(Combine, MixesInDouble) {
  const double a = 1, b = 0;
  double out = 0;
  const tensor_view<const double, 4> of_a(&a, {1, 1, 1, 1}), of_b(&b, {1, 1, 1, 1});
  context ctx;
  mix(of_a, of_b, 0.1, view(&out, {1, 1, 1, 1}), ctx);
  EXPECT_EQ(out, 0.1);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Combine, RefusesOverlapsAndWhatDoesNotFit) {
  const operands<float, float> in(whole);
  auto a = over_keys(in, 0, 90), b = over_keys(in, 50, 130), result = a;
  const auto before = result;
  context ctx;
  const std::array<partial_state<const float>, 2> states{state_of(a), state_of(b)};
  const auto merged = [&](const std::vector<key_range>& keys) {
    return code_of([&] { merge_disjoint<float>(states, keys, state_of(result), ctx); });
  };
  EXPECT_EQ(merged({{0, 90}, {50, 130}}), errc::range);
  EXPECT_EQ(merged({{0, 90}, {89, 90}}), errc::range);
  EXPECT_EQ(merged({{0, 90}}), errc::shape);
  EXPECT_EQ(code_of([&] { exclude<float>(state_of(result), {state_of(a).out, {}}, ctx); }), errc::shape);
  EXPECT_TRUE(result.same_bits(before));
  EXPECT_EQ(merged({{0, 50}, {50, 130}}), errc::ok);
  EXPECT_EQ(merged({{0, 90}, {40, 40}}), errc::ok);

  std::vector<float> out(b.out.size(), 3), gate(1, 1);
  const auto out_view = view(out.data(), {2, 7, 4, 8});
  const gate_view one(gate.data(), {2, 7, 4}, {0, 0, 0});
  const auto summed = [&](const std::vector<view4>& branches, const std::vector<gate_view>& gates) {
    return code_of([&] { gated_sum<float>(branches, gates, out_view, ctx); });
  };
  EXPECT_EQ(summed({state_of(a).out}, {}), errc::shape);
  EXPECT_EQ(summed({view4(a.out.data(), {2, 7, 4, 7})}, {one}), errc::shape);
  EXPECT_EQ(summed({state_of(a).out}, {gate_view(gate.data(), {2, 7, 3}, {0, 0, 0})}), errc::shape);
  EXPECT_EQ(summed({out_view}, {one}), errc::stride);
  EXPECT_EQ(code_of([&] { mix<float>(state_of(a).out, state_of(b).out, 1.5, out_view, ctx); }), errc::option);
  for (const float x : out) EXPECT_EQ(x, 3);
  EXPECT_EQ(summed({}, {}), errc::ok);
  for (const float x : out) EXPECT_EQ(x, 0);
}
#endif

}  // namespace
}  // namespace gqa::test
