// SPDX-License-Identifier: Apache-2.0
// Sparse attention beside the exact kernel: README.md.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "../tests/support/kernels.hpp"
#include "../tests/support/rng.hpp"
#include "support/operands.hpp"
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

void add_all() {
  add_block_sparse<float>("f32", 1024, 8, 2, 64, 3);
  add_block_sparse<float>("f32", 16384, 8, 2, 128, 3);
  add_block_sparse<Eigen::bfloat16>("bf16", 16384, 8, 2, 128, 3);
}

}  // namespace
}  // namespace gqa::bench

int main(int argc, char** argv) {
  return gqa::bench::run_in_huge_pages(argc, argv, gqa::bench::add_all);
}
