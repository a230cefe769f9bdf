// SPDX-License-Identifier: Apache-2.0
// Prefill, append and decode over plain tensors and caches at the geometry of Llama-3-8B, with their twins. See
// README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/eigen_attention.hpp"
#include "support/operands.hpp"
#include "support/probes.hpp"
#include "support/stopwatch.hpp"

namespace gqa::bench {
namespace {

struct attention_case {
  const char* family;
  bench::shape shape;
  layout order = layout::bshd;
  index_t window = -1;  // keys before the query's own that it sees; -1: all
  int threads = 1;
  bool cached = false;  // keys and values in a kv_cache

  [[nodiscard]] attention_options options() const { return {.causal = true, .window = {window, -1}}; }

  [[nodiscard]] std::string name(const char* implementation, const char* dtype) const {
    const auto& n = shape;
    const auto number = [](const char* prefix, index_t value) { return prefix + std::to_string(value); };
    return std::string(family) + '/' + implementation + '/' + dtype +
           (cached                  ? "/cache/"
            : order == layout::bshd ? "/bshd/"
                                    : "/bhsd/") +
           number("b", n.batch) + number("q", n.q_len) + number("t", n.kv_len) + number("h", n.q_heads) +
           number("g", n.kv_heads) + number("d", n.head_dim) +
           (window < 0 ? "/causal" : number("/window", window + 1)) + number("/t", threads);
  }

  // Query-key pairs that are computed.
  [[nodiscard]] double pairs() const {
    double total = 0;
    for (index_t s = 0; s < shape.q_len; ++s) {
      const index_t visible = shape.kv_len - shape.q_len + s + 1;
      total += static_cast<double>(window < 0 ? visible : std::min(visible, window + 1));
    }
    return total * static_cast<double>(shape.batch * shape.q_heads);
  }
  [[nodiscard]] double operations() const { return 4 * pairs() * static_cast<double>(shape.head_dim); }
  [[nodiscard]] double kv_elements() const {
    const index_t keys = window < 0 ? shape.kv_len : std::min(shape.kv_len, window + shape.q_len);
    return 2 * static_cast<double>(shape.batch * keys * shape.kv_heads * shape.head_dim);
  }
};

// The calling thread, or a pool.
class workers {
 public:
  explicit workers(int threads) {
    if (threads > 1) pool_ = std::make_unique<Eigen::ThreadPool>(threads);
    context_ = pool_ ? std::make_unique<context>(*pool_) : std::make_unique<context>();
  }
  context& operator*() const { return *context_; }

 private:
  std::unique_ptr<Eigen::ThreadPool> pool_;
  std::unique_ptr<context> context_;
};

read_probe& memory() {
  static read_probe probe;
  return probe;
}

// The library, with probes and the Eigen twin in between, so that their ratios are of the same moments.
template <class Q, class K>
void run_tiled(benchmark::State& state, const attention_case& c) {
  const workers w(c.threads);
  operands<Q, K> in(c.shape, c.order);
  tensor<Q> twin_out({c.shape.batch, c.shape.q_len, c.shape.q_heads, c.shape.head_dim}, layout::bshd);
  const auto& [q, out, k, v] = in;
  std::optional<kv_cache<K>> cache;
  if (c.cached)
    cache.emplace(c.shape.batch, c.shape.kv_heads, c.shape.kv_len, c.shape.head_dim).append(k.view(), v.view());
  const auto call = [&] {
    if (cache) return attention(q.view(), *cache, in.out.view(), c.options(), *w);
    attention(q.view(), k.view(), v.view(), in.out.view(), c.options(), *w);
  };
  const auto twin_call = [&] {
    if constexpr (std::is_same_v<Q, float> && std::is_same_v<K, float>)
      eigen_attention(q.view(), k.view(), v.view(), twin_out.view(), *w);
  };
  const bool has_twin = std::is_same_v<Q, float> && std::is_same_v<K, float> && c.window < 0;
  // Keys that stay in cache are timed there: by the second of two calls, since the read probe empties the cache.
  const bool warm = c.kv_elements() * sizeof(K) <= 32 << 20;
  const auto time = [&](const auto& f) {
    if (warm) f();
    return seconds_of(f);
  };
  call();

  samples own, twin, peak, read;
  for (auto _ : state) {
    own.add(time(call));
    state.SetIterationTime(own.median());  // what the counters use; a single slow run does not show
    if (own.size() > 30) continue;
    peak.add(product_rate<Q, K>(*w));
    if (c.shape.q_len == 1) read.add(memory().rate(*w));
    if (has_twin) twin.add(time(twin_call));
  }

  state.counters["flop/s"] = c.operations() / own.median();
  state.counters["kv_bytes/s"] = c.kv_elements() * sizeof(K) / own.median();
  state.counters["of_peak"] = c.operations() / own.median() / peak.median();
  if (!read.empty()) state.counters["of_read"] = c.kv_elements() * sizeof(K) / own.median() / read.median();
  if (!twin.empty()) state.counters["x_eigen"] = twin.median() / own.median();

  // The error of the last rows, which see most keys.
  const index_t rows = std::min<index_t>(c.shape.q_len, 16), first = c.shape.q_len - rows;
  tensor<double> exact({c.shape.batch, rows, c.shape.q_heads, c.shape.head_dim}, layout::bshd);
  naive_attention(slice(std::as_const(in.q).view(), 1, first, rows), std::as_const(in.k).view(),
                  std::as_const(in.v).view(), exact.view(), c.options(), *w);
  state.counters["max_abs_err"] = largest_difference(slice(in.out.view(), 1, first, rows), exact.view());
}

void run_eigen(benchmark::State& state, const attention_case& c) {
  const workers w(c.threads);
  operands<float, float> in(c.shape, c.order);
  for (auto _ : state) {
    state.SetIterationTime(
        seconds_of([&] { eigen_attention(in.q.view(), in.k.view(), in.v.view(), in.out.view(), *w); }));
  }
}

void run_naive(benchmark::State& state, const attention_case& c) {
  const workers w(c.threads);
  operands<float, float> in(c.shape, c.order);
  for (auto _ : state) {
    state.SetIterationTime(seconds_of([&] {
      naive_attention(std::as_const(in.q).view(), std::as_const(in.k).view(), std::as_const(in.v).view(), in.out.view(),
                      c.options(), *w);
    }));
  }
}

template <class F>
void add(const std::string& name, const F& run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

template <class Q, class K>
void add_tiled(const attention_case& c, const char* dtype) {
  add(c.name("tiled", dtype), [c](benchmark::State& state) { run_tiled<Q, K>(state, c); });
}

void add_probes(int threads) {
  const std::string suffix = "/t" + std::to_string(threads);
  const auto add_peak = [&](const char* dtype, double (*rate)(context&)) {
    add(std::string("probe/fma/") + dtype + suffix, [threads, rate](benchmark::State& state) {
      const workers w(threads);
      samples rates;
      for (auto _ : state) state.SetIterationTime(seconds_of([&] { rates.add(rate(*w)); }));
      state.counters["flop/s"] = rates.median();
    });
  };
  add_peak("f32", product_rate<float, float>);
  add_peak("bf16", product_rate<Eigen::bfloat16, Eigen::bfloat16>);
  add("probe/read" + suffix, [threads](benchmark::State& state) {
    const workers w(threads);
    samples rates;
    for (auto _ : state) state.SetIterationTime(seconds_of([&] { rates.add(memory().rate(*w)); }));
    state.counters["bytes/s"] = rates.median();
  });
}

void add_all() {
  constexpr index_t h = 32, d = 128;
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<int> thread_counts{1};
  if (all > 1) thread_counts.push_back(all);
  for (const int threads : thread_counts) {
    add_probes(threads);
    for (const index_t g : {32, 8, 1}) {  // MHA, GQA, MQA
      for (const auto order : {layout::bshd, layout::bhsd}) {
        std::vector<attention_case> cases;
        for (const index_t n : {256, 1024, 2048}) cases.push_back({"prefill", {1, n, n, h, g, d}, order, -1, threads});
        cases.push_back({"append", {1, 16, 2048, h, g, d}, order, -1, threads});
        for (const index_t n : {512, 4096, 16384}) cases.push_back({"decode", {1, 1, n, h, g, d}, order, -1, threads});
        for (const attention_case& c : cases) {
          add_tiled<float, float>(c, "f32");
          add(c.name("eigen", "f32"), [c](benchmark::State& state) { run_eigen(state, c); });
        }
      }
    }
    for (const attention_case& c : {attention_case{"prefill", {1, 1024, 1024, h, 8, d}, layout::bshd, -1, threads},
                                    attention_case{"prefill", {1, 4096, 4096, h, 8, d}, layout::bshd, 1023, threads},
                                    attention_case{"decode", {1, 1, 4096, h, 8, d}, layout::bhsd, -1, threads},
                                    attention_case{"decode", {16, 1, 1024, h, 8, d}, layout::bhsd, -1, threads}}) {
      if (c.window >= 0 || c.shape.batch > 1) add_tiled<float, float>(c, "f32");
      add_tiled<Eigen::half, Eigen::half>(c, "f16");
      add_tiled<Eigen::bfloat16, Eigen::bfloat16>(c, "bf16");
      add_tiled<float, Eigen::bfloat16>(c, "f32_over_bf16");
    }
    for (attention_case c : {attention_case{"prefill", {1, 2048, 2048, h, 8, d}, layout::bshd, -1, threads},
                             attention_case{"append", {1, 64, 8192, h, 8, d}, layout::bshd, -1, threads},
                             attention_case{"append", {1, 5, 8192, h, 8, d}, layout::bshd, -1, threads},
                             attention_case{"decode", {1, 1, 16384, 8, 8, d}, layout::bshd, -1, threads},
                             attention_case{"decode", {1, 1, 65536, h, 8, d}, layout::bshd, -1, threads}}) {
      c.cached = true;
      add_tiled<float, float>(c, "f32");
      add_tiled<Eigen::half, Eigen::half>(c, "f16");
      add_tiled<Eigen::bfloat16, Eigen::bfloat16>(c, "bf16");
    }
    const attention_case naive_prefill{"prefill", {1, 256, 256, h, h, d}, layout::bshd, -1, threads};
    const attention_case naive_decode{"decode", {1, 1, 4096, h, h, d}, layout::bshd, -1, threads};
    for (const attention_case& c : {naive_prefill, naive_decode})
      add(c.name("naive", "f32"), [c](benchmark::State& state) { run_naive(state, c); });
  }
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  gqa::bench::add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
