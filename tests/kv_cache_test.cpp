// SPDX-License-Identifier: Apache-2.0
// kv_cache of GQA_TEST_KV under queries of GQA_TEST_Q: what it stores, what it refuses, and that a token's attention
// has the same bits however the tokens came and were asked for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <memory_resource>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

using Q = GQA_TEST_Q;
using T = GQA_TEST_KV;
using cache = kv_cache<T>;
static_assert(kv_source<cache>);

const T not_a_number = std::numeric_limits<T>::quiet_NaN();

template <class U>
bool same_bits(const U* a, const U* b, std::size_t count) {
  return std::memcmp(a, b, count * sizeof(U)) == 0;
}

// All keys and values of the operands, in one piece.
cache filled(const operands<Q, T>& in) {
  const auto& n = in.of.shape;
  cache kv(n.b, n.g, n.t, n.d, n.e);
  kv.append(in.k.view(), in.v.view());
  return kv;
}

TEST(KvCache, GivesBackWhatItWasGiven) {
  rng random(7);
  for (const shape n : {shape{2, 1, 150, 2, 2, 128, 128}, shape{1, 1, 70, 1, 1, 1, 3}, shape{1, 1, 97, 3, 3, 65, 80},
                        shape{1, 1, 64, 2, 2, 192, 128}, shape{2, 1, 33, 1, 1, 40, 72}}) {
    const operands<Q, T> in(attention_case{n, 0, layout::bhsd});
    tensor<float> k({n.b, n.t, n.g, n.d}, layout::bshd), v({n.b, n.t, n.g, n.e}, layout::bshd);
    for (auto* x : {&k, &v}) {
      for (float& y : x->data()) y = static_cast<float>(random.normal() * 100);
    }
    for (const bool from_floats : {false, true}) {
      cache kv(n.b, n.g, n.t, n.d, n.e);
      for (index_t at = 0; at < n.t;) {  // in pieces of any size
        const index_t count = std::min(n.t - at, random.between(0, 40));
        if (from_floats) {
          kv.append(slice(k.view(), 1, at, count), slice(v.view(), 1, at, count));
        } else {
          kv.append(slice(in.k.view(), 1, at, count), slice(in.v.view(), 1, at, count));
        }
        at += count;
      }
      for (index_t b = 0; b < n.b; ++b) {
        ASSERT_EQ(kv.length(b), n.t);
        for (index_t t = 0; t < n.t; ++t) {
          for (index_t g = 0; g < n.g; ++g) {
            const std::vector<T> key = kv.key(b, t, g), value = kv.value(b, t, g);
            for (index_t d = 0; d < n.d; ++d)
              ASSERT_EQ(key[static_cast<std::size_t>(d)],
                        from_floats ? static_cast<T>(k.view()(b, t, g, d)) : in.k.view()(b, t, g, d));
            for (index_t e = 0; e < n.e; ++e)
              ASSERT_EQ(value[static_cast<std::size_t>(e)],
                        from_floats ? static_cast<T>(v.view()(b, t, g, e)) : in.v.view()(b, t, g, e));
          }
        }
      }
    }
  }
}

// Ties, denormal numbers, the largest that round down, overflow, NaN: as Eigen rounds one by one.
TEST(KvCache, RoundsFloatsToNearestEven) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> numbers = {0.0f,     -0.0f,    1.00390625f, 1.01171875f, 3.3895314e38f, 3.4e38f,
                                65519.9f, 65520.0f, 1e-40f,      -2.5e-39f,   1e-45f,        6e-8f,
                                2.9e-8f,  inf,      -inf,        nan,         1.00048f,      1.0014649f};
  // What the type would make infinite is refused (narrowing_test).
  std::erase_if(numbers,
                [](float x) { return std::isfinite(x) && !std::isfinite(static_cast<float>(static_cast<T>(x))); });
  rng random(3);
  while (numbers.size() < 64) {
    const auto x = static_cast<float>(std::ldexp(random.normal(), static_cast<int>(random.between(-140, 120))));
    if (std::isfinite(static_cast<float>(static_cast<T>(x)))) numbers.push_back(x);
  }
  for (const index_t count : {16, 1}) {  // a whole panel and a part of one
    std::vector<float> rows;
    for (index_t t = 0; t < count; ++t) rows.insert(rows.end(), numbers.begin(), numbers.end());
    cache kv(1, 1, 16, 64);
    kv.append(view(rows.data(), {1, count, 1, 64}), view(rows.data(), {1, count, 1, 64}));
    const std::vector<T> key = kv.key(0, count - 1, 0), value = kv.value(0, count - 1, 0);
    for (std::size_t i = 0; i < 64; ++i) {
      const auto expected = static_cast<float>(static_cast<T>(numbers[i]));
      for (const float got : {static_cast<float>(key[i]), static_cast<float>(value[i])}) {
        if (std::isnan(expected)) {
          EXPECT_TRUE(std::isnan(got));
        } else {
          EXPECT_EQ(got, expected) << numbers[i];
          EXPECT_EQ(std::signbit(got), std::signbit(expected)) << numbers[i];
        }
      }
    }
  }
}

TEST(KvCache, MatchesTheReference) {
  Eigen::ThreadPool pool(2);
  context serial, on_pool(pool);
  for (unsigned seed = 1; seed <= number_of_random_cases(); ++seed) {
    const operands<Q, T> in(random_case(seed + 1000000));
    ASSERT_TRUE(matches_oracle_over(in, filled(in), seed % 2 == 0 ? serial : on_pool)) << "seed " << seed;
  }
}

// More rows per KV head than the in-place kernel of plain tensors takes, which packs the same tiles otherwise.
TEST(KvCache, HasTheBitsOfPackedPlainTensors) {
  context ctx;
  for (unsigned seed = 1; seed <= 40; ++seed) {
    attention_case c = random_case(seed + 2000000);
    c.options &= ~unsigned{with_groups};
    c.shape.s += 7;
    const operands<Q, T> in(c);
    ASSERT_TRUE(run_over(in, filled(in), ctx).same_bits(run(in, ctx))) << c.name();
  }
}

// A sequence's outputs when its tokens come in pieces and each piece's queries are asked for as it comes, against those
// of one call over all of it.
void expect_same_bits_in_pieces(std::uint64_t seed, context& ctx, context& other) {
  rng random(seed);
  attention_case c;
  c.seed = seed;
  auto& n = c.shape;
  n.g = random.pick({1, 2});
  n.h = n.g * random.pick({1, 2, 3, 4, 5, 6, 7, 8});
  n.d = random.pick({1, 16, 40, 64, 65, 96});
  n.e = random.chance(0.7) ? n.d : random.pick({8, 64, 80, 130});
  n.t = random.pick({1, 17, 63, 64, 65, 130, 200, 300});
  if (random.chance(0.03)) n.t = random.pick({1023, 1025, 1400});
  n.s = n.t;
  c.options = with_causal;
  for (const auto option : {with_softcap, with_alibi, with_sinks, with_scale, with_float_products}) {
    if (random.chance(0.2)) c.options |= option;
  }
  c.magnitude = random.chance(0.25) ? 4 : 1;
  operands<Q, T> in(c);
  if (random.chance(0.3)) in.options.window.left = random.between(0, n.t);
  const auto expected = run_over(in, filled(in), ctx);

  cache kv(1, n.g, n.t + random.between(0, 70), n.d, n.e);
  const bool one_by_one = random.chance(0.2) && n.t <= 200;
  for (index_t at = 0; at < n.t;) {
    const index_t count = one_by_one ? 1 : std::min(n.t - at, random.pick({1, 2, 3, 5, 16, 31, 64, 100, 333}));
    if (random.chance(0.2)) {  // tokens that are taken back
      const index_t other_tokens = std::min<index_t>(n.t - at, 5);
      kv.append(slice(in.k.view(), 1, 0, other_tokens), slice(in.v.view(), 1, 0, other_tokens));
      kv.truncate(0, at);
    }
    kv.append(0, slice(in.k.view(), 1, at, count), slice(in.v.view(), 1, at, count));
    std::vector<Q> out(static_cast<std::size_t>(count * n.h * n.e));
    std::vector<float> lse(static_cast<std::size_t>(count * n.h));
    const partial_state<Q> state{view(out.data(), {1, count, n.h, n.e}),
                                 tensor_view<float, 3>(lse.data(), {1, count, n.h})};
    attention(slice(in.q.view(), 1, at, count), kv, state, in.options, random.chance(0.5) ? ctx : other);
    ASSERT_TRUE(same_bits(out.data(), expected.out.data() + at * n.h * n.e, out.size()) &&
                same_bits(lse.data(), expected.lse.data() + at * n.h, lse.size()))
        << c.name() << ", " << count << " tokens from " << at;
    at += count;
  }
}

TEST(KvCache, GivesTheSameBitsInAnyPieces) {
  Eigen::ThreadPool pool(3);
  context serial, on_pool(pool);
  for (unsigned seed = 1; seed <= 2 * number_of_random_cases(); ++seed) {
    expect_same_bits_in_pieces(seed, serial, on_pool);
    if (HasFatalFailure()) return;
  }
}

TEST(KvCache, SequencesDoNotDependOnEachOther) {
  context ctx;
  const operands<Q, T> in(attention_case{{3, 2, 200, 6, 2, 64, 64}, with_causal | with_sinks, layout::bshd});
  const auto& n = in.of.shape;
  cache together(n.b, n.g, n.t, n.d, n.e);
  const std::vector<index_t> lengths{200, 1, 77};
  for (index_t b = 0; b < n.b; ++b) {
    const auto own = [&](const auto& x) {
      return slice(slice(x, 0, b, 1), 1, 0, lengths[static_cast<std::size_t>(b)]);
    };
    together.append(b, own(in.k.view()), own(in.v.view()));
  }
  EXPECT_EQ(together.kv_len(), 200);
  const auto expected = run_over(in, together, ctx);
  for (index_t b = 0; b < n.b; ++b) {
    const index_t length = lengths[static_cast<std::size_t>(b)];
    cache alone(1, n.g, length, n.d, n.e);
    alone.append(slice(slice(in.k.view(), 0, b, 1), 1, 0, length), slice(slice(in.v.view(), 0, b, 1), 1, 0, length));
    std::vector<Q> out(static_cast<std::size_t>(n.s * n.h * n.e));
    attention(slice(in.q.view(), 0, b, 1), alone, view(out.data(), {1, n.s, n.h, n.e}), in.options, ctx);
    EXPECT_TRUE(same_bits(out.data(), expected.out.data() + b * n.s * n.h * n.e, out.size())) << "sequence " << b;
  }
}

// NaN in a hidden token reaches nothing, in a visible one every row that sees it; what was taken back is forgotten.
TEST(KvCache, KeepsHiddenNaNOut) {
  context ctx;
  const operands<Q, T> clean(attention_case{{1, 90, 90, 6, 2, 48, 48}, with_causal, layout::bshd});
  operands<Q, T> dirty(clean.of);
  for (index_t e = 0; e < 48; ++e) dirty.v.view()(0, 70, 0, e) = dirty.k.view()(0, 70, 0, e) = not_a_number;
  const auto expected = run_over(clean, filled(clean), ctx), actual = run_over(dirty, filled(dirty), ctx);
  for (index_t s = 0; s < 90; ++s) {
    for (index_t h = 0; h < 6; ++h) {
      const index_t at = (s * 6 + h) * 48;
      if (s < 70 || h >= 3) {
        EXPECT_TRUE(same_bits(actual.out.data() + at, expected.out.data() + at, 48)) << s << ' ' << h;
      } else {
        EXPECT_TRUE(std::isnan(static_cast<float>(actual.out[static_cast<std::size_t>(at)]))) << s << ' ' << h;
      }
    }
  }
  cache kv = filled(dirty);
  kv.truncate(0, 70);
  for (const index_t more : {0, 20}) {
    kv.append(slice(clean.k.view(), 1, 70, more), slice(clean.v.view(), 1, 70, more));
    std::vector<Q> out(static_cast<std::size_t>((70 + more) * 6 * 48));
    attention(slice(clean.q.view(), 1, 0, 70 + more), kv, view(out.data(), {1, 70 + more, 6, 48}), clean.options, ctx);
    EXPECT_TRUE(same_bits(out.data(), expected.out.data(), out.size())) << more;
  }
}

// Hidden by a mask or by a bias of -inf, in the middle of what is seen: panels of which nothing is seen, between
// others.
TEST(KvCache, KeepsMaskedNaNOut) {
  context ctx;
  const operands<Q, T> clean(attention_case{{1, 9, 200, 4, 2, 40, 40}, 0, layout::bshd});
  operands<Q, T> dirty(clean.of);
  std::vector<float> bias(9 * 200, 0.0f);
  const auto mask = std::make_unique<bool[]>(9 * 200);
  std::fill_n(mask.get(), 9 * 200, true);
  for (index_t t = 80; t < 100; ++t) {
    for (index_t e = 0; e < 40; ++e) dirty.v.view()(0, t, 1, e) = dirty.k.view()(0, t, 0, e) = not_a_number;
    for (index_t s = 0; s < 9; ++s) {
      mask[static_cast<std::size_t>(s * 200 + t)] = false;
      bias[static_cast<std::size_t>(s * 200 + t)] = -std::numeric_limits<float>::infinity();
    }
  }
  const auto expect_same_bits = [&](const attention_options& options, const operands<Q, T>& with_nan) {
    operands<Q, T> a(clean.of), b(clean.of);
    a.options = options;
    b.options = options;
    const cache plain = filled(clean), other = filled(with_nan);
    EXPECT_TRUE(run_over(b, other, ctx).same_bits(run_over(a, plain, ctx)));
  };
  expect_same_bits({.mask = tensor_view<const bool, 4>(mask.get(), {1, 1, 9, 200})}, dirty);
  operands<Q, T> dirty_values(clean.of);  // a score of NaN is not hidden by a bias
  for (index_t t = 80; t < 100; ++t) {
    for (index_t e = 0; e < 40; ++e) dirty_values.v.view()(0, t, 1, e) = not_a_number;
  }
  expect_same_bits({.bias = tensor_view<const float, 4>(bias.data(), {1, 1, 9, 200})}, dirty_values);
}

TEST(KvCache, IsFullWithoutLosingAnything) {
  const operands<Q, T> in(attention_case{{2, 3, 100, 4, 2, 32, 32}, with_causal, layout::bshd});
  context ctx;
  cache kv(2, 2, 103, 32);
  kv.append(in.k.view(), in.v.view());
  kv.append(1, slice(slice(in.k.view(), 0, 0, 1), 1, 0, 2), slice(slice(in.v.view(), 0, 0, 1), 1, 0, 2));
  const auto expected = run_over(in, kv, ctx);
  const refusal full = refusal_of([&] {  // sequence 0 had room for them
    kv.append(slice(in.k.view(), 1, 0, 2), slice(in.v.view(), 1, 0, 2));
  });
  EXPECT_EQ(full.code, errc::capacity);
  EXPECT_EQ(full.message, "k: expected at most 1 tokens (the room left in sequence 1), got 2");
  EXPECT_EQ(kv.length(0), 100);
  EXPECT_EQ(kv.length(1), 102);
  EXPECT_TRUE(run_over(in, kv, ctx).same_bits(expected));
  kv.append(slice(in.k.view(), 1, 0, 1), slice(in.v.view(), 1, 0, 1));
  EXPECT_EQ(kv.length(1), 103);
  kv.append(slice(in.k.view(), 1, 0, 0), slice(in.v.view(), 1, 0, 0));  // nothing fits
  kv.clear();
  EXPECT_EQ(kv.length(0), 0);
  kv.append(in.k.view(), in.v.view());
  EXPECT_EQ(kv.length(0), 100);
}

TEST(KvCache, RefusesWhatDoesNotFit) {
  const auto make = [](index_t b, index_t g, index_t c, index_t d, index_t e) {
    return code_of([&] { cache(b, g, c, d, e); });
  };
  EXPECT_EQ(make(1, 1, 1, 1, 1), errc::ok);
  EXPECT_EQ(make(0, 0, 0, 1, 1), errc::ok);
  EXPECT_EQ(make(-1, 1, 1, 1, 1), errc::shape);
  EXPECT_EQ(make(1, -1, 1, 1, 1), errc::shape);
  EXPECT_EQ(make(1, 1, -1, 1, 1), errc::shape);
  EXPECT_EQ(make(1, 1, 1, 0, 1), errc::shape);
  EXPECT_EQ(make(1, 1, 1, 1, -2), errc::shape);
  const index_t huge = std::numeric_limits<index_t>::max();
  EXPECT_EQ(make(1, 1, huge, 1, 1), errc::capacity);
  EXPECT_EQ(make(huge, huge, huge, huge, huge), errc::capacity);
  EXPECT_EQ(make(1, 0, huge, 64, 64), errc::capacity);  // nothing to hold, but extents whose products overflow
  EXPECT_EQ(make(0, 1, huge, 64, 64), errc::capacity);
  EXPECT_EQ(make(0, 1, 1, huge, 1), errc::capacity);
  EXPECT_EQ(make(0, 1, 1, 1, huge), errc::capacity);
  EXPECT_EQ(make(1, 1, index_t{1} << 42, 64, 64), errc::capacity);

  const operands<Q, T> in(attention_case{{2, 3, 10, 4, 2, 32, 40}, with_causal, layout::bshd});
  cache kv(2, 2, 20, 32, 40);
  const auto append = [&](const auto& k, const auto& v) { return code_of([&] { kv.append(k, v); }); };
  EXPECT_EQ(append(in.k.view(), in.v.view()), errc::ok);
  EXPECT_EQ(append(slice(in.k.view(), 0, 0, 1), slice(in.v.view(), 0, 0, 1)), errc::shape);
  EXPECT_EQ(append(slice(in.k.view(), 1, 0, 5), in.v.view()), errc::shape);
  EXPECT_EQ(append(slice(in.k.view(), 2, 0, 1), slice(in.v.view(), 2, 0, 1)), errc::shape);
  EXPECT_EQ(append(slice(in.k.view(), 3, 0, 31), in.v.view()), errc::shape);
  EXPECT_EQ(append(in.k.view(), slice(in.v.view(), 3, 0, 39)), errc::shape);
  const auto row = [](const auto& x) { return slice(x, 0, 0, 1); };
  for (const index_t sequence : {index_t{-1}, index_t{2}, huge}) {
    EXPECT_EQ(code_of([&] { kv.append(sequence, row(in.k.view()), row(in.v.view())); }), errc::range);
    EXPECT_EQ(code_of([&] { kv.truncate(sequence, 0); }), errc::range);
    EXPECT_EQ(kv.length(sequence), 0);
    EXPECT_EQ(code_of([&] { static_cast<void>(kv.key(sequence, 0, 0)); }), errc::range);
  }
  EXPECT_EQ(code_of([&] { kv.append(0, in.k.view(), in.v.view()); }), errc::shape);  // of two sequences
  EXPECT_EQ(code_of([&] { kv.truncate(0, 11); }), errc::length);
  EXPECT_EQ(code_of([&] { kv.truncate(0, -1); }), errc::length);
  EXPECT_EQ(code_of([&] { static_cast<void>(kv.key(0, 10, 0)); }), errc::range);
  EXPECT_EQ(code_of([&] { static_cast<void>(kv.value(0, 0, 2)); }), errc::range);
  EXPECT_EQ(kv.length(0), 10);

  std::vector<Q> q(2 * 4 * 32), out(2 * 4 * 40);
  const auto queries = view(q.data(), {2, 1, 4, 32});
  const auto to = view(out.data(), {2, 1, 4, 40});
  EXPECT_EQ(check(queries, kv, to), errc::ok);
  const std::vector<index_t> lengths{10, 11};
  EXPECT_EQ(check(queries, kv, to, {.kv_lengths = lengths}), errc::length);
  EXPECT_EQ(check(slice(queries, 0, 0, 1), kv, slice(to, 0, 0, 1)), errc::shape);
  EXPECT_EQ(check(slice(queries, 3, 0, 31), kv, to), errc::shape);
}

class counting_resource : public std::pmr::memory_resource {
 public:
  std::size_t alive = 0, limit = std::numeric_limits<std::size_t>::max();

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
#ifndef GQA_NO_EXCEPTIONS
    if (bytes > limit) throw std::bad_alloc();
#endif
    alive += bytes;
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    alive -= bytes;
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override {
    return this == &other;
  }
};

TEST(KvCache, TakesItsMemoryFromAResource) {
  counting_resource memory;
  {
    const operands<Q, T> in(attention_case{{1, 3, 100, 4, 2, 32, 32}, with_causal, layout::bshd});
    context ctx;
    cache kv(1, 2, 128, 32, -1, &memory);
    EXPECT_GE(memory.alive, 2 * 128 * 64 * sizeof(T));
    kv.append(in.k.view(), in.v.view());
    const auto expected = run_over(in, filled(in), ctx);
    EXPECT_TRUE(run_over(in, kv, ctx).same_bits(expected));
    cache moved = std::move(kv);
    EXPECT_TRUE(run_over(in, moved, ctx).same_bits(expected));
    kv = cache(1, 2, 64, 32);  // a moved-from cache can be given another's contents
    kv.append(slice(in.k.view(), 1, 0, 64), slice(in.v.view(), 1, 0, 64));
    EXPECT_EQ(kv.length(0), 64);
#ifndef GQA_NO_EXCEPTIONS
    memory.limit = 1000;
    EXPECT_EQ(code_of([&] { cache(1, 2, 128, 32, -1, &memory); }), errc::capacity);
#endif
  }
  EXPECT_EQ(memory.alive, 0u);
}

TEST(KvCache, OfValuesOfOneGivesExactlyOne) {
  context ctx;
  for (unsigned seed = 1; seed <= number_of_random_cases(); ++seed) {
    const auto in = with_values_of_one<Q, T>(random_case(seed + 3000000));
    ASSERT_TRUE(gives_ones_over(in, filled(in), ctx)) << "seed " << seed;
  }
}

// Where products are of pairs, float queries are rounded first: as queries that were rounded before. (Queries of the
// cache's own type are what they are.)
TEST(KvCache, RoundsFloatQueriesOfPairs) {
  if (!std::is_same_v<Q, float> || !std::is_same_v<T, Eigen::bfloat16>)
    GTEST_SKIP() << "of float queries over bfloat16";
  if (!detail::has_dot<T>) GTEST_SKIP() << "no products of pairs in this instruction set";
  context ctx;
  for (unsigned seed = 1; seed <= 50; ++seed) {
    operands<Q, T> in(random_case(seed + 4000000)), rounded(in.of);
    in.options.float_products = rounded.options.float_products = false;
    rng random(seed);
    for (std::size_t i = 0; i < in.q.data().size(); ++i) {
      in.q.data()[i] = static_cast<Q>(random.normal());
      rounded.q.data()[i] = static_cast<Q>(static_cast<T>(in.q.data()[i]));
    }
    const cache kv = filled(in);
    ASSERT_TRUE(run_over(in, kv, ctx).same_bits(run_over(rounded, kv, ctx))) << "seed " << seed;
  }
}

TEST(KvCache, MayBeEmpty) {
  cache kv(2, 2, 10, 32);
  std::vector<Q> q(2 * 3 * 4 * 32, Q(1)), out(q.size(), not_a_number);
  attention(view(q.data(), {2, 3, 4, 32}), kv, view(out.data(), {2, 3, 4, 32}));
  for (const Q x : out) EXPECT_EQ(static_cast<float>(x), 0.0f);
}

}  // namespace
}  // namespace gqa::test
