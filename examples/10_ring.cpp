// SPDX-License-Identifier: Apache-2.0
// Decode without end in memory that does not grow: the first tokens, which many heads lean on, and a window of the
// newest (StreamingLLM); the first few thousand steps beside a cache that keeps all tokens. Argument: how many tokens.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.hpp"
#include "progress.hpp"

namespace model {
constexpr gqa::index_t q_heads = 4, kv_heads = 2, dim = 32, row = kv_heads * dim, sinks = 4, window = 128;
}  // namespace model

int main(int argc, char** argv) {
  using namespace model;
  const gqa::index_t steps = argc > 1 ? std::max(std::atoll(argv[1]), 1ll) : 20'000, compared = 5'000, texts = 1'009;
  gqa::ring_kv_cache<float> ring(1, kv_heads, sinks, window, dim);
  gqa::kv_cache<float> all(1, kv_heads, compared, dim);
  const gqa::sinks_and_window mask(sinks, window - 1);
  const auto tokens = example::random(texts * row);  // that come again and again
  const auto q = example::random(q_heads * dim);
  std::vector<float> out(q.size()), expected(q.size());
  gqa::context ctx;
  const example::progress progress(stderr);
  const auto start = std::chrono::steady_clock::now();
  for (gqa::index_t step = 0; step < steps; ++step) {
    const auto token = gqa::view(tokens.data() + step % texts * row, {1, 1, kv_heads, dim});
    ring.append(token, token);
    gqa::attention(gqa::view(q.data(), {1, 1, q_heads, dim}), ring, gqa::view(out.data(), {1, 1, q_heads, dim}),
                   {.causal = true}, mask, ctx);
    if (step < compared) {
      all.append(token, token);
      gqa::attention(gqa::view(q.data(), {1, 1, q_heads, dim}), all, gqa::view(expected.data(), {1, 1, q_heads, dim}),
                     {.causal = true}, mask, ctx);
      if (out != expected) return std::printf("DIFFERENT BITS at token %lld\n", static_cast<long long>(step)), 1;
    }
    if (step % 1'000'000 == 999'999) progress.show(std::to_string(step + 1) + " tokens");
  }
  progress.done();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const gqa::key_range gone = ring.gone(0);
  std::printf("%lld tokens, of which [%lld, %lld) are gone; same bits; %.2f us a token\n",
              static_cast<long long>(ring.length(0)), static_cast<long long>(gone.begin),
              static_cast<long long>(gone.end), seconds.count() / static_cast<double>(steps) * 1e6);
  return example::ended(0);
}
