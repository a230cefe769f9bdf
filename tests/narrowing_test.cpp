// SPDX-License-Identifier: Apache-2.0
// Floats that a narrower cache would make infinite are refused with their place, in every cache, before anything is
// written.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/refusal.hpp"

namespace gqa::test {
namespace {

constexpr index_t tokens = 70, heads = 2, dim = 24;

// The least float that rounds to an infinite T, and the one below it.
template <class T>
constexpr float first_beyond = std::is_same_v<T, Eigen::half> ? 65520.0f : 0x1.ffp127f;
template <class T>
float last_within() {
  return std::nextafter(first_beyond<T>, 0.0f);
}

struct rows {
  std::vector<float> k = std::vector<float>(tokens * heads * dim, 0.5f), v = k;
  float& key(index_t t, index_t g, index_t d) { return k[static_cast<std::size_t>((t * heads + g) * dim + d)]; }
  float& value(index_t t, index_t g, index_t d) { return v[static_cast<std::size_t>((t * heads + g) * dim + d)]; }
  static tensor_view<const float, 4> view_of(const std::vector<float>& x) {
    return {x.data(), {1, tokens, heads, dim}};
  }
};

// Appends through `append(k, v)`, and asks `length()` whether anything was stored.
template <class T, class Append, class Length>
void expect_refused(const Append& append, const Length& length) {
  for (const bool of_values : {false, true}) {
    for (const float sign : {1.0f, -1.0f}) {
      rows in;
      (of_values ? in.value(67, 1, 19) : in.key(67, 1, 19)) = sign * first_beyond<T>;
      const refusal r = refusal_of([&] { append(rows::view_of(in.k), rows::view_of(in.v)); });
      EXPECT_EQ(r.code, errc::range);
      EXPECT_NE(r.message.find((of_values ? "v" : "k") + std::string("[0, 67, 1, 19]")), std::string::npos)
          << r.message;
      EXPECT_EQ(length(), 0);
    }
  }
  // What is within reach, and what is infinite or NaN already, is stored.
  rows in;
  in.key(67, 1, 19) = last_within<T>(), in.value(3, 0, 2) = -last_within<T>();
  in.value(5, 0, 2) = -std::numeric_limits<float>::infinity(), in.value(6, 0, 2) = std::nanf("");
  append(rows::view_of(in.k), rows::view_of(in.v));
  EXPECT_EQ(length(), tokens);
}

template <class T>
class Narrowing : public ::testing::Test {};
using narrow_types = ::testing::Types<Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(Narrowing, narrow_types);

TYPED_TEST(Narrowing, IsRefusedByEveryCache) {
  kv_cache<TypeParam> cache(1, heads, 100, dim);
  expect_refused<TypeParam>([&](const auto& k, const auto& v) { cache.append(k, v); }, [&] { return cache.length(0); });
  EXPECT_TRUE(std::isfinite(static_cast<float>(cache.key(0, 67, 1)[19])));
  kv_cache<TypeParam> one(1, heads, 100, dim);
  expect_refused<TypeParam>([&](const auto& k, const auto& v) { one.append(0, k, v); }, [&] { return one.length(0); });
  ring_kv_cache<TypeParam> ring(1, heads, 4, 20, dim);
  expect_refused<TypeParam>([&](const auto& k, const auto& v) { ring.append(k, v); }, [&] { return ring.length(0); });
  paged_kv_cache<TypeParam> paged(1, 10, 16, heads, dim);
  const sequence_id id = paged.create();
  const auto rank_3 = [](const auto& x) { return tensor_view<const float, 3>(x.data(), {tokens, heads, dim}); };
  expect_refused<TypeParam>([&](const auto& k, const auto& v) { paged.append(id, rank_3(k), rank_3(v)); },
                            [&] { return paged.length(id); });
  // write() into room there is: what stood there stays.
  rows in;
  in.key(1, 0, 0) = first_beyond<TypeParam>;
  EXPECT_EQ(code_of([&] { paged.write(0, id, 0, rank_3(rows::view_of(in.k)), rank_3(rows::view_of(in.v))); }),
            errc::range);
  EXPECT_EQ(paged.free_pages(), 5);
  latent_kv_cache<TypeParam> latent(1, 200, dim, 8);
  expect_refused<TypeParam>(
      [&](const auto& k, const auto& v) {
        const std::vector<float> both(dim * tokens, 0.5f);
        std::vector<float> vectors = both;
        for (index_t t = 0; t < tokens; ++t)  // one head, of keys where they are what is wrong
          for (index_t d = 0; d < dim; ++d) {
            const float of_key = k(0, t, 1, d), of_value = v(0, t, 1, d);
            vectors[static_cast<std::size_t>(t * dim + d)] = of_key == 0.5f ? of_value : of_key;
          }
        const refusal r = refusal_of([&] { latent.append(view(vectors.data(), {1, tokens, 1, dim})); });
        if (r.code == errc::ok) return;
        EXPECT_NE(r.message.find("rows[0, 67, 0, 19]"), std::string::npos) << r.message;
        const bool is_key = k(0, 67, 1, 19) != 0.5f;
        detail::raise(detail::make_fault(r.code, "%s[0, 67, 1, 19]", is_key ? "k" : "v"));
      },
      [&] { return latent.length(0); });
}

// Keys that only leave the range once they are turned.
TEST(NarrowingToHalf, OfTurnedKeysIsOfWhatTheyBecome) {
  const rope embedding(dim);
  context ctx;
  std::vector<index_t> positions(tokens);
  for (index_t t = 0; t < tokens; ++t) positions[static_cast<std::size_t>(t)] = t;
  const auto turns = embedding.turns<float>(positions, ctx);
  rows in;
  for (index_t d = 0; d < 2; ++d) in.key(1, 0, d) = 0.8f * first_beyond<Eigen::half>;  // a pair, turned by 1
  kv_cache<Eigen::half> cache(1, heads, 100, dim);
  EXPECT_EQ(code_of([&] { cache.append(turned(rows::view_of(in.k), turns), rows::view_of(in.v)); }), errc::range);
  EXPECT_EQ(cache.length(0), 0);
  cache.append(rows::view_of(in.k), rows::view_of(in.v));
  EXPECT_EQ(cache.length(0), tokens);
}

// Rows that are turned in memory may grow by a factor of sqrt(2), and by the magnitude.
template <class T>
void expect_rotation_refused(float large, float magnitude) {
  const rope embedding(dim, rope_frequencies{std::vector<double>(dim / 2, 0.1), magnitude});
  const std::vector<index_t> first{5}, positions(tokens, 8);
  std::vector<T> x(tokens * heads * dim, static_cast<T>(1.0f));
  const auto at = [&x](index_t t, index_t d) -> T& { return x[static_cast<std::size_t>((t * heads + 1) * dim + d)]; };
  context ctx;
  const auto turns = embedding.turns<float>(positions, ctx);
  const auto rotations = std::to_array<std::function<void()>>({
      [&] {
        embedding.rotate(view(x.data(), {1, tokens, heads, dim}), std::span(first), ctx);
      },
      [&] {
        embedding.rotate_each(view(x.data(), {1, tokens, heads, dim}), positions, ctx);
      },
      [&] {
        embedding.rotate(view(x.data(), {1, tokens, heads, dim}), turns, ctx);
      },
  });
  for (const auto& rotate : rotations) {
    at(60, 6) = at(60, 7) = static_cast<T>(large);  // some pair of it turns to nearly sqrt(2) of either
    const std::vector<T> before = x;
    const refusal r = refusal_of(rotate);
    EXPECT_EQ(r.code, errc::range) << r.message;
    EXPECT_NE(r.message.find("x[0, 60, 1, 7]"), std::string::npos) << r.message;
    EXPECT_EQ(0, std::memcmp(x.data(), before.data(), x.size() * sizeof(T)));
    // What is not finite already turns as it does, and so does what stays within.
    at(60, 6) = at(60, 7) = static_cast<T>(large / 2), at(3, 2) = std::numeric_limits<T>::infinity();
    EXPECT_EQ(refusal_of(rotate).code, errc::ok);
    std::fill(x.begin(), x.end(), static_cast<T>(1.0f));
  }
}
TEST(NarrowingToHalf, OfRowsThatTurnInMemoryIsRefused) {
  expect_rotation_refused<Eigen::half>(55000.0f, 1);
  expect_rotation_refused<Eigen::half>(30000.0f, 2);
  expect_rotation_refused<Eigen::bfloat16>(3e38f, 1);
}

// Queries that are rounded to bfloat16 for products of pairs: the largest floats stay finite.
TEST(NarrowingToBfloat16, OfQueriesHoldsTheLargestFloats) {
  if (!detail::has_dot<Eigen::bfloat16>) GTEST_SKIP() << "no products of pairs in this instruction set";
  for (const index_t channels : {16, 21}) {  // whole packets, and a rest
    std::vector<float> q(static_cast<std::size_t>(channels), 0.0f), out(1);
    std::vector<Eigen::bfloat16> k(static_cast<std::size_t>(2 * channels), Eigen::bfloat16(0.0f)), v(2);
    q.back() = std::numeric_limits<float>::max();
    k[static_cast<std::size_t>(channels - 1)] = Eigen::bfloat16(0x1p-120f), v[0] = Eigen::bfloat16(3.0f);
    attention_options options;
    options.scale = 1, options.float_products = false;
    context ctx;
    attention(view(q.data(), {1, 1, 1, channels}), view(k.data(), {1, 2, 1, channels}), view(v.data(), {1, 2, 1, 1}),
              view(out.data(), {1, 1, 1, 1}), options, ctx);
    EXPECT_EQ(out[0], 3.0f);  // a score of 2^8, beside one of 0
    q.back() = std::numeric_limits<float>::infinity();
    attention(view(q.data(), {1, 1, 1, channels}), view(k.data(), {1, 2, 1, channels}), view(v.data(), {1, 2, 1, 1}),
              view(out.data(), {1, 1, 1, 1}), options, ctx);
    EXPECT_TRUE(std::isnan(out[0]));  // as of any infinite query
  }
}

TEST(NarrowingToEightBits, TakesAnyFiniteNumber) {
  kv_cache<q8> cache(1, heads, 100, dim);
  rows in;
  in.key(2, 1, 3) = std::numeric_limits<float>::max();
  cache.append(rows::view_of(in.k), rows::view_of(in.v));
  EXPECT_TRUE(std::isfinite(cache.key(0, 2, 1)[3]));
  kv_cache<kv_types<Eigen::half, q8>> mixed(1, heads, 100, dim);
  EXPECT_EQ(code_of([&] { mixed.append(rows::view_of(in.k), rows::view_of(in.v)); }), errc::range);
}

}  // namespace
}  // namespace gqa::test
