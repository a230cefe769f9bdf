// SPDX-License-Identifier: Apache-2.0
// A ring with positions of the cache: what rotating all of its keys anew for every token computes, without doing so.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/doors.hpp"
#include "support/kernels.hpp"
#include "support/matchers.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"
#include "support/tensor.hpp"

namespace gqa::test {
namespace {

constexpr index_t heads = 4, kv_heads = 2, value_dim = 24;

// Tokens of a stream, not turned, and a ring of them.
struct stream {
  index_t tokens, dim, sinks, window;
  rope embedding;
  std::vector<float> q, k, v;

  stream(index_t count, index_t d, index_t n, index_t w, const rope_options& o, rng& random)
      : tokens(count), dim(d), sinks(n), window(w), embedding(d, o) {
    const auto fill = [&](std::vector<float>& x, index_t size) {
      for (index_t i = 0; i < size; ++i) x.push_back(static_cast<float>(random.normal()));
    };
    fill(q, count * heads * d), fill(k, count * kv_heads * d), fill(v, count * kv_heads * value_dim);
  }
  tensor_view<const float, 4> queries(index_t t, index_t n) const {
    return view(q.data() + t * heads * dim, {1, n, heads, dim});
  }
  // Tokens [t, t + n) into a ring, and their outputs, in T.
  template <class Ring, class T>
  void step(Ring& ring, index_t t, index_t n, std::vector<T>& out, const attention_options& options,
            context& ctx) const {
    std::vector<index_t> positions(static_cast<std::size_t>(n));
    std::iota(positions.begin(), positions.end(), t);
    const auto turns = embedding.turns<float>(positions, ctx);
    ring.append(turned(view(k.data() + t * kv_heads * dim, {1, n, kv_heads, dim}), turns),
                view(v.data() + t * kv_heads * value_dim, {1, n, kv_heads, value_dim}));
    streaming_attention(queries(t, n), embedding, ring,
                        view(out.data() + t * heads * value_dim, {1, n, heads, value_dim}), options, ctx);
  }
};

// One query as the definition has it: the keys that it sees, each turned in double by its place among them.
void expect_defined(const stream& s, index_t t, const std::vector<float>& actual, const attention_options& options) {
  std::vector<index_t> seen;
  for (index_t key = 0; key <= t; ++key)
    if (key < s.sinks || key > t - s.window) seen.push_back(key);
  const auto count = static_cast<index_t>(seen.size());
  std::vector<double> q(s.q.begin() + t * heads * s.dim, s.q.begin() + (t + 1) * heads * s.dim), k, v;
  for (const index_t key : seen) {
    k.insert(k.end(), s.k.begin() + key * kv_heads * s.dim, s.k.begin() + (key + 1) * kv_heads * s.dim);
    v.insert(v.end(), s.v.begin() + key * kv_heads * value_dim, s.v.begin() + (key + 1) * kv_heads * value_dim);
  }
  context ctx;
  const index_t zero = 0, last = count - 1;
  s.embedding.rotate(view(k.data(), {1, count, kv_heads, s.dim}), std::span<const index_t>(&zero, 1), ctx);
  s.embedding.rotate(view(q.data(), {1, 1, heads, s.dim}), std::span<const index_t>(&last, 1), ctx);
  std::vector<double> expected(static_cast<std::size_t>(heads * value_dim));
  const tensor_view<const double, 4> queries(q.data(), {1, 1, heads, s.dim}),
      keys(k.data(), {1, count, kv_heads, s.dim});
  reference::attention(queries, keys, view(v.data(), {1, count, kv_heads, value_dim}),
                       view(expected.data(), {1, 1, heads, value_dim}), options);
  // Rotations round sines, cosines and results, of queries and keys: 6 u of the sum of the products' magnitudes, which
  // a score is off by, and twice that a weight.
  double magnitude = 0, largest = 0;
  for (index_t n = 0; n < count; ++n)
    for (index_t h = 0; h < heads; ++h) {
      double sum = 0;
      for (index_t d = 0; d < s.dim; ++d) sum += std::abs(queries(0, 0, h, d) * keys(0, n, h / (heads / kv_heads), d));
      magnitude = std::max(magnitude, sum / std::sqrt(static_cast<double>(s.dim)));
    }
  for (const double x : v) largest = std::max(largest, std::abs(x));
  const double bound = output_bound<float>(s.dim, magnitude, largest) + 12 * 0x1p-24 * magnitude * 1.5 * largest;
  comparison worst;
  for (std::size_t i = 0; i < expected.size(); ++i)
    worst.add(static_cast<double>(actual[static_cast<std::size_t>(t) * expected.size() + i]), expected[i], bound,
              "token " + std::to_string(t) + ", element " + std::to_string(i));
  ASSERT_TRUE(worst.result());
}

TEST(StreamingAttention, IsThatOfKeysTurnedAnewByTheirPlace) {
  rng random(1);
  context ctx;
  for (int round = 0; round < 12; ++round) {
    rope_options o;
    o.pairing = random.chance(0.5) ? rope_pairing::halves : rope_pairing::neighbours;
    if (random.chance(0.5)) o.scaling = rope_scaling::linear, o.factor = 4;
    const stream s(900, random.chance(0.5) ? 32 : 18, random.chance(0.2) ? 0 : random.between(1, 90),
                   random.between(1, 200), o, random);
    attention_options options;
    if (random.chance(0.3)) options.softcap = 4;
    const std::vector<float> of_heads(heads, 0.3f);
    if (round % 3 == 0) options.sinks = of_heads;
    ring_kv_cache<float> ring(1, kv_heads, s.sinks, s.window, s.dim, value_dim);
    std::vector<float> out(static_cast<std::size_t>(s.tokens * heads * value_dim));
    for (index_t t = 0; t < s.tokens && !HasFatalFailure();) {
      const index_t n = std::min<index_t>(random.chance(0.6) ? 1 : random.between(1, 65), s.tokens - t);
      s.step(ring, t, n, out, options, ctx);
      t += n;
      if (t % 3 == 0) expect_defined(s, t - 1, out, options);
      if (n > 1) expect_defined(s, t - n, out, options);
    }
  }
}

// Bits do not depend on the pieces; those of tokens that see all there is are attention()'s.
template <class T>
void expect_same_bits() {
  rng random(2);
  Eigen::ThreadPool pool(2);
  context serial, threads(pool);
  const stream s(500, 32, 5, 70, {}, random);
  ring_kv_cache<T> one_by_one(1, kv_heads, s.sinks, s.window, s.dim, value_dim);
  ring_kv_cache<T> pieces(1, kv_heads, s.sinks, s.window, s.dim, value_dim);
  kv_cache<T> all(1, kv_heads, 75, s.dim, value_dim);
  std::vector<float> expected(static_cast<std::size_t>(s.tokens * heads * value_dim)), actual(expected.size());
  for (index_t t = 0; t < s.tokens; ++t) s.step(one_by_one, t, 1, expected, {}, serial);
  for (index_t t = 0; t < s.tokens;) {
    const index_t n = std::min<index_t>(random.between(1, 65), s.tokens - t);
    s.step(pieces, t, n, actual, {}, threads);
    t += n;
  }
  EXPECT_EQ(std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(float)), 0);
  std::vector<index_t> positions(75);
  std::iota(positions.begin(), positions.end(), 0);
  const auto turns = s.embedding.turns<float>(positions, serial);
  all.append(turned(view(s.k.data(), {1, 75, kv_heads, s.dim}), turns), view(s.v.data(), {1, 75, kv_heads, value_dim}));
  attention(turned(s.queries(0, 75), turns), all, view(actual.data(), {1, 75, heads, value_dim}), {.causal = true},
            serial);
  EXPECT_EQ(std::memcmp(actual.data(), expected.data(), 75 * heads * value_dim * sizeof(float)), 0);
}
TEST(StreamingAttention, HasTheSameBitsInAnyPieces) {
  expect_same_bits<float>();
  expect_same_bits<q8>();
}

// A state's log-sum-exp, from the scores of keys turned by their places.
TEST(StreamingAttention, GivesStates) {
  rng random(3);
  context ctx;
  const stream s(300, 16, 4, 50, {}, random);
  ring_kv_cache<float> ring(1, kv_heads, 4, 50, 16, value_dim);
  std::vector<float> out(static_cast<std::size_t>(300 * heads * value_dim)), state(heads * value_dim), lse(heads, 9);
  for (index_t t = 0; t < 300; ++t) s.step(ring, t, 1, out, {}, ctx);
  const partial_state<float> to{tensor_view<float, 4>(state.data(), {1, 1, heads, value_dim}),
                                tensor_view<float, 3>(lse.data(), {1, 1, heads})};
  streaming_attention(s.queries(299, 1), s.embedding, ring, to, {}, ctx);
  EXPECT_TRUE(std::equal(state.begin(), state.end(), out.end() - heads * value_dim));
  const std::vector<index_t> last{53};
  for (index_t h = 0; h < heads; ++h) {
    double sum = 0, magnitude = 0;
    for (index_t place = 0; place < 54; ++place) {
      const index_t key = place < 4 ? place : 300 - 54 + place;
      std::vector<double> q(16), k(16);
      for (index_t d = 0; d < 16; ++d) {
        q[static_cast<std::size_t>(d)] = static_cast<double>(s.q[static_cast<std::size_t>((299 * heads + h) * 16 + d)]);
        k[static_cast<std::size_t>(d)] =
            static_cast<double>(s.k[static_cast<std::size_t>((key * kv_heads + h / 2) * 16 + d)]);
      }
      s.embedding.rotate(view(q.data(), {1, 1, 1, 16}), last, ctx);
      s.embedding.rotate(view(k.data(), {1, 1, 1, 16}), std::span<const index_t>(&place, 1), ctx);
      sum += std::exp(std::inner_product(q.begin(), q.end(), k.begin(), 0.0) / 4);
      double size = 0;
      for (std::size_t d = 0; d < 16; ++d) size += std::abs(q[d] * k[d]) / 4;
      magnitude = std::max(magnitude, size);
    }
    EXPECT_NEAR(lse[static_cast<std::size_t>(h)], std::log(sum), lse_bound<float>(16, magnitude, 2)) << h;
  }
}

// Sequences of different lengths, in any positions: each as by itself.
TEST(StreamingAttention, TakesSequencesApart) {
  rng random(4);
  context ctx;
  rope_options yarn;
  yarn.scaling = rope_scaling::yarn, yarn.factor = 8, yarn.trained_length = 64, yarn.dims = 12;
  const stream s(400, 16, 3, 40, yarn, random);
  ring_kv_cache<float> both(2, kv_heads, 3, 40, 16, value_dim);
  std::vector<ring_kv_cache<float>> alone;
  const std::vector<index_t> lengths{390, 30}, shorter{388, 30}, first{383, 25};
  for (std::size_t b = 0; b < 2; ++b) {
    alone.emplace_back(1, kv_heads, 3, 40, 16, value_dim);
    for (index_t t = 0; t < lengths[b]; ++t) {
      const auto turns = s.embedding.turns<float>(std::span<const index_t>(&t, 1), ctx);
      const auto k = view(s.k.data() + t * kv_heads * 16, {1, 1, kv_heads, 16});
      const auto v = view(s.v.data() + t * kv_heads * value_dim, {1, 1, kv_heads, value_dim});
      both.append(static_cast<index_t>(b), turned(k, turns), v), alone[b].append(turned(k, turns), v);
    }
  }
  const auto expect_apart = [&](attention_options options) {
    const auto of = [](std::span<const index_t> x, std::size_t b) { return x.empty() ? x : x.subspan(b, 1); };
    std::vector<float> out(2 * 5 * heads * value_dim), expected(out.size() / 2);
    streaming_attention(view(s.q.data(), {2, 5, heads, 16}), s.embedding, both,
                        view(out.data(), {2, 5, heads, value_dim}), options, ctx);
    for (std::size_t b = 0; b < 2; ++b) {
      attention_options one = options;
      one.kv_lengths = of(options.kv_lengths, b), one.query_offsets = of(options.query_offsets, b);
      streaming_attention(view(s.q.data() + b * 5 * heads * 16, {1, 5, heads, 16}), s.embedding, alone[b],
                          view(expected.data(), {1, 5, heads, value_dim}), one, ctx);
      EXPECT_TRUE(
          std::equal(expected.begin(), expected.end(), out.begin() + static_cast<std::ptrdiff_t>(b * expected.size())));
    }
  };
  expect_apart({});
  expect_apart({.kv_lengths = shorter});
  expect_apart({.query_offsets = first});
}

TEST(StreamingAttention, RefusesWhatTheRingSays) {
  context ctx;
  const ring_kv_cache<float> ring(1, 1, 2, 8, 8);
  std::vector<float> q(8, 1.0f), out(8, 9.0f);
  const auto attend = [&](const rope& r, const attention_options& o) {
    return code_of([&] {
      streaming_attention(view(q.data(), {1, 1, 1, 8}), r, ring, view(out.data(), {1, 1, 1, 8}), o, ctx);
    });
  };
  const float slope[] = {0.5f};
  EXPECT_EQ(attend(rope(8), {.window = {4, -1}}), errc::option);
  EXPECT_EQ(attend(rope(8), {.alibi_slopes = slope}), errc::option);
  EXPECT_EQ(attend(rope(8), {.mask = tensor_view<const bool, 4>(nullptr, {1, 1, 1, 0})}), errc::option);
  EXPECT_EQ(attend(rope(6), {}), errc::shape);
  EXPECT_EQ(out, std::vector<float>(8, 9.0f));
  EXPECT_EQ(attend(rope(8), {}), errc::ok);
  EXPECT_EQ(out, std::vector<float>(8, 0.0f));  // no keys
}

TEST(StreamingAttention, HasACheck) {
  const rope embedding(door_operands::dim);
  ring_kv_cache<float> ring(1, door_operands::kv_heads, 4, 200, door_operands::dim);
  const door_operands keys;
  for (index_t t = 0; t < door_operands::tokens; ++t) {
    const auto one = slice(keys.k, 1, t, 1);
    ring.append(one, one);
  }
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, embedding, ring, c.out, c.options); },
      [&](door_operands& c, context& ctx) { streaming_attention(c.q, embedding, ring, c.out, c.options, ctx); });
}

}  // namespace
}  // namespace gqa::test
