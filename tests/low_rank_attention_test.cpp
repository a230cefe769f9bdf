// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/doors.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

// A latent cache has the bits of a kv_cache of the same keys, with their first channels as values.
template <class T>
void expect_bits_of_a_kv_cache(index_t dim, index_t rank, index_t queries, index_t heads, unsigned options) {
  const index_t tokens = 1500;
  operands<T, T> in({{2, queries, tokens, heads, 1, dim, rank}, options, layout::bshd});
  rng random(static_cast<std::uint64_t>(dim * rank + queries));
  kv_cache<T> expected(2, 1, tokens, dim, rank);
  latent_kv_cache<T> latent(2, tokens, dim, rank);
  const auto k = in.k.view();
  const auto values = [&](const tensor_view<T, 4>& x) {  // a prefix of the same memory
    return tensor_view<T, 4>(x.data(), {x.extent(0), x.extent(1), 1, rank}, {x.stride(0), x.stride(1), x.stride(2), 1});
  };
  for (index_t first = 0; first < tokens;) {
    const index_t count = std::min(random.between(1, 200), tokens - first);
    const auto some = slice(k, 1, first, count);
    latent.append(some);
    expected.append(some, values(some));
    first += count;
    if (random.chance(0.2) && first > 100) {
      first -= random.between(1, 100);
      for (index_t b = 0; b < 2; ++b) latent.truncate(b, first), expected.truncate(b, first);
    }
  }
  Eigen::ThreadPool pool(2);
  context ctx, threads(pool);
  const auto of_latent = run_over(in, latent, ctx);
  EXPECT_TRUE(of_latent.same_bits(run_over(in, expected, ctx))) << in.of.name();
  EXPECT_TRUE(of_latent.same_bits(run_over(in, latent, threads))) << in.of.name();
  if constexpr (std::is_same_v<T, float>) {
    EXPECT_TRUE(queries * heads <= 6 || of_latent.same_bits(run_over(in, kv_view(k, values(k)), ctx))) << in.of.name();
  }
}
TEST(LatentKvCache, HasTheBitsOfKeysAndAPrefixOfThem) {
  for (const auto& [dim, rank] : {std::pair<index_t, index_t>{40, 32}, {20, 13}, {7, 7}, {80, 65}, {1, 1}}) {
    expect_bits_of_a_kv_cache<float>(dim, rank, 1, 16, with_causal);
    expect_bits_of_a_kv_cache<float>(dim, rank, 40, 4, with_causal | with_sinks | with_lengths);
    expect_bits_of_a_kv_cache<Eigen::bfloat16>(dim, rank, 3, 5, with_causal | with_softcap);
  }
  expect_bits_of_a_kv_cache<Eigen::half>(40, 32, 2, 4, with_causal);
  expect_bits_of_a_kv_cache<float>(24, 17, 2, 4, with_mask);
}

TEST(LatentKvCache, KeepsOutNaNThatIsHidden) {
  operands<float, float> in({{1, 8, 100, 4, 1, 24, 16}, with_causal, layout::bshd});
  in.options.query_offset = 50;  // tokens from 58 on are hidden from all
  latent_kv_cache<float> clean(1, 100, 24, 16), poisoned(1, 100, 24, 16);
  clean.append(in.k.view());
  in.k.view()(0, 60, 0, 3) = std::numeric_limits<float>::quiet_NaN();  // of a tile that is seen in part
  in.k.view()(0, 58, 0, 20) = std::numeric_limits<float>::infinity();
  poisoned.append(in.k.view());
  context ctx;
  EXPECT_TRUE(run_over(in, poisoned, ctx).same_bits(run_over(in, clean, ctx)));
}

TEST(LatentKvCache, RefusesWhatDoesNotFit) {
  const auto made = [](index_t batch, index_t capacity, index_t dim, index_t rank) {
    return code_of([&] { const latent_kv_cache<float> cache(batch, capacity, dim, rank); });
  };
  EXPECT_EQ(made(1, 10, 8, 8), errc::ok);
  EXPECT_EQ(made(-1, 10, 8, 8), errc::shape);
  EXPECT_EQ(made(1, -1, 8, 8), errc::shape);
  EXPECT_EQ(made(1, 10, 8, 0), errc::shape);
  EXPECT_EQ(made(1, 10, 8, 9), errc::shape);
  EXPECT_EQ(made(1, index_t{1} << 60, 8, 8), errc::capacity);
  latent_kv_cache<float> cache(2, 100, 8, 4);
  const tensor<float> rows({2, 60, 1, 8}, layout::bshd), two_heads({2, 1, 2, 8}, layout::bshd);
  const auto code = [&](const auto& f) { return code_of(f); };
  EXPECT_EQ(code([&] { cache.append(rows.view()); }), errc::ok);
  EXPECT_EQ(code([&] { cache.append(rows.view()); }), errc::capacity);
  EXPECT_EQ(cache.length(0), 60);
  EXPECT_EQ(code([&] { cache.append(two_heads.view()); }), errc::shape);
  EXPECT_EQ(code([&] { cache.append(0, rows.view()); }), errc::shape);
  EXPECT_EQ(code([&] { cache.append(2, rows.view()); }), errc::range);
  EXPECT_EQ(code([&] { cache.truncate(0, 61); }), errc::length);
  EXPECT_EQ(code([&] { cache.truncate(-1, 0); }), errc::range);
  std::vector<float> copy(8);
  EXPECT_EQ(code([&] { cache.copy_rows(0, 60, 1, copy.data(), 8); }), errc::range);
  EXPECT_EQ(code([&] { cache.copy_rows(0, 59, 1, copy.data(), 8); }), errc::ok);
}

struct latent_case {
  index_t batch, queries, tokens, heads, nope, rope, rank, value_dim;
};

// Operands of a call, and what it must be: keys and values in double by definition, then the oracle.
struct latent_operands {
  latent_case of;
  tensor<float> q_nope, q_rope, rows;
  std::vector<float> w_k, w_v;
  latent_options options;

  explicit latent_operands(const latent_case& c)
      : of(c),
        q_nope({c.batch, c.queries, c.heads, c.nope}, layout::bshd),
        q_rope({c.batch, c.queries, c.heads, c.rope}, layout::bshd),
        rows({c.batch, c.tokens, 1, c.rank + c.rope}, layout::bshd),
        w_k(static_cast<std::size_t>(c.heads * c.nope * c.rank)),
        w_v(static_cast<std::size_t>(c.heads * c.value_dim * c.rank)) {
    rng random(static_cast<std::uint64_t>(c.tokens + c.heads));
    for (auto* x : {&q_nope, &q_rope, &rows}) {
      for (auto& element : x->data()) element = static_cast<float>(random.normal());
    }
    const double size = 1 / std::sqrt(static_cast<double>(c.rank));
    for (auto* x : {&w_k, &w_v}) {
      for (auto& element : *x) element = static_cast<float>(size * random.normal());
    }
    options.attention.causal = true;
  }
  [[nodiscard]] latent_projections projections() const {
    return {tensor_view<const float, 3>(w_k.data(), {of.heads, of.nope, of.rank}),
            tensor_view<const float, 3>(w_v.data(), {of.heads, of.value_dim, of.rank})};
  }
  [[nodiscard]] std::vector<float> run(latent_form form, context& ctx) const {
    latent_kv_cache<float> cache(of.batch, of.tokens, of.rank + of.rope, of.rank);
    cache.append(rows.view());
    std::vector<float> out(static_cast<std::size_t>(of.batch * of.queries * of.heads * of.value_dim),
                           std::numeric_limits<float>::quiet_NaN());
    latent_options o = options;
    o.form = form;
    latent_attention(q_nope.view(), q_rope.view(), cache, projections(),
                     view(out.data(), {of.batch, of.queries, of.heads, of.value_dim}), o, ctx);
    return out;
  }
};

// Both forms against the definition. A chain of n rounded products is off by at most n u sum |x y|; of a score that is
// (R + Dn + Dr) u times the sum of magnitudes that all of its products have, of a value R u sum |W c|. A score off by d
// moves an output by at most 2 d max |v|.
void expect_definition(const latent_operands& in) {
  const latent_case& c = in.of;
  tensor<double> q({c.batch, c.queries, c.heads, c.nope + c.rope}, layout::bshd),
      k({c.batch, c.tokens, c.heads, c.nope + c.rope}, layout::bshd),
      v({c.batch, c.tokens, c.heads, c.value_dim}, layout::bshd);
  double key_sum = 0, value_sum = 0, query_sum = 0;  // largest sums of magnitudes
  for (index_t b = 0; b < c.batch; ++b)
    for (index_t h = 0; h < c.heads; ++h) {
      for (index_t s = 0; s < c.queries; ++s) {
        double sum = 0;
        for (index_t d = 0; d < c.nope + c.rope; ++d) {
          q.view()(b, s, h, d) = d < c.nope ? in.q_nope.view()(b, s, h, d) : in.q_rope.view()(b, s, h, d - c.nope);
          sum += std::abs(q.view()(b, s, h, d));
        }
        query_sum = std::max(query_sum, sum);
      }
      for (index_t t = 0; t < c.tokens; ++t) {
        const auto project = [&](const std::vector<float>& w, index_t dim, index_t d, double& magnitude) {
          double sum = 0, sizes = 0;
          for (index_t r = 0; r < c.rank; ++r) {
            const double term = static_cast<double>(w[static_cast<std::size_t>((h * dim + d) * c.rank + r)]) *
                                static_cast<double>(in.rows.view()(b, t, 0, r));
            sum += term, sizes += std::abs(term);
          }
          magnitude = std::max(magnitude, sizes);
          return sum;
        };
        for (index_t d = 0; d < c.nope; ++d) k.view()(b, t, h, d) = project(in.w_k, c.nope, d, key_sum);
        for (index_t d = 0; d < c.rope; ++d) {
          k.view()(b, t, h, c.nope + d) = in.rows.view()(b, t, 0, c.rank + d);
          key_sum = std::max(key_sum, std::abs(k.view()(b, t, h, c.nope + d)));
        }
        for (index_t e = 0; e < c.value_dim; ++e) v.view()(b, t, h, e) = project(in.w_v, c.value_dim, e, value_sum);
      }
    }
  const auto expected = run_oracle_on<float>(q.view(), k.view(), v.view(), in.options.attention);
  const double u = 0x1p-24, scale = 1 / std::sqrt(static_cast<double>(c.nope + c.rope));
  const double score_off = static_cast<double>(c.rank + c.nope + c.rope + 4) * u * scale * query_sum * key_sum;
  const double of_values = 2 * score_off * value_sum + static_cast<double>(c.rank + 4) * u * value_sum;
  for (const latent_form form : {latent_form::absorbed, latent_form::materialised, latent_form::automatic}) {
    context ctx;
    const auto actual = in.run(form, ctx);
    comparison compared;
    for (std::size_t i = 0; i < actual.size(); ++i)
      compared.add(actual[i], expected.out[i], expected.out_bound(i) + of_values, "out");
    EXPECT_TRUE(compared.result()) << static_cast<int>(form);
    Eigen::ThreadPool pool(3);
    context threads(pool);
    const auto again = in.run(form, threads);
    EXPECT_EQ(std::memcmp(again.data(), actual.data(), actual.size() * sizeof(float)), 0);
  }
}
TEST(LatentAttention, IsItsDefinitionInBothForms) {
  expect_definition(latent_operands({2, 1, 300, 16, 24, 8, 48, 20}));
  expect_definition(latent_operands({1, 70, 200, 4, 16, 8, 40, 16}));
  expect_definition(latent_operands({2, 3, 130, 3, 5, 1, 7, 9}));
  expect_definition(latent_operands({1, 2, 64, 2, 8, 0, 16, 8}));
  latent_operands in({2, 4, 200, 4, 16, 8, 32, 16});
  const std::vector<index_t> lengths{150, 3};
  in.options.attention.kv_lengths = lengths;
  const std::vector<float> sinks{0.5F, -1, 2, 0};
  in.options.attention.sinks = sinks;
  in.options.attention.window.left = 40;
  expect_definition(in);
}

TEST(LatentAttention, RefusesWhatDoesNotFit) {
  latent_operands in({1, 2, 50, 4, 16, 8, 32, 16});
  latent_kv_cache<float> cache(1, 50, 40, 32);
  cache.append(in.rows.view());
  std::vector<float> out(2 * 4 * 16, -1.0F);
  const auto out_view = view(out.data(), {1, 2, 4, 16});
  const auto code = [&](const auto& q_nope, const auto& q_rope, const latent_projections& w, const auto& to,
                        const latent_options& o) {
    context ctx;
    const errc c = code_of([&] { latent_attention(q_nope, q_rope, cache, w, to, o, ctx); });
    EXPECT_TRUE(c == errc::ok || std::all_of(out.begin(), out.end(), [](float x) { return x == -1.0F; }));
    return c;
  };
  const auto nope = in.q_nope.view(), rope = in.q_rope.view();
  EXPECT_EQ(code(nope, nope, in.projections(), out_view, in.options), errc::shape);  // 16 is not 40 - 32
  EXPECT_EQ(code(slice(nope, 1, 0, 1), rope, in.projections(), out_view, in.options), errc::shape);
  EXPECT_EQ(code(slice(nope, 2, 0, 3), slice(rope, 2, 0, 3), in.projections(), slice(out_view, 2, 0, 3), in.options),
            errc::shape);
  latent_projections w = in.projections();
  std::swap(w.keys, w.values);  // of one shape here
  w.keys = tensor_view<const float, 3>(in.w_k.data(), {4, 15, 32});
  EXPECT_EQ(code(nope, rope, w, out_view, in.options), errc::shape);
  EXPECT_EQ(code(nope, rope, latent_projections{}, out_view, in.options), errc::shape);
  w = in.projections();
  w.values = tensor_view<const float, 3>(in.w_v.data(), {4, 16, 32}, {512, 1, 16});
  EXPECT_EQ(code(nope, rope, w, out_view, in.options), errc::stride);
  const auto over_q = view(in.q_nope.data().data(), {1, 2, 4, 16});
  EXPECT_EQ(code(nope, rope, in.projections(), over_q, in.options), errc::stride);
  latent_options o = in.options;
  const std::vector<index_t> groups{0, 4}, long_ones{51};
  o.attention.group_offsets = groups;
  EXPECT_EQ(code(nope, rope, in.projections(), out_view, o), errc::option);
  o = in.options;
  o.attention.kv_lengths = long_ones;
  EXPECT_EQ(code(nope, rope, in.projections(), out_view, o), errc::length);
  EXPECT_EQ(code(nope, rope, in.projections(), out_view, in.options), errc::ok);
}

TEST(LatentAttention, HasACheck) {
  constexpr index_t dim = door_operands::dim;
  const door_operands keys;
  latent_kv_cache<float> latent(1, door_operands::tokens, dim, dim);
  latent.append(view(keys.k_data.data(), {1, door_operands::tokens, 1, dim}));
  const std::vector<float> w(4 * dim * dim, 0.125f);
  const latent_projections projections{tensor_view<const float, 3>(w.data(), {4, dim, dim}),
                                       tensor_view<const float, 3>(w.data(), {4, dim, dim})};
  const tensor_view<const float, 4> no_rope(keys.q_data.data(), {1, 2, 4, 0});
  expect_check_says_the_same(
      [&](const door_operands& c) {
        return check(c.q, no_rope, latent, projections, c.out.out, {.attention = c.options});
      },
      [&](door_operands& c, context& ctx) {
        latent_attention(c.q, no_rope, latent, projections, c.out.out, {.attention = c.options}, ctx);
      });
}

}  // namespace
}  // namespace gqa::test
