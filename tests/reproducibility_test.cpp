// SPDX-License-Identifier: Apache-2.0
// The same bits whoever runs a call: any number of threads, any executor, any batch around a sequence.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

// A user's executor: threads made for the occasion, tasks dealt out one by one.
class thread_executor {
 public:
  explicit thread_executor(int threads) : threads_(threads) {}
  int concurrency() const { return threads_; }
  void run(index_t tasks, const std::function<void(index_t, index_t)>& f) {
    std::atomic<index_t> next{0};
    std::vector<std::thread> threads;
    for (int worker = 0; worker < threads_; ++worker)
      threads.emplace_back([&, worker] {
        for (index_t i = next++; i < tasks; i = next++) f(i, worker);
      });
    for (auto& t : threads) t.join();
  }

 private:
  int threads_;
};

// Calls that are divided in every way there is: row tiles, waves of packed keys, splits, bundles of heads, masks.
std::vector<attention_case> divided_cases() {
  std::vector<attention_case> cases = {
      {{2, 150, 700, 6, 3, 64, 64}, with_causal, layout::bshd},
      {{1, 70, 2100, 4, 1, 40, 72}, with_causal | with_softcap | with_sinks, layout::bhsd},
      {{1, 1, 5000, 8, 2, 64, 64}, with_causal | with_sinks, layout::bhsd},
      {{1, 1, 5000, 8, 8, 64, 64}, with_causal, layout::bshd},
      {{3, 1, 2500, 8, 4, 64, 64}, with_causal | with_lengths, layout::bshd},
      {{1, 5, 3000, 10, 2, 65, 65}, with_window | with_alibi, layout::bshd},
      {{2, 33, 1500, 8, 4, 32, 32}, with_mask | with_bias | with_groups, layout::bhsd},
      {{2, 25, 4200, 32, 8, 128, 128}, with_causal, layout::bshd},  // 69 MiB of packed keys: two waves
  };
  for (std::size_t i = 0; i < cases.size(); ++i) cases[i].seed = i + 1;
  return cases;
}

TEST(Reproducibility, DoesNotDependOnThreadsOrExecutor) {
  for (const attention_case& c : divided_cases()) {
    const operands<float, float> in(c);
    context serial;
    const auto expected = run(in, serial);
    for (const int threads : {1, 2, 3, 8}) {
      Eigen::ThreadPool pool(threads);
      context on_pool(pool);
      EXPECT_TRUE(run(in, on_pool).same_bits(expected)) << threads << " pool threads, " << c.name();
      EXPECT_TRUE(run(in, on_pool).same_bits(expected)) << threads << " pool threads again, " << c.name();
      thread_executor own(threads);
      context on_own(own);
      EXPECT_TRUE(run(in, on_own).same_bits(expected)) << threads << " own threads, " << c.name();
#ifdef _OPENMP
      openmp_executor openmp(threads);
      context on_openmp(openmp);
      EXPECT_TRUE(run(in, on_openmp).same_bits(expected)) << threads << " OpenMP threads, " << c.name();
#endif
    }
  }
}

// 65 MiB of packed keys and values a KV head: one head at a time, and each the same on its own.
TEST(Reproducibility, DoesNotDependOnThreadsOrHeadsWhereAHeadFillsAWave) {
  const operands<float, float> in(attention_case{{1, 49, 66'000, 4, 2, 128, 128}, with_causal, layout::bshd});
  context serial;
  Eigen::ThreadPool pool(2);
  context on_pool(pool);
  const auto expected = run(in, serial);
  EXPECT_TRUE(run(in, on_pool).same_bits(expected));
  for (index_t g = 0; g < 2; ++g) {
    std::vector<float> out(49 * 2 * 128);
    attention(slice(in.q.view(), 2, 2 * g, 2), slice(in.k.view(), 2, g, 1), slice(in.v.view(), 2, g, 1),
              view(out.data(), {1, 49, 2, 128}), in.options, serial);
    for (index_t s = 0; s < 49; ++s) {
      EXPECT_EQ(
          std::memcmp(out.data() + s * 2 * 128, expected.out.data() + (s * 4 + 2 * g) * 128, 2 * 128 * sizeof(float)),
          0)
          << "KV head " << g << ", query " << s;
    }
  }
}

// Each sequence of a batch, attended to on its own.
TEST(Reproducibility, DoesNotDependOnTheBatch) {
  for (attention_case c : divided_cases()) {
    c.shape.b = 3;
    c.options &= ~unsigned{with_bias | with_mask};
    c.options |= with_lengths;
    const operands<float, float> batch(c);
    context ctx;
    const auto expected = run(batch, ctx);
    const auto& n = c.shape;
    for (index_t b = 0; b < n.b; ++b) {
      auto options = batch.options;
      options.kv_lengths = batch.options.kv_lengths.subspan(static_cast<std::size_t>(b), 1);
      const auto sequence = [&](const tensor_view<const float, 4>& x) { return slice(x, 0, b, 1); };
      const auto size = static_cast<std::size_t>(n.s * n.h * n.e);
      std::vector<float> out(size);
      const auto expect_same_bits = [&](const char* how) {
        EXPECT_EQ(
            std::memcmp(out.data(), expected.out.data() + static_cast<std::size_t>(b) * size, size * sizeof(float)), 0)
            << "sequence " << b << " of " << c.name() << ", " << how;
      };
      attention(sequence(batch.q.view()), sequence(batch.k.view()), sequence(batch.v.view()),
                view(out.data(), {1, n.s, n.h, n.e}), options, ctx);
      expect_same_bits("padded");
      const index_t length = options.kv_lengths[0];  // alone there is no padding
      options.kv_lengths = {};
      attention(sequence(batch.q.view()), slice(sequence(batch.k.view()), 1, 0, length),
                slice(sequence(batch.v.view()), 1, 0, length), view(out.data(), {1, n.s, n.h, n.e}), options, ctx);
      expect_same_bits("cut to its length");
    }
  }
}

// Heads whose keys lie together are read together; each KV head's group on its own gives the same bits, whatever the
// masks of the others hold.
TEST(Reproducibility, DoesNotDependOnTheOtherHeads) {
  const auto expect_same_bits = [](index_t s, bool masked) {
    operands<float, float> in(attention_case{{1, s, 900, 8, 4, 64, 64}, with_causal | with_sinks, layout::bshd});
    const std::size_t row = 900;
    const auto mask = std::make_unique<bool[]>(8 * static_cast<std::size_t>(s) * row);
    std::fill_n(mask.get(), 8 * static_cast<std::size_t>(s) * row, true);
    for (const std::size_t hidden : {3 * row * static_cast<std::size_t>(s) + 70, 5 * row * static_cast<std::size_t>(s)})
      mask[hidden] = false;  // one key each of heads 3 and 5
    if (masked) in.options.mask = tensor_view<const bool, 4>(mask.get(), {1, 8, s, 900});
    context ctx;
    const auto expected = run(in, ctx);
    EXPECT_TRUE(matches_oracle(in, ctx));
    for (index_t g = 0; g < 4; ++g) {
      auto options = in.options;
      options.sinks = options.sinks.subspan(static_cast<std::size_t>(2 * g), 2);
      if (masked) options.mask = tensor_view<const bool, 4>(mask.get() + 2 * g * s * 900, {1, 2, s, 900});
      std::vector<float> out(static_cast<std::size_t>(s * 2 * 64));
      attention(slice(in.q.view(), 2, 2 * g, 2), slice(in.k.view(), 2, g, 1), slice(in.v.view(), 2, g, 1),
                view(out.data(), {1, s, 2, 64}), options, ctx);
      for (index_t i = 0; i < s; ++i) {
        EXPECT_EQ(
            std::memcmp(out.data() + i * 2 * 64, expected.out.data() + (i * 8 + 2 * g) * 64, 2 * 64 * sizeof(float)), 0)
            << "KV head " << g << ", query " << i << " of " << s;
      }
    }
  };
  for (const index_t s : {1, 3, 20}) {
    expect_same_bits(s, true);
    expect_same_bits(s, false);
  }
}

// Over packed tiles a query's bits are the same in a prefill, in chunks of it, and on its own. (Six rows of a KV head
// or fewer, of a dim that fills packets, are read in place by another kernel: plain tensors do not promise its bits.)
TEST(Reproducibility, DoesNotDependOnTheQueriesAroundWherePacked) {
  const auto expect_same_bits = [](index_t dim, index_t chunk) {
    const operands<float, float> in(
        attention_case{{1, 1100, 1100, 4, 2, dim, dim}, with_causal | with_sinks, layout::bshd});
    context ctx;
    const auto expected = run(in, ctx);
    for (index_t s = 0; s + chunk <= 1100; s += chunk == 1 ? 37 : 333) {
      auto options = in.options;
      options.query_offset = s;
      const auto q = slice(in.q.view(), 1, s, chunk);
      std::vector<float> out(static_cast<std::size_t>(chunk * 4 * dim));
      attention(q, in.k.view(), in.v.view(), view(out.data(), {1, chunk, 4, dim}), options, ctx);
      EXPECT_EQ(std::memcmp(out.data(), expected.out.data() + s * 4 * dim, out.size() * sizeof(float)), 0)
          << "queries from " << s << ", " << chunk << " of dim " << dim;
    }
  };
  for (const index_t chunk : {1, 3, 50}) expect_same_bits(65, chunk);
  for (const index_t chunk : {4, 50}) expect_same_bits(64, chunk);
}

}  // namespace
}  // namespace gqa::test
