// SPDX-License-Identifier: Apache-2.0
// 8 bits: what is stored is near what was appended, attention over it is as near as its bound says, and the bits are
// those of any other cache: the same however tokens came and are asked for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <string>
#include <type_traits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"
#include "support/tensor.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

// Rows of normal numbers; some channels are outliers, as keys of trained models have them.
std::vector<float> random_rows(index_t count, index_t dim, rng& random, double outliers = 0) {
  std::vector<float> factor(static_cast<std::size_t>(dim), 1.0f), x;
  for (float& f : factor) f = random.chance(outliers) ? 30.0f : 1.0f;
  for (index_t i = 0; i < count; ++i)
    for (const float f : factor) x.push_back(f * static_cast<float>(random.normal()));
  return x;
}

// The least bfloat16 that is no less than a 127th of the largest magnitude, from its definition.
double scale_of_block(const float* x, index_t count) {
  double largest = 0;
  for (index_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(static_cast<double>(x[i])));
  if (largest == 0) return 0;
  const double least = largest / 127;
  const int exponent = std::max(std::ilogb(least), -126);
  return std::ldexp(std::ceil(std::ldexp(least, 7 - exponent)), exponent - 7);
}

struct shape {
  index_t batch, q_len, kv_len, heads, kv_heads, dim, value_dim;
};

// Queries, keys and values, and attention over them as they are.
struct q8_case {
  shape n;
  std::vector<float> q, k, v;

  q8_case(const shape& s, rng& random, double outliers = 0)
      : n(s),
        q(random_rows(s.batch * s.q_len * s.heads, s.dim, random)),
        k(random_rows(s.batch * s.kv_len * s.kv_heads, s.dim, random, outliers)),
        v(random_rows(s.batch * s.kv_len * s.kv_heads, s.value_dim, random, outliers)) {}

  tensor_view<const float, 4> queries() const { return view(q.data(), {n.batch, n.q_len, n.heads, n.dim}); }
  tensor_view<const float, 4> keys() const { return view(k.data(), {n.batch, n.kv_len, n.kv_heads, n.dim}); }
  tensor_view<const float, 4> values() const { return view(v.data(), {n.batch, n.kv_len, n.kv_heads, n.value_dim}); }
  template <class T = q8>
  kv_cache<T> cache() const {
    kv_cache<T> c(n.batch, n.kv_heads, n.kv_len, n.dim, n.value_dim);
    c.append(keys(), values());
    return c;
  }
  std::vector<float> output() const {
    return std::vector<float>(static_cast<std::size_t>(n.batch * n.q_len * n.heads * n.value_dim), 9.0f);
  }
  tensor_view<float, 4> as_output(std::vector<float>& x) const {
    return view(x.data(), {n.batch, n.q_len, n.heads, n.value_dim});
  }
  template <class T>
  std::vector<double> bounds(const kv_cache<T>& c, const attention_options& options) const {
    std::vector<double> bound(static_cast<std::size_t>(n.batch * n.q_len * n.heads));
    error_bound(queries(), c, tensor_view<double, 3>(bound.data(), {n.batch, n.q_len, n.heads}), options);
    return bound;
  }
};

// The largest error over its row's bound, infinite where either is not a number or the bound is infinite.
template <class T = q8>
double worst_share(const q8_case& c, const attention_options& options) {
  const kv_cache<T> cache = c.cache<T>();
  std::vector<float> actual = c.output();
  std::vector<double> expected(actual.size());
  attention(c.queries(), cache, c.as_output(actual), options);
  reference::attention(c.queries(), c.keys(), c.values(),
                       view(expected.data(), {c.n.batch, c.n.q_len, c.n.heads, c.n.value_dim}), options);
  const std::vector<double> bound = c.bounds(cache, options);
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double off = std::abs(static_cast<double>(actual[i]) - expected[i]);
    const double allowed = bound[i / static_cast<std::size_t>(c.n.value_dim)];
    if (!std::isfinite(allowed) || !std::isfinite(off)) return std::numeric_limits<double>::infinity();
    if (off > 0) worst = std::max(worst, off / allowed);
  }
  return worst;
}

TEST(Quantization, StoresWithinHalfAScale) {
  rng random(1);
  for (const index_t dim : {1, 3, 4, 31, 32, 33, 64, 65, 100, 128}) {
    for (const double magnitude : {1.0, 1e-20, 1e-37, 1e-41, 1e30, 1e38}) {
      kv_cache<q8> cache(1, 1, 70, dim);
      std::vector<float> x = random_rows(70, dim, random, 0.1);
      for (float& y : x) y = std::clamp(static_cast<float>(static_cast<double>(y) / 100 * magnitude), -3e38f, 3e38f);
      std::fill_n(x.begin() + dim, dim, 0.0f);  // a token of zeros
      cache.append(view(x.data(), {1, 70, 1, dim}), view(x.data(), {1, 70, 1, dim}));
      for (index_t t = 0; t < 70; ++t) {
        const std::vector<float> key = cache.key(0, t, 0), value = cache.value(0, t, 0);
        for (index_t d = 0; d < dim; ++d) {
          const index_t first = d / 32 * 32;
          const double scale = scale_of_block(x.data() + t * dim + first, std::min<index_t>(32, dim - first));
          const double stored = static_cast<double>(key[static_cast<std::size_t>(d)]);
          ASSERT_LE(std::abs(stored - static_cast<double>(x[static_cast<std::size_t>(t * dim + d)])),
                    scale * 0.5 * (1 + 0x1p-15))
              << dim << ", " << magnitude << ", token " << t << ", channel " << d;
          ASSERT_EQ(value[static_cast<std::size_t>(d)], key[static_cast<std::size_t>(d)]);
        }
      }
    }
  }
}

template <class T>
void expect_bound(int rounds, std::uint64_t seed) {
  rng random(seed);
  for (int round = 0; round < rounds; ++round) {
    const index_t kv_heads = random.between(1, 2), heads = kv_heads * random.between(1, 4);
    const index_t kv_len = random.between(1, 200), q_len = random.between(1, std::min<index_t>(kv_len, 20));
    const q8_case c({random.between(1, 2), q_len, kv_len, heads, kv_heads, random.between(1, 100),
                     random.chance(0.3) ? 128 : random.between(1, 100)},
                    random, random.chance(0.5) ? 0.1 : 0);
    attention_options options;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const std::vector<float> of_heads(static_cast<std::size_t>(heads), 0.5f);
    auto sinks = of_heads;
    if (random.chance(0.3)) sinks[0] = -infinity;
    auto unset = random_rows(q_len, kv_len, random);
    for (float& x : unset)
      if (random.chance(0.2)) x = random.chance(0.5) ? -infinity : -1e9f;
    std::vector<index_t> lengths;
    for (index_t b = 0; b < c.n.batch; ++b) lengths.push_back(random.between(0, kv_len));
    options.causal = random.chance(0.7);
    if (random.chance(0.3)) options.window = {random.between(0, 50), -1};
    if (random.chance(0.3)) options.softcap = 5;
    if (random.chance(0.3)) options.sinks = sinks;
    if (random.chance(0.3)) options.alibi_slopes = of_heads;
    if (random.chance(0.3)) options.scale = random.chance(0.5) ? 1.0 : -0.3;
    if (random.chance(0.3)) options.bias = view(unset.data(), {1, 1, q_len, kv_len});
    if (random.chance(0.3)) options.float_products = true;
    if (random.chance(0.2))
      options.kv_lengths = lengths;  // of 0, of less than there are queries: rows that see nothing
    const double worst = worst_share<T>(c, options);
    ASSERT_LE(worst, 1) << "round " << round;
  }
}
TEST(Quantization, StaysWithinItsBound) {
  expect_bound<q8>(60, 2);
  expect_bound<kv_types<Eigen::bfloat16, q8>>(20, 3);
  expect_bound<kv_types<q8, Eigen::bfloat16>>(20, 4);
  expect_bound<kv_types<float, q8>>(10, 5);
}

// Numbers as small and as large as floats are.
TEST(Quantization, StaysWithinItsBoundAtAnyMagnitude) {
  rng random(10);
  for (const double of_keys : {1e-37, 1e-31, 1.0, 1e30}) {
    for (const double of_values : {1e-43, 1e-39, 1e-36, 1e-31, 1.0, 1e36}) {
      q8_case c({1, 3, 70, 2, 1, 40, 48}, random);
      for (float& x : c.q) x = static_cast<float>(static_cast<double>(x) / of_keys);
      for (float& x : c.k) x = static_cast<float>(static_cast<double>(x) * of_keys);
      for (float& x : c.v) x = static_cast<float>(static_cast<double>(x) * of_values);
      for (const bool float_products : {false, true})
        EXPECT_LE(worst_share(c, {.float_products = float_products}), 1) << of_keys << ", " << of_values;
    }
  }
  // One key alone: its value, whatever its magnitude, to half a scale.
  for (const float value : {1e-33f, 1e-31f, 3e38f}) {
    q8_case c({1, 1, 1, 1, 1, 8, 8}, random);
    std::fill(c.v.begin(), c.v.end(), value);
    std::vector<float> out = c.output();
    attention(c.queries(), c.cache(), c.as_output(out));
    for (const float x : out) EXPECT_NEAR(x / value, 1, 0.006) << value;
  }
}

// A bound that everything keeps says nothing. That of a single key, whose weight is 1, is its value's: nearly reached.
// Over many keys errors of either sign leave a fraction of theirs; over keys as far apart as these, whose scores are
// off by at most 0.13, weights are by at most a seventh, and an output by that and more of the values' mean deviation.
TEST(Quantization, HasABoundThatSaysSomething) {
  rng random(3);
  const q8_case alone({1, 1, 1, 16, 16, 64, 64}, random);
  EXPECT_GT(worst_share(alone, {}), 0.6);
  for (const index_t kv_len : {64, 500}) {
    const q8_case c({1, 8, kv_len, 4, 2, 64, 64}, random);
    EXPECT_GT(worst_share(c, {}), 0.01) << kv_len;
    const std::vector<double> bound = c.bounds(c.cache(), {});
    EXPECT_LT(*std::max_element(bound.begin(), bound.end()), 0.5) << kv_len;
  }
}

// Errors that all point one way come to near half of it. Two keys of 31 channels a hair below, or above, half a step
// whose scores are rounded apart, under queries that are exact; then queries like that under two keys that are exact.
TEST(Quantization, HasABoundThatErrorsNearlyReach) {
  rng unused(1);
  const double step = 0x1p-7;  // of blocks whose largest is 127 of them
  for (const bool in_keys : {true, false}) {
    if (!in_keys && !detail::has_dot<q8>) continue;  // queries are as they are
    q8_case c({1, 1, 2, 1, 1, 32, 1}, unused);
    for (int d = 0; d < 32; ++d) {
      const auto i = static_cast<std::size_t>(d);
      const auto elements = [&](double of_q, double of_first, double of_second) {
        c.q[i] = static_cast<float>(of_q * step), c.k[i] = static_cast<float>(of_first * step);
        c.k[32 + i] = static_cast<float>(of_second * step);
      };
      if (in_keys) {
        d == 0 ? elements(127, 127, 127) : elements(127, 0.49, 0.51);
      } else {
        d == 0 ? elements(127, 127, -127) : elements(0.49, 127, -127);
      }
    }
    c.v = {1, -1};
    const double worst = worst_share(c, {.scale = std::numbers::ln2, .float_products = in_keys});
    EXPECT_GT(worst, 0.3) << in_keys;
    EXPECT_LE(worst, 1) << in_keys;
  }
}

template <class T>
void expect_decoded_tiles() {
  rng random(4);
  const q8_case c({1, 9, 150, 4, 2, 40, 72}, random);
  const kv_cache<T> cache = c.cache<T>();
  kv_cache<float> decoded(1, 2, 150, 40, 72);
  for (index_t t = 0; t < 150; ++t) {
    std::vector<float> k, v;
    for (index_t g = 0; g < 2; ++g) {
      for (const auto x : cache.key(0, t, g)) k.push_back(static_cast<float>(x));
      for (const auto x : cache.value(0, t, g)) v.push_back(static_cast<float>(x));
    }
    decoded.append(view(k.data(), {1, 1, 2, 40}), view(v.data(), {1, 1, 2, 72}));
  }
  const attention_options options{.causal = true, .float_products = true};
  std::vector<float> actual = c.output(), expected = c.output();
  attention(c.queries(), cache, c.as_output(actual), options);
  attention(c.queries(), decoded, c.as_output(expected), options);
  EXPECT_EQ(actual, expected);
}
TEST(Quantization, HasFloatProductsExactToTheDecodedTile) {
  expect_decoded_tiles<q8>();
  expect_decoded_tiles<kv_types<Eigen::bfloat16, q8>>();
  expect_decoded_tiles<kv_types<q8, Eigen::half>>();
  expect_decoded_tiles<kv_types<float, q8>>();
}

// Products of integers are those of what is stored, queries rounded to blocks as keys are: with a power of 2 times ln 2
// for a scale, which log2(e) makes a power of 2, their blocks are those of the queries as they are. What is left is the
// rounding of weights, an eighth of a value's scale at most (quantization.hpp), and of floats.
TEST(Quantization, MultipliesWhatIsStored) {
  if (!detail::has_dot<q8>) GTEST_SKIP() << "no instruction multiplies 8-bit integers";
  rng random(9);
  for (const index_t dim : {16, 40, 64, 128, 200}) {
    const q8_case c({1, 12, 140, 6, 2, dim, dim}, random);
    q8_case rounded = c;
    kv_cache<q8> of_queries(1, 6, 12, dim);
    of_queries.append(c.queries(), c.queries());
    rounded.q.clear();
    for (index_t s = 0; s < 12; ++s)
      for (index_t h = 0; h < 6; ++h)
        for (const float x : of_queries.key(0, s, h)) rounded.q.push_back(x);
    std::vector<float> actual = c.output(), expected = c.output();
    const double power = std::exp2(std::round(-std::log2(static_cast<double>(dim)) / 2)) * std::numbers::ln2;
    attention(c.queries(), c.cache(), c.as_output(actual), {.scale = power, .causal = true});
    attention(rounded.queries(), c.cache(), c.as_output(expected),
              {.scale = power, .causal = true, .float_products = true});
    double largest = 0;
    for (std::size_t i = 0; i < c.v.size(); i += 32) largest = std::max(largest, scale_of_block(&c.v[i], 32));
    for (std::size_t i = 0; i < actual.size(); ++i)
      ASSERT_NEAR(actual[i], expected[i], largest / 8 + 1e-5) << dim << ", element " << i;
  }
}

// Any chunks, prefill, append and decode, any threads, and any type that holds the rows: one row's bits.
template <class T>
void expect_same_bits() {
  rng random(5);
  Eigen::ThreadPool pool(3);
  context serial, threads(pool);
  for (const bool float_products : {false, true}) {
    for (const auto& [dim, value_dim] : {std::pair<index_t, index_t>{64, 128}, {33, 17}, {128, 80}}) {
      const q8_case c({1, 300, 300, 8, 2, dim, value_dim}, random);
      const attention_options options{.causal = true, .float_products = float_products};
      std::vector<float> expected = c.output(), actual = c.output();
      attention(c.queries(), c.cache<T>(), c.as_output(expected), options, threads);
      kv_cache<T> cache(1, 2, 300, dim, value_dim);
      for (index_t t = 0; t < 300;) {
        const index_t piece = std::min<index_t>(random.chance(0.8) ? 1 : random.between(1, 70), 300 - t);
        cache.append(slice(c.keys(), 1, t, piece), slice(c.values(), 1, t, piece));
        attention(slice(c.queries(), 1, t, piece), cache, slice(c.as_output(actual), 1, t, piece), options, serial);
        t += piece;
      }
      ASSERT_EQ(std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(float)), 0) << dim;
    }
  }
}
TEST(Quantization, HasTheSameBitsHoweverTokensCame) {
  expect_same_bits<q8>();
}
TEST(Quantization, HasTheSameBitsHoweverTokensOfTwoTypesCame) {
  expect_same_bits<kv_types<Eigen::bfloat16, q8>>();
  expect_same_bits<kv_types<q8, Eigen::bfloat16>>();
}

template <class X>
void expect_same_from(const q8_case& c) {
  const auto wide = [](const std::vector<X>& x) {
    std::vector<float> y;
    for (const X& e : x) y.push_back(static_cast<float>(e));
    return y;
  };
  q8_case of_floats = c;
  std::vector<X> q, k, v;
  for (const float x : c.q) q.push_back(static_cast<X>(x));
  for (const float x : c.k) k.push_back(static_cast<X>(x));
  for (const float x : c.v) v.push_back(static_cast<X>(x));
  of_floats.q = wide(q), of_floats.k = wide(k), of_floats.v = wide(v);
  const shape& n = c.n;
  kv_cache<q8> cache(n.batch, n.kv_heads, n.kv_len, n.dim, n.value_dim);
  cache.append(view(k.data(), {n.batch, n.kv_len, n.kv_heads, n.dim}),
               view(v.data(), {n.batch, n.kv_len, n.kv_heads, n.value_dim}));
  std::vector<float> actual = c.output(), expected = c.output();
  attention(view(q.data(), {n.batch, n.q_len, n.heads, n.dim}), cache, c.as_output(actual));
  attention(of_floats.queries(), of_floats.cache(), c.as_output(expected));
  EXPECT_EQ(actual, expected);
}
TEST(Quantization, TakesSixteenBitRows) {
  rng random(6);
  const q8_case c({2, 3, 90, 4, 2, 48, 48}, random);
  expect_same_from<Eigen::half>(c);
  expect_same_from<Eigen::bfloat16>(c);
}

// NaN and infinity reach whoever sees them, and nobody else, whatever a slot held before.
template <class T>
void expect_hidden_nan() {
  rng random(7);
  for (const float strange : {nan_value, std::numeric_limits<float>::infinity()}) {
    for (const bool in_keys : {false, true}) {
      const bool in_blocks =
          in_keys ? std::is_same_v<detail::key_type<T>, q8> : std::is_same_v<detail::value_type<T>, q8>;
      if (std::isinf(strange) && !in_blocks) continue;  // stays infinite, or weighs nothing
      for (const bool float_products : {false, true}) {
        q8_case c({1, 100, 100, 4, 2, 32, 64}, random);
        std::vector<float>& x = in_keys ? c.k : c.v;
        const index_t dim = in_keys ? 32 : 64;
        x[static_cast<std::size_t>(70 * 2 * dim + dim + 5)] = strange;  // token 70, KV head 1
        kv_cache<T> cache(1, 2, 100, 32, 64);
        const std::vector<float> old(100 * 2 * 64, strange);
        cache.append(view(old.data(), {1, 100, 2, 32}), view(old.data(), {1, 100, 2, 64}));
        cache.truncate(0, 0);
        cache.append(c.keys(), c.values());
        std::vector<float> out = c.output();
        attention(c.queries(), cache, c.as_output(out), {.causal = true, .float_products = float_products});
        for (index_t s = 0; s < 100; ++s)
          for (index_t h = 0; h < 4; ++h) {
            bool has_nan = false;
            for (index_t e = 0; e < 64; ++e) has_nan = has_nan || std::isnan(c.as_output(out)(0, s, h, e));
            ASSERT_EQ(has_nan, s >= 70 && h >= 2) << s << ", head " << h << (in_keys ? ", keys" : ", values");
          }
        const std::vector<double> bound = c.bounds(cache, {.causal = true});
        EXPECT_TRUE(std::isfinite(bound[0]));
        EXPECT_TRUE(std::isinf(bound.back()));
      }
    }
  }
}
TEST(Quantization, KeepsHiddenNanOut) {
  expect_hidden_nan<q8>();
  expect_hidden_nan<kv_types<Eigen::bfloat16, q8>>();
  expect_hidden_nan<kv_types<q8, Eigen::bfloat16>>();
}

TEST(Quantization, ShowsWhatItHolds) {
  kv_cache<q8> cache(1, 1, 4, 40);
  std::vector<float> x(80, 0.5f);
  x[3] = nan_value;
  cache.append(view(x.data(), {1, 2, 1, 40}), view(x.data(), {1, 2, 1, 40}));
  const std::vector<float> first = cache.key(0, 0, 0), second = cache.value(0, 1, 0);
  for (std::size_t i = 0; i < 40; ++i) {
    EXPECT_EQ(std::isnan(first[i]), i < 32) << i;  // its block
    EXPECT_NEAR(second[i], 0.5f, 0.5f / 127) << i;
  }
}

// A trained model's activations, whose keys have outliers of their own.
TEST(Quantization, StaysWithinItsBoundOnRealActivations) {
  GQA_NEED_TEST_DATA();
  for (const real_layer& layer : read_real_layers()) {
    rng unused(1);
    const index_t last = layer.positions - 40;  // the last queries see most
    q8_case c({1, 40, layer.positions, layer.q_heads, layer.kv_heads, layer.dim, layer.dim}, unused);
    c.k = layer.k, c.v = layer.v;
    c.q.assign(layer.q.begin() + last * layer.q_heads * layer.dim, layer.q.end());
    EXPECT_LE(worst_share(c, {.causal = true}), 1);
    EXPECT_LE(worst_share(c, {.causal = true, .float_products = true}), 1);
  }
}

TEST(Quantization, RefusesAsAttentionDoes) {
  rng random(8);
  const q8_case c({1, 2, 10, 2, 1, 8, 8}, random);
  std::vector<double> bound(4, 9.0);
  const auto to = [&](index_t q_len, index_t heads) { return tensor_view<double, 3>(bound.data(), {1, q_len, heads}); };
  const kv_cache<q8> cache = c.cache();
  EXPECT_EQ(code_of([&] { error_bound(c.queries(), cache, to(1, 2)); }), errc::shape);
  EXPECT_EQ(code_of([&] { error_bound(c.queries(), cache, to(2, 2), {.softcap = -1}); }), errc::option);
  const index_t lengths[] = {11};
  EXPECT_EQ(code_of([&] { error_bound(c.queries(), cache, to(2, 2), {.kv_lengths = lengths}); }), errc::length);
  EXPECT_EQ(code_of([&] {
              error_bound(c.queries(), cache, tensor_view<double, 3>(bound.data(), {1, 2, 2}, {0, 1, 1}));
            }),
            errc::stride);
  EXPECT_EQ(bound, std::vector<double>(4, 9.0));
  error_bound(c.queries(), cache, to(2, 2));
  EXPECT_LT(bound[0], 1);
}

static_assert(kv_source<kv_cache<kv_types<float, q8>>> && kv_source<kv_cache<q8>> && kv_source<ring_kv_cache<q8>> &&
              kv_source<paged_layer<q8>>);

}  // namespace
}  // namespace gqa::test
