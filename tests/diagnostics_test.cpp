// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

// Weights [B, S, H, T] of a case, from outputs over values that are one key each: nothing of the diagnostics.
std::vector<double> weights_of(const operands<float, float>& in) {
  const auto& n = in.of.shape;
  std::vector<double> all(static_cast<std::size_t>(n.b * n.s * n.h * n.t));
  for (index_t t = 0; t < n.t; ++t) {
    tensor<float> one({n.b, n.t, n.g, 1}, layout::bshd);
    for (index_t b = 0; b < n.b; ++b)
      for (index_t g = 0; g < n.g; ++g) one.view()(b, t, g, 0) = 1;
    const auto result = run_oracle_on(in.q.view(), in.k.view(), std::as_const(one).view(), in.options);
    for (std::size_t row = 0; row < result.out.size(); ++row)
      all[row * static_cast<std::size_t>(n.t) + static_cast<std::size_t>(t)] = result.out[row];
  }
  return all;
}

const attention_case small{{2, 6, 70, 6, 2, 16, 8}, with_causal, layout::bshd};

// What a log-sum-exp of a case's call in float may be off by: the relative error of weights made with it.
double lse_error_of(const operands<float, float>& in) {
  const auto oracle = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  return lse_bound<float>(in.of.shape.d, oracle.max_magnitude);
}

// Calls f(operands, their weights) for the small case with each of the options.
template <class F>
void for_each_options(std::initializer_list<unsigned> all, const F& f) {
  for (const unsigned options : all) {
    attention_case c = small;
    c.options = options;
    SCOPED_TRACE(c.name());
    const operands<float, float> in(c);
    f(in, weights_of(in));
  }
}

TEST(Diagnostics, MapsAreTheWeights) {
  const auto options = {0u, static_cast<unsigned>(with_causal), with_causal | with_softcap | with_bias | with_alibi,
                        with_window | with_mask | with_sinks | with_lengths | with_groups};
  for_each_options(options, [](const auto& in, const std::vector<double>& expected) {
    context ctx;
    auto result = run(in, ctx);
    const double relative = std::expm1(lse_error_of(in)) + 0x1p-24;
    std::vector<float> map(3 * 50);
    for (const index_t h : {0, 5}) {
      attention_map(in.q.view(), in.k.view(), tensor_view<const float, 3>(result.lse.data(), {2, 6, 6}), in.options,
                    {1, h, {2, 5}, {20, 70}}, tensor_view<float, 2>(map.data(), {3, 50}));
      for (index_t s = 2; s < 5; ++s)
        for (index_t t = 20; t < 70; ++t) {
          const double weight = expected[static_cast<std::size_t>(((6 + s) * 6 + h) * 70 + t)];
          ASSERT_NEAR(map[static_cast<std::size_t>((s - 2) * 50 + t - 20)], weight, relative * weight + 0x1p-149);
        }
    }
  });
}

TEST(Diagnostics, EntropyIsThatOfTheWeights) {
  const auto options = {0u, static_cast<unsigned>(with_causal), with_window | with_mask | with_lengths | with_scale};
  for_each_options(options, [](const auto& in, const std::vector<double>& weights) {
    // lse - scale q . (mean key): the error of a log-sum-exp, and of an output whose values are keys for each channel.
    const auto over_keys = run_oracle_on(in.q.view(), in.k.view(), in.k.view(), in.options);
    double largest = 0;
    for (const float x : in.q.data()) largest = std::max(largest, std::abs(static_cast<double>(x)));
    const double scale = std::abs(in.options.scale.value_or(0.25)),
                 bound = lse_error_of(in) +
                         scale * 16 * largest * output_bound<float>(16, over_keys.max_magnitude, over_keys.max_value);
    std::vector<float> entropy(2 * 6 * 6, -1);
    context ctx;
    attention_entropy(in.q.view(), in.k.view(), in.options, tensor_view<float, 3>(entropy.data(), {2, 6, 6}), ctx);
    for (std::size_t row = 0; row < entropy.size(); ++row) {
      double expected = 0;
      for (std::size_t t = 0; t < 70; ++t) {
        const double w = weights[row * 70 + t];
        expected -= w > 0 ? w * std::log(w) : 0;
      }
      ASSERT_NEAR(entropy[row], expected, bound);
    }
  });
}

TEST(Diagnostics, MassesAreSumsOfWeights) {
  const auto options = {static_cast<unsigned>(with_causal), with_causal | with_sinks | with_softcap};
  for_each_options(options, [](const auto& in, const std::vector<double>& weights) {
    context ctx;
    auto result = run(in, ctx);
    const tensor_view<const float, 3> lse(result.lse.data(), {2, 6, 6});
    std::vector<float> mass(2 * 6 * 6);
    const tensor_view<float, 3> to(mass.data(), {2, 6, 6});
    const double relative = std::expm1(2 * lse_error_of(in)) + 0x1p-24;  // of two log-sum-exps
    const auto expect = [&](const auto& shown) {
      attention_mass(in.q.view(), kv_view(in.k.view(), in.v.view()), shown, lse, in.options, to, ctx);
      for (std::size_t row = 0; row < mass.size(); ++row) {
        double expected = 0;
        for (index_t t = 0; t < 70; ++t) {
          const position p{0, 0, 64 + static_cast<index_t>(row) / 6 % 6, t};
          if (shown.visible(p)) expected += weights[row * 70 + static_cast<std::size_t>(t)];
        }
        ASSERT_NEAR(mass[row], expected, relative * expected);
      }
    };
    expect(sliding_window(9, 0));
    expect(sinks_and_window(4, 0));
    expect(block_local(32));
  });
}

TEST(Diagnostics, SimilarityIsTheMeanCosine) {
  // Heads 0 and 1 equal, 2 the opposite, 3 at a right angle; a second KV group of zeros.
  const std::vector<float> x{3, 4, 3, 4, -6, -8, -4, 3, 0, 0, 0, 0, 0, 0, 0, 0,
                             1, 0, 1, 0, -1, 0,  0,  5, 0, 0, 0, 0, 0, 0, 0, 0};
  std::vector<double> similarity(2 * 4 * 4);
  head_similarity(tensor_view<const float, 4>(x.data(), {1, 2, 8, 2}), 2,
                  tensor_view<double, 3>(similarity.data(), {2, 4, 4}));
  const std::vector<double> expected{1, 1, -1, 0, 1, 1, -1, 0, -1, -1, 1, 0, 0, 0, 0, 1};
  for (std::size_t i = 0; i < 16; ++i) EXPECT_NEAR(similarity[i], expected[i], 1e-12) << i;
  for (std::size_t i = 16; i < 32; ++i) EXPECT_EQ(similarity[i], 0);
}

TEST(Diagnostics, ComparesOutputs) {
  const std::vector<float> a{1, 2, 3, 5}, b{1, 2, 3, 1};
  const tensor_view<const float, 4> x(a.data(), {1, 2, 2, 1}), y(b.data(), {1, 2, 2, 1});
  const difference d = compare(x, y);
  EXPECT_EQ(d.largest, 4);
  EXPECT_EQ(d.mean, 1);
  EXPECT_DOUBLE_EQ(d.relative, 4 / std::sqrt(15.0));
  EXPECT_EQ(compare(x, x), difference{});
  const std::vector<float> nan{1, std::numeric_limits<float>::quiet_NaN(), 3, 5};
  EXPECT_TRUE(std::isnan(compare(tensor_view<const float, 4>(nan.data(), {1, 2, 2, 1}), x).largest));
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Diagnostics, RefuseWhatDoesNotFit) {
  const operands<float, float> in(small);
  const std::vector<float> lse(72);
  const tensor_view<const float, 3> lse_view(lse.data(), {2, 6, 6});
  std::vector<float> map(3 * 50);
  const auto mapped = [&](const map_range& range, std::array<index_t, 2> extents) {
    return code_of([&] {
      attention_map(in.q.view(), in.k.view(), lse_view, in.options, range, tensor_view<float, 2>(map.data(), extents));
    });
  };
  EXPECT_EQ(mapped({1, 5, {2, 5}, {20, 70}}, {3, 50}), errc::ok);
  EXPECT_EQ(mapped({2, 5, {2, 5}, {20, 70}}, {3, 50}), errc::range);
  EXPECT_EQ(mapped({1, 6, {2, 5}, {20, 70}}, {3, 50}), errc::range);
  EXPECT_EQ(mapped({1, 5, {4, 7}, {20, 70}}, {3, 50}), errc::range);
  EXPECT_EQ(mapped({1, 5, {2, 5}, {21, 71}}, {3, 50}), errc::range);
  EXPECT_EQ(mapped({1, 5, {2, 5}, {20, 70}}, {3, 49}), errc::shape);
  const tensor_view<const float, 4> no_heads(lse.data(), {2, 70, 0, 16});
  EXPECT_EQ(code_of([&] {
              attention_map(in.q.view(), no_heads, lse_view, in.options, {1, 5, {2, 5}, {20, 70}},
                            tensor_view<float, 2>(map.data(), {3, 50}));
            }),
            errc::shape);
  context ctx;
  std::vector<float> entropy(72);
  attention_options with_softcap;
  with_softcap.softcap = 3;
  EXPECT_EQ(code_of([&] {
              attention_entropy(in.q.view(), in.k.view(), with_softcap,
                                tensor_view<float, 3>(entropy.data(), {2, 6, 6}), ctx);
            }),
            errc::option);
  EXPECT_EQ(code_of([&] {
              attention_entropy(in.q.view(), in.k.view(), {}, tensor_view<float, 3>(entropy.data(), {2, 6, 5}), ctx);
            }),
            errc::shape);
  std::vector<double> similarity(18);
  EXPECT_EQ(code_of([&] {
              head_similarity(in.q.view(), 4, tensor_view<double, 3>(similarity.data(), {2, 3, 3}));
            }),
            errc::shape);
}

TEST(Diagnostics, DoNotWriteOverTheTablesOfPages) {
  const std::vector<float> x(16 * 4), q(4), lse(1);
  const std::vector<std::int32_t> indices{0}, offsets{0, 1};
  std::vector<index_t> lengths{16};
  const auto pages = view(x.data(), {1, 16, 1, 4});
  const paged_view<float> kv(pages, pages, indices, offsets, lengths);
  const auto write_to = [&](float* mass) {
    return code_of([&] {
      context ctx;
      attention_mass(view(q.data(), {1, 1, 1, 4}), kv, sliding_window(3, 0),
                     tensor_view<const float, 3>(lse.data(), {1, 1, 1}), {}, tensor_view<float, 3>(mass, {1, 1, 1}),
                     ctx);
    });
  };
  float mass = 0;
  EXPECT_EQ(write_to(&mass), errc::ok);
  EXPECT_EQ(write_to(reinterpret_cast<float*>(lengths.data())), errc::stride);
}
#endif

}  // namespace
}  // namespace gqa::test
