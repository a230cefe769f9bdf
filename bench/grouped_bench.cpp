// SPDX-License-Identifier: Apache-2.0
// Grouped attention beside the exact kernel, and the parts of it: README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <Eigen/Dense>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "../tests/support/rng.hpp"
#include "support/stopwatch.hpp"

namespace gqa::bench {
namespace {

struct shape {
  index_t length, q_heads, kv_heads, dim;
};

// Queries of `topics` directions a KV head, each off by `spread` in every element; keys and values random. No topics:
// queries are random, too, and do not group.
struct document {
  shape of;
  index_t topics;
  std::vector<float> q, k, v;

  document(const shape& s, index_t topic_count, double spread) : of(s), topics(topic_count) {
    test::rng random(1);
    const index_t group = s.q_heads / s.kv_heads;
    std::vector<double> directions(static_cast<std::size_t>(std::max<index_t>(s.kv_heads * topics, 1) * s.dim));
    for (double& x : directions) x = random.normal();
    for (index_t i = 0; i < s.length * s.q_heads; ++i) {
      const index_t topic = topics == 0 ? 0 : i % s.q_heads / group * topics + random.between(0, topics - 1);
      for (index_t d = 0; d < s.dim; ++d) {
        const double about = topics == 0 ? 0 : directions[static_cast<std::size_t>(topic * s.dim + d)];
        q.push_back(static_cast<float>(about + (topics == 0 ? 1 : spread) * random.normal()));
      }
    }
    for (index_t i = 0; i < s.length * s.kv_heads * s.dim; ++i) {
      k.push_back(static_cast<float>(random.normal()));
      v.push_back(static_cast<float>(random.normal()));
    }
  }
  auto queries() const { return view(q.data(), {1, of.length, of.q_heads, of.dim}); }
  auto keys() const { return view(k.data(), {1, of.length, of.kv_heads, of.dim}); }
  auto values() const { return view(v.data(), {1, of.length, of.kv_heads, of.dim}); }
  auto outputs(std::vector<float>& out) const {
    out.resize(q.size());
    return view(out.data(), {1, of.length, of.q_heads, of.dim});
  }
};

// One document at a time, with the exact kernel's outputs over it.
struct exact_document {
  document in;
  std::vector<float> out;
};
const exact_document& document_of(const shape& s, index_t topics, double spread) {
  static std::optional<exact_document> kept;
  static std::string name;
  const std::string wanted = std::to_string(s.length) + " " + std::to_string(topics) + " " + std::to_string(spread);
  if (name == wanted) return *kept;
  name = wanted;
  kept.emplace(exact_document{document(s, topics, spread), {}});
  context ctx;
  attention(kept->in.queries(), kept->in.keys(), kept->in.values(), kept->in.outputs(kept->out), {.causal = true}, ctx);
  return *kept;
}

struct grouped_case {
  std::string name;
  shape of;
  index_t topics;
  double spread;
  grouped_options options;
};

// Time of grouping the rows of all of a call's blocks, as the call groups them.
double grouping_seconds(const document& in, const grouped_options& o, const grouped_report& report) {
  const index_t group = in.of.q_heads / in.of.kv_heads;
  grouping_options grouping = o.grouping;
  context ctx;
  query_groups<float> groups;
  double seconds = 0;
  for (const block_report& b : report.blocks) {
    if (b.exact) continue;
    const index_t rows = (b.query_end - b.query_begin) * group;
    if (o.tolerance) {
      grouping.method = grouping_method::cover;
      grouping.groups = b.groups;
    } else if (grouping.groups == 0) {
      grouping.groups = rows / 32;
    }
    const tensor_view<const float, 4> heads(&in.queries()(0, b.query_begin, b.kv_head * group, 0),
                                            {1, b.query_end - b.query_begin, group, in.of.dim},
                                            {0, in.of.q_heads * in.of.dim, in.of.dim, 1});
    seconds += seconds_of([&] { group_queries(heads, grouping, groups, ctx); });
  }
  return seconds;
}

void run_grouped(benchmark::State& state, const grouped_case& c) {
  const exact_document& document = document_of(c.of, c.topics, c.spread);
  const auto& in = document.in;
  std::vector<float> out, again;
  samples exact, grouped;
  context ctx;
  for (auto _ : state) {
    const double seconds =
        seconds_of([&] { grouped_attention(in.queries(), in.keys(), in.values(), in.outputs(out), c.options, ctx); });
    grouped.add(seconds);
    state.SetIterationTime(seconds);
    exact.add(seconds_of(
        [&] { attention(in.queries(), in.keys(), in.values(), in.outputs(again), c.options.attention, ctx); }));
  }
  const double exact_median = exact.median(), median = grouped.median();
  grouped_report report;
  grouped_attention(in.queries(), in.keys(), in.values(), in.outputs(out), c.options, ctx, &report);
  double products = 0, exact_products = 0, groups = 0, blocks = 0;
  double cost = 0, exact_cost = 0;
  for (const block_report& b : report.blocks) {
    products += b.products, exact_products += b.exact_products;
    cost += b.cost, exact_cost += b.exact_cost;
    groups += static_cast<double>(b.groups), blocks += b.exact ? 0 : 1;
  }
  state.counters["seconds"] = median;
  state.counters["x_exact"] = exact_median / median;
  state.counters["x_foreseen"] = exact_cost / cost;
  const difference off = compare(tensor_view<const float, 4>(in.outputs(out)),
                                 view(document.out.data(), {1, in.of.length, in.of.q_heads, in.of.dim}));
  state.counters["rel_err"] = off.relative;
  // Weights that are off by so much in all, of values up to the largest, and what floats round.
  double bound = 0, largest = 0;
  for (const block_report& b : report.blocks) bound = std::max(bound, b.error_bound);
  for (const float x : in.v) largest = std::max(largest, std::abs(static_cast<double>(x)));
  if (!(off.largest <= (bound + 0x1p-14) * largest)) state.SkipWithError("off by more than the bound that it reports");
  if (blocks == 0) return;
  state.counters["groups"] = groups / blocks;
  state.counters["of_products"] = products / exact_products;
  const double grouping = grouping_seconds(in, c.options, report);
  state.counters["of_saved"] = exact_median > median ? grouping / (exact_median - median) : 0;
}

// One new token of many sequences that share their keys, by groups of all their rows, beside the exact kernel.
void run_pooled_decode(benchmark::State& state, index_t sequences, const shape& of, index_t topics) {
  const document in({of.length, of.q_heads, of.kv_heads, of.dim}, topics, 0.04);
  const tensor_view<const float, 4> q(in.q.data(), {sequences, 1, of.q_heads, of.dim});
  const tensor_view<const float, 4> k(in.k.data(), {sequences, of.length, of.kv_heads, of.dim},
                                      {0, of.kv_heads * of.dim, of.dim, 1});
  const tensor_view<const float, 4> v(in.v.data(), {sequences, of.length, of.kv_heads, of.dim},
                                      {0, of.kv_heads * of.dim, of.dim, 1});
  std::vector<float> out(static_cast<std::size_t>(q.size())), exact_out(out.size());
  const auto to = view(out.data(), {sequences, 1, of.q_heads, of.dim});
  const auto exact_to = view(exact_out.data(), {sequences, 1, of.q_heads, of.dim});
  grouped_options o;
  o.attention.causal = true;
  o.block = 512, o.window = 256, o.grouping.groups = topics, o.pool_batch = true;
  samples exact, grouped;
  context ctx;
  for (auto _ : state) {
    const double seconds = seconds_of([&] { grouped_attention(q, k, v, to, o, ctx); });
    grouped.add(seconds);
    state.SetIterationTime(seconds);
    exact.add(seconds_of([&] { attention(q, k, v, exact_to, o.attention, ctx); }));
  }
  grouped_report report;
  grouped_attention(q, k, v, to, o, ctx, &report);
  state.counters["seconds"] = grouped.median();
  state.counters["x_exact"] = exact.median() / grouped.median();
  state.counters["rel_err"] = compare(tensor_view<const float, 4>(to), tensor_view<const float, 4>(exact_to)).relative;
  state.counters["groups"] = static_cast<double>(report.blocks[0].groups);
}

// Local attention by a mask: time a token, which should not depend on how many there are.
template <class Mask>
void run_local(benchmark::State& state, const shape& of, const Mask& mask) {
  const document in(of, 0, 1);
  std::vector<float> out;
  samples local;
  context ctx;
  for (auto _ : state) {
    const double seconds = seconds_of(
        [&] { attention(in.queries(), in.keys(), in.values(), in.outputs(out), {.causal = true}, mask, ctx); });
    local.add(seconds);
    state.SetIterationTime(seconds);
  }
  state.counters["seconds"] = local.median();
  state.counters["us_a_token"] = 1e6 * local.median() / static_cast<double>(of.length);
}

// Nearest centres of rows beside the same products by Eigen, without their comparison.
void run_nearest(benchmark::State& state, index_t rows, index_t centres, index_t dim) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix x = matrix::Random(rows, dim), c = matrix::Random(centres, dim);
  matrix products(rows, centres);
  std::vector<float> memory(static_cast<std::size_t>(detail::packed_centres<float>::elements(centres, dim)));
  std::vector<index_t> nearest(static_cast<std::size_t>(rows));
  samples ours, eigens;
  for (auto _ : state) {
    const double seconds = seconds_of([&] {
      const detail::packed_centres<float> packed({c.data(), centres, dim, dim}, memory.data());
      packed.find_nearest({x.data(), rows, dim, dim}, 0, rows, nearest.data());
    });
    ours.add(seconds);
    state.SetIterationTime(seconds);
    eigens.add(seconds_of([&] { products.noalias() = x * c.transpose(); }));
    benchmark::DoNotOptimize(products.data());
  }
  state.counters["seconds"] = ours.median();
  state.counters["x_eigen"] = eigens.median() / ours.median();
}

void add_grouped(const grouped_case& c, int rounds) {
  benchmark::RegisterBenchmark(c.name.c_str(), [c](benchmark::State& state) { run_grouped(state, c); })
      ->Iterations(rounds)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

void add_all() {
  const shape small{1024, 8, 2, 64}, large{16384, 32, 8, 128};
  grouped_options o;
  o.attention.causal = true;
  o.block = 128, o.window = 64, o.always_group = true, o.groupwise.top_keys = 16;
  add_grouped({"grouped/kmeans_improved_lse/f32/q1024h8g2d64/t1", small, 24, 0.05, o}, 3);

  o = {};
  o.attention.causal = true, o.block = 512, o.window = 256, o.grouping.groups = 64;
  const auto add = [&](const std::string& name, index_t topics, const grouped_options& options, double spread = 0.04) {
    add_grouped({"grouped/" + name + "/f32/q16384h32g8d128/t1", large, topics, spread, options}, 1);
  };
  add("kmeans_improved_lse", 64, o);
  o.groupwise.form = groupwise_form::improved;
  add("kmeans_improved", 64, o);
  o.groupwise.form = groupwise_form::clustered;
  add("kmeans_clustered", 64, o);
  o.groupwise.form = groupwise_form::improved_lse;
  for (const auto& [name, method] : {std::pair{"hashed", grouping_method::hashed},
                                     {"balanced", grouping_method::balanced},
                                     {"cover", grouping_method::cover},
                                     {"random", grouping_method::random}}) {
    o.grouping.method = method;
    add(std::string(name) + "_improved_lse", 64, o);
  }
  o.grouping = {};
  o.tolerance = 1.0;
  add("tolerance_improved_lse", 64, o);
  add("refused", 0, o);
  o.tolerance.reset();
  o.grouping.groups = 64;
  add("kmeans_improved_lse_spread_0.1", 64, o, 0.1);

  benchmark::RegisterBenchmark("grouped/pooled_decode/f32/b64q1t16384h32g8d128/t1",
                               [=](benchmark::State& state) { run_pooled_decode(state, 64, large, 64); })
      ->Iterations(5)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);

  const auto add_local = [&](const std::string& mask_name, index_t length, const auto& mask) {
    const std::string name = "local/" + mask_name + "/f32/q" + std::to_string(length) + "h32g8d128/t1";
    const shape of{length, 32, 8, 128};
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run_local(state, of, mask); })
        ->Iterations(5)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  };
  for (const index_t length : {2048, 4096, 8192, 16384}) {
    add_local("sliding_window_1024", length, sliding_window(1023, 0));
    add_local("block_local_512_2", length, block_local(512, 1, 0));
  }

  for (const auto& [rows, centres, dim] :
       {std::array<index_t, 3>{2048, 64, 128}, {2048, 128, 128}, {1024, 32, 128}, {2048, 64, 64}, {4096, 256, 128}}) {
    const std::string name =
        "clustering/nearest/f32/n" + std::to_string(rows) + "c" + std::to_string(centres) + "d" + std::to_string(dim);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run_nearest(state, rows, centres, dim); })
        ->Iterations(51)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  gqa::bench::add_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
