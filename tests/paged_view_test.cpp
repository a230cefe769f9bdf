// SPDX-License-Identifier: Apache-2.0
// An engine's own pages: the bits of the same keys elsewhere, and tables that are not what they should be.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/kernels.hpp"
#include "support/pages.hpp"

namespace gqa::test {
namespace {

std::vector<index_t> lengths_of(const attention_case& c, rng& random) {
  std::vector<index_t> lengths{c.shape.t};
  while (static_cast<index_t>(lengths.size()) < c.shape.b) lengths.push_back(random.between(0, c.shape.t));
  return lengths;
}

// Pages of any size and order hold what tensors hold: the bits of tensors where pages hold whole groups of 16 tokens,
// those of a cache for whatever is not read in place.
template <class T>
void expect_bits_of_others(const attention_case& c, index_t page_size, page_order order, rng& random) {
  const std::vector<index_t> lengths = lengths_of(c, random);
  operands<T, T> in(c);
  pages<T> paged(in.k.view(), in.v.view(), lengths, page_size, order, random);
  context ctx;
  const auto actual = run_over(in, paged.view(), ctx);
  kv_cache<T> cache(c.shape.b, c.shape.g, c.shape.t, c.shape.d, c.shape.e);
  for (index_t b = 0; b < c.shape.b; ++b) {
    const index_t length = lengths[static_cast<std::size_t>(b)];
    cache.append(b, slice(slice(std::as_const(in.k).view(), 0, b, 1), 1, 0, length),
                 slice(slice(std::as_const(in.v).view(), 0, b, 1), 1, 0, length));
  }
  const auto of_cache = run_over(in, cache, ctx);
  in.options.kv_lengths = lengths;
  const auto of_tensors = run(in, ctx);
  const bool few_rows = c.shape.s * (c.shape.h / c.shape.g) <= 6;
  SCOPED_TRACE(c.name() + ", pages of " + std::to_string(page_size));
  EXPECT_TRUE(few_rows && page_size % 16 != 0 ? actual.same_bits(of_cache) : actual.same_bits(of_tensors));
  if (!few_rows) {
    EXPECT_TRUE(actual.same_bits(of_cache));
  }
}

TEST(PagedView, HasTheBitsOfTheSameKeysElsewhere) {
  rng random(5);
  const std::vector<attention_case> cases = {
      {{3, 1, 700, 8, 2, 64, 64}, with_causal, layout::bshd},  // in place
      {{3, 1, 700, 8, 2, 64, 64}, with_causal, layout::bhsd},
      {{2, 1, 300, 7, 7, 40, 24}, with_causal | with_sinks, layout::bshd},  // dims that are packed
      {{2, 5, 200, 8, 2, 64, 64}, with_causal | with_window, layout::bshd},
      {{2, 70, 300, 8, 2, 64, 72}, with_causal, layout::bshd},  // packed beforehand
      {{2, 33, 150, 6, 2, 65, 65}, with_softcap | with_alibi, layout::bhsd},
  };
  for (attention_case c : cases) {
    for (const index_t page_size : {16, 64, 48, 1, 7, 20, 256}) {
      c.seed = random.bits();
      for (const auto order : {page_order::tokens_first, page_order::heads_first}) {
        expect_bits_of_others<float>(c, page_size, order, random);
        expect_bits_of_others<Eigen::bfloat16>(c, page_size, order, random);
      }
      expect_bits_of_others<double>(c, page_size, page_order::tokens_first, random);
      expect_bits_of_others<Eigen::half>(c, page_size, page_order::tokens_first, random);
    }
  }
}

TEST(PagedView, IsWhatTheOracleSays) {
  rng random(6);
  attention_case c{{1, 9, 333, 6, 2, 32, 16}, with_causal | with_softcap | with_sinks, layout::bshd};
  const operands<float, float> in(c);
  pages<float> paged(in.k.view(), in.v.view(), {333}, 16, page_order::tokens_first, random);
  context ctx;
  EXPECT_TRUE(matches_oracle_over(in, paged.view(), ctx));
}

// An engine keeps one view and changes what it views.
TEST(PagedView, FollowsItsLengths) {
  rng random(8);
  const operands<float, float> in(attention_case{{1, 1, 80, 4, 2, 16, 16}, with_causal, layout::bshd});
  pages<float> paged(in.k.view(), in.v.view(), {80}, 16, page_order::tokens_first, random);
  const auto kv = paged.view();
  for (const index_t length : {3, 80, 17}) {
    paged.lengths[0] = length;
    EXPECT_EQ(kv.kv_len(), length);
    std::vector<float> out(64), expected(64);
    attention(in.q.view(), kv, view(out.data(), {1, 1, 4, 16}), {.causal = true});
    attention(in.q.view(), slice(in.k.view(), 1, 0, length), slice(in.v.view(), 1, 0, length),
              view(expected.data(), {1, 1, 4, 16}), {.causal = true});
    EXPECT_EQ(out, expected);
  }
}

TEST(PagedView, SharesPagesAmongSequences) {
  rng random(7);
  const operands<float, float> in(attention_case{{1, 1, 80, 4, 2, 16, 16}, with_causal, layout::bshd});
  pages<float> paged(in.k.view(), in.v.view(), {80}, 16, page_order::tokens_first, random);
  // Three sequences: all pages, the first two, and twice the third.
  const std::vector<std::int32_t>& own = paged.indices;
  const std::vector<std::int32_t> indices{own[0], own[1], own[2], own[3], own[4], own[0], own[1], own[2], own[2]};
  const std::vector<std::int32_t> offsets{0, 5, 7, 9};
  const std::vector<index_t> lengths{80, 20, 32};
  const paged_view<float> kv(paged.key_pages(), paged.value_pages(), indices, offsets, lengths);
  std::vector<float> q(3 * 4 * 16, 0.25f), out(q.size()), one(4 * 16);
  attention(view(q.data(), {3, 1, 4, 16}), kv, view(out.data(), {3, 1, 4, 16}), {.causal = true});
  const auto part = [&](index_t first, index_t count) {
    attention(view(q.data(), {1, 1, 4, 16}), slice(std::as_const(in.k).view(), 1, first, count),
              slice(std::as_const(in.v).view(), 1, first, count), view(one.data(), {1, 1, 4, 16}), {.causal = true});
    return one;
  };
  EXPECT_EQ(std::vector<float>(out.begin(), out.begin() + 64), part(0, 80));
  EXPECT_EQ(std::vector<float>(out.begin() + 64, out.begin() + 128), part(0, 20));
  for (index_t i = 0; i < 64; ++i)  // the same 16 tokens twice weigh as they do once
    EXPECT_NEAR(out[static_cast<std::size_t>(128 + i)], part(32, 16)[static_cast<std::size_t>(i)], 1e-6f);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(PagedView, RefusesTablesThatDoNotFit) {
  std::vector<float> memory(4 * 16 * 2 * 8, 1), q(3 * 4 * 8, 1), out(q.size(), 7);
  const tensor_view<const float, 4> good_pages(memory.data(), {4, 16, 2, 8});
  const std::vector<std::int32_t> indices{0, 3, 1, 2, 9}, offsets{0, 2, 3, 4};
  const std::vector<index_t> lengths{32, 5, 0};
  struct table {
    tensor_view<const float, 4> k, v;
    std::vector<std::int32_t> indices, offsets;
    std::vector<index_t> lengths;
  };
  const table good{good_pages, good_pages, indices, offsets, lengths};
  const auto with = [&](const auto& change) {
    table t = good;
    change(t);
    const paged_view<float> kv(t.k, t.v, t.indices, t.offsets, t.lengths);
    const auto to = view(out.data(), {3, 1, 4, 8});
    const errc checked = check(view(q.data(), {3, 1, 4, 8}), kv, to);
    try {
      attention(view(q.data(), {3, 1, 4, 8}), kv, to);
    } catch (const error& e) {
      EXPECT_EQ(e.code(), checked);
      EXPECT_EQ(std::count(out.begin(), out.end(), 7.0f), static_cast<std::ptrdiff_t>(out.size())) << e.what();
      return e.code();
    }
    EXPECT_EQ(checked, errc::ok);
    std::fill(out.begin(), out.end(), 7.0f);
    return errc::ok;
  };
  const index_t most = std::numeric_limits<index_t>::max();
  EXPECT_EQ(with([](auto&) {}), errc::ok);
  EXPECT_EQ(with([](auto& t) { t.indices[3] = -5; }), errc::ok);  // beyond the length of its sequence
  EXPECT_EQ(with([](auto& t) { t.indices[1] = -1; }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.indices[1] = 4; }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.indices[2] = std::numeric_limits<std::int32_t>::max(); }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.indices[2] = std::numeric_limits<std::int32_t>::min(); }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.offsets[0] = -1; }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.offsets[1] = 4; }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.offsets[3] = 6; }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.indices.clear(); }), errc::page);
  EXPECT_EQ(with([](auto& t) { t.offsets.pop_back(); }), errc::shape);
  EXPECT_EQ(with([](auto& t) { t.offsets.clear(); }), errc::shape);
  EXPECT_EQ(with([](auto& t) { t.lengths[0] = 33; }), errc::length);
  EXPECT_EQ(with([](auto& t) { t.lengths[1] = -1; }), errc::length);
  EXPECT_EQ(with([](auto& t) { t.lengths[2] = index_t{1} << 40; }), errc::length);
  EXPECT_EQ(with([&](auto& t) { t.lengths[2] = most; }), errc::length);
  EXPECT_EQ(with([&](auto& t) { t.lengths[2] = -most - 1; }), errc::length);
  // One page of 2^52 tokens at a stride of 0, and a length whose number of pages overflows.
  EXPECT_EQ(with([&](auto& t) {
              t.k = t.v = {memory.data(), {1, index_t{1} << 52, 2, 8}, {0, 0, 8, 1}};
              t.indices.assign(4096, 0), t.offsets = {0, 2, 3, 4096}, t.lengths[2] = most;
            }),
            errc::length);
  EXPECT_EQ(with([&](auto& t) { t.k = {memory.data(), {0, 16, 2, 8}}, t.v = t.k; }), errc::page);
  EXPECT_EQ(with([&](auto& t) { t.k = {memory.data(), {4, 0, 2, 8}}, t.v = t.k; }), errc::shape);
  EXPECT_EQ(with([&](auto& t) { t.k = {memory.data(), {4, -1, 2, 8}}, t.v = t.k; }), errc::shape);
  EXPECT_EQ(with([&](auto& t) { t.v = {memory.data(), {4, 8, 2, 8}}; }), errc::shape);
  EXPECT_EQ(with([&](auto& t) { t.v = {memory.data(), {3, 16, 2, 8}}; }), errc::shape);
  EXPECT_EQ(with([&](auto& t) { t.v = {memory.data(), {4, 16, 1, 8}}; }), errc::shape);
  EXPECT_EQ(with([&](auto& t) { t.k = {memory.data(), {4, 16, 2, 4}, {256, 16, 8, 2}}; }), errc::stride);
  EXPECT_EQ(with([](auto& t) { t.k = {nullptr, {4, 16, 2, 8}}; }), errc::shape);
  EXPECT_EQ(with([](auto& t) { t.lengths.push_back(0), t.offsets.push_back(4); }), errc::shape);  // of four, not q's
  const paged_view<float> kv(good_pages, good_pages, indices, offsets, lengths);
  EXPECT_THROW(attention(view(q.data(), {3, 1, 4, 8}), kv, view(memory.data(), {3, 1, 4, 8})),
               error);                  // over the pages
  std::vector<std::int32_t> table(96);  // of which an output would take the place
  std::copy(indices.begin(), indices.end(), table.begin());
  const paged_view<float> in_table(good_pages, good_pages, std::span(table).first(5), offsets, lengths);
  EXPECT_THROW(
      attention(view(q.data(), {3, 1, 4, 8}), in_table, view(reinterpret_cast<float*>(table.data()), {3, 1, 4, 8})),
      error);
}
#endif

TEST(PagedView, TakesNoSequences) {
  const float x = 0;
  const std::int32_t zero = 0;
  const paged_view<float> kv({&x, {0, 16, 2, 8}}, {&x, {0, 16, 2, 8}}, {}, {&zero, 1}, {});
  float out = 1;
  attention(tensor_view<const float, 4>(&x, {0, 1, 4, 8}), kv, view(&out, {0, 1, 4, 8}));
  EXPECT_EQ(out, 1);
}

}  // namespace
}  // namespace gqa::test
