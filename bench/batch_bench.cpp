// SPDX-License-Identifier: Apache-2.0
// Ragged batches and pages, beside what the machine allows and beside the same work done otherwise: README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <memory_resource>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "../tests/support/rng.hpp"
#include "support/probes.hpp"
#include "support/run.hpp"
#include "support/stopwatch.hpp"
#include "support/workers.hpp"

namespace gqa::bench {
namespace {

struct heads {
  index_t query, kv, dim;
};

// Some queries of a sequence that has so many keys.
struct part {
  sequence_id sequence;
  index_t queries, keys;
};

// Rows of a batch, and where they belong.
template <class T>
struct rows {
  heads of;
  std::vector<index_t> offsets{0};
  std::vector<sequence_id> sequences;
  std::vector<T> q, out;

  rows(const heads& h, std::span<const part> parts) : of(h) {
    test::rng random(2);
    for (const part& p : parts) {
      sequences.push_back(p.sequence);
      offsets.push_back(offsets.back() + p.queries);
    }
    for (index_t i = 0; i < offsets.back() * of.query * of.dim; ++i)
      q.push_back(static_cast<T>(static_cast<float>(random.uniform() * 2 - 1)));
    out.resize(q.size());
  }
  template <class KV>
  void attend(const KV& kv, context& ctx, bool share_prefixes = true, std::span<const index_t> lengths = {}) {
    const index_t total = offsets.back();
    batch_options options;
    options.common.causal = true, options.common.kv_lengths = lengths;
    options.share_prefixes = share_prefixes;
    batch_attention(tensor_view<const T, 3>(q.data(), {total, of.query, of.dim}), offsets, kv, sequences,
                    tensor_view<T, 3>(out.data(), {total, of.query, of.dim}), options, ctx);
  }
};

// Random tokens to fill caches with.
struct token_rows {
  index_t count;
  heads of;
  std::vector<float> elements;

  token_rows(index_t tokens, const heads& h)
      : count(tokens), of(h), elements(static_cast<std::size_t>(tokens * h.kv * h.dim)) {
    test::rng random(1);
    for (float& x : elements) x = static_cast<float>(random.uniform() * 2 - 1);
  }
  [[nodiscard]] tensor_view<const float, 3> first(index_t tokens) const {
    return {elements.data(), {tokens, of.kv, of.dim}};
  }
  template <class T>
  void append_to(paged_kv_cache<T>& cache, sequence_id id, index_t tokens) const {
    for (index_t done = 0; done < tokens; done += count) {
      const auto some = first(std::min(count, tokens - done));
      cache.append(id, some, some);
    }
  }
  template <class T>
  void append_to(kv_cache<T>& cache, index_t sequence, index_t tokens) const {
    for (index_t done = 0; done < tokens; done += count) {
      const index_t some = std::min(count, tokens - done);
      const tensor_view<const float, 4> x(elements.data(), {1, some, of.kv, of.dim});
      cache.append(sequence, x, x);
    }
  }
};

// What the machine would take at best: to read so many bytes or to do so many operations, whichever takes longer.
struct work {
  double bytes = 0, operations = 0;
  [[nodiscard]] double seconds(double read_rate, double operation_rate) const {
    return std::max(bytes / read_rate, operations / operation_rate);
  }
};
// Of one part whose first `shared` keys somebody else has read.
template <class T>
work work_of(const heads& h, const part& p, index_t shared = 0) {
  const auto queries = static_cast<double>(p.queries), keys = static_cast<double>(p.keys);
  const auto element = static_cast<double>(h.dim);
  return {(keys - static_cast<double>(shared)) * 2 * static_cast<double>(h.kv) * element * sizeof(T),
          queries * (keys - (queries - 1) / 2) * 4 * static_cast<double>(h.query) * element};
}

// Rounds of a call, probes around it, and one twin between; `ideal` are pieces of work that cannot overlap.
template <class T, class Call, class Twin>
void run_rounds(benchmark::State& state, context& ctx, std::span<const work> ideal, const Call& call, const Twin& twin,
                const char* ratio) {
  samples own, other, of_ideal, ratios;
  call(), twin();
  for (auto _ : state) {
    const double peak = product_rate<T, T>(ctx), before = memory().rate(ctx);
    const double seconds = seconds_of(call);
    const double read = std::max(before, memory().rate(ctx)), other_seconds = seconds_of(twin);
    state.SetIterationTime(seconds);
    double least = 0;
    for (const work& w : ideal) least += w.seconds(read, peak);
    own.add(seconds), other.add(other_seconds), of_ideal.add(least / seconds), ratios.add(other_seconds / seconds);
  }
  state.counters["seconds"] = own.median();
  state.counters["of_ideal"] = of_ideal.median();
  state.counters[ratio] = ratios.median();
}

template <class F>
void add(const std::string& name, int rounds, const F& run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(rounds);
}
// A part of a name: what it counts, and how many.
[[nodiscard]] std::string counted(const char* what, index_t n) {
  std::string text(what);
  return text += std::to_string(n);
}
[[nodiscard]] std::string text_of(const heads& h) {
  return counted("h", h.query) + counted("g", h.kv) + counted("d", h.dim);
}

// Forks of one prompt, each with tokens of its own, decode together; and the same without reading the prompt once.
template <class T>
void add_prefix(const char* dtype, const heads& h, index_t n, index_t prefix, index_t own, index_t page, int threads) {
  const std::string name = std::string("prefix/paged/") + dtype + counted("/n", n) + counted("p", prefix) +
                           counted("o", own) + text_of(h) + counted("/page", page) + counted("/t", threads);
  add(name, 9, [=](benchmark::State& state) {
    const workers w(threads);
    const token_rows tokens(1024, h);
    paged_kv_cache<T> cache(1, prefix / page + n * (own / page + 2) + 1, page, h.kv, h.dim, h.dim,
                            std::pmr::get_default_resource());
    std::vector<part> parts{{cache.create(), 1, prefix + own}};
    tokens.append_to(cache, parts[0].sequence, prefix);
    for (index_t i = 1; i < n; ++i) parts.push_back({cache.fork(parts[0].sequence), 1, prefix + own});
    work all;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      tokens.append_to(cache, parts[i].sequence, own);
      const work some = work_of<T>(h, parts[i], i == 0 ? 0 : prefix);
      all.bytes += some.bytes, all.operations += some.operations;
    }
    rows<T> shared(h, parts), apart(h, parts);
    run_rounds<T>(
        state, *w, std::span(&all, 1), [&] { shared.attend(cache.layer(0), *w); },
        [&] { apart.attend(cache.layer(0), *w, false); }, "x_apart");
    state.counters["differ"] =
        static_cast<double>(std::inner_product(shared.out.begin(), shared.out.end(), apart.out.begin(), index_t{0},
                                               std::plus<>{}, [](T x, T y) { return static_cast<index_t>(x != y); }));
  });
}

// Decode of one sequence from pages, and from a kv_cache.
template <class T>
void add_pages(const char* dtype, const heads& h, index_t keys, index_t page, int threads) {
  const std::string name = std::string("pages/paged/") + dtype + counted("/t", keys) + text_of(h) +
                           counted("/page", page) + counted("/t", threads);
  add(name, 21, [=](benchmark::State& state) {
    const workers w(threads);
    const token_rows tokens(1024, h);
    paged_kv_cache<T> paged(1, keys / page + 1, page, h.kv, h.dim, h.dim, std::pmr::get_default_resource());
    kv_cache<T> contiguous(1, h.kv, keys, h.dim, h.dim, std::pmr::get_default_resource());
    const part all{paged.create(), 1, keys};
    tokens.append_to(paged, all.sequence, keys);
    tokens.append_to(contiguous, 0, keys);
    const work ideal = work_of<T>(h, all);
    rows<T> from_pages(h, std::span(&all, 1)), from_cache(h, std::span(&all, 1));
    run_rounds<T>(
        state, *w, std::span(&ideal, 1), [&] { from_pages.attend(paged.layer(0), *w); },
        [&] { from_cache.attend(contiguous, *w); }, "x_contiguous");
  });
}

// A prompt among decode steps, and one call for the prompt and one for the steps.
template <class T>
void add_mixed(const char* dtype, const heads& h, index_t prompt, index_t steps, index_t keys, int threads) {
  const std::string name = std::string("mixed/cache/") + dtype + counted("/q", prompt) + counted("n", steps) +
                           counted("t", keys) + text_of(h) + counted("/t", threads);
  add(name, 9, [=](benchmark::State& state) {
    const workers w(threads);
    const token_rows tokens(1024, h);
    kv_cache<T> cache(steps + 1, h.kv, std::max(prompt, keys), h.dim, h.dim, std::pmr::get_default_resource());
    std::vector<part> parts{{sequence_id{0}, prompt, prompt}};
    for (index_t n = 1; n <= steps; ++n) parts.push_back({static_cast<sequence_id>(n), 1, keys});
    std::vector<work> ideal;
    for (std::size_t n = 0; n < parts.size(); ++n) {
      tokens.append_to(cache, static_cast<index_t>(n), parts[n].keys);
      ideal.push_back(work_of<T>(h, parts[n]));
    }
    rows<T> all(h, parts), first(h, std::span(parts).first(1)), others(h, std::span(parts).subspan(1));
    run_rounds<T>(
        state, *w, ideal, [&] { all.attend(cache, *w); }, [&] { first.attend(cache, *w), others.attend(cache, *w); },
        "x_parts");
  });
}

// A token for each of some sequences, as a share of their decode step.
template <class T>
void add_append(const char* dtype, const heads& h, index_t n, index_t keys, index_t page, int threads) {
  const std::string name = std::string("append/paged/") + dtype + counted("/n", n) + counted("t", keys) + text_of(h) +
                           counted("/page", page) + counted("/t", threads);
  constexpr int rounds = 15;
  add(name, rounds, [=](benchmark::State& state) {
    const workers w(threads);
    const token_rows tokens(1024, h);
    paged_kv_cache<T> cache(1, n * ((keys + rounds) / page + 1), page, h.kv, h.dim, h.dim,
                            std::pmr::get_default_resource());
    std::vector<part> parts;
    for (index_t i = 0; i < n; ++i) {
      parts.push_back({cache.create(), 1, keys});
      tokens.append_to(cache, parts.back().sequence, keys);
    }
    rows<detail::read_element<T>> all(h, parts);
    samples of_step;
    all.attend(cache.layer(0), *w);
    for (auto _ : state) {
      const double append = seconds_of([&] {
        for (const part& p : parts) tokens.append_to(cache, p.sequence, 1);
      });
      state.SetIterationTime(append);
      of_step.add(append / seconds_of([&] { all.attend(cache.layer(0), *w); }));
    }
    state.counters["of_step"] = of_step.median();
  });
}

// Many short sequences of one narrow head; and the same without their keys: what a sequence costs beside its kernels.
void add_short(index_t n, index_t keys, int threads) {
  const heads h{1, 1, 16};
  const std::string name = counted("short/cache/f32/n", n) + counted("t", keys) + text_of(h) + counted("/t", threads);
  add(name, 201, [=](benchmark::State& state) {
    const workers w(threads);
    const token_rows tokens(keys, h);
    kv_cache<float> cache(n, h.kv, keys, h.dim);
    std::vector<part> parts;
    for (index_t i = 0; i < n; ++i) {
      parts.push_back({static_cast<sequence_id>(i), 1, keys});
      tokens.append_to(cache, i, keys);
    }
    rows<float> all(h, parts);
    const std::vector<index_t> none(static_cast<std::size_t>(n), 0);
    samples seconds, without_keys;
    all.attend(cache, *w);
    for (auto _ : state) {
      const double took = seconds_of([&] { all.attend(cache, *w); });
      seconds.add(took);
      state.SetIterationTime(took);
    }
    // Afterwards: in turns each would be planned anew.
    for (int i = 0; i < 201; ++i) without_keys.add(seconds_of([&] { all.attend(cache, *w, true, none); }));
    state.counters["us_a_sequence"] = seconds.median() / static_cast<double>(n) * 1e6;
    state.counters["us_without_keys"] = without_keys.median() / static_cast<double>(n) * 1e6;
  });
}

void add_all() {
  using Eigen::bfloat16;
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const heads gqa{32, 8, 128}, mha{32, 32, 128};
  add_prefix<bfloat16>("bf16", {8, 2, 64}, 4, 256, 16, 64, 1);  // to see that it runs
  for (const int t : all > 1 ? std::vector{1, all} : std::vector{1}) {
    for (const index_t page : {16, 64}) add_prefix<bfloat16>("bf16", gqa, 32, 8192, 128, page, t);
    add_prefix<bfloat16>("bf16", mha, 32, 8192, 128, 64, t);
    add_prefix<float>("f32", gqa, 32, 8192, 128, 64, t);
    for (const index_t n : {2, 8}) add_prefix<bfloat16>("bf16", gqa, n, 8192, 128, 64, t);
    for (const index_t page : {16, 64, 256}) {
      add_pages<float>("f32", gqa, 32768, page, t);
      add_pages<bfloat16>("bf16", gqa, 65536, page, t);
    }
    add_mixed<float>("f32", gqa, 512, 31, 4096, t);
    add_mixed<bfloat16>("bf16", gqa, 512, 31, 4096, t);
    add_append<bfloat16>("bf16", gqa, 32, 4096, 64, t);
    add_append<q8>("q8", gqa, 32, 4096, 64, t);
    add_short(256, 64, t);
  }
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  return gqa::bench::run_in_huge_pages(argc, argv, gqa::bench::add_all);
}
