// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/doors.hpp"
#include "support/grouped_oracle.hpp"
#include "support/kernels.hpp"
#include "support/matchers.hpp"
#include "support/oracle.hpp"
#include "support/rng.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

constexpr groupwise_form forms[] = {groupwise_form::dense, groupwise_form::clustered, groupwise_form::improved,
                                    groupwise_form::improved_lse};

enum class data_kind { random, planted, needle, sink, key_offset, repeated };
constexpr data_kind kinds[] = {data_kind::random, data_kind::planted, data_kind::needle, data_kind::sink,
                               data_kind::key_offset};

// q [B, S, H, D], k [B, T, G, D], v [B, T, G, E], dense.
template <class X>
struct grouped_case {
  index_t b, s, t, h, g, d, e;
  std::vector<X> q, k, v;

  tensor_view<const X, 4> queries() const { return {q.data(), {b, s, h, d}}; }
  tensor_view<const X, 4> keys() const { return {k.data(), {b, t, g, d}}; }
  tensor_view<const X, 4> values() const { return {v.data(), {b, t, g, e}}; }
  index_t rows() const { return s * (h / g); }
  row query(index_t at_b, index_t at_g, index_t i) const {  // pooled row i
    const X* const from = &queries()(at_b, i / (h / g), at_g * (h / g) + i % (h / g), 0);
    return {from, from + d};
  }
  std::vector<row> keys_of(index_t at_b, index_t at_g, index_t count) const {
    std::vector<row> all;
    for (index_t i = 0; i < count; ++i) all.emplace_back(&keys()(at_b, i, at_g, 0), &keys()(at_b, i, at_g, 0) + d);
    return all;
  }
};

template <class X>
grouped_case<X> make_case(std::array<index_t, 7> shape, data_kind kind, std::uint64_t seed, double spread = 0.1) {
  const auto [b, s, t, h, g, d, e] = shape;
  grouped_case<X> c{b, s, t, h, g, d, e, {}, {}, {}};
  rng random(seed);
  const index_t clusters = 6;
  std::vector<double> centres(static_cast<std::size_t>(clusters * d)), offset(static_cast<std::size_t>(d));
  for (double& x : centres) x = random.normal();
  for (double& x : offset) x = 3 * random.normal();
  for (index_t i = 0; i < b * s * h; ++i) {
    const index_t centre = random.between(0, clusters - 1);
    for (index_t j = 0; j < d; ++j) {
      const double x = random.normal();
      const double about = centres[static_cast<std::size_t>(centre * d + j)] + spread * x;
      c.q.push_back(static_cast<X>(kind == data_kind::random ? x : about));
    }
  }
  for (index_t i = 0; i < b * t * g; ++i) {
    const index_t token = i / g % t;
    for (index_t j = 0; j < d; ++j) {
      double x = random.normal();
      if (kind == data_kind::needle && token == t / 3) x = 4 * centres[static_cast<std::size_t>(j)];
      if (kind == data_kind::sink && token == 0) x = 2 * centres[static_cast<std::size_t>(d + j)];
      if (kind == data_kind::repeated && token >= 40)
        x = static_cast<double>(c.k[c.k.size() - static_cast<std::size_t>(40 * g * d)]);
      if (kind == data_kind::key_offset) x += offset[static_cast<std::size_t>(j)];
      c.k.push_back(static_cast<X>(x));
    }
  }
  for (index_t i = 0; i < b * t * g * e; ++i) c.v.push_back(static_cast<X>(random.normal()));
  return c;
}

template <class A>
struct result {
  std::vector<A> out, lse;
  partial_state<A> state(index_t b, index_t s, index_t h, index_t e) {
    out.assign(static_cast<std::size_t>(b * s * h * e), std::numeric_limits<A>::quiet_NaN());
    lse.assign(static_cast<std::size_t>(b * s * h), std::numeric_limits<A>::quiet_NaN());
    return {tensor_view<A, 4>(out.data(), {b, s, h, e}), tensor_view<A, 3>(lse.data(), {b, s, h})};
  }
  friend bool operator==(const result& x, const result& y) {
    return std::memcmp(x.out.data(), y.out.data(), x.out.size() * sizeof(A)) == 0 &&
           std::memcmp(x.lse.data(), y.lse.data(), x.lse.size() * sizeof(A)) == 0;
  }
};

template <class X>
std::vector<query_groups<accumulator_t<X>>> groups_of(const grouped_case<X>& c, const grouping_options& options) {
  using A = accumulator_t<X>;
  std::vector<query_groups<A>> all;
  context ctx;
  for (index_t b = 0; b < c.b; ++b) {
    for (index_t g = 0; g < c.g; ++g) {
      std::vector<A> rows;
      for (index_t i = 0; i < c.rows(); ++i)
        for (const double x : c.query(b, g, i)) rows.push_back(static_cast<A>(x));
      all.emplace_back();
      group_queries(tensor_view<const A, 2>(rows.data(), {c.rows(), c.d}), options, all.back(), ctx);
    }
  }
  return all;
}

// groupwise_attention() gives every row the weights of its definition. Slopes: ALiBi's, where heads are not pooled.
template <class X>
void expect_definition(const grouped_case<X>& c, groupwise_form form, index_t top_keys, index_t length,
                       const std::vector<float>& slopes = {}) {
  using A = accumulator_t<X>;
  grouping_options grouping;
  grouping.groups = 7;
  const auto groups = groups_of(c, grouping);
  const std::vector<index_t> lengths(static_cast<std::size_t>(c.b), length);
  attention_options scores;
  scores.kv_lengths = lengths, scores.alibi_slopes = slopes;
  result<A> actual;
  context ctx;
  groupwise_attention(c.queries(), c.keys(), c.values(), std::span<const query_groups<A>>(groups),
                      actual.state(c.b, c.s, c.h, c.e), scores, {form, top_keys}, ctx);
  comparison compared;
  for (index_t b = 0; b < c.b; ++b) {
    for (index_t g = 0; g < c.g; ++g) {
      naive_groupwise naive{c.keys_of(b, g, length), 1 / std::sqrt(static_cast<double>(c.d))};
      if (!slopes.empty()) naive.slope = static_cast<double>(slopes[static_cast<std::size_t>(g)]);
      const auto& set = groups[static_cast<std::size_t>(b * c.g + g)];
      for (index_t j = 0; j < set.size(); ++j) {
        const row representative(set.representative(j).begin(), set.representative(j).end());
        for (const index_t i : set.members(j)) {
          const row q = c.query(b, g, i);
          naive.position = static_cast<double>(length - c.s + i / (c.h / c.g));
          const weights w = set.members(j).size() == 1
                                ? naive.exact(q)
                                : naive.shared(q, representative, form, static_cast<std::size_t>(top_keys));
          // Scores and their sums, those of the representative and those of the shift: a few bounds of one pass.
          const double magnitude = std::max(naive.magnitude(q), naive.magnitude(representative));
          const index_t at = (b * c.s + i / (c.h / c.g)) * c.h + g * (c.h / c.g) + i % (c.h / c.g);
          compared.add(static_cast<double>(actual.lse[static_cast<std::size_t>(at)]), w.lse,
                       lse_bound<A>(c.d, magnitude, 4), "lse");
          for (index_t e = 0; e < c.e; ++e) {
            double out = 0;
            for (index_t t = 0; t < length; ++t)
              out += w.of[static_cast<std::size_t>(t)] * static_cast<double>(c.values()(b, t, g, e));
            compared.add(static_cast<double>(actual.out[static_cast<std::size_t>(at * c.e + e)]), out,
                         output_bound<A>(c.d, magnitude, 5, 4), "out");
          }
        }
      }
    }
  }
  EXPECT_TRUE(compared.result()) << "form " << static_cast<int>(form) << ", top " << top_keys << ", keys " << length;
}

TEST(GroupwiseAttention, GivesTheWeightsOfItsDefinition) {
  for (const groupwise_form form : forms) {
    for (const index_t top_keys : {0, 1, 5, 64, 100, 1000}) {
      expect_definition(make_case<float>({2, 20, 150, 6, 2, 16, 24}, data_kind::planted, 1, 0.4), form, top_keys, 150);
    }
    expect_definition(make_case<float>({1, 9, 64, 4, 4, 40, 8}, data_kind::random, 2), form, 8, 64);
    for (const index_t top_keys : {1, 7, 30})  // equal keys: the first are taken
      expect_definition(make_case<float>({1, 20, 200, 4, 2, 16, 8}, data_kind::repeated, 5), form, top_keys, 200);
    expect_definition(make_case<double>({1, 33, 200, 4, 1, 24, 16}, data_kind::key_offset, 3, 0.4), form, 16, 190);
    expect_definition(make_case<Eigen::bfloat16>({1, 16, 100, 4, 2, 32, 16}, data_kind::sink, 4), form, 16, 100);
  }
}

TEST(GroupwiseAttention, GivesTheWeightsOfItsDefinitionUnderAlibi) {
  for (const groupwise_form form : forms) {
    for (const index_t top_keys : {0, 1, 20, 1000}) {
      // In double: slopes whose products with distances floats hold exactly.
      expect_definition(make_case<double>({2, 40, 150, 3, 3, 16, 24}, data_kind::planted, 1, 0.4), form, top_keys, 150,
                        {0.5f, -0.125f, 0.0078125f});
      expect_definition(make_case<float>({1, 40, 190, 3, 3, 24, 8}, data_kind::key_offset, 2, 0.4), form, top_keys, 180,
                        {0.3f, -0.07f, 0});
    }
  }
}

// Every head has a slope and a set of groups of its own: GQA is MHA with copies of its keys.
TEST(GroupwiseAttention, GroupsHeadByHeadUnderAlibi) {
  const auto c = make_case<float>({2, 40, 150, 6, 2, 16, 24}, data_kind::planted, 1, 0.4);
  auto copied = c;
  copied.g = 6, copied.k.clear(), copied.v.clear();
  for (index_t token = 0; token < 2 * 150; ++token) {
    for (index_t h = 0; h < 6; ++h) {
      const auto k = c.k.begin() + (token * 2 + h / 3) * 16, v = c.v.begin() + (token * 2 + h / 3) * 24;
      copied.k.insert(copied.k.end(), k, k + 16), copied.v.insert(copied.v.end(), v, v + 24);
    }
  }
  grouping_options grouping;
  grouping.groups = 5;
  const auto groups = groups_of(copied, grouping);
  const std::span<const query_groups<float>> sets(groups);
  const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.0625f, -0.1f, 0};
  attention_options scores;
  scores.alibi_slopes = slopes;
  for (const groupwise_form form : forms) {
    result<float> shared, own;
    context ctx;
    groupwise_attention(c.queries(), c.keys(), c.values(), sets, shared.state(2, 40, 6, 24), scores, {form, 8}, ctx);
    groupwise_attention(copied.queries(), copied.keys(), copied.values(), sets, own.state(2, 40, 6, 24), scores,
                        {form, 8}, ctx);
    EXPECT_TRUE(shared == own) << static_cast<int>(form);
  }
}

TEST(GroupwiseAttention, TakesNoSequences) {
  context ctx;
  const float x = 0;
  const tensor_view<const float, 4> none(&x, {0, 5, 2, 4});
  result<float> out;
  groupwise_attention(none, none, none, std::span<const query_groups<float>>(), out.state(0, 5, 2, 4), {}, {}, ctx);
}

TEST(GroupwiseAttention, DoesNotDependOnThreads) {
  const auto c = make_case<float>({2, 40, 300, 6, 3, 16, 16}, data_kind::planted, 9);
  grouping_options grouping;
  grouping.groups = 7;
  const auto groups = groups_of(c, grouping);
  const std::span<const query_groups<float>> sets(groups);
  result<float> serial, parallel;
  context ctx;
  groupwise_attention(c.queries(), c.keys(), c.values(), sets, serial.state(2, 40, 6, 16), {}, {}, ctx);
  Eigen::ThreadPool pool(3);
  context threads(pool);
  groupwise_attention(c.queries(), c.keys(), c.values(), sets, parallel.state(2, 40, 6, 16), {}, {}, threads);
  EXPECT_TRUE(parallel == serial);
}

TEST(GroupwiseAttention, OverACacheIsThatOverTensors) {
  const auto c = make_case<float>({2, 20, 150, 6, 2, 16, 24}, data_kind::planted, 1, 0.4);
  grouping_options grouping;
  grouping.groups = 7;
  const auto groups = groups_of(c, grouping);
  kv_cache<float> cache(2, 2, 150, 16, 24);
  cache.append(c.keys(), c.values());
  for (const groupwise_form form : forms) {
    result<float> tensors, cached;
    context ctx;
    const std::span<const query_groups<float>> sets(groups);
    groupwise_attention(c.queries(), c.keys(), c.values(), sets, tensors.state(2, 20, 6, 24), {}, {form, 20}, ctx);
    groupwise_attention(c.queries(), cache, sets, cached.state(2, 20, 6, 24), {}, {form, 20}, ctx);
    EXPECT_TRUE(tensors == cached) << static_cast<int>(form);
  }
}

// Outputs of the library for KV head 0 of a case with one.
std::vector<double> outputs_of(const grouped_case<double>& c, const query_groups<double>& set, groupwise_form form,
                               double scale, double slope) {
  attention_options scores;
  const std::vector<float> slopes(1, static_cast<float>(slope));
  scores.scale = scale;
  if (slope != 0) scores.alibi_slopes = slopes;
  result<double> r;
  context ctx;
  groupwise_attention(c.queries(), c.keys(), c.values(), std::span<const query_groups<double>>(&set, 1),
                      r.state(1, c.s, c.h, c.e), scores, {form, 4}, ctx);
  return r.out;
}

// What the definitions promise of KV head 0, in double, on the oracle's weights and the library's groups; and the
// library's outputs. Returns the sums of L1 errors of the paper's improved form and of that by log-sum-exps. A slope:
// of the only head.
std::pair<double, double> check_inequalities(const grouped_case<double>& c, const grouping_options& grouping,
                                             double scale, double slope = 0) {
  const auto set = groups_of(c, grouping)[0];
  naive_groupwise naive{c.keys_of(0, 0, c.t), scale, slope};
  const auto of_clustered = outputs_of(c, set, groupwise_form::clustered, scale, slope);
  const auto of_lse = outputs_of(c, set, groupwise_form::improved_lse, scale, slope);
  const auto dim = static_cast<std::size_t>(c.d);
  row mean(dim);
  for (const row& k : naive.keys)
    for (std::size_t d = 0; d < dim; ++d) mean[d] += k[d] / static_cast<double>(c.t);
  double spread = 0;
  for (const row& k : naive.keys) {
    double sum = 0;
    for (std::size_t d = 0; d < dim; ++d) sum += (k[d] - mean[d]) * (k[d] - mean[d]);
    spread = std::max(spread, std::sqrt(sum));
  }
  std::pair<double, double> errors{0, 0};
  for (index_t j = 0; j < set.size(); ++j) {
    const row centre(set.representative(j).begin(), set.representative(j).end());
    const double bound = 2 * std::tanh(std::abs(scale) * set.radius(j) * spread / 2);
    for (const index_t i : set.members(j)) {
      const row q = c.query(0, 0, i);
      naive.position = static_cast<double>(c.t - c.s + i / c.h);
      const weights exact = naive.exact(q);
      for (index_t e = 0; e < c.e; ++e) {
        double out = 0, least = 1e300, most = -1e300;
        for (index_t t = 0; t < c.t; ++t) {
          const double v = c.values()(0, t, 0, e);
          out += exact.of[static_cast<std::size_t>(t)] * v;
          least = std::min(least, v), most = std::max(most, v);
        }
        const auto at = static_cast<std::size_t>(i * c.e + e);
        EXPECT_LE(std::abs(of_clustered[at] - out), bound / 2 * (most - least) + 1e-12);
        EXPECT_LE(std::abs(of_lse[at] - out), bound / 2 * (most - least) + 1e-12);
      }
      const double clustered = l1(naive.shared(q, centre, groupwise_form::clustered, 0).of, exact.of);
      EXPECT_LE(clustered, bound + 1e-12);
      for (const std::size_t k : {1u, 4u, 16u}) {
        const double improved = l1(naive.shared(q, centre, groupwise_form::improved, k).of, exact.of);
        EXPECT_LE(improved, clustered + 1e-12);
        const weights by_lse = naive.shared(q, centre, groupwise_form::improved_lse, k);
        const double with_lse = l1(by_lse.of, exact.of);
        EXPECT_LE(with_lse, bound + 1e-12);
        const std::vector<bool> is_top = naive.top(centre, k);
        const double true_rest = log_sum_exp(naive_groupwise::where(naive.scores(q), is_top, false));
        EXPECT_LE(naive.corrected_rest(q, centre, is_top), true_rest + 1e-12);
        for (index_t e = 0; e < c.e; ++e) {
          double off = 0, least = 1e300, most = -1e300;
          for (index_t t = 0; t < c.t; ++t) {
            const double v = c.values()(0, t, 0, e);
            off += (by_lse.of[static_cast<std::size_t>(t)] - exact.of[static_cast<std::size_t>(t)]) * v;
            least = std::min(least, v), most = std::max(most, v);
          }
          EXPECT_LE(std::abs(off), with_lse / 2 * (most - least) + 1e-12);
        }
        errors.first += improved, errors.second += with_lse;
      }
    }
  }
  return errors;
}
grouping_options random_grouping(rng& random) {
  grouping_options grouping;
  grouping.groups = random.between(1, 12), grouping.seed = random.bits();
  grouping.method = random.chance(0.5) ? grouping_method::kmeans : grouping_method::cover;
  return grouping;
}

TEST(GroupwiseAttention, KeepsTheInequalitiesOfItsDefinition) {
  rng random(99);
  double paper_error = 0, lse_error = 0;  // on data whose keys have an offset
  for (int round = 0; round < 2000 && !::testing::Test::HasFailure(); ++round) {
    const data_kind kind = kinds[round % 5];
    const auto c = make_case<double>({1, 10, random.between(2, 60), 1, 1, 6, 2}, kind, random.bits(), random.uniform());
    const double slope =
        random.chance(0.3) ? std::ldexp(random.chance(0.3) ? -1 : 1, -static_cast<int>(random.between(1, 6))) : 0;
    const auto [paper, lse] = check_inequalities(c, random_grouping(random), random.chance(0.2) ? -0.3 : 0.4, slope);
    if (kind == data_kind::key_offset) paper_error += paper, lse_error += lse;
  }
  EXPECT_LT(lse_error, paper_error);
}

// Blocks of a trained model's queries over all keys before them.
TEST(GroupwiseAttention, KeepsTheInequalitiesOnRealData) {
  GQA_NEED_TEST_DATA();
  rng random(7);
  for (const real_layer& layer : read_real_layers()) {
    const index_t group = layer.q_heads / layer.kv_heads, d = layer.dim;
    for (index_t g = 0; g < layer.kv_heads; ++g) {
      for (const index_t first : {64, 256}) {
        grouped_case<double> c{1, 32, first, group, 1, d, d, {}, {}, {}};
        for (index_t s = first; s < first + 32; ++s) {
          const auto q = layer.q.begin() + (s * layer.q_heads + g * group) * d;
          c.q.insert(c.q.end(), q, q + group * d);
        }
        for (index_t t = 0; t < first; ++t) {
          const auto k = layer.k.begin() + (t * layer.kv_heads + g) * d,
                     v = layer.v.begin() + (t * layer.kv_heads + g) * d;
          c.k.insert(c.k.end(), k, k + d), c.v.insert(c.v.end(), v, v + d);
        }
        check_inequalities(c, random_grouping(random), 1 / std::sqrt(static_cast<double>(d)));
      }
    }
  }
}

// Adding one vector to all keys changes no weight of improved_lse, near keys or not.
TEST(GroupedAttention, OfLogSumExpsDoesNotSeeAnOffsetOfAllKeys) {
  const auto c = make_case<double>({1, 300, 300, 4, 2, 8, 8}, data_kind::planted, 5, 0.3);
  auto moved = c;
  for (std::size_t i = 0; i < moved.k.size(); ++i) moved.k[i] += 1.5 * static_cast<double>(i % 8) - 4;
  grouped_options o;
  o.attention.causal = true, o.block = 64, o.window = 32, o.always_group = true, o.groupwise.top_keys = 8;
  std::vector<double> out(c.q.size()), of_moved(c.q.size());
  context ctx;
  grouped_attention(c.queries(), c.keys(), c.values(), view(out.data(), {1, 300, 4, 8}), o, ctx);
  grouped_attention(moved.queries(), moved.keys(), moved.values(), view(of_moved.data(), {1, 300, 4, 8}), o, ctx);
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], of_moved[i], 1e-11);
}

template <class X>
grouped_options small_blocks(groupwise_form form, bool causal) {
  grouped_options o;
  o.attention.causal = causal;
  o.block = 40, o.window = 25, o.always_group = true;
  o.groupwise = {form, 16};
  return o;
}
template <class X>
result<accumulator_t<X>> run_grouped(const grouped_case<X>& c, const grouped_options& o,
                                     grouped_report* report = nullptr) {
  result<accumulator_t<X>> r;
  context ctx;
  grouped_attention(c.queries(), c.keys(), c.values(), r.state(c.b, c.s, c.h, c.e), o, ctx, report);
  return r;
}
template <class X>
void expect_exact(const grouped_case<X>& c, const grouped_options& o, const std::string& what) {
  const auto expected = run_oracle_on(c.queries(), c.keys(), c.values(), o.attention);
  const auto actual = run_grouped(c, o);
  comparison compared;
  for (std::size_t i = 0; i < actual.out.size(); ++i)
    compared.add(static_cast<double>(actual.out[i]), expected.out[i], 4 * expected.out_bound(i), "out");
  for (std::size_t i = 0; i < actual.lse.size(); ++i)
    compared.add(static_cast<double>(actual.lse[i]), expected.lse[i], 4 * expected.lse_bound(i), "lse");
  EXPECT_TRUE(compared.result()) << what;
}

// Where grouping changes nothing the result is the exact one, within rounding.
TEST(GroupedAttention, IsExactWhereEveryRowIsAGroup) {
  for (const bool causal : {true, false}) {
    for (const groupwise_form form : forms) {
      auto o = small_blocks<float>(form, causal);
      o.grouping.groups = 1000;
      expect_exact(make_case<float>({2, 130, 170, 6, 2, 16, 24}, data_kind::random, 1), o, "float");
      expect_exact(make_case<double>({1, 130, 170, 3, 1, 16, 8}, data_kind::key_offset, 1), o, "double");
    }
  }
}
TEST(GroupedAttention, IsExactWhereTheToleranceIsZero) {
  for (const bool strict : {false, true}) {
    auto o = small_blocks<float>(groupwise_form::improved_lse, true);
    o.tolerance = 0, o.strict_causal = strict;
    expect_exact(make_case<float>({1, 130, 170, 6, 2, 16, 24}, data_kind::planted, 2), o, strict ? "strict" : "");
  }
}
TEST(GroupedAttention, IsExactWhereAllKeysAreTopKeys) {
  for (const bool causal : {true, false}) {
    auto o = small_blocks<float>(groupwise_form::improved_lse, causal);
    o.grouping.groups = 3, o.groupwise.top_keys = std::numeric_limits<index_t>::max();
    expect_exact(make_case<float>({2, 130, 170, 6, 2, 16, 24}, data_kind::planted, 3), o, "lse");
  }
}
TEST(GroupedAttention, IsTheExactKernelToTheBitWhereTheWindowIsWide) {
  for (const bool causal : {true, false}) {
    const auto c = make_case<float>({2, 130, 170, 6, 2, 16, 24}, data_kind::planted, 3);
    auto o = small_blocks<float>(groupwise_form::clustered, causal);
    o.window = 170;
    result<float> exact;
    context ctx;
    attention(c.queries(), c.keys(), c.values(), exact.state(2, 130, 6, 24), o.attention, ctx);
    EXPECT_TRUE(run_grouped(c, o) == exact);
  }
}
TEST(GroupedAttention, IsTheExactKernelToTheBitWhereGroupsDoNotPay) {
  const auto c = make_case<float>({1, 400, 400, 4, 2, 16, 16}, data_kind::random, 3);
  grouped_options o;
  o.attention.causal = true, o.block = 64, o.window = 0, o.grouping.groups = 100;
  grouped_report report;
  result<float> exact;
  context ctx;
  attention(c.queries(), c.keys(), c.values(), exact.state(1, 400, 4, 16), o.attention, ctx);
  EXPECT_TRUE(run_grouped(c, o, &report) == exact);
  ASSERT_EQ(report.blocks.size(), 14u);
  for (const block_report& b : report.blocks) EXPECT_TRUE(b.exact);
}

TEST(GroupedAttention, TakesOptionsOfAttention) {
  const auto c = make_case<float>({2, 130, 170, 6, 2, 16, 24}, data_kind::planted, 6);
  const std::vector<index_t> lengths{150, 170}, offsets{3, 40}, heads{0, 5, 6}, one_owner{0, 6, 6};
  const std::vector<float> sinks{0.5f, -1, 2, 0, -std::numeric_limits<float>::infinity(), 1};
  const std::vector<float> slopes{0.5f, 0.3f, 0.1f, 0, -0.07f, 0.03125f};
  const auto with = [&](const char* what, const auto& change) {
    auto o = small_blocks<float>(groupwise_form::improved, true);
    o.grouping.groups = 1000;
    change(o.attention);
    expect_exact(c, o, what);
  };
  with("lengths", [&](auto& a) { a.kv_lengths = lengths; });
  with("offsets", [&](auto& a) { a.query_offsets = offsets; });
  with("offset", [&](auto& a) { a.query_offset = -30; });
  with("beyond", [&](auto& a) { a.query_offset = 200; });
  with("sinks", [&](auto& a) { a.sinks = sinks; });
  with("softcap", [&](auto& a) { a.softcap = 2; });
  with("scale", [&](auto& a) { a.scale = -0.4; });
  with("unequal groups", [&](auto& a) { a.group_offsets = heads; });
  with("one KV head for all", [&](auto& a) { a.group_offsets = one_owner; });
  for (const bool causal : {true, false}) {
    with("ALiBi", [&](auto& a) { a.alibi_slopes = slopes, a.causal = causal; });
    with("ALiBi and sinks", [&](auto& a) {
      a.alibi_slopes = slopes, a.causal = causal, a.sinks = sinks, a.kv_lengths = lengths, a.query_offsets = offsets;
    });
    with("ALiBi and unequal groups", [&](auto& a) { a.alibi_slopes = slopes, a.group_offsets = heads; });
  }
  auto o = small_blocks<float>(groupwise_form::improved, true);
  o.grouping.groups = 1000;
  const std::vector<index_t> all_heads{0, 6};
  o.attention.alibi_slopes = slopes, o.attention.group_offsets = all_heads;
  expect_exact(make_case<float>({1, 130, 170, 6, 1, 16, 24}, data_kind::planted, 6), o, "ALiBi and one KV head");
}

// Terms of far keys are floats: scores over double keys are off by 2^-24 of the largest of them, weights by twice that.
TEST(GroupedAttention, HoldsTermsOfAlibiInFloats) {
  const auto c = make_case<double>({1, 130, 170, 2, 1, 16, 4}, data_kind::planted, 6);
  const std::vector<float> slopes{0.3f, 0.0123f};
  auto o = small_blocks<double>(groupwise_form::improved_lse, true);
  o.grouping.groups = 1000, o.attention.alibi_slopes = slopes;
  const auto expected = run_oracle_on(c.queries(), c.keys(), c.values(), o.attention);
  const auto actual = run_grouped(c, o);
  const double bound = 2 * 0.3 * 170 * 0x1p-24 * expected.max_value;
  for (std::size_t i = 0; i < actual.out.size(); ++i)
    ASSERT_LE(std::abs(actual.out[i] - expected.out[i]), bound + 1e-12);
}

// Rows of a head under ALiBi differ by a number each, which no weight sees.
TEST(GroupedAttention, SharesUnderAlibi) {
  const std::vector<float> slopes{0.0625f, 0.01f, 0.002f, -0.001f};
  const auto c = make_case<float>({1, 600, 600, 4, 2, 16, 8}, data_kind::planted, 7, 0.01);
  for (const bool strict : {false, true}) {
    auto o = small_blocks<float>(groupwise_form::improved_lse, true);
    o.attention.alibi_slopes = slopes, o.grouping.groups = 6, o.strict_causal = strict;
    grouped_report report;
    const auto actual = run_grouped(c, o, &report);
    const auto expected = run_oracle_on(c.queries(), c.keys(), c.values(), o.attention);
    for (std::size_t i = 0; i < actual.out.size(); ++i)
      ASSERT_NEAR(static_cast<double>(actual.out[i]), expected.out[i], 0.02);
    ASSERT_EQ(report.blocks.size(), 60u);  // 15 blocks of 4 heads
    for (std::size_t i = 0; i < 60; ++i) {
      const block_report& b = report.blocks[i];
      EXPECT_EQ(b.head_begin, static_cast<index_t>(i % 4));
      EXPECT_EQ(b.head_end, b.head_begin + 1);
      EXPECT_EQ(b.kv_head, b.head_begin / 2);
      EXPECT_EQ(b.exact, b.query_begin == 0);
      EXPECT_LE(b.groups + b.alone, 6);  // strict: some of the block before get none
    }
  }
}

// Decode of sequences that share their keys: the rows of all of them are those of one block.
TEST(GroupedAttention, PoolsSequencesThatShareKeys) {
  const index_t sequences = 6;
  const auto c = make_case<double>({1, sequences, 300, 4, 2, 16, 8}, data_kind::planted, 7, 0.05);
  const tensor_view<const double, 4> q(c.q.data(), {sequences, 1, 4, 16});
  const tensor_view<const double, 4> k(c.k.data(), {sequences, 300, 2, 16}, {0, 32, 16, 1});
  const tensor_view<const double, 4> v(c.v.data(), {sequences, 300, 2, 8}, {0, 16, 8, 1});
  std::vector<double> out(static_cast<std::size_t>(sequences * 4 * 8));
  const tensor_view<double, 4> to(out.data(), {sequences, 1, 4, 8});
  grouped_report report;
  context ctx;
  auto o = small_blocks<double>(groupwise_form::improved_lse, true);
  o.pool_batch = true;
  const auto exact = run_oracle_on(q, k, v, o.attention);
  for (const index_t groups : {1000, 6}) {
    o.grouping.groups = groups;
    grouped_attention(q, k, v, to, o, ctx, &report);
    ASSERT_EQ(report.blocks.size(), 2u);
    for (const block_report& b : report.blocks) {
      EXPECT_EQ(b.sequences, sequences);
      EXPECT_EQ(b.groups + b.alone, std::min<index_t>(groups, sequences * 2));
      EXPECT_EQ(b.alone == 12, groups == 1000);
    }
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], exact.out[i], groups == 1000 ? 1e-12 : 0.05) << i;
  }
  // They are what so many heads of one sequence are.
  std::vector<double> regrouped(out.size());
  for (index_t g = 0; g < 2; ++g) {
    std::vector<double> rows;  // of KV head g, [sequences, 2 heads]
    for (index_t b = 0; b < sequences; ++b) rows.insert(rows.end(), &q(b, 0, 2 * g, 0), &q(b, 0, 2 * g, 0) + 32);
    const tensor_view<const double, 4> q_of_g(rows.data(), {1, 1, 2 * sequences, 16});
    const tensor_view<const double, 4> k_of_g(c.k.data() + g * 16, {1, 300, 1, 16}, {0, 32, 16, 1});
    const tensor_view<const double, 4> v_of_g(c.v.data() + g * 8, {1, 300, 1, 8}, {0, 16, 8, 1});
    std::vector<double> of_g(static_cast<std::size_t>(2 * sequences * 8));
    o.pool_batch = false;
    grouped_attention(q_of_g, k_of_g, v_of_g, view(of_g.data(), {1, 1, 2 * sequences, 8}), o, ctx);
    for (index_t b = 0; b < sequences; ++b) {
      for (index_t x = 0; x < 16; ++x)
        ASSERT_NEAR(of_g[static_cast<std::size_t>(b * 16 + x)], to(b, 0, 2 * g + x / 8, x % 8), 1e-12);
    }
  }
}
// Blocks of several queries a sequence, with an exact first block.
TEST(GroupedAttention, PoolsQueriesOfSequencesThatShareKeys) {
  auto c = make_case<float>({3, 130, 170, 4, 2, 16, 24}, data_kind::planted, 3, 0.01);
  for (std::size_t i = 2 * c.q.size() / 3; i < c.q.size(); ++i) c.q[i] = -c.q[i];  // the last has topics of its own
  const tensor_view<const float, 4> k(c.k.data(), {3, 170, 2, 16}, {0, 32, 16, 1});
  const tensor_view<const float, 4> v(c.v.data(), {3, 170, 2, 24}, {0, 48, 24, 1});
  for (const bool strict : {false, true}) {
    auto o = small_blocks<float>(groupwise_form::improved_lse, true);
    o.pool_batch = true, o.strict_causal = strict, o.grouping.groups = 12;
    const std::vector<index_t> lengths(3, 160);
    o.attention.kv_lengths = lengths;
    result<float> actual;
    grouped_report report;
    context ctx;
    grouped_attention(c.queries(), k, v, actual.state(3, 130, 4, 24), o, ctx, &report);
    const auto expected = run_oracle_on(c.queries(), k, v, o.attention);
    EXPECT_TRUE(report.blocks[0].exact);
    EXPECT_EQ(report.blocks.back().groups, 12);
    for (std::size_t i = 0; i < actual.out.size(); ++i)
      ASSERT_NEAR(static_cast<double>(actual.out[i]), expected.out[i], 0.02);
    for (std::size_t i = 0; i < actual.lse.size(); ++i)
      ASSERT_NEAR(static_cast<double>(actual.lse[i]), expected.lse[i], 0.02);
  }
}

TEST(GroupedAttention, KeepsItsTolerance) {
  rng random(8);
  double worst = 0;
  for (int round = 0; round < 20; ++round) {
    const auto c = make_case<double>({1, 160, 160, 2, 1, 8, 1}, kinds[round % 5], random.bits(), 0.05);
    for (const double tolerance : {0.05, 0.3, 1.0}) {
      auto o = small_blocks<double>(groupwise_form::improved_lse, true);
      o.tolerance = tolerance, o.groupwise.top_keys = 4, o.strict_causal = round % 2 == 1;
      // With values that are 1 for some keys and -1 for the others an output is off by the L1 error at most, and by all
      // of it for the right choice; random choices see a part.
      auto signs = c;
      for (double& v : signs.v) v = random.chance(0.5) ? 1 : -1;
      const auto expected = run_oracle_on(signs.queries(), signs.keys(), signs.values(), o.attention);
      const auto actual = run_grouped(signs, o);
      for (std::size_t i = 0; i < actual.out.size(); ++i) {
        ASSERT_LE(std::abs(actual.out[i] - expected.out[i]), tolerance + 1e-12);
        worst = std::max(worst, std::abs(actual.out[i] - expected.out[i]) / tolerance);
      }
    }
  }
  EXPECT_GT(worst, 0.02);  // something was grouped
}

// A changed token changes no row of a block before its own, and with strict_causal no row before it.
TEST(GroupedAttention, DoesNotLookAhead) {
  for (const bool strict : {false, true}) {
    for (const groupwise_form form : forms) {
      for (const index_t groups : {5, 40, 0}) {  // 40: some representatives get one row; 0: by a tolerance
        auto o = small_blocks<float>(form, true);
        o.strict_causal = strict, o.grouping.groups = groups;
        if (groups == 0) o.tolerance = 0.5;
        auto c = make_case<float>({1, 170, 170, 4, 2, 16, 8}, data_kind::planted, 7);
        const auto before = run_grouped(c, o);
        const index_t changed = 130;
        for (index_t i = changed; i < 170; ++i) {
          for (index_t x = 0; x < 4 * 16; ++x) c.q[static_cast<std::size_t>(i * 64 + x)] *= -1.7f;
          for (index_t x = 0; x < 2 * 16; ++x)
            c.k[static_cast<std::size_t>(i * 32 + x)] = std::numeric_limits<float>::quiet_NaN();
          for (index_t x = 0; x < 2 * 8; ++x)
            c.v[static_cast<std::size_t>(i * 16 + x)] = std::numeric_limits<float>::quiet_NaN();
        }
        const auto after = run_grouped(c, o);
        const auto rows = static_cast<std::size_t>(strict ? changed : changed / 40 * 40);
        EXPECT_EQ(std::memcmp(before.out.data(), after.out.data(), rows * 4 * 8 * sizeof(float)), 0)
            << "strict " << strict << ", form " << static_cast<int>(form);
        for (index_t i = changed / 40 * 40 * 32; i < changed * 32; ++i)
          ASSERT_TRUE(std::isfinite(after.out[static_cast<std::size_t>(i)]));
      }
    }
  }
}

TEST(GroupedAttention, NaNStaysInItsRow) {
  auto c = make_case<float>({1, 170, 170, 4, 2, 16, 8}, data_kind::planted, 7);
  c.q[static_cast<std::size_t>((100 * 4 + 1) * 16)] = std::numeric_limits<float>::quiet_NaN();
  for (const groupwise_form form : forms) {
    auto o = small_blocks<float>(form, true);
    o.grouping.groups = 5;
    const auto actual = run_grouped(c, o);
    for (index_t i = 0; i < 170 * 4; ++i)
      ASSERT_EQ(std::isnan(actual.out[static_cast<std::size_t>(i * 8)]), i == 401) << static_cast<int>(form);
  }
}

TEST(GroupedAttention, DoesNotDependOnThreads) {
  const auto c = make_case<float>({2, 300, 300, 6, 3, 16, 16}, data_kind::planted, 9);
  auto o = small_blocks<float>(groupwise_form::improved_lse, true);
  grouped_report serial_report, report;
  const auto serial = run_grouped(c, o, &serial_report);
  for (const int threads : {2, 3}) {
    Eigen::ThreadPool pool(threads);
    context ctx(pool);
    result<float> parallel;
    for (int round = 0; round < 2; ++round)
      grouped_attention(c.queries(), c.keys(), c.values(), parallel.state(2, 300, 6, 16), o, ctx, &report);
    EXPECT_TRUE(parallel == serial);
    EXPECT_EQ(report.blocks, serial_report.blocks);
  }
}

// A tolerance looks at some rows first: of all heads.
TEST(GroupedAttention, RefusesBlocksBySample) {
  const index_t s = 640, h = 4;
  const auto alike = make_case<float>({1, s, s, h, 1, 32, 32}, data_kind::planted, 7, 0.001);
  const auto run_with = [&](const std::vector<index_t>& heads_at_random, bool strict, context& ctx,
                            grouped_report& report) {
    auto c = alike;
    rng random(3);
    for (index_t i = 0; i < s * h; ++i) {
      if (std::find(heads_at_random.begin(), heads_at_random.end(), i % h) == heads_at_random.end()) continue;
      for (index_t d = 0; d < 32; ++d) c.q[static_cast<std::size_t>(i * 32 + d)] = static_cast<float>(random.normal());
    }
    grouped_options o;
    o.attention.causal = true, o.block = 128, o.window = 0, o.tolerance = 0.5, o.groupwise.top_keys = 8;
    o.strict_causal = strict;
    result<float> grouped, exact;
    grouped_attention(c.queries(), c.keys(), c.values(), grouped.state(1, s, h, 32), o, ctx, &report);
    attention(c.queries(), c.keys(), c.values(), exact.state(1, s, h, 32), o.attention, ctx);
    EXPECT_EQ(grouped == exact, report.blocks.back().exact);
    return grouped;
  };
  Eigen::ThreadPool pool(3);
  context ctx, threads(pool);
  grouped_report report, threaded_report;
  for (const bool strict : {false, true}) {
    for (const std::vector<index_t>& heads :
         {std::vector<index_t>{}, std::vector<index_t>{0}, std::vector<index_t>{1, 2, 3}, std::vector<index_t>{3}}) {
      const auto serial = run_with(heads, strict, ctx, report);
      EXPECT_EQ(report.blocks.back().exact, !heads.empty()) << heads.size() << ' ' << strict;
      EXPECT_TRUE(report.blocks.front().exact);
      const auto parallel = run_with(heads, strict, threads, threaded_report);
      EXPECT_TRUE(serial == parallel);
      EXPECT_EQ(report.blocks, threaded_report.blocks);
    }
  }
}

// Under ALiBi some heads' blocks are grouped and others of the same KV head exact.
TEST(GroupedAttention, MixesExactAndGroupedHeads) {
  const std::vector<float> slopes{0.0625f, 0.01f, 0.002f, -0.001f};
  auto c = make_case<float>({1, 1024, 1024, 4, 2, 32, 32}, data_kind::planted, 7, 0.001);
  rng random(3);
  for (index_t i = 0; i < 1024 * 4; ++i) {
    for (index_t d = 0; i % 4 == 1 && d < 32; ++d)
      c.q[static_cast<std::size_t>(i * 32 + d)] = static_cast<float>(random.normal());
  }
  grouped_options o;
  o.attention.causal = true, o.attention.alibi_slopes = slopes;
  o.block = 256, o.window = 0, o.tolerance = 0.5, o.groupwise.top_keys = 4;
  grouped_report report;
  const auto actual = run_grouped(c, o, &report);
  const auto expected = run_oracle_on(c.queries(), c.keys(), c.values(), o.attention);
  for (std::size_t i = 0; i < actual.out.size(); ++i)
    ASSERT_NEAR(static_cast<double>(actual.out[i]), expected.out[i],
                expected.out_bound(i) + (i / 32 % 4 == 1 ? 0 : *o.tolerance * expected.max_value));
  std::vector<bool> exact(4);
  for (const block_report& b : report.blocks) {
    if (b.query_begin == 768) exact[static_cast<std::size_t>(b.head_begin)] = b.exact;
  }
  EXPECT_EQ(exact, (std::vector<bool>{false, true, false, false}));
  kv_cache<float> cache(1, 2, 1024, 32, 32);
  cache.append(c.keys(), c.values());
  result<float> cached;
  Eigen::ThreadPool pool(3);
  context threads(pool);
  grouped_attention(c.queries(), cache, cached.state(1, 1024, 4, 32), o, threads);
  EXPECT_TRUE(cached == actual);
}

TEST(GroupedAttention, OverACacheIsThatOverTensors) {
  const auto c = make_case<float>({2, 130, 170, 6, 2, 16, 24}, data_kind::planted, 3);
  kv_cache<float> cache(2, 2, 200, 16, 24);
  cache.append(c.keys(), c.values());
  for (const groupwise_form form : forms) {
    auto o = small_blocks<float>(form, true);
    result<float> cached;
    context ctx;
    grouped_attention(c.queries(), cache, cached.state(2, 130, 6, 24), o, ctx);
    EXPECT_TRUE(run_grouped(c, o) == cached) << static_cast<int>(form);
  }
}

TEST(GroupedAttention, ReportsWhatItDid) {
  auto c = make_case<float>({1, 160, 160, 4, 2, 16, 8}, data_kind::planted, 7, 0.01);
  auto o = small_blocks<float>(groupwise_form::improved_lse, true);
  o.grouping.groups = 6, o.groupwise.top_keys = 3;
  grouped_report report;
  run_grouped(c, o, &report);
  ASSERT_EQ(report.blocks.size(), 8u);
  for (std::size_t i = 0; i < 8; ++i) {
    const block_report& b = report.blocks[i];
    EXPECT_EQ(b.query_begin, static_cast<index_t>(i / 2) * 40);
    EXPECT_EQ(b.kv_head, static_cast<index_t>(i % 2));
    const index_t far = std::max<index_t>(b.query_begin - 25, 0);
    EXPECT_EQ(b.exact, far == 0);
    // Rows times the keys that they see, of those near ones in the block half.
    EXPECT_EQ(b.exact_cost, static_cast<double>(80 * (b.query_begin + 20) * (16 + 8)));
    if (far == 0) {
      EXPECT_EQ(b.cost, b.exact_cost);
      continue;
    }
    EXPECT_GT(b.cost, b.products);
    EXPECT_EQ(b.groups + b.alone, 6);
    EXPECT_GT(b.retained_mass, 0);
    EXPECT_LT(b.retained_mass, 1);
    EXPECT_GT(b.error_bound, 0);
    EXPECT_LT(b.error_bound, 0.3);
    EXPECT_EQ(b.exact_products, static_cast<double>(80 * far * (16 + 8)));
    // Representatives: top keys, and the rest with values and keys; then rows that share, and representatives, on 3
    // keys.
    EXPECT_EQ(b.products, static_cast<double>(b.groups * far * 16 + (b.groups + b.alone) * far * (16 + 8 + 16) +
                                              (80 - b.alone + b.groups) * 3 * (16 + 8)));
    ASSERT_EQ(static_cast<index_t>(b.shared.size()), b.groups);
    index_t members = 0;
    double mass = 0, bound = 0;
    for (const group_report& g : b.shared) {
      members += g.members;
      mass += static_cast<double>(g.members) * g.retained_mass / static_cast<double>(80 - b.alone);
      bound = std::max(bound, g.error_bound);
    }
    EXPECT_EQ(members, 80 - b.alone);
    EXPECT_NEAR(mass, b.retained_mass, 1e-12);
    EXPECT_EQ(bound, b.error_bound);
    if (b.query_begin == 120) {
      EXPECT_LT(b.products, b.exact_products);
    }
  }
}

// Of a part of a block: rows times the near keys that they see on average, and the far ones.
TEST(GroupedAttention, ForeseesCostsOfPartsOfBlocks) {
  const auto c = make_case<float>({1, 10, 170, 4, 2, 16, 8}, data_kind::planted, 7, 0.01);
  for (const bool strict : {false, true}) {
    auto o = small_blocks<float>(groupwise_form::clustered, true);
    o.strict_causal = strict;
    grouped_report report;
    run_grouped(c, o, &report);  // positions 160 to 169, in the block from 160 on
    ASSERT_EQ(report.blocks.size(), 2u);
    EXPECT_EQ(report.blocks[0].exact_cost, 20 * (135 + (26 + 35) / 2) * 24);
    EXPECT_EQ(report.blocks[0].exact, strict);
  }
}

TEST(GroupedAttention, GroupsByTheBlockBeforeWhereItIsStrict) {
  const auto c = make_case<float>({1, 160, 160, 4, 2, 16, 8}, data_kind::planted, 7, 0.01);
  auto o = small_blocks<float>(groupwise_form::improved_lse, true);
  o.strict_causal = true, o.grouping.groups = 6;
  grouped_report report;
  run_grouped(c, o, &report);
  for (const block_report& b : report.blocks) {
    EXPECT_EQ(b.exact, b.query_begin == 0);
    EXPECT_EQ(b.groups, b.exact ? 0 : 6);
    EXPECT_LT(b.largest_radius, 0.1);
  }
}

// Nor on how many tokens follow: the last block of a shorter call decides as the full one of a longer.
TEST(GroupedAttention, OfStrictCallsDoesNotDependOnTheTokensAfter) {
  const auto longer = make_case<float>({1, 640, 640, 4, 1, 32, 32}, data_kind::planted, 7, 0.01);
  auto shorter = longer;
  shorter.s = shorter.t = 580;  // 4 rows in the last block
  grouped_options o;
  o.attention.causal = true, o.block = 64, o.window = 0, o.grouping.groups = 4, o.groupwise.top_keys = 8;
  o.strict_causal = true;
  grouped_report report;
  const auto expected = run_grouped(longer, o, &report), actual = run_grouped(shorter, o);
  ASSERT_FALSE(report.blocks[9].exact);  // by the model of the cost
  EXPECT_EQ(std::memcmp(actual.out.data(), expected.out.data(), actual.out.size() * sizeof(float)), 0);
}

// A softcap is no softmax: what a vector added to all keys adds to scores, it does not leave out.
TEST(GroupedAttention, BoundsMoreUnderASoftcap) {
  const auto c = make_case<float>({1, 160, 160, 4, 2, 16, 8}, data_kind::key_offset, 7, 0.01);
  auto o = small_blocks<float>(groupwise_form::improved, true);
  o.grouping.groups = 6;
  grouped_report plain, capped;
  run_grouped(c, o, &plain);
  o.attention.softcap = 1e6;
  run_grouped(c, o, &capped);
  for (std::size_t i = 2; i < plain.blocks.size(); ++i)
    EXPECT_GT(capped.blocks[i].error_bound, 1.5 * plain.blocks[i].error_bound);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(GroupedAttention, RefusesWhatGroupsCannotShare) {
  const auto c = make_case<float>({1, 20, 30, 2, 1, 8, 8}, data_kind::random, 1);
  std::vector<float> out(20 * 2 * 8, 7.0f);
  context ctx;
  const auto with = [&](const auto& change) {
    grouped_options o;
    o.attention.causal = true, o.block = 8, o.always_group = true;
    change(o);
    try {
      grouped_attention(c.queries(), c.keys(), c.values(), view(out.data(), {1, 20, 2, 8}), o, ctx);
    } catch (const error& e) {
      for (const float x : out) EXPECT_EQ(x, 7.0f);
      return e.code();
    }
    return errc::ok;
  };
  const bool seen[20 * 30] = {};
  const std::vector<float> bias(20 * 30), slopes(2);
  EXPECT_EQ(with([&](auto& o) { o.attention.mask = tensor_view<const bool, 4>(seen, {1, 1, 20, 30}); }), errc::option);
  EXPECT_EQ(with([&](auto& o) {
              o.attention.bias = tensor_view<const float, 4>(bias.data(), {1, 1, 20, 30});
            }),
            errc::option);
  EXPECT_EQ(with([&](auto& o) {
              o.attention.alibi_slopes = slopes, o.attention.softcap = 3, o.groupwise.form = groupwise_form::improved;
            }),
            errc::option);
  EXPECT_EQ(with([](auto& o) { o.attention.window = {5, -1}; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.attention.softcap = 3; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.block = 0; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.window = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.tolerance = -0.1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.tolerance = 2.1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.groupwise.top_keys = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.strict_causal = true, o.attention.causal = false; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.grouping.groups = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.groupwise.without = {3, 5}; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.attention.scale = std::numeric_limits<double>::infinity(); }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.attention.query_offset = index_t{1} << 60; }), errc::range);
  EXPECT_EQ(with([](auto& o) { o.grouping.method = static_cast<grouping_method>(9); }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.groupwise.form = static_cast<groupwise_form>(9); }), errc::option);
  EXPECT_EQ(with([](auto&) {}), errc::ok);
  EXPECT_EQ(with([](auto& o) {
              o.grouping.iterations = std::numeric_limits<index_t>::max(), o.always_group = false, o.block = 20;
            }),
            errc::ok);
}

TEST(GroupedAttention, RefusesToPoolWhatIsNotShared) {
  const auto c = make_case<float>({2, 20, 30, 2, 1, 8, 8}, data_kind::random, 1);
  std::vector<float> out(2 * 20 * 2 * 8, 7.0f);
  context ctx;
  const tensor_view<const float, 4> k(c.k.data(), {2, 30, 1, 8}, {0, 8, 8, 1}),
      v(c.v.data(), {2, 30, 1, 8}, {0, 8, 8, 1});
  kv_cache<float> cache(2, 1, 30, 8);
  cache.append(c.keys(), c.values());
  const auto code_of = [&](const auto& kv, const auto& change) {
    grouped_options o;
    o.pool_batch = true, o.block = 8, o.always_group = true;
    change(o);
    try {
      grouped_attention(c.queries(), kv, view(out.data(), {2, 20, 2, 8}), o, ctx);
    } catch (const error& e) {
      EXPECT_EQ(std::count(out.begin(), out.end(), 7.0f), static_cast<std::ptrdiff_t>(out.size()));
      return e.code();
    }
    return errc::ok;
  };
  const std::vector<index_t> unequal{20, 21}, equal{20, 20};
  const auto nothing = [](auto&) {};
  EXPECT_EQ(code_of(kv_view(c.keys(), c.values()), nothing), errc::option);
  EXPECT_EQ(code_of(kv_view(k, c.values()), nothing), errc::option);
  EXPECT_EQ(code_of(kv_view(c.keys(), v), nothing), errc::option);
  EXPECT_EQ(code_of(cache, nothing), errc::option);
  EXPECT_EQ(code_of(kv_view(k, v), [&](auto& o) { o.attention.kv_lengths = unequal; }), errc::option);
  EXPECT_EQ(code_of(kv_view(k, v), [&](auto& o) { o.attention.query_offsets = unequal; }), errc::option);
  EXPECT_EQ(code_of(kv_view(k, v), [&](auto& o) { o.attention.kv_lengths = equal; }), errc::ok);
}

TEST(GroupwiseAttention, RefusesGroupsThatDoNotFit) {
  const auto c = make_case<float>({1, 10, 30, 4, 2, 8, 8}, data_kind::random, 1);
  grouping_options grouping;
  grouping.groups = 3;
  const auto good = groups_of(c, grouping);
  const std::vector<float> slopes(4);
  context ctx;
  const auto with = [&](const auto& change) {
    auto sets = good;
    attention_options scores;
    change(sets, scores);
    result<float> out;
    try {
      groupwise_attention(c.queries(), c.keys(), c.values(), std::span<const query_groups<float>>(sets),
                          out.state(1, 10, 4, 8), scores, {}, ctx);
    } catch (const error& e) {
      EXPECT_TRUE(std::isnan(out.out[0]));
      return e.code();
    }
    return errc::ok;
  };
  EXPECT_EQ(with([](auto&, auto&) {}), errc::ok);
  EXPECT_EQ(with([](auto& sets, auto&) { sets.pop_back(); }), errc::shape);
  EXPECT_EQ(with([](auto& sets, auto&) { sets.clear(); }), errc::shape);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[1].order.pop_back(); }), errc::shape);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[1].dim = 7; }), errc::shape);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[1].order[0] = sets[1].order[1]; }), errc::range);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[1].order[0] = 20; }), errc::range);
  EXPECT_EQ(with([](auto& sets, auto&) { std::swap(sets[1].order[0], sets[1].order[1]); }), errc::range);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[0].offsets[1] = 21; }), errc::range);
  EXPECT_EQ(with([](auto& sets, auto&) { sets[0].representatives.pop_back(); }), errc::range);
  EXPECT_EQ(with([](auto&, auto& scores) { scores.causal = true; }), errc::option);
  EXPECT_EQ(with([&](auto&, auto& scores) { scores.alibi_slopes = slopes; }), errc::shape);  // sets of heads then
  EXPECT_EQ(with([&](auto&, auto& scores) { scores.alibi_slopes = slopes, scores.softcap = 2; }), errc::option);
}
#endif

// What works on single elements decodes tiles of 8 bits first: it is that of the floats that are stored.
TEST(GroupedAttention, DecodesEightBits) {
  rng random(11);
  const index_t tokens = 256, heads = 4, kv_heads = 2, dim = 16;
  std::vector<float> q, x;
  for (index_t i = 0; i < tokens * heads * dim; ++i) q.push_back(static_cast<float>(random.normal()));
  for (index_t i = 0; i < tokens * kv_heads * dim; ++i) x.push_back(static_cast<float>(random.normal()));
  kv_cache<q8> cache(1, kv_heads, tokens, dim);
  kv_cache<float> decoded(1, kv_heads, tokens, dim);
  cache.append(view(x.data(), {1, tokens, kv_heads, dim}), view(x.data(), {1, tokens, kv_heads, dim}));
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<float> row;
    for (index_t g = 0; g < kv_heads; ++g) {
      const auto key = cache.key(0, t, g);
      row.insert(row.end(), key.begin(), key.end());
    }
    decoded.append(view(row.data(), {1, 1, kv_heads, dim}), view(row.data(), {1, 1, kv_heads, dim}));
  }
  grouped_options options;
  options.attention.causal = true;
  options.block = 64, options.window = 64, options.grouping.groups = 8, options.always_group = true;
  std::vector<float> actual(q.size()), expected(q.size());
  context ctx;
  const auto rows = [&](std::vector<float>& of) { return view(of.data(), {1, tokens, heads, dim}); };
  grouped_attention(rows(q), cache, rows(actual), options, ctx);
  grouped_attention(rows(q), decoded, rows(expected), options, ctx);
  EXPECT_EQ(actual, expected);
}

// The spread that error bounds rest on: no less than the largest distance of a key that is seen, in double, whatever
// floats round, and hardly more; of the keys that count, and no others.
TEST(GroupedAttention, KnowsTheSpreadOfItsKeys) {
  constexpr index_t keys = 150, dim = 40;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    rng random(seed);
    std::vector<float> k_data(keys * dim), v_data(k_data.size());
    const tensor_view<float, 4> k(k_data.data(), {1, keys, 1, dim}), v(v_data.data(), {1, keys, 1, dim});
    for (float& x : k_data) x = static_cast<float>(1 + random.normal());
    const index_t seen = 140;  // of which those of [20, 50) are near, and do not count
    for (index_t d = 0; d < dim; ++d) k(0, 30, 0, d) = k(0, 145, 0, d) = 100;
    const auto kv = kv_view(k, v);
    const detail::part_of_source<std::remove_cvref_t<decltype(kv)>> head(kv, 0, 0, 1, keys);
    std::vector<double> mean(dim);
    const auto counts = [](index_t t) { return t < 20 || t >= 50; };
    for (index_t t = 0; t < seen; ++t)
      for (index_t d = 0; d < dim && counts(t); ++d)
        mean[static_cast<std::size_t>(d)] += static_cast<double>(k(0, t, 0, d)) / (seen - 30);
    for (const bool from_mean : {false, true}) {
      double largest = 0;
      for (index_t t = 0; t < seen; ++t) {
        double sum = 0;
        for (index_t d = 0; d < dim && counts(t); ++d) {
          // The mean as it is held, in float, which is all that distances are from.
          const auto centre =
              from_mean ? static_cast<double>(static_cast<float>(mean[static_cast<std::size_t>(d)])) : 0;
          sum += std::pow(static_cast<double>(k(0, t, 0, d)) - centre, 2);
        }
        largest = std::max(largest, std::sqrt(sum));
      }
      const double said = detail::spread_of(head, detail::key_interval({20, 50}, false), seen, from_mean).value();
      EXPECT_GE(said, largest * (1 + (from_mean ? -1e-12 : 0))) << seed;
      EXPECT_LE(said, largest * (1 + 2 * (dim + 3) * 0x1p-23)) << seed;
    }
  }
}

TEST(GroupedAttention, HasACheck) {
  expect_check_says_the_same(
      [](const door_operands& c) { return check(c.q, c.k, c.k, c.out, grouped_options{.attention = c.options}); },
      [](door_operands& c, context& ctx) { grouped_attention(c.q, c.k, c.k, c.out, {.attention = c.options}, ctx); });
}

TEST(GroupwiseAttention, HasACheck) {
  const auto groups = door_operands().groups();
  const std::span<const query_groups<float>> sets(groups);
  expect_check_says_the_same(
      [&](const door_operands& c) { return check(c.q, c.k, c.k, sets, c.out, c.options, {}); },
      [&](door_operands& c, context& ctx) { groupwise_attention(c.q, c.k, c.k, sets, c.out, c.options, {}, ctx); });
}

}  // namespace
}  // namespace gqa::test
