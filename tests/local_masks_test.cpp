// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

// Whether the query at a position sees a key, as a mask's documentation says it.
using definition = std::function<bool(index_t query, index_t key)>;

index_t block_of(index_t position, index_t size) {  // blocks of negative positions, too
  index_t block = position / size;
  while (block * size > position) --block;
  return block;
}

// Calls f(name, mask, definition) for masks of every kind, for a sequence of `length`.
template <class F>
void for_each_mask(index_t length, const F& f) {
  f("sliding 20 5", sliding_window(20, 5), [](index_t q, index_t k) { return k >= q - 20 && k <= q + 5; });
  f("sliding 0 0", sliding_window(0, 0), [](index_t q, index_t k) { return k == q; });
  f("block 64", block_local(64), [](index_t q, index_t k) { return block_of(q, 64) == block_of(k, 64); });
  f("block 24 1 2", block_local(24, 1, 2), [](index_t q, index_t k) {
    const index_t ahead = block_of(k, 24) - block_of(q, 24);
    return ahead >= -1 && ahead <= 2;
  });
  f("chunked 100", chunked(100), [](index_t q, index_t k) { return block_of(q, 100) == block_of(k, 100); });
  f("dilated 9 4 3", dilated_window(9, 4, 3), [](index_t q, index_t k) {
    for (index_t j = -9; j <= 4; ++j) {
      if (k == q + 3 * j) return true;
    }
    return false;
  });
  f("dilated 2 1 70", dilated_window(2, 1, 70),
    [](index_t q, index_t k) { return k == q - 140 || k == q - 70 || k == q || k == q + 70; });
  for (const index_t size : {1, 7, 64, 90, 100000}) {
    f("neighbourhood " + std::to_string(size), neighbourhood(size, length), [=](index_t q, index_t k) {
      index_t begin = q - size / 2;
      while (begin + size > length) --begin;
      begin = std::max<index_t>(begin, 0);
      return k >= begin && k < begin + size && k < length;
    });
  }
  f("sinks 3, window 40", sinks_and_window(3, 40),
    [](index_t q, index_t k) { return k < 3 || (k >= q - 40 && k <= q); });
  f("sinks 130, window 10 4", sinks_and_window(130, 10, 4),
    [](index_t q, index_t k) { return k < 130 || (k >= q - 10 && k <= q + 4); });
}

TEST(LocalMasks, SeeWhatTheySay) {
  const index_t length = 250;
  for_each_mask(length, [&](const std::string& name, const auto& mask, const definition& sees) {
    for (index_t q = -70; q < length + 70; ++q) {
      index_t wrong = -1;  // the last key of which it says otherwise
      for (index_t k = 0; k < length; ++k) {
        const std::uint64_t bits = mask.visible_bits(position{0, 0, q, k / 64 * 64});
        const bool seen = sees(q, k);
        if (mask.visible(position{0, 0, q, k}) != seen || ((bits >> k % 64 & 1) != 0) != seen) wrong = k;
      }
      ASSERT_EQ(wrong, -1) << name << ": query " << q << ", key " << wrong;
    }
  });
}

TEST(LocalMasks, SayOfBlocksAndBoundsWhatTheySayOfPairs) {
  rng random(3);
  const index_t length = 250;
  for_each_mask(length, [&](const std::string& name, const auto& mask, const definition& sees) {
    int none = 0, all = 0;
    for (int round = 0; round < 160; ++round) {
      const index_t q = random.between(-70, length + 70), queries = random.between(1, 40);
      const index_t k = random.between(0, length - 1), keys = random.between(1, std::min<index_t>(length - k, 64));
      index_t seen = 0;
      for (index_t i = q; i < q + queries; ++i) {
        for (index_t t = k; t < k + keys; ++t) seen += sees(i, t) ? 1 : 0;
      }
      const visibility said = mask.visible(key_block{0, 0, 4, q, q + queries, k, k + keys});
      if (said == visibility::none) {
        ASSERT_EQ(seen, 0) << name;
      }
      if (said == visibility::all) {
        ASSERT_EQ(seen, queries * keys) << name;
      }
      none += said == visibility::none ? 1 : 0, all += said == visibility::all ? 1 : 0;
      const key_range bound = mask.keys({q, q + queries});
      for (index_t t = 0; t < length; ++t) {
        bool outside = false;
        for (index_t i = q; i < q + queries && (t < bound.begin || t >= bound.end); ++i)
          outside = outside || sees(i, t);
        ASSERT_FALSE(outside) << name;
      }
    }
    EXPECT_TRUE(none > 0 || name == "neighbourhood 100000") << name;
    const bool is_narrow =
        name.starts_with("dilated") || name == "sliding 0 0" || name == "neighbourhood 1" || name == "neighbourhood 7";
    EXPECT_TRUE(all > 0 || is_narrow) << name;
  });
}

// attention() under a mask is the oracle's under the tensor that the mask's definition fills, and to the bit
// attention() under that tensor.
template <class Q, class K>
void expect_oracle_of(const attention_case& c, const std::string& name, const auto& mask, const definition& sees) {
  SCOPED_TRACE(name + " in " + c.name());
  operands<Q, K> in(c);
  const auto& n = c.shape;
  const auto pairs = static_cast<std::size_t>(n.b * n.s * n.t);
  const std::unique_ptr<bool[]> seen(new bool[pairs]);
  for (index_t b = 0; b < n.b; ++b) {
    const index_t length = in.options.kv_lengths.empty() ? n.t : in.options.kv_lengths[static_cast<std::size_t>(b)];
    for (index_t s = 0; s < n.s; ++s)
      for (index_t t = 0; t < n.t; ++t)
        seen[static_cast<std::size_t>((b * n.s + s) * n.t + t)] =
            sees(in.options.query_offset.value_or(length - n.s) + s, t);
  }
  const auto size = static_cast<std::size_t>(n.b * n.s * n.h * n.e);
  std::vector<Q> out(size), as_tensor(size);
  context ctx;
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {n.b, n.s, n.h, n.e}), in.options, mask, ctx);
  in.options.mask = tensor_view<const bool, 4>(seen.get(), {n.b, 1, n.s, n.t});
  attention(in.q.view(), in.k.view(), in.v.view(), view(as_tensor.data(), {n.b, n.s, n.h, n.e}), in.options, ctx);
  EXPECT_TRUE(std::equal(out.begin(), out.end(), as_tensor.begin()));
  EXPECT_TRUE(matches_oracle(in, ctx));
}
template <class Q, class K>
void expect_oracle(const attention_case& c) {
  for_each_mask(c.shape.t, [&](const std::string& name, const auto& mask, const definition& sees) {
    expect_oracle_of<Q, K>(c, name, mask, sees);
  });
}
TEST(LocalMasks, AreTheOraclesMasks) {
  expect_oracle<float, float>({{2, 150, 250, 4, 2, 16, 16}, 0, layout::bshd});
  expect_oracle<float, float>({{1, 150, 250, 4, 1, 16, 24}, with_causal | with_lengths, layout::bhsd});
  expect_oracle<float, float>({{2, 1, 250, 4, 2, 16, 16}, with_causal, layout::bshd});
  expect_oracle_of<Eigen::bfloat16, Eigen::bfloat16>(
      {{1, 70, 250, 3, 1, 16, 16}, with_causal, layout::bshd}, "sinks 3, window 40", sinks_and_window(3, 40),
      [](index_t q, index_t k) { return k < 3 || (k >= q - 40 && k <= q); });
}

TEST(LocalMasks, OfTheReferenceAreTheSame) {
  attention_case c{{1, 40, 200, 2, 1, 8, 8}, with_causal, layout::bshd};
  const operands<float, float> in(c);
  const auto oracle = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  const double bound = output_bound<float>(8, oracle.max_magnitude, oracle.max_value) + oracle.max_value * 0x1p-24;
  for_each_mask(200, [&](const std::string& name, const auto& mask, const definition&) {
    std::vector<float> out(40 * 2 * 8), expected(out.size());
    context ctx;
    attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {1, 40, 2, 8}), in.options, mask, ctx);
    reference::attention(in.q.view(), in.k.view(), in.v.view(), view(expected.data(), {1, 40, 2, 8}), in.options, mask);
    for (std::size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected[i], bound) << name;
  });
}

// Blocks that a mask is asked about, of tiles that lie within its bounds.
template <class Mask>
struct counted {
  const Mask& mask;
  index_t* blocks;
  std::uint64_t visible_bits(const position& p) const { return mask.visible_bits(p); }
  visibility visible(const key_block& b) const {
    ++*blocks;
    return mask.visible(b);
  }
  key_range keys(key_range queries) const { return mask.keys(queries); }
};
template <class Mask>
index_t blocks_visited(const Mask& mask, index_t length) {
  const std::vector<float> x(static_cast<std::size_t>(length));
  std::vector<float> out(x.size());
  const auto rows = view(x.data(), {1, length, 1, 1});
  index_t blocks = 0;
  context ctx;
  attention(rows, rows, rows, view(out.data(), {1, length, 1, 1}), {}, counted<Mask>{mask, &blocks}, ctx);
  return blocks;
}
TEST(LocalMasks, VisitTilesOfTheirBandsOnly) {
  const auto expect_linear = [](const auto& mask_of, const char* name) {
    // Twice as much for twice as many tokens more: what the ends of a sequence save cancels.
    const auto visited = [&](index_t length) { return static_cast<double>(blocks_visited(mask_of(length), length)); };
    const double shorter = visited(8192) - visited(4096), longer = visited(16384) - visited(8192);
    EXPECT_LE(longer, 2.01 * shorter) << name;
  };
  expect_linear([](index_t) { return sliding_window(200, 100); }, "sliding");
  expect_linear([](index_t) { return block_local(128, 1, 1); }, "blocks");
  expect_linear([](index_t) { return dilated_window(20, 20, 10); }, "dilated");
  expect_linear([](index_t length) { return neighbourhood(300, length); }, "neighbourhood");
}

#ifndef GQA_NO_EXCEPTIONS
TEST(LocalMasks, RefuseWhatHasNoMeaning) {
  EXPECT_THROW(sliding_window(-1, 0), error);
  EXPECT_THROW(sliding_window(0, -1), error);
  EXPECT_THROW(block_local(0), error);
  EXPECT_THROW(block_local(8, -1), error);
  EXPECT_THROW(block_local(8, 0, -1), error);
  EXPECT_THROW(block_local(index_t{1} << 40, index_t{1} << 40), error);
  EXPECT_THROW(dilated_window(1, 1, 0), error);
  EXPECT_THROW(dilated_window(-1, 1, 1), error);
  EXPECT_THROW(neighbourhood(0, 10), error);
  EXPECT_THROW(neighbourhood(1, -1), error);
  EXPECT_THROW(sinks_and_window(-1, 1), error);
  try {
    block_local(-7);
    FAIL();
  } catch (const error& e) {
    EXPECT_EQ(e.code(), errc::option);
    EXPECT_STREQ(e.what(), "block_local: size: expected 1 to 1152921504606846976, got -7");
  }
}
#endif

}  // namespace
}  // namespace gqa::test
