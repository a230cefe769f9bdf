// SPDX-License-Identifier: Apache-2.0
// Sparse attention beside the exact kernel: README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <memory_resource>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "../tests/support/rng.hpp"
#include "support/operands.hpp"
#include "support/probes.hpp"
#include "support/run.hpp"
#include "support/stopwatch.hpp"

namespace gqa::bench {
namespace {

struct block_sparse_case {
  std::string name;
  block_sparse_mask mask;
};

// Prefill under a mask of lists. of_dense: the time that the same share of exact attention's visits takes, over its
// own.
template <class T>
void run_block_sparse(benchmark::State& state, const block_sparse_mask& mask, index_t q_heads, index_t kv_heads,
                      index_t dim) {
  const index_t length = mask.shape().kv_len;
  const auto q = random_tensor<T>({1, length, q_heads, dim}, layout::bshd, 1);
  const auto k = random_tensor<T>({1, length, kv_heads, dim}, layout::bshd, 2);
  const auto v = random_tensor<T>({1, length, kv_heads, dim}, layout::bshd, 3);
  kv_cache<T> kv(1, kv_heads, length, dim);
  kv.append(k.view(), v.view());
  tensor<T> out({1, length, q_heads, dim}, layout::bshd);
  const attention_options options{.causal = true};
  const auto all = block_sparse_mask::from_tiles(mask.shape(), [](index_t, key_range, index_t) { return true; });
  const double density = static_cast<double>(mask.listed_tiles()) / static_cast<double>(all.listed_tiles());
  context ctx;
  samples sparse, dense;
  block_sparse_attention(q.view(), kv, out.view(), mask, options, ctx);
  for (auto _ : state) {
    dense.add(seconds_of([&] { attention(q.view(), kv, out.view(), options, ctx); }));
    const double seconds = seconds_of([&] { block_sparse_attention(q.view(), kv, out.view(), mask, options, ctx); });
    sparse.add(seconds);
    state.SetIterationTime(seconds);
  }
  state.counters["seconds"] = sparse.median();
  state.counters["density"] = density;
  state.counters["x_exact"] = dense.median() / sparse.median();
  state.counters["of_dense"] = density * dense.median() / sparse.median();
}

template <class T>
void add_block_sparse(const std::string& type, index_t length, index_t q_heads, index_t kv_heads, index_t dim,
                      int rounds) {
  const auto add = [&](const std::string& pattern, const block_sparse_mask& mask) {
    const std::string name = "block_sparse/" + pattern + "/" + type + "/q" + std::to_string(length) + "h" +
                             std::to_string(q_heads) + "g" + std::to_string(kv_heads) + "d" + std::to_string(dim) +
                             "/t1";
    benchmark::RegisterBenchmark(
        name.c_str(), [=](benchmark::State& state) { run_block_sparse<T>(state, mask, q_heads, kv_heads, dim); })
        ->Iterations(rounds)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  };
  block_sparse_shape shape{.q_len = length, .kv_len = length};
  const auto random = [&](double density) {
    test::rng numbers(7);
    return block_sparse_mask::from_tiles(shape, [&](index_t, key_range, index_t) { return numbers.chance(density); });
  };
  add("random_0.05", random(0.05));
  add("random_0.1", random(0.1));
  add("random_0.25", random(0.25));
  add("random_0.5", random(0.5));
  add("a_shape_64_1024", a_shape(shape, 64, 1023));
  add("strided_256_8", strided(shape, 255, 8));
  add("big_bird", big_bird(shape, {}));
  shape.lists = kv_heads, shape.heads_per_list = q_heads / kv_heads;
  add("random_0.1_of_kv_heads", random(0.1));
  shape.lists = q_heads, shape.heads_per_list = 1;
  add("random_0.1_of_heads", random(0.1));
  shape.query_block = 128;
  add("random_0.1_of_heads_blocks_128", random(0.1));
}

// What page_attention() and its like take beside exact attention: call(out, report, ctx) is one of theirs.
template <class T, class Call>
void measure_pages(benchmark::State& state, const tensor<T>& q, const kv_cache<T>& kv, const attention_options& options,
                   const Call& call) {
  const index_t q_heads = q.view().extent(2), dim = q.view().extent(3);
  tensor<float> out({1, 1, q_heads, dim}, layout::bshd), exact_out({1, 1, q_heads, dim}, layout::bshd);
  const auto heads = static_cast<std::size_t>(q_heads);
  std::vector<float> lse(heads), exact_lse(heads);
  const auto state_of = [&](tensor<float>& to, std::vector<float>& l) {
    return partial_state<float>{to.view(), tensor_view<float, 3>(l.data(), {1, 1, q_heads})};
  };
  context ctx;
  page_report report;
  samples exact, paged;
  for (auto _ : state) {
    exact.add(seconds_of([&] { attention(q.view(), kv, state_of(exact_out, exact_lse), options, ctx); }));
    const double seconds = seconds_of([&] { call(state_of(out, lse), report, ctx); });
    paged.add(seconds);
    state.SetIterationTime(seconds);
  }
  double certified = 0, dropped = 0;
  for (std::size_t row = 0; row < lse.size(); ++row) {
    certified = std::max(certified, report.rows[row].dropped);
    dropped = std::max(dropped, -std::expm1(static_cast<double>(lse[row]) - static_cast<double>(exact_lse[row])));
  }
  state.counters["seconds"] = paged.median();
  state.counters["x_exact"] = exact.median() / paged.median();
  state.counters["of_bytes"] = (report.bytes_read + report.bytes_of_bounds) / report.bytes_exact;
  state.counters["of_pages"] = report.bytes_read / report.bytes_exact;
  state.counters["certified"] = certified;
  state.counters["dropped"] = dropped;
  state.counters["rounds"] = static_cast<double>(report.rounds);
  const difference off =
      compare(tensor_view<const float, 4>(out.view()), tensor_view<const float, 4>(exact_out.view()));
  state.counters["rel_err"] = off.relative;
  // Values are normal numbers, below 6; both kernels round, by less than 2^-7 of them.
  if (!(certified <= page_options{}.epsilon && off.largest <= 2 * 6 * certified + 6 * 0x1p-7))
    state.SkipWithError("off by more than what is certified");
}

struct decode_shape {
  static constexpr index_t q_heads = 32, kv_heads = 8, group = q_heads / kv_heads, dim = 128;
};

// One query a head, those of a KV head alike, so that they want the same pages, or unlike, each with keys of its own;
// keys of normal numbers, of the given sizes in their channels, of which eight a KV head score `gap` nats above the
// rest; with bounds, unless of 0 tokens.
template <class T>
struct decode_operands : decode_shape {
  tensor<T> q{{1, 1, q_heads, dim}, layout::bshd};
  kv_cache<T> kv;

  decode_operands(index_t keys, index_t bound_tokens, double gap, const std::vector<double>& sizes, std::uint64_t seed,
                  bool alike = true)
      : kv(1, kv_heads, keys, dim, dim, std::pmr::get_default_resource()) {
    test::rng random(seed);
    if (bound_tokens > 0) kv.keep_key_bounds(bound_tokens, std::pmr::get_default_resource());
    std::vector<double> about(q_heads * dim);  // [KV heads, group, D]
    for (double& x : about) x = random.normal();
    for (index_t h = 0; h < q_heads && alike; ++h)
      std::copy_n(about.begin() + h / group * group * dim, dim, about.begin() + h * dim);
    for (index_t h = 0; h < q_heads; ++h)
      for (index_t d = 0; d < dim; ++d)
        q.view()(0, 0, h, d) =
            static_cast<T>(static_cast<float>(about[static_cast<std::size_t>(h * dim + d)] + 0.1 * random.normal()));
    constexpr index_t together = 1024;
    tensor<float> k({1, together, kv_heads, dim}, layout::bshd), v({1, together, kv_heads, dim}, layout::bshd);
    for (index_t first = 0; first < keys; first += together) {
      for (std::size_t i = 0; i < k.data().size(); ++i)
        k.data()[i] = static_cast<float>(sizes[i % dim] * random.normal());
      for (auto& x : v.data()) x = static_cast<float>(random.normal());
      const index_t apart = std::max(keys / 8, together);  // from one such key of a KV head to the next
      for (index_t g = 0; g < kv_heads && first % apart == 0; ++g) {
        const index_t head = g * group + first / apart % group;  // whose query it answers
        const double* const direction = about.data() + head * dim;
        double norm = 0;
        for (index_t d = 0; d < dim; ++d) norm += direction[d] * direction[d];
        for (index_t d = 0; d < dim; ++d)
          k.view()(0, 64 * g + 7, g, d) +=
              static_cast<float>(direction[d] * gap * std::sqrt(static_cast<double>(dim)) / norm);
      }
      kv.append(k.view(), v.view());
    }
  }
};

// Decode of one token by page_attention().
template <class T>
void run_pages(benchmark::State& state, const decode_operands<T>& in) {
  page_options options;
  options.attention.causal = true;
  measure_pages(state, in.q, in.kv, options.attention, [&](const auto& out, page_report& report, context& ctx) {
    page_attention(in.q.view(), in.kv, out, options, ctx, &report);
  });
}
// The same by projected_attention().
template <class T>
void run_projected(benchmark::State& state, const decode_operands<T>& in, index_t rank) {
  page_options options;
  options.attention.causal = true;
  const projected_keys<Eigen::bfloat16> few(in.kv, {.rank = rank});
  measure_pages(state, in.q, in.kv, options.attention, [&](const auto& out, page_report& report, context& ctx) {
    projected_attention(in.q.view(), in.kv, few, out, options, ctx, &report);
  });
  state.counters["residual"] = few.residual(0, 0);
}

template <class Run>
void add_decode(const std::string& family, double gap, const std::string& type, index_t keys, const std::string& how,
                int rounds, const Run& run) {
  const std::string name = family + "/gap" + std::to_string(static_cast<int>(gap)) + "/" + type + "/t" +
                           std::to_string(keys) + "h32g8d128/" + how + "/t1";
  benchmark::RegisterBenchmark(name.c_str(), run)->Iterations(rounds)->UseManualTime()->Unit(benchmark::kMillisecond);
}
// Over keys without any order.
template <class T>
void add_pages(const std::string& type, index_t keys, index_t bound_tokens, double gap, int rounds = 21) {
  for (const bool alike : {true, false}) {
    const std::string how = "bounds" + std::to_string(bound_tokens) + (alike ? "" : "/heads_apart");
    add_decode("pages", gap, type, keys, how, rounds, [=](benchmark::State& state) {
      run_pages<T>(state, {keys, bound_tokens, gap, std::vector<double>(decode_shape::dim, 1.0), 11, alike});
    });
  }
}
// Over keys whose n-th channel has a variance of 64 / n^2; rank 0: by page_attention() with bounds of 16.
template <class T>
void add_projected(const std::string& type, index_t keys, index_t rank, double gap, int rounds = 15) {
  std::vector<double> sizes;
  for (index_t n = 1; n <= decode_shape::dim; ++n) sizes.push_back(8.0 / static_cast<double>(n));
  const bool boxes = rank == 0;
  add_decode("projected", gap, type, keys, boxes ? "boxes16" : "rank" + std::to_string(rank), rounds,
             [=](benchmark::State& state) {
               const decode_operands<T> in(keys, boxes ? 16 : 0, gap, sizes, 12);
               boxes ? run_pages(state, in) : run_projected(state, in, rank);
             });
}

// Decode of one token over latent vectors of 512 + 64 (DeepSeek-V2), absorbed. of_limit: the time that reading each
// byte once takes, or the multiply-adds, whichever is longer, over ours.
template <class T>
void run_latent(benchmark::State& state, index_t tokens, index_t heads) {
  constexpr index_t dim = 576, rank = 512;
  const auto q = random_tensor<T>({1, 1, heads, dim}, layout::bshd, 1);
  const auto rows = random_tensor<T>({1, tokens, 1, dim}, layout::bshd, 2);
  latent_kv_cache<T> kv(1, tokens, dim, rank, std::pmr::get_default_resource());
  kv.append(rows.view());
  tensor<float> out({1, 1, heads, rank}, layout::bshd);
  const double bytes = static_cast<double>(tokens * dim) * sizeof(T),
               operations = 2 * static_cast<double>(tokens * heads * (dim + rank));
  context ctx;
  samples ours, of_limit;
  for (auto _ : state) {
    const double peak = product_rate<T, T>(ctx), read = memory().rate(ctx);
    const double seconds = seconds_of([&] { attention(q.view(), kv, out.view(), {.causal = true}, ctx); });
    state.SetIterationTime(seconds);
    ours.add(seconds), of_limit.add(std::max(bytes / read, operations / peak) / seconds);
  }
  state.counters["seconds"] = ours.median();
  state.counters["of_limit"] = of_limit.median();
}
template <class T>
void add_latent(const std::string& type, index_t tokens, index_t heads, int rounds = 15) {
  const std::string name =
      "latent/absorbed/" + type + "/t" + std::to_string(tokens) + "h" + std::to_string(heads) + "d576e512/t1";
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run_latent<T>(state, tokens, heads); })
      ->Iterations(rounds)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

void add_all() {
  add_latent<float>("f32", 1024, 16, 3);
  for (const index_t heads : {16, 32, 128}) add_latent<float>("f32", 32768, heads);
  for (const index_t heads : {16, 32, 128}) add_latent<Eigen::bfloat16>("bf16", 32768, heads);
  add_pages<float>("f32", 4096, 64, 50, 3);
  for (const double gap : {0, 10, 20, 25, 30, 35, 40, 50}) add_pages<float>("f32", 65536, 64, gap);
  for (const double gap : {0, 20, 30, 35, 40, 50}) add_pages<Eigen::bfloat16>("bf16", 65536, 64, gap);
  for (const double gap : {0, 30, 40, 50}) add_pages<float>("f32", 65536, 16, gap);
  for (const double gap : {0, 30, 40, 50}) add_pages<Eigen::bfloat16>("bf16", 65536, 16, gap);
  add_projected<float>("f32", 4096, 16, 15, 3);
  for (const index_t rank : {0, 6, 14, 30}) {
    for (const double gap : {0, 10, 15, 20}) {
      add_projected<float>("f32", 65536, rank, gap);
      add_projected<Eigen::bfloat16>("bf16", 65536, rank, gap);
    }
  }
  add_block_sparse<float>("f32", 1024, 8, 2, 64, 3);
  add_block_sparse<float>("f32", 16384, 8, 2, 128, 3);
  add_block_sparse<Eigen::bfloat16>("bf16", 16384, 8, 2, 128, 3);
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  return gqa::bench::run_in_huge_pages(argc, argv, gqa::bench::add_all);
}
