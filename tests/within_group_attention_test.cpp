// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/doors.hpp"

namespace gqa::test {
namespace {

// Groups of the pooled rows of every (sequence, KV head) by label_of(row).
template <class LabelOf>
std::vector<query_groups<float>> groups_by(const operands<float, float>& in, const LabelOf& label_of) {
  const auto& n = in.of.shape;
  const index_t rows = n.s * (n.h / n.g);
  std::vector<float> zeros(static_cast<std::size_t>(rows * n.d));
  std::vector<index_t> labels(static_cast<std::size_t>(rows));
  for (index_t i = 0; i < rows; ++i) labels[static_cast<std::size_t>(i)] = label_of(i);
  query_groups<float> set;
  context ctx;
  group_by_labels(tensor_view<const float, 2>(zeros.data(), {rows, n.d}), std::span<const index_t>(labels), set, ctx);
  return std::vector<query_groups<float>>(static_cast<std::size_t>(n.b * n.g), set);
}

attended<float> run_within(const operands<float, float>& in, const std::vector<query_groups<float>>& groups) {
  const auto& n = in.of.shape;
  attended<float> r;
  r.out.assign(static_cast<std::size_t>(n.b * n.s * n.h * n.e), std::numeric_limits<float>::quiet_NaN());
  r.lse.assign(static_cast<std::size_t>(n.b * n.s * n.h), std::numeric_limits<float>::quiet_NaN());
  context ctx;
  within_group_attention(in.q.view(), in.k.view(), in.v.view(), std::span<const query_groups<float>>(groups),
                         partial_state<float>{tensor_view<float, 4>(r.out.data(), {n.b, n.s, n.h, n.e}),
                                              tensor_view<float, 3>(r.lse.data(), {n.b, n.s, n.h})},
                         in.options, ctx);
  return r;
}

// Within groups by label_of a query sees the keys at positions where a row of its group is: the oracle's mask.
template <class LabelOf>
void expect_oracle(attention_case c, const LabelOf& label_of) {
  operands<float, float> in(c);
  const auto& n = c.shape;
  const auto actual = run_within(in, groups_by(in, label_of));
  const index_t size = n.h / n.g;
  std::vector<char> seen(static_cast<std::size_t>(n.b * n.h * n.s * n.t));
  for (index_t b = 0; b < n.b; ++b) {
    const index_t length = in.options.kv_lengths.empty() ? n.t : in.options.kv_lengths[static_cast<std::size_t>(b)];
    const index_t offset = in.options.query_offset.value_or(length - n.s);
    for (index_t h = 0; h < n.h; ++h)
      for (index_t s = 0; s < n.s; ++s)
        for (index_t other = 0; other < n.s; ++other)
          for (index_t x = 0; x < size; ++x) {
            const index_t t = offset + other;
            if (t >= 0 && t < n.t && label_of(other * size + x) == label_of(s * size + h % size))
              seen[static_cast<std::size_t>(((b * n.h + h) * n.s + s) * n.t + t)] = 1;
          }
  }
  static_assert(sizeof(bool) == sizeof(char));
  in.options.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(seen.data()), {n.b, n.h, n.s, n.t});
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  comparison compared;
  for (std::size_t i = 0; i < actual.out.size(); ++i)
    compared.add(actual.out[i], expected.out[i], 2 * expected.out_bound(i), "out");
  for (std::size_t i = 0; i < actual.lse.size(); ++i)
    compared.add(actual.lse[i], expected.lse[i], 2 * expected.lse_bound(i), "lse");
  EXPECT_TRUE(compared.result()) << c.name();
}

TEST(WithinGroupAttention, SeesThePositionsOfTheGroup) {
  for (const unsigned options : {0u, static_cast<unsigned>(with_causal), with_causal | with_softcap | with_sinks,
                                 with_causal | with_lengths | with_scale, with_causal | with_offset}) {
    attention_case c{{2, 90, 90, 6, 2, 16, 24}, options, layout::bshd};
    expect_oracle(c, [](index_t i) { return i % 7; });
    expect_oracle(c, [](index_t i) { return i / 30; });
    expect_oracle(c, [](index_t i) { return i % 3 == 0 ? 0 : i; });
    expect_oracle({{1, 40, 130, 4, 1, 8, 8}, options, layout::bhsd}, [](index_t i) { return (i * i) % 5; });
  }
}

TEST(WithinGroupAttention, OfOneGroupIsExactAttention) {
  for (const unsigned options : {0u, static_cast<unsigned>(with_causal)}) {
    const operands<float, float> in(attention_case{{2, 150, 150, 4, 2, 16, 16}, options, layout::bshd});
    context ctx;
    const auto exact = run(in, ctx), within = run_within(in, groups_by(in, [](index_t) { return 0; }));
    EXPECT_TRUE(exact.same_bits(within));
  }
}

TEST(WithinGroupAttention, OverACacheIsThatOverTensors) {
  const operands<float, float> in(attention_case{{2, 60, 60, 4, 2, 16, 24}, with_causal, layout::bshd});
  const auto groups = groups_by(in, [](index_t i) { return i % 5; });
  kv_cache<float> cache(2, 2, 60, 16, 24);
  cache.append(in.k.view(), in.v.view());
  std::vector<float> out(2 * 60 * 4 * 24);
  context ctx;
  within_group_attention(in.q.view(), cache, std::span<const query_groups<float>>(groups),
                         view(out.data(), {2, 60, 4, 24}), in.options, ctx);
  EXPECT_EQ(std::memcmp(out.data(), run_within(in, groups).out.data(), out.size() * sizeof(float)), 0);
}

TEST(WithinGroupAttention, DoesNotDependOnThreads) {
  const operands<float, float> in(attention_case{{2, 60, 60, 6, 3, 16, 24}, with_causal, layout::bshd});
  const auto groups = groups_by(in, [](index_t i) { return i % 5; });
  std::vector<float> out(2 * 60 * 6 * 24);
  Eigen::ThreadPool pool(3);
  context ctx(pool);
  within_group_attention(in.q.view(), in.k.view(), in.v.view(), std::span<const query_groups<float>>(groups),
                         view(out.data(), {2, 60, 6, 24}), in.options, ctx);
  EXPECT_EQ(std::memcmp(out.data(), run_within(in, groups).out.data(), out.size() * sizeof(float)), 0);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(WithinGroupAttention, RefusesWhatDoesNotFit) {
  operands<float, float> in(attention_case{{1, 10, 10, 4, 2, 8, 8}, with_causal, layout::bshd});
  auto groups = groups_by(in, [](index_t i) { return i % 2; });
  groups.pop_back();
  EXPECT_THROW(run_within(in, groups), error);
  groups = groups_by(in, [](index_t i) { return i % 2; });
  in.options.window = {3, 0};
  EXPECT_THROW(run_within(in, groups), error);
}
#endif

TEST(WithinGroupAttention, HasACheck) {
  const auto groups = door_operands().groups();
  const std::span<const query_groups<float>> sets(groups);
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, c.k, c.k, sets, c.out, c.options); },
      [&](door_operands& c, context& ctx) { within_group_attention(c.q, c.k, c.k, sets, c.out, c.options, ctx); });
}

}  // namespace
}  // namespace gqa::test
