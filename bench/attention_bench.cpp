// SPDX-License-Identifier: Apache-2.0
// Prefill, append and decode over plain tensors and caches at the geometry of Llama-3-8B and around it, each beside the
// machine's limits and its twins in the same rounds. See README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "support/eigen_attention.hpp"
#ifdef GQA_BENCH_ONEDNN
#include "support/onednn_attention.hpp"
#endif
#include "support/operands.hpp"
#include "support/probes.hpp"
#include "support/run.hpp"
#include "support/stopwatch.hpp"
#include "support/workers.hpp"

namespace gqa::bench {
namespace {

// Plain tensors in either order, or a kv_cache in huge pages or in the system's own.
enum class storage { bshd, bhsd, cache, cache_in_small_pages };

struct attention_case {
  const char* family;
  bench::shape shape;
  storage where = storage::bshd;
  index_t window = -1;  // keys before the query's own that it sees; -1: all
  int threads = 1;

  [[nodiscard]] layout kv_layout() const { return where == storage::bhsd ? layout::bhsd : layout::bshd; }
  [[nodiscard]] attention_options options() const { return {.causal = true, .window = {window, -1}}; }

  [[nodiscard]] std::string name(const char* implementation, const char* dtype) const {
    const auto& n = shape;
    const auto number = [](const char* prefix, index_t value) { return prefix + std::to_string(value); };
    static constexpr const char* storages[] = {"/bshd/", "/bhsd/", "/cache/", "/cache_in_small_pages/"};
    return std::string(family) + '/' + implementation + '/' + dtype + storages[static_cast<int>(where)] +
           number("b", n.batch) + number("q", n.q_len) + number("t", n.kv_len) + number("h", n.q_heads) +
           number("g", n.kv_heads) + number("d", n.head_dim) +
           (n.value_dim == n.head_dim ? "" : number("e", n.value_dim)) +
           (window < 0 ? "/causal" : number("/window", window + 1)) + number("/t", threads);
  }

  // Query-key pairs of the queries from `first` on that are computed.
  [[nodiscard]] double pairs(index_t first = 0) const {
    double total = 0;
    for (index_t s = first; s < shape.q_len; ++s) {
      const index_t visible = shape.kv_len - shape.q_len + s + 1;
      total += static_cast<double>(window < 0 ? visible : std::min(visible, window + 1));
    }
    return total * static_cast<double>(shape.batch * shape.q_heads);
  }
  [[nodiscard]] double operations() const {
    return 2 * pairs() * static_cast<double>(shape.head_dim + shape.value_dim);
  }
  // Elements of keys and values that are read.
  [[nodiscard]] double kv_elements() const {
    const index_t keys = window < 0 ? shape.kv_len : std::min(shape.kv_len, window + shape.q_len);
    return static_cast<double>(shape.batch * keys * shape.kv_heads * (shape.head_dim + shape.value_dim));
  }
  // The same with another number of KV heads.
  [[nodiscard]] attention_case with_kv_heads(index_t kv_heads) const {
    attention_case other = *this;
    other.shape.kv_heads = kv_heads;
    return other;
  }
};

// A case's operands, and the library's call on them.
template <class Q, class K>
class tiled {
 public:
  explicit tiled(const attention_case& c) : of(c), in(c.shape, c.kv_layout()) {
    const auto& n = c.shape;
    if (c.where == storage::bshd || c.where == storage::bhsd) return;
    huge_pages* const memory = c.where == storage::cache ? &pages_ : nullptr;
    cache_.emplace(n.batch, n.kv_heads, n.kv_len, n.head_dim, n.value_dim, memory).append(in.k.view(), in.v.view());
  }

  void operator()(context& ctx) {
    if (cache_) return attention(in.q.view(), *cache_, in.out.view(), of.options(), ctx);
    attention(in.q.view(), in.k.view(), in.v.view(), in.out.view(), of.options(), ctx);
  }

  attention_case of;
  operands<Q, K> in;

 private:
  huge_pages pages_;
  std::optional<kv_cache<K>> cache_;
};

// Something timed in between the rounds of a case, and its counter: how many times the case's time it takes.
struct twin {
  std::string counter;
  std::function<void()> call;
  samples times = {};

  // A few times, and not for more than a second or two: some take a hundred times as long as the case itself.
  [[nodiscard]] bool is_timed_enough() const { return times.size() >= 3 || times.sum() >= 1; }
};

// The twins of a case: the Eigen loop (in float) and, where it is installed, a oneDNN loop in the case's own type,
// which know no window; and multi-head and multi-query attention of the same model. Left out where their operands would
// take a gigabyte.
template <class Q, class K>
std::vector<twin> twins_of(const attention_case& c, context& ctx) {
  std::vector<twin> twins;
  const auto& n = c.shape;
  const double token_bytes = static_cast<double>(n.batch * n.kv_len * (n.head_dim + n.value_dim)) * sizeof(float);
  constexpr double too_many = 1 << 30;
  const auto add_loop = [&]<class T>(const char* counter, const T&, auto loop) {
    if (c.window >= 0 || token_bytes * static_cast<double>(n.kv_heads) >= too_many) return;
    const auto in = std::make_shared<operands<T, T>>(n, c.kv_layout());
    twins.push_back({counter, [=, &ctx] { loop(in->q.view(), in->k.view(), in->v.view(), in->out.view(), ctx); }});
  };
  add_loop("x_eigen", float{}, eigen_attention);
#ifdef GQA_BENCH_ONEDNN
  if constexpr (std::is_same_v<Q, K> && onednn_multiplies<K>) add_loop("x_onednn", K{}, onednn_attention<K>);
#endif
  const auto add = [&](const char* counter, index_t kv_heads) {
    if (n.kv_heads == kv_heads || token_bytes * static_cast<double>(kv_heads) >= too_many) return;
    const auto call = std::make_shared<tiled<Q, K>>(c.with_kv_heads(kv_heads));
    twins.push_back({counter, [call, &ctx] { (*call)(ctx); }});
  };
  add("x_mha", n.q_heads);
  add("x_mqa", 1);
  return twins;
}

// The library in rounds: probes before and after, twins in between, so that shares and ratios are of the same moments.
template <class Q, class K>
void run_tiled(benchmark::State& state, const attention_case& c) {
  const workers w(c.threads);
  tiled<Q, K> call(c);
  std::vector<twin> twins = twins_of<Q, K>(c, *w);
  // Decode of keys that stay in cache is timed there: by the second of two calls, since the read probe empties the
  // cache.
  const bool decodes = c.shape.q_len == 1;
  const bool warm = decodes && c.kv_elements() * sizeof(K) <= 32 << 20;
  const auto time = [&](const auto& f) {
    if (warm) f();
    return seconds_of(f);
  };
  const auto own_call = [&] { call(*w); };
  own_call();

  const double bytes = c.kv_elements() * sizeof(K);
  samples own, peak, read, of_peak, of_read;
  double before = 0;  // what memory gave last; 0 if that was some time ago
  for (auto _ : state) {
    const double operations_rate = product_rate<Q, K>(*w);
    if (decodes && before == 0) before = memory().rate(*w);
    const double seconds = time(own_call);
    own.add(seconds);
    state.SetIterationTime(seconds);
    peak.add(operations_rate);
    of_peak.add(c.operations() / seconds / operations_rate);
    if (decodes) {
      const double after = memory().rate(*w), read_rate = std::max(before, after);
      read.add(read_rate);
      of_read.add(bytes / seconds / read_rate);
      before = after;
    }
    for (twin& t : twins) {
      if (t.is_timed_enough()) continue;
      t.times.add(time(t.call));
      before = 0;
    }
  }

  state.counters["seconds"] = own.median();
  state.counters["peak"] = peak.median();
  state.counters["of_peak"] = of_peak.median();
  if (!read.empty()) state.counters["read"] = read.median();
  if (!read.empty()) state.counters["of_read"] = of_read.median();
  for (const twin& t : twins) state.counters[t.counter] = t.times.median() / own.median();

  // Error and time of the naive reference, over the last rows, which see most keys.
  const index_t rows = std::min<index_t>(c.shape.q_len, c.shape.kv_len > 4096 ? 1 : 8), first = c.shape.q_len - rows;
  const auto& in = std::as_const(call.in);
  tensor<double> exact({c.shape.batch, rows, c.shape.q_heads, c.shape.value_dim}, layout::bshd);
  const double naive = seconds_of([&] {
    naive_attention(slice(in.q.view(), 1, first, rows), in.k.view(), in.v.view(), exact.view(), c.options(), *w);
  });
  state.counters["x_naive"] = naive * c.pairs() / c.pairs(first) / own.median();
  const double error = largest_difference(slice(call.in.out.view(), 1, first, rows), exact.view());
  state.counters["max_abs_err"] = error;
  if (!(error <= allowed_error(call.in))) state.SkipWithError("off by more than the bound of docs/01_numerics.md");
}

// Rounds of a case: enough for a median, and no more than a second or two of them.
[[nodiscard]] int rounds_of(const attention_case& c) {
  const double seconds = std::max(c.operations() / 5e10, c.kv_elements() * 4 / 1e10) / c.threads;
  return static_cast<int>(std::clamp(1 / seconds, 5.0, 21.0));
}

template <class Q, class K>
void add_tiled(const attention_case& c, const char* dtype) {
  benchmark::RegisterBenchmark(c.name("tiled", dtype).c_str(), [c](benchmark::State& s) { run_tiled<Q, K>(s, c); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond)
      ->Iterations(rounds_of(c));
}

void add_f32(const attention_case& c) {
  add_tiled<float, float>(c, "f32");
}
void add_bf16(const attention_case& c) {
  add_tiled<Eigen::bfloat16, Eigen::bfloat16>(c, "bf16");
}
void add_f16(const attention_case& c) {
  add_tiled<Eigen::half, Eigen::half>(c, "f16");
}

void add_probes(int threads) {
  const std::string suffix = "/t" + std::to_string(threads);
  const auto add = [&](const std::string& name, const char* counter, double (*rate)(context&)) {
    const auto run = [threads, counter, rate](benchmark::State& state) {
      const workers w(threads);
      samples rates;
      for (auto _ : state) state.SetIterationTime(seconds_of([&] { rates.add(rate(*w)); }));
      state.counters[counter] = rates.median();
    };
    benchmark::RegisterBenchmark((name + suffix).c_str(), run)->UseManualTime()->Iterations(15);
  };
  add("probe/fma/f32", "flop/s", product_rate<float, float>);
  add("probe/fma/bf16", "flop/s", product_rate<Eigen::bfloat16, Eigen::bfloat16>);
  add("probe/read", "bytes/s", [](context& ctx) { return memory().rate(ctx); });
}

void add_prefills(int t) {
  constexpr index_t h = 32, d = 128;
  using enum storage;
  for (const index_t g : {32, 8, 1}) {  // MHA, GQA, MQA
    for (const index_t n : {256, 1024, 2048}) add_f32({"prefill", {1, n, n, h, g, d, d}, bshd, -1, t});
  }
  add_f32({"prefill", {1, 1024, 1024, h, 8, d, d}, bhsd, -1, t});
  for (const index_t n : {2048, 4096}) {
    add_f32({"prefill", {1, n, n, h, 8, d, d}, cache, -1, t});
    add_bf16({"prefill", {1, n, n, h, 8, d, d}, cache, -1, t});
    add_f16({"prefill", {1, n, n, h, 8, d, d}, cache, -1, t});
  }
  add_bf16({"prefill", {1, 2048, 2048, h, 8, d, d}, bshd, -1, t});
  add_f16({"prefill", {1, 2048, 2048, h, 8, d, d}, bshd, -1, t});
  add_tiled<float, Eigen::bfloat16>({"prefill", {1, 2048, 2048, h, 8, d, d}, cache, -1, t}, "f32_over_bf16");
  for (const index_t group : {1, 2, 3, 5, 7, 8}) add_f32({"group", {1, 1024, 1024, 4 * group, 4, d, d}, cache, -1, t});
  add_f32({"group", {1, 1024, 1024, 32, 1, d, d}, cache, -1, t});
  for (const index_t dim : {64, 80, 96, 256}) add_f32({"dim", {1, 1024, 1024, h, 8, dim, dim}, cache, -1, t});
  add_f32({"dim", {1, 1024, 1024, h, 8, 192, 128}, cache, -1, t});
  add_f32({"window", {1, 8192, 8192, h, 8, d, d}, cache, 1023, t});
  for (const storage where : {cache, bshd}) {
    add_f32({"append", {1, 64, 8192, h, 8, d, d}, where, -1, t});
    add_f32({"append", {1, 5, 8192, h, 8, d, d}, where, -1, t});
  }
  for (const index_t n : {64, 5}) {
    add_bf16({"append", {1, n, 8192, h, 8, d, d}, cache, -1, t});
    add_f16({"append", {1, n, 8192, h, 8, d, d}, cache, -1, t});
  }
  add_f32({"append", {1, 1000, 1031, h, 8, d, d}, cache, -1, t});
}

void add_decodes(int t) {
  constexpr index_t h = 32, d = 128;
  using enum storage;
  for (const index_t g : {32, 8, 1}) {
    for (const index_t n : {128, 512, 1024, 2048, 4096, 8192, 16384, 32768})
      add_f32({"decode", {1, 1, n, h, g, d, d}, cache, -1, t});
  }
  const shape group_1{1, 1, 65536, 8, 8, d, d}, group_4{1, 1, 65536, h, 8, d, d}, group_8{1, 1, 65536, 64, 8, d, d};
  add_f32({"decode", group_1, cache, -1, t});
  for (const shape& n : {group_4, group_8, shape{8, 1, 16384, h, 8, d, d}}) {
    add_f32({"decode", n, cache, -1, t});
    add_bf16({"decode", n, cache, -1, t});
  }
  add_f16({"decode", group_4, cache, -1, t});
  add_f32({"decode", group_4, cache_in_small_pages, -1, t});
  add_bf16({"decode", group_4, cache_in_small_pages, -1, t});
  for (const storage where : {bhsd, bshd}) {
    add_f32({"decode", {1, 1, 32768, h, 8, d, d}, where, -1, t});
    add_bf16({"decode", group_4, where, -1, t});
  }
  for (const index_t n : {4096, 16384, 65536}) add_f32({"window", {1, 1, n, h, 8, d, d}, cache, 1023, t});
}

void add_all() {
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<int> thread_counts{1};
  if (all > 1) thread_counts.push_back(all);
  for (const int threads : thread_counts) {
    add_probes(threads);
    add_prefills(threads);
    add_decodes(threads);
  }
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  return gqa::bench::run_in_huge_pages(argc, argv, gqa::bench::add_all);
}
