// SPDX-License-Identifier: Apache-2.0
// One table: attention at the geometry of Llama-3-8B (32 query heads of dim 128) with 32, 8 and 1 KV heads, through the
// library, through an Eigen matrix-product loop as a user would write it, and through the naive reference in double.
// All three use the same threads. Exits with 1 if the library's result is not the reference's.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "../bench/support/eigen_attention.hpp"
#include "../bench/support/operands.hpp"
#include "../bench/support/stopwatch.hpp"
#include "printed.hpp"
#include "progress.hpp"

namespace {

constexpr gqa::index_t q_heads = 32, head_dim = 128;

struct workload {
  const char* phase;
  gqa::index_t q_len, kv_len;
};

struct grouping {
  const char* name;
  gqa::index_t kv_heads;
};

// One line of the table.
struct row {
  gqa::layout order;                     // of keys and values in memory
  double gqa = 0, eigen = 0, naive = 0;  // seconds
  double error = 0;
};

std::vector<row> measure(const workload& w, const grouping& of, gqa::context& ctx) {
  using gqa::bench::samples, gqa::bench::seconds_of;
  const gqa::bench::shape n{1, w.q_len, w.kv_len, q_heads, of.kv_heads, head_dim, head_dim};
  gqa::bench::tensor<double> exact({1, w.q_len, q_heads, head_dim}, gqa::layout::bshd);
  std::vector<row> rows;
  double naive_seconds = 0;
  for (const auto order : {gqa::layout::bshd, gqa::layout::bhsd}) {
    gqa::bench::operands<float, float> in(n, order);
    const gqa::tensor_view<const float, 4> q = in.q.view(), k = in.k.view(), v = in.v.view();
    const auto out = in.out.view();
    gqa::bench::tensor<float> product_out({1, w.q_len, q_heads, head_dim}, gqa::layout::bshd);
    if (rows.empty())  // once: it takes longest, and nobody lays out memory for it
      naive_seconds = seconds_of([&] { gqa::bench::naive_attention(q, k, v, exact.view(), {.causal = true}, ctx); });
    samples ours, products;
    double spent = 0;
    for (int repeat = 0; repeat < 5 || (spent < 0.6 && repeat < 200); ++repeat) {  // interleaved
      const double product = seconds_of([&] { gqa::bench::eigen_attention(q, k, v, product_out.view(), ctx); });
      const double own = seconds_of([&] { gqa::attention(q, k, v, out, {.causal = true}, ctx); });
      products.add(product), ours.add(own);
      spent += product + own;
    }
    rows.push_back(
        {order, ours.median(), products.median(), naive_seconds, gqa::bench::largest_difference(out, exact.view())});
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc == 2 && std::strcmp(argv[1], "--quick") == 0;
  if (argc > 1 && !quick) {
    std::printf("usage: gqa_demo [--quick]\n\nTimes attention as MHA, GQA and MQA; --quick takes short lengths.\n");
    return std::strcmp(argv[1], "--help") == 0 ? 0 : 2;
  }
  const std::vector<workload> workloads =
      quick ? std::vector<workload>{{"prefill", 64, 64}, {"decode", 1, 256}}
            : std::vector<workload>{{"prefill", 1024, 1024}, {"decode", 1, 4096}, {"decode", 1, 16384}};
  const std::vector<grouping> groupings = {{"MHA", 32}, {"GQA", 8}, {"MQA", 1}};

  const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Eigen::ThreadPool pool(threads);
  gqa::context ctx(pool);
  std::printf("Causal attention in float, %td query heads of dim %td, batch 1, %d threads\n\n", q_heads, head_dim,
              threads);

  const example::progress tell(stdout);
  std::string table =
      "                                     time (ms)               gqa is faster than\n"
      "phase          heads  K, V     gqa  Eigen loop   naive   Eigen loop   naive  KV MiB  largest error\n";
  double worst = 0;
  for (const workload& w : workloads) {
    for (const grouping& of : groupings) {
      tell.show(std::string(w.phase) + ' ' + std::to_string(w.kv_len) + ' ' + of.name + " ...");
      for (const row& r : measure(w, of, ctx)) {
        char line[160];
        std::snprintf(line, sizeof line, "%-7s %6td  %s  %s %7.2f  %10.2f %7.0f %11.1fx %6.0fx %7.0f %14.1e\n", w.phase,
                      w.kv_len, of.name, r.order == gqa::layout::bshd ? "bshd" : "bhsd", 1e3 * r.gqa, 1e3 * r.eigen,
                      1e3 * r.naive, r.eigen / r.gqa, r.naive / r.gqa,
                      static_cast<double>(2 * w.kv_len * of.kv_heads * head_dim) * sizeof(float) / (1 << 20), r.error);
        table += line;
        worst = std::max(worst, r.error);
      }
    }
  }
  tell.done();
  std::printf("%s\nGroups share keys and values: GQA reads a quarter of MHA's bytes, MQA a thirty-second.\n",
              table.c_str());
  if (worst > 2e-6) {
    std::printf("FAILED: the largest error is %.1e\n", worst);
    return 1;
  }
  return example::ended(0);
}
