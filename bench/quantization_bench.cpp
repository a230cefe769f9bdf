// SPDX-License-Identifier: Apache-2.0
// Keys and values in 8 bits beside bfloat16, and what narrow types cost in accuracy: README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory_resource>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "../tests/support/real_layers.hpp"
#include "../tests/support/rng.hpp"
#include "support/operands.hpp"
#include "support/probes.hpp"
#include "support/run.hpp"
#include "support/stopwatch.hpp"
#include "support/workers.hpp"

namespace gqa::bench {
namespace {

using Eigen::bfloat16;

template <class F>
benchmark::internal::Benchmark* add(const std::string& name, const F& run) {
  return benchmark::RegisterBenchmark(name.c_str(), run)->Unit(benchmark::kMillisecond);
}
[[nodiscard]] std::string name_of(const char* family, const char* dtype, const shape& n, int threads) {
  const auto counted = [](const char* what, index_t count) { return what + std::to_string(count); };
  std::string name = std::string(family) + "/cache/" + dtype + "/" + counted("q", n.q_len);
  name += counted("t", n.kv_len), name += counted("h", n.q_heads), name += counted("g", n.kv_heads);
  name += counted("d", n.head_dim);
  return name += counted("/t", threads);
}

template <class T>
[[nodiscard]] kv_cache<T> filled(const shape& n, const operands<bfloat16, bfloat16>& from) {
  kv_cache<T> cache(n.batch, n.kv_heads, n.kv_len, n.head_dim, n.value_dim, std::pmr::get_default_resource());
  cache.append(from.k.view(), from.v.view());
  return cache;
}

// Of an element, with its share of a scale.
template <class T>
constexpr double bytes_of = std::is_same_v<T, q8> ? 1 + 2 / 32.0 : sizeof(T);

// One call over T and over bfloat16 in turn, with queries in bfloat16.
template <class T>
void add_turns(const char* family, const char* dtype, const shape& n, int threads, int rounds) {
  add(name_of(family, dtype, n, threads),
      [=](benchmark::State& state) {
        const workers w(threads);
        operands<bfloat16, bfloat16> in(n, layout::bshd);
        const kv_cache<bfloat16> wide = filled<bfloat16>(n, in);
        const kv_cache<T> narrow = filled<T>(n, in);
        const attention_options options{.causal = true};
        const auto over = [&](const auto& cache) { attention(in.q.view(), cache, in.out.view(), options, *w); };
        over(wide), over(narrow);
        const auto rows = static_cast<double>(n.batch * n.kv_len * n.kv_heads);
        const double bytes = rows * (static_cast<double>(n.head_dim) * bytes_of<detail::key_type<T>> +
                                     static_cast<double>(n.value_dim) * bytes_of<detail::value_type<T>>);
        samples own, ratios, of_read;
        for (auto _ : state) {
          const double before = n.q_len == 1 ? memory().rate(*w) : 0;
          const double seconds = seconds_of([&] { over(narrow); });
          const double read = n.q_len == 1 ? std::max(before, memory().rate(*w)) : 0;
          const double of_wide = seconds_of([&] { over(wide); });
          state.SetIterationTime(seconds);
          own.add(seconds), ratios.add(of_wide / seconds);
          if (read > 0) of_read.add(bytes / seconds / read);
        }
        state.counters["seconds"] = own.median();
        state.counters["x_bf16"] = ratios.median();
        if (!of_read.empty()) state.counters["of_read"] = of_read.median();
      })
      ->UseManualTime()
      ->Iterations(rounds);
}

// Rows of one layer: queries [T, H, D], keys and values [T, G, D].
struct activations {
  index_t tokens, heads, kv_heads, dim;
  std::vector<float> q, k, v;
};

[[nodiscard]] std::vector<activations> real_activations() {
  const char* const folder = std::getenv("GQA_TEST_DATA");
  std::vector<activations> all;
  if (folder == nullptr) return all;
  for (const test::real_layer& layer : test::read_real_layers(std::string(folder) + "/models/stories260K_attn512.bin"))
    all.push_back({layer.positions, layer.q_heads, layer.kv_heads, layer.dim, layer.q, layer.k, layer.v});
  return all;
}

// Normal numbers; a channel of keys in `one_in` is `factor` times as large, as in trained models (KIVI, Liu et al.
// 2024).
[[nodiscard]] std::vector<activations> normal_activations(float factor, index_t one_in) {
  test::rng random(7);
  activations a{1024, 8, 2, 128, {}, {}, {}};
  const auto fill = [&](std::vector<float>& x, index_t heads) {
    for (index_t i = 0; i < a.tokens * heads * a.dim; ++i) x.push_back(static_cast<float>(random.normal()));
  };
  fill(a.q, a.heads), fill(a.k, a.kv_heads), fill(a.v, a.kv_heads);
  for (index_t i = 0; i < a.tokens * a.kv_heads * a.dim; i += one_in) a.k[static_cast<std::size_t>(i)] *= factor;
  return {a};
}

// The softmax of a row of scores over the first `count` keys, in double.
[[nodiscard]] std::vector<double> softmax(const std::vector<float>& q, const std::vector<float>& k,
                                          const activations& a, index_t s, index_t h) {
  const index_t g = h / (a.heads / a.kv_heads);
  std::vector<double> p;
  for (index_t t = 0; t <= s; ++t) {
    const float *const x = q.data() + (s * a.heads + h) * a.dim, *const y = k.data() + (t * a.kv_heads + g) * a.dim;
    p.push_back(std::inner_product(x, x + a.dim, y, 0.0) / std::sqrt(static_cast<double>(a.dim)));
  }
  const double top = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& x : p) x = std::exp(x - top), sum += x;
  for (double& x : p) x /= sum;
  return p;
}

// Rows [count, dim] as a cache of T holds them.
template <class T>
[[nodiscard]] std::vector<float> stored(const std::vector<float>& rows, index_t dim) {
  const auto count = static_cast<index_t>(rows.size()) / dim;
  kv_cache<T> cache(1, 1, count, dim);
  const tensor_view<const float, 4> x(rows.data(), {1, count, 1, dim});
  cache.append(x, x);
  std::vector<float> all;
  for (index_t t = 0; t < count; ++t)
    for (const auto element : cache.key(0, t, 0)) all.push_back(static_cast<float>(element));
  return all;
}

// Causal attention of float queries over a cache of T: the norm of what outputs are off by over theirs, and the mean
// divergence of the weights from those of keys as they were.
template <class T>
void add_accuracy(const std::string& data, const char* dtype, const std::vector<activations>& layers,
                  bool float_products = false) {
  if (layers.empty()) return;
  add("accuracy/cache/" + std::string(dtype) + "/" + data, [=](benchmark::State& state) {
    attention_options options{.causal = true};
    if (float_products) options.float_products = true;
    const bool rounds_queries = std::is_same_v<detail::key_type<T>, q8> && detail::has_dot<q8> && !float_products;
    for (auto _ : state) {
      double off = 0, norm = 0, divergence = 0, rows = 0;
      for (const activations& a : layers) {
        kv_cache<T> cache(1, a.kv_heads, a.tokens, a.dim);
        const tensor_view<const float, 4> q(a.q.data(), {1, a.tokens, a.heads, a.dim}),
            k(a.k.data(), {1, a.tokens, a.kv_heads, a.dim}), v(a.v.data(), {1, a.tokens, a.kv_heads, a.dim});
        cache.append(k, v);
        std::vector<float> out(a.q.size());
        std::vector<double> exact(a.q.size());
        attention(q, cache, tensor_view<float, 4>(out.data(), {1, a.tokens, a.heads, a.dim}), options);
        reference::attention(q, k, v, tensor_view<double, 4>(exact.data(), {1, a.tokens, a.heads, a.dim}), options);
        for (std::size_t i = 0; i < out.size(); ++i) {
          const double d = static_cast<double>(out[i]) - exact[i];
          off += d * d, norm += exact[i] * exact[i];
        }
        const std::vector<float> keys = stored<T>(a.k, a.dim);
        const std::vector<float> queries = rounds_queries ? stored<T>(a.q, a.dim) : a.q;
        for (index_t s = 0; s < a.tokens; s += 5) {
          for (index_t h = 0; h < a.heads; ++h, ++rows) {
            const std::vector<double> p = softmax(a.q, a.k, a, s, h), actual = softmax(queries, keys, a, s, h);
            for (std::size_t t = 0; t < p.size(); ++t)
              if (p[t] > 0) divergence += p[t] * std::log(p[t] / actual[t]);
          }
        }
      }
      state.counters["rel_err"] = std::sqrt(off / norm);
      state.counters["kl"] = divergence / rows;
    }
  })->Iterations(1);
}

void add_all() {
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const index_t h = 32, d = 128;
  add_turns<q8>("decode", "q8", {1, 1, 256, 8, 2, 64, 64}, 1, 3);  // to see that it runs
  for (const int t : all > 1 ? std::vector{1, all} : std::vector{1}) {
    for (const index_t heads : {8, 32, 64}) add_turns<q8>("decode", "q8", {1, 1, 65536, heads, 8, d, d}, t, 15);
    add_turns<kv_types<bfloat16, q8>>("decode", "bf16_q8", {1, 1, 65536, h, 8, d, d}, t, 15);
    add_turns<kv_types<q8, bfloat16>>("decode", "q8_bf16", {1, 1, 65536, h, 8, d, d}, t, 15);
    for (const index_t n : {2048, 4096}) add_turns<q8>("prefill", "q8", {1, n, n, h, 8, d, d}, t, 7);
    add_turns<q8>("prefill", "q8", {1, 2048, 2048, h, 8, 64, 64}, t, 7);
    add_turns<q8>("append", "q8", {1, 64, 8192, h, 8, d, d}, t, 9);
  }
  const std::pair<std::string, std::vector<activations>> data[] = {{"stories260k", real_activations()},
                                                                   {"normal", normal_activations(1, 1)},
                                                                   {"outliers", normal_activations(20, 16)}};
  for (const auto& [name, layers] : data) {
    add_accuracy<float>(name, "f32", layers);
    add_accuracy<Eigen::half>(name, "f16", layers);
    add_accuracy<bfloat16>(name, "bf16", layers);
    add_accuracy<kv_types<bfloat16, q8>>(name, "bf16_q8", layers);
    add_accuracy<q8>(name, "q8", layers);
    add_accuracy<q8>(name, "q8_float_products", layers, true);
  }
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  return gqa::bench::run_in_huge_pages(argc, argv, gqa::bench::add_all);
}
