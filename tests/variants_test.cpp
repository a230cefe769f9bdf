// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

// A bias that depends on everything a variant is told.
struct position_bias {
  float score(float s, const position& p) const {
    return s + 0.01f * static_cast<float>(p.batch + 2 * p.q_head) - 0.002f * static_cast<float>(p.query - p.key);
  }
};
struct double_bias {
  double score(double s, const position& p) const { return s - 0.002 * static_cast<double>(p.query - p.key); }
};
// Every third key, by position.
struct thirds {
  bool visible(const position& p) const { return (p.query + p.key) % 3 == 0; }
};
// Strided blocks of 64 keys, known by block and by position.
struct strided_blocks {
  std::atomic<int>* positions_asked = nullptr;
  bool visible(const position& p) const {
    if (positions_asked != nullptr) ++*positions_asked;
    return p.key / 64 % 2 == 0;
  }
  visibility visible(const key_block& b) const {
    if (b.key_begin / 64 != (b.key_end - 1) / 64) return visibility::some;
    return b.key_begin / 64 % 2 == 0 ? visibility::all : visibility::none;
  }
};
// Known by block only.
struct blocks_only {
  visibility visible(const key_block& b) const {
    if (b.key_end <= 50) return visibility::all;
    return b.key_begin >= 50 ? visibility::none : visibility::some;
  }
};
struct first_fifty {
  bool visible(const position& p) const { return p.key < 50; }
};
struct capped_and_masked {
  float score(float s, const position&) const { return std::min(s, 0.5f); }
  bool visible(const position& p) const { return p.key % 2 == 0; }
};

template <class T, class Variant, class OracleVariant = Variant>
::testing::AssertionResult matches_reference(const attention_case& c, const Variant& variant, const OracleVariant& as) {
  const operands<T, T> in(c);
  const auto& n = c.shape;
  tensor<T> out({n.b, n.s, n.h, n.e}, layout::bshd), expected({n.b, n.s, n.h, n.e}, layout::bshd);
  context ctx;
  attention(in.q.view(), in.k.view(), in.v.view(), out.view(), in.options, variant, ctx);
  reference::attention(in.q.view(), in.k.view(), in.v.view(), expected.view(), in.options, as);
  // The oracle says how far sums without the variant may be off; none here makes a score's error larger, and what some
  // add to a score (at most 1) is two roundings.
  using A = accumulator_t<T>;
  const auto plain = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  comparison compared;
  for (std::size_t i = 0; i < out.data().size(); ++i)
    compared.add(static_cast<double>(out.data()[i]), static_cast<double>(expected.data()[i]),
                 output_bound<A>(n.d, plain.max_magnitude + 1, plain.max_value) +
                     storing_error<T>(static_cast<double>(expected.data()[i])),
                 "out");
  return compared.result() << " in " << c.name();
}

const attention_case prefill{{2, 40, 300, 6, 2, 32, 32}, with_causal, layout::bshd};
const attention_case decode{{2, 1, 300, 6, 2, 64, 64}, with_causal, layout::bhsd};

TEST(Variants, ScoresAreReplaced) {
  EXPECT_TRUE(matches_reference<float>(prefill, position_bias{}, position_bias{}));
  EXPECT_TRUE(matches_reference<float>(decode, position_bias{}, position_bias{}));
  EXPECT_TRUE(matches_reference<double>(prefill, double_bias{}, double_bias{}));
}

TEST(Variants, ScoresComeAfterSoftcapBiasAndAlibi) {
  auto c = prefill;
  c.options |= with_softcap | with_bias | with_alibi;
  EXPECT_TRUE(matches_reference<float>(c, capped_and_masked{}, capped_and_masked{}));
}

TEST(Variants, PositionsAreHidden) {
  EXPECT_TRUE(matches_reference<float>(prefill, thirds{}, thirds{}));
  EXPECT_TRUE(matches_reference<float>(decode, thirds{}, thirds{}));
  EXPECT_TRUE(matches_reference<double>(prefill, thirds{}, thirds{}));
}

TEST(Variants, BlocksAreSkippedWithoutAskingForPositions) {
  std::atomic<int> asked{0};
  attention_case c{{1, 3, 320, 2, 1, 32, 32}, 0, layout::bshd};
  EXPECT_TRUE(matches_reference<float>(c, strided_blocks{&asked}, strided_blocks{}));
  EXPECT_EQ(asked, 0);
  c.options = with_causal;
  EXPECT_TRUE(matches_reference<float>(c, strided_blocks{}, strided_blocks{}));
  EXPECT_TRUE(matches_reference<float>(decode, strided_blocks{}, strided_blocks{}));
}

TEST(Variants, OfBlocksOnlyAreResolvedToPositions) {
  EXPECT_TRUE(matches_reference<float>(prefill, blocks_only{}, first_fifty{}));
  EXPECT_TRUE(matches_reference<float>(decode, blocks_only{}, first_fifty{}));
}

TEST(Variants, MayHideEverything) {
  struct nothing {
    bool visible(const position&) const { return false; }
  };
  const operands<float, float> in(prefill);
  std::vector<float> out(in.q.data().size(), 1.0f);
  context ctx;
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {2, 40, 6, 32}), in.options, nothing{}, ctx);
  for (const float x : out) EXPECT_EQ(x, 0.0f);
}

TEST(Variants, AreOnlyAskedAboutKeysThatOptionsLeaveVisible) {
  struct careful {
    std::atomic<bool>* wrong;
    float score(float s, const position& p) const {
      if (p.key > p.query || p.key >= 222 || p.key < 0 || p.query - p.key > 90) *wrong = true;
      return s;
    }
    bool visible(const position& p) const {
      if (p.key > p.query || p.key >= 222 || p.key < 0 || p.query - p.key > 90) *wrong = true;
      return true;
    }
  };
  operands<float, float> in(prefill);
  const std::vector<index_t> lengths{222, 100};
  in.options.kv_lengths = lengths;
  in.options.window = {90, -1};
  std::atomic<bool> wrong{false};
  std::vector<float> out(in.q.data().size());
  context ctx;
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {2, 40, 6, 32}), in.options, careful{&wrong}, ctx);
  EXPECT_FALSE(wrong);
}

TEST(Variants, WorkOverAKvSource) {
  const operands<float, float> in(prefill);
  std::vector<float> out(in.q.data().size()), expected(out.size());
  context ctx;
  const auto kv = kv_view(in.k.view(), in.v.view());
  attention(in.q.view(), kv, view(out.data(), {2, 40, 6, 32}), in.options, thirds{}, ctx);
  attention(in.q.view(), in.k.view(), in.v.view(), view(expected.data(), {2, 40, 6, 32}), in.options, thirds{}, ctx);
  EXPECT_EQ(out, expected);
}

// What a variant makes of scores may lie anywhere in the range of floats.
struct far_below {
  float score(float, const position& p) const {
    return p.key == 66 ? -3.3e38f : -std::numeric_limits<float>::infinity();
  }
};
TEST(Variant, ScoresOfTheLowestNumbersHideNothing) {
  const operands<float, float> in(attention_case{{1, 2, 70, 2, 1, 16, 16}, 0, layout::bshd});
  context ctx;
  std::vector<float> out(2 * 2 * 16), lse(4);
  const partial_state<float> state{view(out.data(), {1, 2, 2, 16}), tensor_view<float, 3>(lse.data(), {1, 2, 2})};
  attention(in.q.view(), in.k.view(), in.v.view(), state, in.options, far_below{}, ctx);
  for (index_t i = 0; i < 4 * 16; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], in.v.view()(0, 66, 0, i % 16));
  EXPECT_EQ(lse, std::vector<float>(4, -3.3e38f));
}

// The distance to either side, also without a causal edge, against biases that say so.
TEST(EncoderAlibi, FallsOnBothSides) {
  operands<float, float> in(attention_case{{1, 70, 130, 4, 2, 16, 16}, with_bias, layout::bshd});
  const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.01f};
  for (index_t h = 0; h < 4; ++h)
    for (index_t s = 0; s < 70; ++s)
      for (index_t t = 0; t < 130; ++t)
        in.bias[static_cast<std::size_t>((h * 70 + s) * 130 + t)] =
            -slopes[static_cast<std::size_t>(h)] * static_cast<float>(std::abs(60 + s - t));
  context ctx;
  EXPECT_TRUE(matches_oracle(in, ctx));
  const auto expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  in.options.bias = {};
  std::vector<float> out(70 * 4 * 16);
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {1, 70, 4, 16}), in.options, encoder_alibi{slopes},
            ctx);
  for (std::size_t i = 0; i < out.size(); ++i)
    ASSERT_NEAR(static_cast<double>(out[i]), expected.out[i], expected.out_bound(i)) << i;
}

}  // namespace
}  // namespace gqa::test
