// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/certified.hpp"
#include "support/doors.hpp"
#include "support/pages.hpp"
#include "support/refusal.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

template <class KV>
paged_result run_pages(const operands<float, float>& in, const KV& kv, const page_options& options, context& ctx) {
  return run_paged(in, options, [&](const auto& out, const page_options& o, page_report* report) {
    page_attention(in.q.view(), kv, out, o, ctx, report);
  });
}

TEST(PageSelection, OfAllPagesIsExactAttention) {
  for (const unsigned options : {0U, with_causal | with_sinks, with_causal | with_window | with_softcap,
                                 with_causal | with_alibi | with_groups, with_lengths | with_mask}) {
    operands<float, float> in({{2, 2, 700, 8, 2, 16, 24}, options, layout::bshd});
    context ctx;
    const auto cache = cache_of<float>(in, 64);
    const auto exact = run_over(in, cache, ctx);
    const auto paged = run_pages(in, cache, {.epsilon = 0}, ctx);
    EXPECT_TRUE(paged.same_bits(exact)) << in.of.name();
    for (const page_row& row : paged.report.rows) EXPECT_TRUE(row.read == row.pages && row.dropped == 0);
    EXPECT_EQ(paged.report.bytes_read, paged.report.bytes_exact);
    EXPECT_EQ(paged.report.bytes_of_bounds, 0);
  }
}

// How many pages were left out.
// `rounds`: queries are rounded as the kernel of pairs or integers takes them, and so are weights.
template <class T>
index_t expect_all_certified(unsigned options, bool rounds = false) {
  index_t saved = 0;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    for (const index_t bound_tokens : {16, 64}) {
      attention_case c{{2, seed % 2 == 0 ? 1 : 3, 4000, 6, 2, 16, 16}, options, layout::bshd, seed, 5};
      auto in = with_topics(c, seed % 3 == 0 ? 100 : 64, 0.3);
      in.options.float_products = !rounds;
      for (float& sink : in.sinks) sink += 15;  // that count beside such scores
      const auto cache = cache_of<T>(in, bound_tokens);
      context ctx;
      const exact_attention<T> exact(in, cache);
      for (const double epsilon : {0.3, 0.01, 1e-4}) {
        const auto r = run_pages(in, cache, {.epsilon = epsilon, .sink_tokens = 64, .window = 64}, ctx);
        expect_certified(r, exact, in, epsilon, rounds && detail::has_dot<T> ? 0x1p-7 : 0);
        for (const page_row& row : r.report.rows) saved += row.pages - row.read;
      }
    }
  }
  return saved;
}
TEST(PageSelection, CertifiesWhatItDrops) {
  EXPECT_GT(expect_all_certified<float>(0), 2000);
  EXPECT_GT(expect_all_certified<float>(with_causal | with_sinks | with_lengths), 1000);
  EXPECT_GT(expect_all_certified<float>(with_causal | with_softcap | with_scale), 100);
  EXPECT_GT(expect_all_certified<float>(with_causal | with_alibi), 2000);
  EXPECT_GT(expect_all_certified<float>(with_causal | with_groups | with_window), 100);
}
TEST(PageSelection, CertifiesWhatItDropsOfOtherTypes) {
  EXPECT_GT(expect_all_certified<Eigen::bfloat16>(with_causal), 2000);
  EXPECT_GT(expect_all_certified<Eigen::bfloat16>(with_causal, true), 2000);
  EXPECT_GT(expect_all_certified<q8>(with_causal), 2000);
  EXPECT_GT(expect_all_certified<q8>(with_causal, true), 2000);
}

// Where all keys of a page are the same, its bound is their score and nothing is to spare but the margins for rounding:
// of large products, of what is added to them, and of the mass that was read.
template <class T>
void expect_tight_certificates(unsigned options, double size, bool cancels, bool rounds) {
  for (std::uint64_t seed = 1; seed <= 2; ++seed) {
    attention_case c{{1, 4, 700, 8, 2, 128, 4}, options, layout::bshd, seed};
    operands<float, float> in(c);
    in.options.float_products = !rounds;
    rng random(seed + 50);
    const double each = std::sqrt(size / std::sqrt(128.0));  // magnitudes of products sum to scores of `size`
    for (float& x : in.q.data()) x = static_cast<float>(each * (1 + 0.1 * random.normal()));
    for (index_t s = 0; s < 4 && cancels; ++s)
      for (index_t h = 0; h < 8; ++h)
        for (index_t d = 64; d < 128; ++d)
          in.q.view()(0, s, h, d) = in.q.view()(0, s, h, d - 64) * static_cast<float>(1 + random.normal() / size);
    std::vector<float> key(128);
    for (index_t g = 0; g < 2; ++g)
      for (index_t t = 0; t < 700; ++t) {
        if (t % 64 == 0) {
          const double page = 1 + 0.5 * random.normal() / size;
          for (float& x : key) x = static_cast<float>(each * page * (1 + 0.1 * random.normal() / size));
        }
        // Of one sign or, in two halves of the channels, of both, whose sum is small and rounded as the halves are.
        for (index_t d = 0; d < 128; ++d)
          in.k.view()(0, t, g, d) =
              (cancels && d >= 64 ? -1.0f : 1.0f) * key[static_cast<std::size_t>(d % (cancels ? 64 : 128))];
      }
    const auto cache = cache_of<T>(in, 64);
    const exact_attention<T> exact(in, cache);
    context ctx;
    for (const index_t budget : {4, 10}) {
      const auto r = run_pages(in, cache, {.epsilon = 0.9, .sink_tokens = 0, .window = 0, .page_budget = budget}, ctx);
      expect_certified(r, exact, in, 1, rounds && detail::has_dot<T> ? 0x1p-7 : 0);
    }
  }
}
TEST(PageSelection, CertifiesWhereBoundsAreTheScores) {
  for (const double size : {30.0, 1e4}) {
    for (const bool cancels : {false, true}) {
      expect_tight_certificates<float>(0, size, cancels, false);
      expect_tight_certificates<float>(with_alibi | with_softcap, size, cancels, false);
    }
    expect_tight_certificates<Eigen::bfloat16>(0, size, false, true);
  }
}

// From a product to the most that its score may be, whatever the kernel rounds on the way: at most 8 roundings of what
// it adds and caps.
TEST(PageSelection, BoundsScoresThroughTheirRules) {
  for (const unsigned options : {0U, unsigned{with_softcap}, unsigned{with_alibi}, with_softcap | with_alibi}) {
    const operands<float, float> in(attention_case{{1, 1, 64, 4, 2, 16, 16}, options, layout::bshd});
    std::vector<float> out(4 * 16);
    const auto call = detail::problem_of<float>(in.q.view(), kv_view(in.k.view(), in.v.view()),
                                                view(out.data(), {1, 1, 4, 16}), in.options);
    const detail::score_bound<float, float> bound(call);
    rng random(7);
    for (int i = 0; i < 2000; ++i) {
      const index_t h = i % 4, key = random.between(0, 63), position = 63;
      const double product = static_cast<double>(static_cast<float>(std::exp2(8 * random.normal())));
      double score = bound.is_plain() ? product * std::numbers::ln2 : product, size = score;
      if (in.options.softcap != 0) score = in.options.softcap * std::tanh(score / in.options.softcap), size = score;
      if (!in.options.alibi_slopes.empty()) {
        const double added = static_cast<double>(in.options.alibi_slopes[static_cast<std::size_t>(h)]) *
                             static_cast<double>(key - position);
        score += added, size += std::abs(added);
      }
      const auto said = static_cast<double>(bound.of(product, h, position, {key, key + 1}));
      EXPECT_GE(said, (score + 8 * 0x1p-24 * size) * std::numbers::log2e) << i;
    }
  }
}

// On a trained model's activations, at some of its positions.
TEST(PageSelection, CertifiesWhatItDropsOfATrainedModel) {
  GQA_NEED_TEST_DATA();
  index_t saved = 0;
  for (const real_layer& layer : read_real_layers()) {
    operands<float, float> in(
        {{1, 1, layer.positions, layer.q_heads, layer.kv_heads, layer.dim, layer.dim}, with_causal, layout::bshd});
    const auto rows = [&](const std::vector<float>& x, index_t heads) {
      return tensor_view<const float, 4>(x.data(), {1, layer.positions, heads, layer.dim});
    };
    for (index_t t = 0; t < layer.positions; ++t)
      for (index_t g = 0; g < layer.kv_heads; ++g)
        for (index_t d = 0; d < layer.dim; ++d) {
          in.k.view()(0, t, g, d) = rows(layer.k, layer.kv_heads)(0, t, g, d);
          in.v.view()(0, t, g, d) = rows(layer.v, layer.kv_heads)(0, t, g, d);
        }
    const auto cache = cache_of<float>(in, 16);
    context ctx;
    for (index_t position = 3; position < layer.positions; position += 17) {
      for (index_t h = 0; h < layer.q_heads; ++h)
        for (index_t d = 0; d < layer.dim; ++d)
          in.q.view()(0, 0, h, d) = rows(layer.q, layer.q_heads)(0, position, h, d);
      in.options.query_offset = position;
      const exact_attention<float> exact(in, cache);
      for (const double epsilon : {0.5, 0.1, 0.01}) {
        const auto r = run_pages(in, cache, {.epsilon = epsilon, .sink_tokens = 0, .window = 0}, ctx);
        expect_certified(r, exact, in, epsilon, 0);
        for (const page_row& row : r.report.rows) saved += row.pages - row.read;
      }
    }
  }
  EXPECT_GT(saved, 500);
}

// Bounds are those of the keys as stored, through appends of any size and truncation.
template <class T>
void expect_bounds_of(const kv_cache<T>& cache, index_t kv_heads, index_t dim, bool exact) {
  const index_t tokens = cache.bound_tokens(), padded = (dim + 15) / 16 * 16;
  for (index_t b = 0; b < cache.batch(); ++b)
    for (index_t g = 0; g < kv_heads; ++g)
      for (index_t first = 0; first < cache.length(b); first += tokens) {
        const auto bounds = cache.bounds(b, g, first / tokens);
        double largest = 0;
        for (index_t d = 0; d < dim; ++d) {
          double high = -std::numeric_limits<double>::infinity(), low = -high;
          for (index_t t = first; t < std::min(first + tokens, cache.length(b)); ++t) {
            const auto x = static_cast<double>(cache.key(b, t, g)[static_cast<std::size_t>(d)]);
            high = std::max(high, x), low = std::min(low, x);
          }
          const auto most = static_cast<double>(bounds.row[d]), least = static_cast<double>(bounds.row[padded + d]);
          ASSERT_TRUE(exact ? most == high : most >= high && most <= high + std::abs(high) * 0x1p-7)
              << most << " " << high;
          ASSERT_TRUE(exact ? least == low : least <= low && least >= low - std::abs(low) * 0x1p-7)
              << least << " " << low;
          largest = std::max({largest, std::abs(most), std::abs(least)});
        }
        ASSERT_EQ(static_cast<double>(bounds.largest), largest);
      }
}
template <class T>
void expect_bounds(index_t bound_tokens, bool exact) {
  const index_t dim = 20;
  operands<float, float> in({{2, 1, 400, 2, 2, dim, 8}, 0, layout::bshd});
  kv_cache<T> cache(2, 2, 400, dim, 8);
  rng random(static_cast<std::uint64_t>(bound_tokens));
  for (int step = 0; step < 60; ++step) {
    const index_t length = cache.length(0), other = cache.length(1);
    if (step == 20) cache.keep_key_bounds(bound_tokens);  // of tokens that there are
    if (step % 10 == 9) {
      cache.truncate(0, random.between(0, length));
      if (cache.length(0) % bound_tokens == 0 || cache.length(0) == length) continue;
      // Bounds of a page that was cut are those of what there was, until the next token.
      cache.append(0, slice(slice(in.k.view(), 0, 0, 1), 1, cache.length(0), 1),
                   slice(slice(in.v.view(), 0, 0, 1), 1, cache.length(0), 1));
    } else {
      const index_t b = step % 2, from = b == 0 ? length : other;
      const index_t count = std::min(random.chance(0.5) ? 1 : random.between(0, 90), 400 - from);
      cache.append(b, slice(slice(in.k.view(), 0, b, 1), 1, from, count),
                   slice(slice(in.v.view(), 0, b, 1), 1, from, count));
    }
    if (step >= 20) expect_bounds_of(cache, 2, dim, exact);
  }
}
TEST(KeyBounds, FollowAppendsAndTruncation) {
  for (const index_t tokens : {16, 64}) {
    expect_bounds<float>(tokens, true);
    expect_bounds<Eigen::bfloat16>(tokens, true);
    expect_bounds<Eigen::half>(tokens, true);
    expect_bounds<double>(tokens, true);
    expect_bounds<q8>(tokens, false);
    expect_bounds<kv_types<Eigen::bfloat16, q8>>(tokens, true);
  }
}

// log n + scale q.mean <= lse of a page <= log n + scale U, and U is no less than any score.
TEST(KeyBounds, BoundScoresAndTheMassOfPages) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    rng random(seed);
    const index_t dim = random.between(1, 40), keys = random.between(1, 64);
    operands<float, float> in({{1, 1, keys, 1, 1, dim, 1}, 0, layout::bshd, seed, 2});
    auto cache = cache_of<q8>(in, 64);
    const auto bounds = cache.bounds(0, 0, 0);
    const index_t padded = (dim + 15) / 16 * 16;
    double upper = 0, mean = 0, sum = 0, top = -1e300;
    for (index_t d = 0; d < dim; ++d) {
      const double q = in.q.view()(0, 0, 0, d);
      upper += std::max(q * static_cast<double>(bounds.row[d]), q * static_cast<double>(bounds.row[padded + d]));
    }
    for (index_t t = 0; t < keys; ++t) {
      double score = 0;
      for (index_t d = 0; d < dim; ++d)
        score += static_cast<double>(in.q.view()(0, 0, 0, d)) *
                 static_cast<double>(cache.key(0, t, 0)[static_cast<std::size_t>(d)]);
      mean += score / static_cast<double>(keys), sum += std::exp(score), top = std::max(top, score);
    }
    const double n = std::log(static_cast<double>(keys)), slack = 1e-12 * (1 + std::abs(upper));
    ASSERT_LE(top, upper + slack);
    ASSERT_LE(n + mean, std::log(sum) + slack);
    ASSERT_LE(std::log(sum), n + upper + slack);
  }
}

// One page has the key that all rows look for.
operands<float, float> with_needle(index_t keys, index_t at, double gap) {
  operands<float, float> in({{1, 1, keys, 8, 2, 32, 16}, with_causal, layout::bshd});
  for (index_t h = 0; h < 8; ++h)
    for (index_t d = 0; d < 32; ++d) in.q.view()(0, 0, h, d) = 1 + 0.1F * static_cast<float>(h % 3);
  for (auto& x : in.k.data()) x *= 0.1F;
  for (index_t g = 0; g < 2; ++g)
    for (index_t d = 0; d < 32; ++d) in.k.view()(0, at, g, d) = static_cast<float>(gap * std::sqrt(32.0) / 32);
  return in;
}
TEST(PageSelection, ReadsFewPagesWhereANeedleStandsOutAndAllWhereNothingDoes) {
  context ctx;
  const auto needle = with_needle(8000, 4321, 25);
  const auto found = run_pages(needle, cache_of<float>(needle, 64), {.epsilon = 0.01}, ctx);
  for (const page_row& row : found.report.rows) EXPECT_LE(row.read, 2 + 16);
  EXPECT_LT(found.report.bytes_read, 0.2 * found.report.bytes_exact);
  EXPECT_EQ(found.report.rounds, 1);
  ASSERT_EQ(found.report.read.size(), 2u);
  for (const auto& pages : found.report.read) {
    EXPECT_EQ(static_cast<index_t>(pages.size()), found.report.rows[0].read);
    EXPECT_TRUE(std::is_sorted(pages.begin(), pages.end()));
    for (const index_t page : {0, 4321 / 64, 7999 / 64})
      EXPECT_TRUE(std::binary_search(pages.begin(), pages.end(), page)) << page;
  }

  const auto flat = with_needle(8000, 4321, 0);
  const auto all = run_pages(flat, cache_of<float>(flat, 64), {.epsilon = 0.01}, ctx);
  for (const page_row& row : all.report.rows) EXPECT_GE(row.read, row.pages - 2);
  EXPECT_LE(all.report.rounds, 3);
}

TEST(PageSelection, KeepsOutWhatItDoesNotReadAndReadsWhatItMust) {
  context ctx;
  auto in = with_needle(4000, 1000, 25);
  const auto clean = run_pages(in, cache_of<float>(in, 64), {}, ctx);
  for (auto& x : in.v.data()) x = std::numeric_limits<float>::quiet_NaN();
  const auto poisoned = run_pages(in, cache_of<float>(in, 64), {}, ctx);
  EXPECT_TRUE(std::isnan(poisoned.out[0]));  // the needle's own
  in = with_needle(4000, 1000, 25);
  // A page that no row needs; then one whose key is no number, which every row must see.
  page_options budget{.sink_tokens = 0, .window = 0, .page_budget = 1};
  const auto one = run_pages(in, cache_of<float>(in, 64), budget, ctx);
  for (index_t t = 0; t < 4000; ++t) {
    if (t / 64 != 1000 / 64) in.v.view()(0, t, 0, 3) = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_TRUE(run_pages(in, cache_of<float>(in, 64), budget, ctx).same_bits(one));
  in = with_needle(4000, 1000, 25);
  in.k.view()(0, 3000, 1, 5) = std::numeric_limits<float>::quiet_NaN();
  const auto seen = run_pages(in, cache_of<float>(in, 64), {}, ctx);
  for (index_t h = 0; h < 8; ++h) EXPECT_EQ(std::isnan(seen.out[static_cast<std::size_t>(h * 16)]), h >= 4) << h;
}

TEST(PageSelection, KeepsToItsBudgetAndSaysWhatItCost) {
  const auto in = with_topics({{1, 1, 3000, 8, 2, 16, 16}, with_causal, layout::bshd}, 64, 0.3);
  const auto cache = cache_of<float>(in, 64);
  const exact_attention exact(in, cache);
  context ctx;
  double before = 1;
  for (const index_t budget : {3, 10, 20, 40}) {
    const auto r = run_pages(in, cache, {.epsilon = 1e-6, .page_budget = budget}, ctx);
    double worst = 0;
    const std::vector<double> dropped = exact.dropped(r.report);
    for (std::size_t row = 0; row < r.lse.size(); ++row) {
      EXPECT_EQ(r.report.rows[row].read, budget);
      EXPECT_LE(dropped[row], r.report.rows[row].dropped);
      worst = std::max(worst, r.report.rows[row].dropped);
    }
    EXPECT_LE(worst, before);
    before = worst;
  }
}

TEST(PageSelection, HasTheSameBitsOnAnyThreads) {
  const auto in = with_topics({{3, 2, 1500, 8, 4, 16, 16}, with_causal | with_sinks, layout::bshd}, 64, 0.3);
  const auto cache = cache_of<float>(in, 16);
  context ctx;
  const auto one = run_pages(in, cache, {}, ctx);
  Eigen::ThreadPool pool(3);
  context threads(pool);
  const auto three = run_pages(in, cache, {}, threads);
  EXPECT_TRUE(three.same_bits(one));
  EXPECT_EQ(three.report.rows, one.report.rows);
}

// Pages of a paged cache and of a ring choose as those of a kv_cache of the same tokens do, whoever shares them.
TEST(PageSelection, ChoosesAlikeFromAnyCache) {
  const auto in = with_topics({{1, 1, 1500, 8, 2, 16, 16}, with_causal, layout::bshd}, 64, 0.3);
  context ctx;
  for (const index_t bound_tokens : {16, 64}) {
    ring_kv_cache<float> ring(1, 2, 0, 1600, 16, 16);
    ring.keep_key_bounds(bound_tokens);
    ring.append(in.k.view(), in.v.view());
    EXPECT_TRUE(run_pages(in, ring, {}, ctx).same_bits(run_pages(in, cache_of<float>(in, bound_tokens), {}, ctx)));

    paged_kv_cache<float> paged(1, 100, bound_tokens == 16 ? 48 : 64, 2, 16, 16);
    kv_cache<float> apart(2, 2, 1500, 16, 16);
    apart.keep_key_bounds(bound_tokens);
    const auto append = [&](sequence_id id, index_t from, index_t count) {
      const auto rows = [&](const auto& x) {
        return tensor_view<const float, 3>(&x(0, std::min<index_t>(from, 1499), 0, 0), {count, 2, 16});
      };
      paged.append(id, rows(in.k.view()), rows(in.v.view()));
      apart.append(static_cast<index_t>(id), slice(in.k.view(), 1, from, count), slice(in.v.view(), 1, from, count));
    };
    const sequence_id parent = paged.create();
    append(parent, 0, 700);
    paged.keep_key_bounds(bound_tokens);
    const sequence_id fork = paged.fork(parent);
    apart.append(1, slice(in.k.view(), 1, 0, 700), slice(in.v.view(), 1, 0, 700));
    append(fork, 700, 800);
    for (const index_t length : {690, 630, 600}) {  // pages of both keep the bounds that the fork needs,
      paged.truncate(parent, length), apart.truncate(0, length);
      append(parent, 0, 0);  // also when nothing is written
    }
    append(parent, 0, 30);
    append(parent, 30, 500);
    tensor<float> q({2, 1, 8, 16}, layout::bshd), out({2, 1, 8, 16}, layout::bshd), expected = out;
    std::copy(in.q.data().begin(), in.q.data().end(), q.data().begin());
    std::copy(in.q.data().begin(), in.q.data().end(), q.data().begin() + 8 * 16);
    page_options o;
    o.attention = in.options;
    page_report report, expected_report;
    page_attention(q.view(), paged.layer(0), out.view(), o, ctx, &report);
    page_attention(q.view(), apart, expected.view(), o, ctx, &expected_report);
    EXPECT_EQ(report.read, expected_report.read);
    EXPECT_EQ(report.rows, expected_report.rows);
    EXPECT_EQ(std::memcmp(out.data().data(), expected.data().data(), 2 * 8 * 16 * sizeof(float)), 0);
  }
}

// Bounds far above all scores: what seems nothing beside them is all that there is.
TEST(PageSelection, IsNotMisledByBoundsFarAboveTheScores) {
  operands<float, float> in({{1, 1, 2048, 1, 1, 16, 4}, with_causal, layout::bshd});
  in.options.scale = 1.0;
  std::fill(in.q.data().begin(), in.q.data().end(), 1.0F);
  std::fill(in.k.data().begin(), in.k.data().end(), 0.0F);
  for (index_t t = 640; t < 1344; ++t)  // scores of 0 under bounds of 160
    for (index_t d = 0; d < 16; ++d) in.k.view()(0, t, 0, d) = (t + d) % 2 == 0 ? 10.0F : -10.0F;
  for (index_t d = 0; d < 16; ++d) in.k.view()(0, 1601, 0, d) = 2;  // a score of 32
  context ctx;
  const auto cache = cache_of<float>(in, 64);
  const exact_attention<float> exact(in, cache);
  for (const index_t budget : {3, 14, 32}) {
    page_options o{.epsilon = 0.01};
    if (budget < 32) o.page_budget = budget;
    const auto r = run_pages(in, cache, o, ctx);
    EXPECT_LE(exact.dropped(r.report)[0], r.report.rows[0].dropped * (1 + 1e-9)) << budget;
    if (!o.page_budget) expect_certified(r, exact, in, 0.01, 0);
  }
}

TEST(PageSelection, LeavesOutWhatARingHasDropped) {
  const auto in = with_topics({{1, 1, 3000, 8, 2, 16, 16}, 0, layout::bshd}, 64, 0.3);
  ring_kv_cache<float> ring(1, 2, 64, 1000, 16, 16);
  ring.keep_key_bounds();
  for (index_t t = 0; t < 3000; t += 60) ring.append(slice(in.k.view(), 1, t, 60), slice(in.v.view(), 1, t, 60));
  operands<float, float> windowed(in.of);
  windowed.q = in.q, windowed.k = in.k, windowed.v = in.v;
  windowed.options.causal = true, windowed.options.window.left = 900;
  context ctx;
  const auto cache = cache_of<float>(windowed, 64);
  EXPECT_TRUE(run_pages(windowed, ring, {}, ctx).same_bits(run_pages(windowed, cache, {}, ctx)));
}

TEST(PageSelection, RefusesWhatDoesNotFit) {
  operands<float, float> in({{1, 1, 100, 4, 2, 16, 16}, with_causal, layout::bshd});
  auto cache = cache_of<float>(in, 64);
  auto without = cache_of<float>(in, 0);
  std::vector<float> out(4 * 16);
  const auto code = [&](const kv_cache<float>& kv, page_options o) {
    context ctx;
    return code_of([&] { page_attention(in.q.view(), kv, view(out.data(), {1, 1, 4, 16}), o, ctx); });
  };
  EXPECT_EQ(code(cache, {}), errc::ok);
  EXPECT_EQ(code(without, {}), errc::option);
  for (const double epsilon : {-0.1, 1.0, 2.0, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_EQ(code(cache, {.epsilon = epsilon}), errc::option);
  EXPECT_EQ(code(cache, {.sink_tokens = -1}), errc::option);
  EXPECT_EQ(code(cache, {.window = index_t{1} << 62}), errc::option);
  EXPECT_EQ(code(cache, {.page_budget = -1}), errc::option);
  page_options biased;
  const std::vector<float> bias(100);
  biased.attention.bias = tensor_view<const float, 4>(bias.data(), {1, 1, 1, 100});
  EXPECT_EQ(code(cache, biased), errc::option);
  EXPECT_EQ(code_of([&] { cache.keep_key_bounds(32); }), errc::option);
  paged_kv_cache<float> paged(1, 4, 48, 2, 16);
  EXPECT_EQ(code_of([&] { paged.keep_key_bounds(64); }), errc::option);
  EXPECT_EQ(code_of([&] { paged.keep_key_bounds(16); }), errc::ok);
}

// Bounds follow what write() puts at an earlier position: a key there that outweighs all others is read.
TEST(PageSelection, SeesWhatIsWrittenToAnEarlierPosition) {
  constexpr index_t tokens = 2000, dim = 16;
  for (const index_t bound_tokens : {16, 64}) {
    for (const index_t position : {0, 70, 127, 1023, 1984}) {
      paged_kv_cache<float> cache(1, 40, 64, 1, dim);
      cache.keep_key_bounds(bound_tokens);
      const sequence_id id = cache.create();
      rng random(3);
      std::vector<float> k(tokens * dim), v(tokens * dim), one(dim, 3.0f), of_one(dim, 7.0f), q(dim, 3.0f);
      for (float& x : k) x = static_cast<float>(0.1 * random.normal());
      for (float& x : v) x = static_cast<float>(random.normal());
      const auto rows = [](const std::vector<float>& x, index_t n) {
        return tensor_view<const float, 3>(x.data(), {n, 1, dim});
      };
      cache.append(id, rows(k, tokens), rows(v, tokens));
      cache.write(0, id, position, rows(one, 1), rows(of_one, 1));  // scores 36, and the others at most 4
      std::vector<float> out(dim);
      page_report report;
      context ctx;
      page_attention(view(q.data(), {1, 1, 1, dim}), cache.layer(0), view(out.data(), {1, 1, 1, dim}),
                     {.epsilon = 1e-6, .sink_tokens = 0, .window = 0}, ctx, &report);
      EXPECT_LT(report.rows[0].read, 10);
      EXPECT_TRUE(std::binary_search(report.read[0].begin(), report.read[0].end(), position / 64)) << position;
      for (const float x : out) EXPECT_NEAR(x, 7, 7 * 210 * 0x1p-24) << position;  // sums (matchers.hpp)
    }
  }
}

TEST(PageSelection, HasACheck) {
  expect_check_says_the_same(
      [](const door_operands& c) { return check(c.q, c.cache, c.out, page_options{.attention = c.options}); },
      [](door_operands& c, context& ctx) { page_attention(c.q, c.cache, c.out, {.attention = c.options}, ctx); });
  door_operands c;
  EXPECT_EQ(check(c.q, c.cache, c.out, page_options{.epsilon = 2}), errc::option);
}

}  // namespace
}  // namespace gqa::test
