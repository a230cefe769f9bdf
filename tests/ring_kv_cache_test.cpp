// SPDX-License-Identifier: Apache-2.0
// A ring: the bits of a kv_cache that keeps everything, before and after tokens are gone, and no key that is not there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

template <class T>
std::vector<T> random_rows(index_t count, rng& random) {
  std::vector<T> x;
  for (index_t i = 0; i < count; ++i) x.push_back(static_cast<T>(static_cast<float>(random.normal())));
  return x;
}

// A ring and a kv_cache with the same tokens.
template <class T>
struct twins {
  using X = detail::read_element<T>;  // of rows, and of queries

  index_t batch, heads, kv_heads, dim, value_dim, sinks, window;
  ring_kv_cache<T> ring;
  kv_cache<T> all;
  rng random;

  twins(index_t b, index_t group, index_t g, index_t d, index_t e, index_t s, index_t w, index_t capacity,
        std::uint64_t seed)
      : batch(b),
        heads(group * g),
        kv_heads(g),
        dim(d),
        value_dim(e),
        sinks(s),
        window(w),
        ring(b, g, s, w, d, e),
        all(b, g, capacity, d, e),
        random(seed) {}

  void append(index_t sequence, index_t tokens) {
    const auto k = random_rows<X>(tokens * kv_heads * dim, random);
    auto v = random_rows<X>(tokens * kv_heads * value_dim, random);
    if (tokens > 0 && random.chance(0.02)) v[0] = static_cast<X>(std::numeric_limits<float>::quiet_NaN());
    const auto keys = view(k.data(), {1, tokens, kv_heads, dim});
    const auto values = view(v.data(), {1, tokens, kv_heads, value_dim});
    ring.append(sequence, keys, values), all.append(sequence, keys, values);
  }
  // The last q_len queries of every sequence over both.
  template <class... Variant>
  void expect_same(index_t q_len, const attention_options& options, context& ctx, const Variant&... variant) {
    const auto q = random_rows<X>(batch * q_len * heads * dim, random);
    std::vector<X> from_ring(static_cast<std::size_t>(batch * q_len * heads * value_dim)), expected(from_ring.size());
    const auto queries = view(q.data(), {batch, q_len, heads, dim});
    attention(queries, ring, view(from_ring.data(), {batch, q_len, heads, value_dim}), options, variant..., ctx);
    attention(queries, all, view(expected.data(), {batch, q_len, heads, value_dim}), options, variant..., ctx);
    ASSERT_EQ(std::memcmp(from_ring.data(), expected.data(), expected.size() * sizeof(X)), 0)
        << q_len << " queries, " << ring.length(0) << " tokens, sinks " << sinks << ", window " << window;
  }
};

// Tokens in pieces of up to 65 that are queries at once, decode steps, truncations: the mask of sinks and a window.
template <class T>
void expect_any_stream(index_t rounds, index_t tokens, std::uint64_t seed) {
  rng random(seed);
  Eigen::ThreadPool pool(3);
  context serial, threads(pool);
  for (index_t round = 0; round < rounds && !::testing::Test::HasFailure(); ++round) {
    const index_t batch = random.between(1, 3), dim = random.between(1, 40);
    twins<T> c(batch, random.between(1, 4), random.between(1, 2), dim, random.chance(0.5) ? dim : 64,
               random.chance(0.3) ? 0 : random.between(1, 140), random.between(1, 300), tokens + 400, ++seed);
    const sinks_and_window mask(c.sinks, c.window - 1);
    while (c.ring.length(0) < tokens && !::testing::Test::HasFatalFailure()) {
      const index_t piece = random.chance(0.7) ? 1 : random.between(1, 65);
      for (index_t b = 0; b < batch; ++b) c.append(b, piece);
      attention_options options{.causal = true};
      if (random.chance(0.2)) options.softcap = 10;
      context& ctx = random.chance(0.5) ? serial : threads;
      c.expect_same(piece, options, ctx, mask);
      options.window = {c.window - 1, -1};
      c.expect_same(piece, options, ctx);
      if (random.chance(0.02)) {  // some drafts rejected: their tokens are in the newest tile or the one before
        const index_t length = c.ring.length(0) - std::min<index_t>(piece, c.ring.length(0));
        for (index_t b = 0; b < batch; ++b) c.ring.truncate(b, length), c.all.truncate(b, length);
      }
    }
  }
}
TEST(RingKvCache, HasTheBitsOfAKvCache) {
  expect_any_stream<float>(12, 2500, 1);
  expect_any_stream<Eigen::bfloat16>(6, 1500, 2);
}
TEST(RingKvCache, HasTheBitsOfAKvCacheInOtherTypes) {
  expect_any_stream<double>(3, 1200, 3);
  expect_any_stream<q8>(6, 1200, 5);
}

// Sequences of different lengths with sinks in one call, drafts among them: each as by itself.
TEST(RingKvCache, HasSinksInRaggedBatches) {
  rng random(8);
  Eigen::ThreadPool pool(2);
  context serial, threads(pool);
  const index_t count = 3, heads = 4, kv_heads = 2, dim = 16, sinks = 5, window = 100;
  const sinks_and_window mask(sinks, window - 1);
  ring_kv_cache<float> all(count, kv_heads, sinks, window, dim);
  std::vector<ring_kv_cache<float>> alone;
  for (index_t n = 0; n < count; ++n) {
    alone.emplace_back(1, kv_heads, sinks, window, dim);
    for (index_t t = 300 * n + random.between(1, 300); t > 0; --t) {
      const auto k = random_rows<float>(kv_heads * dim, random);
      all.append(n, view(k.data(), {1, 1, kv_heads, dim}), view(k.data(), {1, 1, kv_heads, dim}));
      alone.back().append(view(k.data(), {1, 1, kv_heads, dim}), view(k.data(), {1, 1, kv_heads, dim}));
    }
  }
  const std::vector<sequence_id> sequences{sequence_id{2}, sequence_id{0}, sequence_id{1}};
  const std::vector<index_t> offsets{0, 1, 1, 4};
  const bool tree[9] = {true, false, false, true, true, false, true, false, true};
  const std::vector<tensor_view<const bool, 2>> masks{{}, {}, {tree, {3, 3}}};
  const auto q = random_rows<float>(4 * heads * dim, random);
  std::vector<float> out(q.size());
  batch_options options;
  options.common.causal = true, options.masks = masks;
  batch_attention(tensor_view<const float, 3>(q.data(), {4, heads, dim}), offsets, all, sequences,
                  tensor_view<float, 3>(out.data(), {4, heads, dim}), options, mask, threads);
  for (std::size_t n = 0; n < sequences.size(); ++n) {
    const index_t rows = offsets[n + 1] - offsets[n], first = offsets[n] * heads * dim;
    const auto& ring = alone[static_cast<std::size_t>(sequences[n])];
    std::vector<char> seen(static_cast<std::size_t>(rows * ring.length(0)), 1);
    for (index_t i = 0; i < rows && rows > 1; ++i)
      for (index_t j = 0; j < rows; ++j)
        seen[static_cast<std::size_t>((i + 1) * ring.length(0) - rows + j)] = tree[i * 3 + j];
    attention_options one{.causal = true};
    if (rows > 1)
      one.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(seen.data()), {1, 1, rows, ring.length(0)});
    std::vector<float> expected(static_cast<std::size_t>(rows * heads * dim));
    attention(view(q.data() + first, {1, rows, heads, dim}), ring, view(expected.data(), {1, rows, heads, dim}), one,
              mask, serial);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin() + first)) << n;
  }
  // Without them its queries would see what is gone.
  EXPECT_EQ(code_of([&] {
              batch_attention(tensor_view<const float, 3>(q.data(), {4, heads, dim}), offsets, all, sequences,
                              tensor_view<float, 3>(out.data(), {4, heads, dim}), options, threads);
            }),
            errc::range);
}

// Before anything is gone, any options: the ring is a kv_cache.
TEST(RingKvCache, IsAKvCacheUntilItTurns) {
  twins<float> c(2, 3, 2, 24, 40, 10, 200, 500, 5);
  Eigen::ThreadPool pool(2);
  context ctx(pool);
  for (index_t length = 0; length < 64 + 64 * 6;) {
    const index_t piece = std::min<index_t>(c.random.between(1, 50), 64 + 64 * 6 - length);
    for (index_t b = 0; b < 2; ++b) c.append(b, piece);
    length += piece;
    ASSERT_EQ(c.ring.gone(0).size(), 0);
    c.expect_same(std::min<index_t>(length, 20), {.causal = true}, ctx);
    c.expect_same(1, {}, ctx);
  }
  c.append(1, 1);
  EXPECT_EQ(c.ring.gone(1), (key_range{64, 128}));
  EXPECT_EQ(c.ring.gone(0).size(), 0);
}

// Sequences of different lengths in one ragged batch.
TEST(RingKvCache, ServesRaggedBatches) {
  twins<float> c(3, 2, 2, 16, 16, 0, 100, 3000, 6);
  c.append(0, 40), c.append(1, 1000), c.append(2, 2999);
  const std::vector<index_t> offsets{0, 3, 13, 14};
  const std::vector<sequence_id> sequences{sequence_id{2}, sequence_id{0}, sequence_id{1}};
  const auto q = random_rows<float>(14 * 4 * 16, c.random);
  std::vector<float> out(q.size()), expected(q.size());
  context ctx;
  batch_options options;
  options.common.causal = true, options.common.window = {99, -1};
  const tensor_view<const float, 3> queries(q.data(), {14, 4, 16});
  batch_attention(queries, offsets, c.ring, sequences, tensor_view<float, 3>(out.data(), {14, 4, 16}), options, ctx);
  batch_attention(queries, offsets, c.all, sequences, tensor_view<float, 3>(expected.data(), {14, 4, 16}), options,
                  ctx);
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0);
}

// What is gone of one sequence is another's own matter.
TEST(RingKvCache, KeepsSequencesApart) {
  twins<float> c(3, 2, 1, 16, 16, 5, 100, 3000, 10);
  c.append(0, 2999), c.append(1, 150), c.append(2, 1000);
  context ctx;
  c.expect_same(1, {.causal = true}, ctx, sinks_and_window(5, 99));
}

// More tokens at once than there are slots: the last of them stay.
TEST(RingKvCache, TakesMoreThanItKeeps) {
  twins<float> c(1, 2, 1, 16, 16, 30, 70, 5000, 7);
  context ctx;
  c.append(0, 3), c.append(0, 1500), c.append(0, 3000);
  c.expect_same(1, {.causal = true}, ctx, sinks_and_window(30, 69));
  c.append(0, 20);
  c.expect_same(20, {.causal = true}, ctx, sinks_and_window(30, 69));
  const key_range gone = c.ring.gone(0);
  EXPECT_EQ(gone.begin, 64);
  EXPECT_LE(gone.end, 4523 - 70);
  EXPECT_EQ(c.ring.key(0, 4522, 0), c.all.key(0, 4522, 0));
  EXPECT_EQ(c.ring.value(0, 29, 0), c.all.value(0, 29, 0));
}

TEST(RingKvCache, StartsAnew) {
  twins<float> c(1, 2, 1, 16, 16, 30, 70, 5000, 8);
  context ctx;
  c.append(0, 1500);
  c.ring.truncate(0, 20), c.all.truncate(0, 20);  // within what is kept for good
  EXPECT_EQ(c.ring.gone(0).size(), 0);
  c.append(0, 200);
  c.expect_same(100, {.causal = true}, ctx);
  c.ring.clear(), c.all.clear();
  c.append(0, 90);
  c.expect_same(90, {.causal = true}, ctx);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(RingKvCache, RefusesQueriesThatSeeWhatIsGone) {
  twins<float> c(2, 2, 1, 16, 16, 4, 100, 1000, 9);
  c.append(0, 700), c.append(1, 100);
  const auto q = random_rows<float>(2 * 80 * 2 * 16, c.random);
  std::vector<float> out(q.size(), 7);
  context ctx;
  const auto with = [&](index_t q_len, const attention_options& options, const auto&... variant) {
    const auto queries = view(q.data(), {2, q_len, 2, 16});
    const auto to = view(out.data(), {2, q_len, 2, 16});
    const errc code = code_of([&] { attention(queries, c.ring, to, options, variant..., ctx); });
    if constexpr (sizeof...(variant) == 0) {
      EXPECT_EQ(check(queries, c.ring, to, options), code);
    }
    if (code != errc::ok) {
      EXPECT_EQ(std::count(out.begin(), out.end(), 7.0f), static_cast<std::ptrdiff_t>(out.size()));
    }
    std::fill(out.begin(), out.end(), 7.0f);
    return code;
  };
  EXPECT_EQ(with(1, {.causal = true}), errc::range);
  EXPECT_EQ(with(1, {}), errc::range);
  const key_range gone = c.ring.gone(0);
  EXPECT_EQ(gone, (key_range{64, 448}));
  EXPECT_EQ(with(1, {.causal = true, .window = {699 - gone.end, -1}}), errc::ok);
  EXPECT_EQ(with(1, {.causal = true, .window = {700 - gone.end, -1}}), errc::range);
  EXPECT_EQ(with(80, {.causal = true, .window = {620 - gone.end, -1}}), errc::ok);
  EXPECT_EQ(with(80, {.causal = true, .window = {621 - gone.end, -1}}), errc::range);
  EXPECT_EQ(with(1, {.causal = true}, sinks_and_window(64, 699 - gone.end)), errc::ok);
  EXPECT_EQ(with(1, {.causal = true}, sinks_and_window(64, 700 - gone.end)), errc::range);
  EXPECT_EQ(with(1, {.causal = true}, sinks_and_window(65, 1)), errc::range);
  const std::vector<index_t> early{60, 90};  // queries before what is gone
  EXPECT_EQ(with(4, {.causal = true, .query_offsets = early}), errc::ok);
  EXPECT_EQ(with(5, {.causal = true, .query_offsets = early}), errc::range);
  const std::vector<index_t> short_ones{64, 90};
  EXPECT_EQ(with(1, {.kv_lengths = short_ones}), errc::ok);
}

TEST(RingKvCache, RefusesWhatCannotBe) {
  const index_t most = std::numeric_limits<index_t>::max();
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(1, 1, -1, 10, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(1, 1, 0, 0, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(1, 1, 0, std::numeric_limits<index_t>::min(), 8); }), errc::shape);
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(1, 1, std::numeric_limits<index_t>::min(), 5, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(-1, 1, 0, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { ring_kv_cache<float>(1, 1, 0, 1, 0); }), errc::shape);
  EXPECT_EQ(code_of([=] { ring_kv_cache<float>(1, 1, most, most, 8); }), errc::capacity);
  EXPECT_EQ(code_of([=] { ring_kv_cache<float>(most, most, 1, 1, most); }), errc::capacity);
  ring_kv_cache<float> ring(1, 1, 10, 100, 8);
  const std::vector<float> x(1000 * 8, 1.0f);
  ring.append(view(x.data(), {1, 1000, 1, 8}), view(x.data(), {1, 1000, 1, 8}));
  const key_range gone = ring.gone(0);
  EXPECT_EQ(code_of([&] { ring.truncate(0, gone.end - 1); }), errc::length);
  EXPECT_EQ(code_of([&] { ring.truncate(0, 65); }), errc::length);
  EXPECT_EQ(code_of([&] { ring.truncate(0, 1001); }), errc::length);
  EXPECT_EQ(code_of([&] { (void)ring.key(0, gone.begin, 0); }), errc::range);
  EXPECT_EQ(code_of([&] { (void)ring.key(0, gone.end - 1, 0); }), errc::range);
  EXPECT_EQ(code_of([&] { (void)ring.key(0, gone.end, 0); }), errc::ok);
  EXPECT_EQ(ring.length(0), 1000);
  EXPECT_EQ(code_of([&] { ring.truncate(0, gone.end); }), errc::ok);
  EXPECT_EQ(ring.length(0), gone.end);
  ring.append(view(x.data(), {1, 1, 1, 8}), view(x.data(), {1, 1, 1, 8}));
  EXPECT_EQ(ring.gone(0), gone);  // what newer tokens took does not come back
  EXPECT_EQ(code_of([&] { ring.truncate(0, 64); }), errc::ok);
  EXPECT_EQ(ring.gone(0).size(), 0);
}
#else
// A cache that could not be made is an empty one.
TEST(RingKvCache, IsEmptyWithoutMemory) {
  static std::string message;
  set_error_handler([](const error& e) { message = e.what(); });
  ring_kv_cache<float> ring(1, 8, 0, index_t{1} << 45, 128);
  kv_cache<float> cache(1, 8, index_t{1} << 45, 128);
  EXPECT_NE(message.find("memory"), std::string::npos) << message;
  EXPECT_EQ(ring.batch(), 0);
  EXPECT_EQ(cache.batch(), 0);
  EXPECT_EQ(ring.length(0), 0);
  EXPECT_EQ(cache.capacity(), 0);
  ring.clear(), cache.clear();
  EXPECT_EQ(ring.kv_len() + cache.kv_len(), 0);
  EXPECT_EQ(ring.gone(0).size(), 0);
  set_error_handler(nullptr);
}
#endif

}  // namespace
}  // namespace gqa::test
