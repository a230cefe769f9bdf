// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/certified.hpp"
#include "support/doors.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

// Keys of `rank` directions, the same for all tokens of a head, and noise; single ones stand out, each in its own
// direction of those.
operands<float, float> near_subspaces(const attention_case& c, index_t rank, double noise, double outstanding) {
  operands<float, float> in(c);
  rng random(c.seed + 200);
  const auto& n = c.shape;
  for (index_t b = 0; b < n.b; ++b)
    for (index_t g = 0; g < n.g; ++g) {
      std::vector<double> directions(static_cast<std::size_t>(rank * n.d)), mean(static_cast<std::size_t>(n.d));
      for (double& x : directions) x = random.normal() / std::sqrt(static_cast<double>(rank));
      for (double& x : mean) x = 2 * random.normal();
      for (index_t t = 0; t < n.t; ++t) {
        const double size = random.chance(0.01) ? outstanding : 1;
        std::vector<double> at(static_cast<std::size_t>(rank));
        for (double& x : at) x = size * random.normal();
        for (index_t d = 0; d < n.d; ++d) {
          double x = mean[static_cast<std::size_t>(d)] + noise * random.normal();
          for (index_t i = 0; i < rank; ++i)
            x += at[static_cast<std::size_t>(i)] * directions[static_cast<std::size_t>(i * n.d + d)];
          in.k.view()(b, t, g, d) = static_cast<float>(x);
        }
      }
    }
  return in;
}

template <class KV, class S>
paged_result run_projected(const operands<float, float>& in, const KV& kv, const projected_keys<S>& few,
                           const page_options& options, context& ctx) {
  return run_paged(in, options, [&](const auto& out, const page_options& o, page_report* report) {
    projected_attention(in.q.view(), kv, few, out, o, ctx, report);
  });
}

// Channel d of a key as projected: its coordinates, |e| and |P e|.
template <class S>
double channel_of(const projected_keys<S>& few, index_t b, index_t g, index_t t, index_t d) {
  const auto& head = few.of(b, g);
  const S* const panel = head.panels.data() + t / 16 * detail::key_panel_elements<S>(head.channels());
  return static_cast<double>(panel[detail::key_index<S>(t % 16, d)]);
}

// q . m + [y | |w| | |y|] . [a | |e| | |P e|] is no less than q . k for any query, and of full rank no more.
template <class S, class KV, class KeyAt>
void expect_bounds(const KV& kv, const projected_keys<S>& few, index_t keys, index_t rank, const KeyAt& key_at,
                   rng& random) {
  const index_t dim = kv.head_dim();
  const auto& head = few.of(0, 0);
  ASSERT_EQ(head.rank(), rank);
  Eigen::VectorXd q(dim), k(dim);
  for (double& x : q) x = random.normal();
  const Eigen::VectorXd y = head.directions * q, w = q - head.directions.transpose() * y;
  for (index_t t = 0; t < keys; ++t) {
    double most = q.dot(head.mean.transpose()), score = 0;
    for (index_t i = 0; i < rank; ++i) most += y[i] * channel_of(few, 0, 0, t, i);
    most += w.norm() * channel_of(few, 0, 0, t, rank) + y.norm() * channel_of(few, 0, 0, t, rank + 1);
    for (index_t d = 0; d < dim; ++d) k[d] = key_at(t, d), score += q[d] * k[d];
    const double size = q.norm() * (k.norm() + head.mean.norm());
    ASSERT_LE(score, most + 1e-13 * size) << t;
    // Of full rank: what is added for the kernel's rounding, to both norms, and what rounding to bfloat16 leaves out.
    const double rounding = 8 * static_cast<double>(2 * dim + 34) * 0x1p-23;
    const double excess = rank < dim ? 1e9 : rounding + (std::is_same_v<S, float> ? 0x1p-20 : 0x1p-6);
    ASSERT_LE(most, score + excess * size) << t;
  }
}
TEST(ProjectedKeys, BoundEveryScore) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    rng random(seed);
    const index_t dim = random.between(1, 40), keys = random.between(1, 200), rank = random.between(0, dim);
    const auto in =
        near_subspaces({{1, 1, keys, 1, 1, dim, 4}, 0, layout::bshd, seed}, std::min<index_t>(dim, 3), 0.3, 5);
    for (const index_t r : {rank, dim}) {
      const auto plain = kv_view(in.k.view(), in.v.view());
      const auto exact = [&](index_t t, index_t d) { return static_cast<double>(in.k.view()(0, t, 0, d)); };
      expect_bounds(plain, projected_keys<float>(plain, {.rank = r}), keys, r, exact, random);
      expect_bounds(plain, projected_keys<Eigen::bfloat16>(plain, {.rank = r}), keys, r, exact, random);
      const auto eight = cache_of<q8>(in);
      const auto stored = [&](index_t t, index_t d) {
        return static_cast<double>(eight.key(0, t, 0)[static_cast<std::size_t>(d)]);
      };
      expect_bounds(eight, projected_keys<float>(eight, {.rank = r}), keys, r, stored, random);
    }
  }
}

TEST(ProjectedKeys, FindTheDirectionsThatKeysHave) {
  const auto in = near_subspaces({{2, 1, 3000, 2, 2, 32, 4}, 0, layout::bshd}, 3, 0.02, 1);
  const projected_keys<float> few(cache_of<float>(in));
  for (index_t b = 0; b < 2; ++b)
    for (index_t g = 0; g < 2; ++g) {
      EXPECT_TRUE(few.rank(b, g) == 2 || few.rank(b, g) == 3) << few.rank(b, g);  // 3 directions of random lengths
      EXPECT_LE(few.residual(b, g), 0.1);
      const auto& p = few.of(b, g).directions;
      EXPECT_LE((p * p.transpose() - Eigen::MatrixXd::Identity(p.rows(), p.rows())).cwiseAbs().maxCoeff(), 1e-12);
    }
  const projected_keys<float> three(cache_of<float>(in), {.rank = 3});
  // Noise of 29 other channels, and what the mean of a sample is off by.
  for (index_t t = 0; t < 3000; ++t) ASSERT_LE(channel_of(three, 0, 0, t, 3), 0.02 * (std::sqrt(29.0) + 5));
  const projected_keys<float> tight(cache_of<float>(in), {.residual = 1e-4});
  EXPECT_GT(tight.rank(0, 0), 3);
  EXPECT_LE(tight.residual(0, 0), 1e-4);
  const projected_keys<float> all(cache_of<float>(in), {.residual = 0});
  EXPECT_EQ(all.rank(1, 1), 32);
  const projected_keys<float> none(cache_of<float>(in), {.residual = 1});
  EXPECT_EQ(none.rank(1, 1), 0);
}

TEST(ProjectedAttention, OfAllPagesIsExactAttention) {
  for (const unsigned options :
       {with_causal | with_sinks, with_causal | with_alibi | with_groups, with_lengths | with_mask}) {
    operands<float, float> in({{2, 2, 700, 8, 2, 16, 24}, options, layout::bshd});
    context ctx;
    const auto cache = cache_of<float>(in);
    const auto r = run_projected(in, cache, projected_keys<float>(cache), {.epsilon = 0}, ctx);
    EXPECT_TRUE(r.same_bits(run_over(in, cache, ctx))) << in.of.name();
    EXPECT_EQ(r.report.bytes_read, r.report.bytes_exact);
    for (const page_row& row : r.report.rows) EXPECT_EQ(row.dropped, 0);
  }
}

// What is certified is no less than what is dropped, of any rank; also of keys that came later.
template <class T, class S>
index_t expect_all_certified(unsigned options) {
  index_t saved = 0;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    attention_case c{{2, seed % 2 == 0 ? 1 : 3, 2000, 6, 2, 24, 16}, options, layout::bshd, seed, 3};
    auto in = near_subspaces(c, 4, 0.05, 6);
    in.options.float_products = true;
    const auto& n = in.of.shape;
    kv_cache<T> cache(n.b, n.g, n.t, n.d, n.e);
    const auto append = [&](index_t from, index_t count) {
      cache.append(slice(in.k.view(), 1, from, count), slice(in.v.view(), 1, from, count));
    };
    append(0, 1500);
    for (const index_t rank : {2, 4, 10, 24}) {
      projected_keys<S> few(cache, {.rank = rank, .sample = 300});
      if (rank == 2) append(1500, 300), few.update(cache), append(1800, 200);
      if (rank == 4) {
        for (index_t b = 0; b < n.b; ++b) cache.truncate(b, 1237), few.truncate(b, 1237);
        append(1237, 763);
      }
      few.update(cache);
      const exact_attention<T> exact(in, cache);
      context ctx;
      for (const double epsilon : {0.3, 0.01, 1e-4}) {
        const auto r = run_projected(in, cache, few, {.epsilon = epsilon, .sink_tokens = 16, .window = 16}, ctx);
        expect_certified(r, exact, in, epsilon, 0);
        for (const page_row& row : r.report.rows) saved += row.pages - row.read;
      }
    }
  }
  return saved;
}
TEST(ProjectedAttention, CertifiesWhatItDrops) {
  EXPECT_GT((expect_all_certified<float, float>(with_causal | with_sinks | with_lengths)), 10000);
  EXPECT_GT((expect_all_certified<float, float>(with_causal | with_softcap | with_scale | with_groups)), 1000);
  EXPECT_GT((expect_all_certified<float, float>(with_causal | with_alibi | with_window)), 2000);
}
TEST(ProjectedAttention, CertifiesWhatItDropsOfOtherTypes) {
  EXPECT_GT((expect_all_certified<Eigen::bfloat16, Eigen::bfloat16>(with_causal)), 10000);
  EXPECT_GT((expect_all_certified<q8, float>(with_causal)), 10000);
}

// Of full rank the certificate is what was dropped, the best pages are those of the largest mass, and with m the mass
// that was read, o_S - o = (1 - m) (o_S - o_rest).
TEST(ProjectedAttention, OfFullRankKnowsWhatItDrops) {
  const index_t keys = 1600, dim = 24, value_dim = 8;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    auto in = near_subspaces({{1, 1, keys, 1, 1, dim, value_dim}, 0, layout::bshd, seed, 1}, 6, 0.2, 3);
    const auto cache = cache_of<float>(in);
    const projected_keys<float> few(cache, {.rank = dim});
    context ctx;
    const page_options o{.epsilon = 0, .sink_tokens = 0, .window = 0, .page_budget = 12};
    const auto r = run_projected(in, cache, few, o, ctx);
    const auto& read = r.report.read.front();
    ASSERT_EQ(read.size(), 12u);
    EXPECT_EQ(r.report.page_tokens, 16);

    std::vector<double> mass(keys / 16), out(value_dim), rest(value_dim);
    double all = 0, of_rest = 0;
    for (index_t t = 0; t < keys; ++t) {
      double score = 0;
      for (index_t d = 0; d < dim; ++d)
        score += static_cast<double>(in.q.view()(0, 0, 0, d)) * static_cast<double>(in.k.view()(0, t, 0, d));
      const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
      const bool was_read = std::binary_search(read.begin(), read.end(), t / 16);
      mass[static_cast<std::size_t>(t / 16)] += weight, all += weight, of_rest += was_read ? 0 : weight;
      for (std::size_t e = 0; e < value_dim; ++e) {
        const double x = weight * static_cast<double>(in.v.view()(0, t, 0, static_cast<index_t>(e)));
        out[e] += x, rest[e] += was_read ? 0 : x;
      }
    }
    double least_read = all, most_left = 0;
    for (index_t page = 0; page < keys / 16; ++page) {
      const double own = mass[static_cast<std::size_t>(page)];
      if (std::binary_search(read.begin(), read.end(), page)) {
        least_read = std::min(least_read, own);
      } else {
        most_left = std::max(most_left, own);
      }
    }
    // Within the chord of the logarithm and the eighths of a power of two that pages are ordered by.
    EXPECT_LE(most_left, least_read * std::exp2(0.0862 + 0.125) * (1 + 1e-3)) << seed;
    const double dropped = of_rest / all, said = r.report.rows.front().dropped;
    EXPECT_LE(dropped, said * (1 + 1e-9));
    // And no more than the chord of the logarithm above it, and what bounds of scores are above them: three terms that
    // each hold all that rounding may take from and give to a score, of a mass that was read or not.
    double q_size = 0, k_size = 0;
    for (index_t d = 0; d < dim; ++d) q_size += std::pow(static_cast<double>(in.q.view()(0, 0, 0, d)), 2);
    for (index_t t = 0; t < keys; ++t) {
      double sum = 0;
      for (index_t d = 0; d < dim; ++d) sum += std::pow(static_cast<double>(in.k.view()(0, t, 0, d)), 2);
      k_size = std::max(k_size, sum);
    }
    const double size = std::sqrt(q_size * k_size / static_cast<double>(dim));  // of a score, and half of its mean's
    const double above = 2 * 3 * detail::rounding_of(dim, dim) * 2 * size + lse_bound<float>(dim, size);
    EXPECT_LE(said, dropped * std::exp2(0.0862) * std::exp(2 * above)) << seed;
    const double largest = std::abs(*std::max_element(in.v.data().begin(), in.v.data().end(),
                                                      [](float x, float y) { return std::abs(x) < std::abs(y); }));
    for (std::size_t e = 0; e < value_dim; ++e) {
      const double exact = out[e] / all, o_rest = rest[e] / of_rest, o_s = static_cast<double>(r.out[e]);
      EXPECT_NEAR(o_s - exact, dropped * (o_s - o_rest), 2 * output_bound<float>(dim, size, largest)) << seed;
    }
  }
}

TEST(ProjectedAttention, ReadsFewPagesWhereSingleKeysStandOut) {
  auto in = near_subspaces({{1, 1, 8000, 8, 2, 64, 16}, with_causal, layout::bshd, 1, 2}, 8, 0.02, 1);
  for (index_t g = 0; g < 2; ++g) {  // one key along what a group's queries share
    for (index_t h = 0; h < 4; ++h)
      for (index_t d = 0; d < 64; ++d) in.q.view()(0, 0, 4 * g + h, d) = in.k.view()(0, 1234 + g, g, d);
    for (index_t d = 0; d < 64; ++d) in.k.view()(0, 1234 + g, g, d) *= 4;
  }
  const auto cache = cache_of<float>(in);
  context ctx;
  const auto r = run_projected(in, cache, projected_keys<float>(cache, {.rank = 8}), {}, ctx);
  EXPECT_LT(r.report.bytes_read, 0.1 * r.report.bytes_exact);
  EXPECT_EQ(r.report.bytes_of_bounds, 8000.0 * 2 * 10 * 4);  // 8 + 2 channels of floats
  expect_certified(r, exact_attention<float>(in, cache), in, 0.01, 0);
}

// Two keys score by what lies outside of the directions: the one that is left out is in the certificate.
TEST(ProjectedAttention, BoundsWhatLiesOutsideOfItsDirections) {
  const index_t dim = 32, before = 1600;
  auto in = near_subspaces({{1, 1, before + 32, 1, 1, dim, 8}, with_causal, layout::bshd, 1, 1}, 3, 0.01, 1);
  kv_cache<float> cache(1, 1, before + 32, dim, 8);
  cache.append(slice(in.k.view(), 1, 0, before), slice(in.v.view(), 1, 0, before));
  projected_keys<float> few(cache, {.rank = 3});
  Eigen::RowVectorXd outside = Eigen::RowVectorXd::Ones(dim);
  outside -= outside * few.of(0, 0).directions.transpose() * few.of(0, 0).directions;
  outside /= outside.norm();
  for (index_t d = 0; d < dim; ++d) {
    in.q.view()(0, 0, 0, d) = static_cast<float>(std::sqrt(static_cast<double>(dim)) * outside[d]);
    in.k.view()(0, before + 5, 0, d) += static_cast<float>(12 * outside[d]);  // nats above the others
    in.k.view()(0, before + 25, 0, d) += static_cast<float>(9 * outside[d]);
  }
  cache.append(slice(in.k.view(), 1, before, 32), slice(in.v.view(), 1, before, 32));
  few.update(cache);
  context ctx;
  const auto exact = run_over(in, cache, ctx);
  const page_options one{.epsilon = 0, .sink_tokens = 0, .window = 0, .page_budget = 1};
  const auto r = run_projected(in, cache, few, one, ctx);
  EXPECT_EQ(r.report.read.front(), std::vector<index_t>{before / 16});
  const double dropped = -std::expm1(static_cast<double>(r.lse[0]) - static_cast<double>(exact.lse[0]));
  EXPECT_GT(dropped, 0.04);
  EXPECT_LE(dropped, r.report.rows.front().dropped);
}

TEST(ProjectedAttention, KeepsOutWhatItDoesNotReadAndReadsWhatItMust) {
  auto in = near_subspaces({{1, 1, 2000, 4, 2, 32, 16}, with_causal, layout::bshd, 1, 2}, 4, 0.02, 1);
  context ctx;
  const page_options budget{.sink_tokens = 0, .window = 0, .page_budget = 5};
  const auto few = [](const auto& cache) { return projected_keys<float>(cache, {.rank = 4}); };
  const auto cache = cache_of<float>(in);
  const auto clean = run_projected(in, cache, few(cache), budget, ctx);
  operands<float, float> poisoned(in.of);
  poisoned.q = in.q, poisoned.k = in.k, poisoned.v = in.v;
  for (index_t g = 0; g < 2; ++g) {
    const auto& read = clean.report.read[static_cast<std::size_t>(g)];
    for (index_t t = 0; t < 2000; ++t) {
      if (!std::binary_search(read.begin(), read.end(), t / 16))
        poisoned.v.view()(0, t, g, 3) = std::numeric_limits<float>::quiet_NaN();
    }
  }
  const auto kept_out = cache_of<float>(poisoned);
  EXPECT_TRUE(run_projected(poisoned, kept_out, few(kept_out), budget, ctx).same_bits(clean));
  // A key that is no number is seen, by all rows that share it.
  poisoned.v = in.v;
  poisoned.k.view()(0, 999, 1, 5) = std::numeric_limits<float>::quiet_NaN();
  poisoned.k.view()(0, 998, 0, 5) = std::numeric_limits<float>::infinity();
  const auto unbounded = cache_of<float>(poisoned);
  const auto seen = run_projected(poisoned, unbounded, few(unbounded), {.epsilon = 0.3}, ctx);
  for (const auto& read : seen.report.read) EXPECT_TRUE(std::binary_search(read.begin(), read.end(), 999 / 16));
  for (index_t h = 2; h < 4; ++h) EXPECT_TRUE(std::isnan(seen.out[static_cast<std::size_t>(h * 16)]));
}

TEST(ProjectedAttention, ReadsWhatHasNoBound) {
  context ctx;
  for (const index_t place : {513, 530, 550, 567, 1984}) {  // in each panel of a tile; alone in the last tile
    operands<float, float> in({{1, 1, 1985, 2, 1, 2, 4}, with_causal, layout::bshd, 1, 1});
    std::fill(in.q.data().begin(), in.q.data().end(), 0.0F);
    in.k.view()(0, place, 0, 0) = in.k.view()(0, place, 0, 1) = 3e38F;  // its norm is none: 0 times infinity
    const auto cache = cache_of<float>(in);
    const projected_keys<float> few(cache, {.rank = 1});
    const auto r = run_projected(in, cache, few, {.epsilon = 0.001, .sink_tokens = 0, .window = 0}, ctx);
    EXPECT_TRUE(std::binary_search(r.report.read[0].begin(), r.report.read[0].end(), place / 16)) << place;
    expect_certified(r, exact_attention<float>(in, cache), in, 0.001, 0);
    in.k.view()(0, place, 0, 0) = std::numeric_limits<float>::quiet_NaN();
    in.k.view()(0, 100, 0, 1) = std::numeric_limits<float>::quiet_NaN();
    const auto unknown = cache_of<float>(in);
    const auto budget = run_projected(in, unknown, projected_keys<float>(unknown, {.rank = 1}),
                                      {.epsilon = 0, .sink_tokens = 0, .window = 0, .page_budget = 1}, ctx);
    for (const index_t page : {index_t{100 / 16}, place / 16})
      EXPECT_TRUE(std::binary_search(budget.report.read[0].begin(), budget.report.read[0].end(), page)) << place;
  }
}

// Of 8 bits: a value that is no number, in any of the panels of a tile that are read.
TEST(ProjectedAttention, LosesNoValueThatIsNoNumber) {
  context ctx;
  auto in = near_subspaces({{1, 1, 1000, 4, 1, 32, 32}, with_causal, layout::bshd, 1, 2}, 4, 0.02, 1);
  in.options.float_products = false;
  page_options o{.epsilon = 0, .sink_tokens = 0, .window = 0, .page_budget = 20};
  const auto clean = cache_of<q8>(in);
  const auto read = run_projected(in, clean, projected_keys<float>(clean, {.rank = 4}), o, ctx).report.read.front();
  for (const index_t page : read) {
    operands<float, float> poisoned(in.of);
    poisoned.q = in.q, poisoned.k = in.k, poisoned.v = in.v, poisoned.options = in.options;
    poisoned.v.view()(0, page * 16 + 3, 0, 5) = std::numeric_limits<float>::quiet_NaN();
    const auto cache = cache_of<q8>(poisoned);
    const auto r = run_projected(poisoned, cache, projected_keys<float>(cache, {.rank = 4}), o, ctx);
    EXPECT_TRUE(std::any_of(r.out.begin(), r.out.end(), [](float x) { return std::isnan(x); })) << page;
  }
}

TEST(ProjectedAttention, HasTheSameBitsOnAnyThreadsAndOverAnySource) {
  const auto in =
      near_subspaces({{2, 2, 1500, 8, 4, 16, 16}, with_causal | with_sinks, layout::bshd, 1, 3}, 3, 0.05, 6);
  const auto cache = cache_of<float>(in);
  const projected_keys<float> few(cache);
  context ctx;
  const auto one = run_projected(in, cache, few, {}, ctx);
  Eigen::ThreadPool pool(3);
  context threads(pool);
  const auto three = run_projected(in, cache, few, {}, threads);
  EXPECT_TRUE(three.same_bits(one));
  EXPECT_EQ(three.report.rows, one.report.rows);
  const auto plain = kv_view(in.k.view(), in.v.view());
  const auto rows = run_projected(in, plain, projected_keys<float>(plain), {}, ctx);
  EXPECT_TRUE(rows.same_bits(one));
  EXPECT_EQ(rows.report.rows, one.report.rows);
}

// Few rows stream their panels, more meet tiles in which others are hidden: the same bits.
template <class T>
void expect_bits_of_hidden_panels() {
  auto in = near_subspaces({{1, 1, 1500, 16, 1, 32, 32}, with_causal, layout::bshd, 1, 1}, 3, 0.05, 6);
  for (index_t h = 4; h < 16; ++h)  // the same four rows again and again, which choose as four do
    for (index_t d = 0; d < 32; ++d) in.q.view()(0, 0, h, d) = in.q.view()(0, 0, h % 4, d);
  in.options.float_products = false;
  operands<float, float> four({{1, 1, 1500, 4, 1, 32, 32}, with_causal, layout::bshd, 1, 1});
  four.k = in.k, four.v = in.v, four.options.float_products = false;
  std::copy_n(in.q.data().begin(), 4 * 32, four.q.data().begin());
  const auto cache = cache_of<T>(in);
  const projected_keys<float> few(cache, {.rank = 3});
  context ctx;
  const page_options o{.epsilon = 0, .page_budget = 40};
  const auto hidden = run_projected(in, cache, few, o, ctx), streamed = run_projected(four, cache, few, o, ctx);
  EXPECT_EQ(hidden.report.read, streamed.report.read);
  EXPECT_LT(streamed.report.rows.front().read, streamed.report.rows.front().pages);
  EXPECT_EQ(std::memcmp(hidden.out.data(), streamed.out.data(), streamed.out.size() * sizeof(float)), 0);
  EXPECT_EQ(std::memcmp(hidden.lse.data(), streamed.lse.data(), streamed.lse.size() * sizeof(float)), 0);
}
TEST(ProjectedAttention, StreamsWithTheBitsOfHiddenPanels) {
  expect_bits_of_hidden_panels<float>();
  expect_bits_of_hidden_panels<Eigen::bfloat16>();
  expect_bits_of_hidden_panels<q8>();
}

TEST(ProjectedAttention, RefusesWhatDoesNotFit) {
  operands<float, float> in({{2, 1, 100, 4, 2, 16, 16}, with_causal, layout::bshd});
  const auto cache = cache_of<float>(in);
  const auto made = [&](projection_options o) { return code_of([&] { const projected_keys<float> few(cache, o); }); };
  EXPECT_EQ(made({}), errc::ok);
  for (const index_t rank : {index_t{-1}, index_t{17}, index_t{1} << 60}) EXPECT_EQ(made({.rank = rank}), errc::option);
  for (const double residual : {-0.1, 1.1, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_EQ(made({.residual = residual}), errc::option);
  EXPECT_EQ(made({.sample = 0}), errc::option);
  const kv_cache<float> empty(2, 2, 100, 16), other(1, 2, 100, 16);
  projected_keys<float> of_none(empty);  // no keys, no directions
  EXPECT_EQ(of_none.rank(0, 0), 0);
  EXPECT_EQ(code_of([&] { of_none.update(other); }), errc::shape);
  EXPECT_EQ(code_of([&] { of_none.update(cache); }), errc::ok);
  EXPECT_EQ(of_none.length(1), 100);
  EXPECT_EQ(code_of([&] { of_none.update(empty); }), errc::length);
  EXPECT_EQ(code_of([&] { of_none.truncate(2, 0); }), errc::range);
  EXPECT_EQ(code_of([&] { of_none.truncate(0, 101); }), errc::length);

  std::vector<float> out(2 * 4 * 16, 7.0F);
  context ctx;
  const auto call = [&](const projected_keys<float>& few, page_options o) {
    o.attention.causal = true;
    return code_of([&] { projected_attention(in.q.view(), cache, few, view(out.data(), {2, 1, 4, 16}), o, ctx); });
  };
  projected_keys<float> few(cache);
  few.truncate(1, 99);
  EXPECT_EQ(call(few, {}), errc::length);
  EXPECT_EQ(call(projected_keys<float>(other), {}), errc::shape);
  EXPECT_EQ(call(few, {.epsilon = 1}), errc::option);
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return x == 7.0F; }));
  const std::vector<index_t> lengths{100, 99};
  page_options shorter;
  shorter.attention.kv_lengths = lengths;
  EXPECT_EQ(call(few, shorter), errc::ok);
  EXPECT_EQ(call(of_none, {}), errc::ok);
}

// Heads without a finite key have directions all the same, at any dim: of an empty cache, an erased sequence, NaN.
TEST(ProjectedKeys, MayHaveNothingToGoBy) {
  context ctx;
  for (const index_t dim : {1, 8, 47, 48, 64, 128}) {
    for (const std::optional<index_t> rank :
         {std::optional<index_t>{}, std::optional<index_t>{0}, std::optional<index_t>{1}}) {
      kv_cache<float> cache(2, 1, 100, dim);
      projected_keys<float> none(cache, {.rank = rank});
      EXPECT_EQ(none.length(0), 0);
      std::vector<float> k(static_cast<std::size_t>(70 * dim), std::numeric_limits<float>::quiet_NaN()),
          v(k.size(), 1.0f);
      cache.append(1, view(k.data(), {1, 70, 1, dim}), view(v.data(), {1, 70, 1, dim}));
      projected_keys<float> of_nan(cache, {.rank = rank});
      none.update(cache);
      EXPECT_EQ(none.length(1), 70);
      // Ordinary keys come later: they lie outside of directions that were found of nothing, and are read.
      std::fill(k.begin(), k.end(), 0.5f);
      cache.append(0, view(k.data(), {1, 70, 1, dim}), view(v.data(), {1, 70, 1, dim}));
      none.update(cache);
      std::vector<float> q(static_cast<std::size_t>(2 * dim), 1.0f), out(q.size());
      projected_attention(view(q.data(), {2, 1, 1, dim}), cache, none, view(out.data(), {2, 1, 1, dim}),
                          {.attention = {.causal = true}}, ctx);
      EXPECT_EQ(out[0], 1.0f) << dim;
      EXPECT_TRUE(std::isnan(out.back())) << dim;
    }
    paged_kv_cache<float> paged(1, 10, 16, 1, dim);
    const sequence_id first = paged.create(), second = paged.create();
    std::vector<float> k(static_cast<std::size_t>(20 * dim), 0.5f);
    const tensor_view<const float, 3> rows(k.data(), {20, 1, dim});
    paged.append(first, rows, rows), paged.append(second, rows, rows);
    paged.erase(first);
    const projected_keys<float> of_pages(paged.layer(0));
    EXPECT_EQ(of_pages.length(1), 20);
  }
}

TEST(ProjectedAttention, HasACheck) {
  const door_operands of_keys;
  const projected_keys<float> few(of_keys.cache, {.rank = 2});
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, c.cache, few, c.out, {.attention = c.options}); },
      [&](door_operands& c, context& ctx) {
        projected_attention(c.q, c.cache, few, c.out, {.attention = c.options}, ctx);
      });
}

}  // namespace
}  // namespace gqa::test
