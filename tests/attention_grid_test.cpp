// SPDX-License-Identifier: Apache-2.0
// attention() against the oracle over shapes, layouts and options: a grid, all options in pairs, and random cases.
// Built once per element type: GQA_TEST_Q of the queries and the output, GQA_TEST_KV of keys and values. GQA_TEST_CASES
// sets the number of random cases.
#include <gtest/gtest.h>

#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

using query = GQA_TEST_Q;
using stored = GQA_TEST_KV;

::testing::AssertionResult matches_oracle(const attention_case& c, context& ctx) {
  return test::matches_oracle(operands<query, stored>(c), ctx);
}

std::vector<attention_case> grid() {
  std::vector<attention_case> cases;
  const auto add = [&](shape n, unsigned options = with_causal) {
    for (const layout order : {layout::bshd, layout::bhsd}) {
      attention_case c{n, options, order};
      c.seed = cases.size() + 1;
      cases.push_back(c);
    }
  };
  for (const index_t t : {0, 1, 63, 64, 65, 127, 1024, 1031}) add({2, 1, t, 4, 2, 64, 64});  // decode
  for (const index_t s : {0, 1, 63, 64, 65, 97}) {                                           // prefill
    add({1, s, s, 4, 2, 40, 40});
    add({2, s, s, 4, 2, 40, 40}, 0);
  }
  for (const index_t s : {2, 3, 17}) add({1, s, 131, 6, 2, 80, 80});                               // append
  for (const index_t group : {1, 2, 3, 5, 6, 7, 8, 16}) add({1, 19, 70, 2 * group, 2, 72, 72});    // groups
  for (const index_t group : {1, 2, 3, 5, 6, 7, 8, 16}) add({1, 1, 200, 2 * group, 2, 128, 128});  // groups in decode
  for (const index_t d : {1, 8, 40, 64, 65, 72, 80, 96, 128, 256}) {                               // head dims
    add({1, 9, 75, 4, 2, d, d});
    add({1, 1, 75, 4, 2, d, d});
  }
  add({1, 13, 90, 4, 2, 192, 128});
  add({1, 13, 90, 4, 1, 576, 512});
  add({1, 1, 190, 4, 1, 576, 512});
  add({1, 3, 90, 4, 2, 32, 144});
  add({1, 7, 77, 8, 8, 64, 64});  // MHA
  add({1, 7, 77, 8, 1, 64, 64});  // MQA
  return cases;
}

TEST(AttentionMatchesReference, OverTheGrid) {
  context ctx;
  for (const attention_case& c : grid()) EXPECT_TRUE(matches_oracle(c, ctx));
}

TEST(AttentionMatchesReference, WithAllOptionsInPairs) {
  context ctx;
  for (unsigned i = 0; i < option_count; ++i) {
    for (unsigned j = 0; j <= i; ++j) {
      const unsigned options = 1u << i | 1u << j;
      attention_case prefill{{2, 21, 133, 6, 2, 40, 40}, options, layout::bshd};
      attention_case decode{{2, 1, 133, 6, 2, 64, 64}, options | with_causal, layout::bhsd};
      prefill.seed = decode.seed = i * 32 + j + 1;
      EXPECT_TRUE(matches_oracle(prefill, ctx));
      EXPECT_TRUE(matches_oracle(decode, ctx));
    }
  }
}

TEST(AttentionMatchesReference, OnRandomCases) {
  context ctx;
  for (unsigned seed = 1; seed <= number_of_random_cases(); ++seed) {
    ASSERT_TRUE(matches_oracle(random_case(seed), ctx)) << "seed " << seed;
  }
}

// Weights add up in the order in which they meet the values.
TEST(ValuesOfOne, GiveExactlyOne) {
  context ctx;
  for (unsigned seed = 1; seed <= number_of_random_cases(); ++seed) {
    const auto in = with_values_of_one<query, stored>(random_case(seed + 3000000));
    ASSERT_TRUE(gives_ones_over(in, kv_view(in.k.view(), in.v.view()), ctx)) << "seed " << seed;
  }
}

}  // namespace
}  // namespace gqa::test
