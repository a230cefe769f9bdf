// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

#ifndef GQA_NO_EXCEPTIONS
TEST(Context, ScratchThatCannotBeHadIsAnError) {
  context ctx;
  try {
    ctx.reserve(std::size_t{1} << 62);
    FAIL();
  } catch (const error& e) {
    EXPECT_EQ(e.code(), errc::capacity);
  }
}
#endif

// Every worker of the pool is inside a call on that same pool.
TEST(Context, CallsFromAllWorkersOfThePoolReturn) {
  constexpr int threads = 3;
  Eigen::ThreadPool pool(threads);
  operands<float, float> in(attention_case{{1, 120, 300, 4, 2, 32, 32}, with_causal, layout::bshd});
  context serial;
  const auto expected = run(in, serial);
  std::latch all_inside(threads), all_done(threads);
  std::atomic<int> equal{0};
  for (int i = 0; i < threads; ++i) {
    pool.Schedule([&] {
      all_inside.arrive_and_wait();
      context ctx(pool);
      for (int repeat = 0; repeat < 5; ++repeat) equal += run(in, ctx).same_bits(expected);
      all_done.count_down();
    });
  }
  all_done.wait();
  EXPECT_EQ(equal, threads * 5);
}

TEST(Context, TakesAConstExecutor) {
  const openmp_executor executor(2);
  context ctx(executor);
  std::atomic<int> runs{0};
  ctx.for_each(10, [&](index_t, index_t) { ++runs; });
  EXPECT_EQ(runs, 10);
}

TEST(Context, MayDieBeforeItsLateHelpers) {
  Eigen::ThreadPool pool(2);
  operands<float, float> in(attention_case{{1, 300, 300, 4, 2, 32, 32}, with_causal, layout::bshd});
  for (int i = 0; i < 50; ++i) {
    context ctx(pool);
    run(in, ctx);
  }
}

TEST(Context, ManyCallersWithTheirOwnContexts) {
  Eigen::ThreadPool pool(2);
  operands<float, float> in(attention_case{{1, 64, 256, 4, 2, 32, 32}, with_causal, layout::bshd});
  context serial;
  const auto expected = run(in, serial);
  std::atomic<int> equal{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      context ctx(pool);
      for (int repeat = 0; repeat < 5; ++repeat) equal += run(in, ctx).same_bits(expected);
    });
  for (auto& t : callers) t.join();
  EXPECT_EQ(equal, 20);
}

TEST(Context, RunsEveryTaskOnceWithDistinctWorkers) {
  Eigen::ThreadPool pool(4);
  context ctx(pool);
  ASSERT_EQ(ctx.concurrency(), 4);
  for (const index_t tasks : {0, 1, 2, 3, 100}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
    std::vector<std::atomic<bool>> busy(4);
    std::atomic<bool> clash{false};
    ctx.for_each(tasks, [&](index_t task, index_t worker) {
      if (busy[static_cast<std::size_t>(worker)].exchange(true)) clash = true;
      ++runs[static_cast<std::size_t>(task)];
      busy[static_cast<std::size_t>(worker)] = false;
    });
    for (const auto& n : runs) EXPECT_EQ(n, 1);
    EXPECT_FALSE(clash);
  }
}

// The last tasks of the helpers take longer than those of the caller.
TEST(Context, ReturnsWhenAllTasksHaveRun) {
  Eigen::ThreadPool pool(3);
  context ctx(pool);
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::atomic<int> done{0};
    ctx.for_each(6, [&](index_t, index_t worker) {
      std::this_thread::sleep_for(std::chrono::milliseconds(worker == 0 ? 1 : 4));
      ++done;
    });
    EXPECT_EQ(done, 6);
  }
}

#ifndef GQA_NO_EXCEPTIONS
TEST(Context, PassesOnTheExceptionOfATask) {
  Eigen::ThreadPool pool(3);
  context ctx(pool);
  std::atomic<int> others{0};
  EXPECT_THROW(ctx.for_each(20,
                            [&](index_t task, index_t) {
                              if (task == 7) throw std::logic_error("7");
                              ++others;
                            }),
               std::logic_error);
  EXPECT_EQ(others, 19);
}
#endif

// Sizes that cannot be are refused, and what was there before stays and serves.
TEST(Context, RefusesToReserveWhatCannotBe) {
  context ctx;
  ctx.reserve(1 << 16, 4);
  const std::size_t before = ctx.scratch_bytes();
  EXPECT_GE(before, std::size_t{1} << 16);
  for (const index_t sequences :
       {index_t{-1}, index_t{1} << 61, std::numeric_limits<index_t>::max(), std::numeric_limits<index_t>::min()})
    EXPECT_EQ(code_of([&] { ctx.reserve(0, sequences); }), errc::shape) << sequences;
  for (const std::size_t bytes : {std::numeric_limits<std::size_t>::max(), std::numeric_limits<std::size_t>::max() - 62,
                                  std::size_t{1} << 63, std::size_t{1} << 62})
    EXPECT_EQ(code_of([&] { ctx.reserve(bytes); }), errc::capacity) << bytes;
  EXPECT_EQ(code_of([&] { ctx.reserve(0, index_t{1} << 40); }), errc::capacity);
  EXPECT_EQ(ctx.scratch_bytes(), before);
  const operands<float, float> in(attention_case{{5, 3, 200, 4, 2, 32, 32}, with_causal, layout::bshd});
  EXPECT_TRUE(matches_oracle(in, ctx));
}

// What a call needs is reserved by its shape, and nothing of it is computed.
TEST(Context, ReservesByTheShapeOfACall) {
  for (const index_t queries : {1, 40}) {
    const operands<float, float> in(attention_case{{2, queries, 3000, 8, 2, 64, 64}, with_causal, layout::bshd});
    std::vector<float> out(static_cast<std::size_t>(2 * queries * 8 * 64), 7.0f);
    const auto to = view(out.data(), {2, queries, 8, 64});
    context ctx;
    reserve(in.q.view(), in.k.view(), in.v.view(), to, in.options, ctx);
    EXPECT_EQ(out, std::vector<float>(out.size(), 7.0f));
    const std::size_t reserved = ctx.scratch_bytes();
    EXPECT_GT(reserved, 0u);
    attention(in.q.view(), in.k.view(), in.v.view(), to, in.options, ctx);
    EXPECT_EQ(ctx.scratch_bytes(), reserved);
    EXPECT_NE(out[0], 7.0f);
    kv_cache<float> cache(2, 2, 3000, 64);
    cache.append(in.k.view(), in.v.view());
    attention(in.q.view(), cache, to, in.options, ctx);
    EXPECT_EQ(ctx.scratch_bytes(), reserved);
  }
}

}  // namespace
}  // namespace gqa::test
