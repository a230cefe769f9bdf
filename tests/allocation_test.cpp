// SPDX-License-Identifier: Apache-2.0
// What a call takes from the heap. A program of its own: it replaces operator new.
#include <gtest/gtest.h>

#include <new>
#include <span>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/count_allocations.hpp"

namespace gqa::test {
namespace {

TEST(Allocations, ASecondIdenticalCallHasNone) {
  Eigen::ThreadPool pool(2);
  for (const shape n :
       {shape{1, 200, 300, 4, 2, 64, 64}, shape{2, 1, 3000, 8, 2, 64, 64}, shape{1, 7, 90, 4, 2, 40, 40}}) {
    operands<float, float> in(attention_case{n, with_causal | with_sinks, layout::bshd});
    std::vector<float> out(static_cast<std::size_t>(n.b * n.s * n.h * n.e));
    const auto to = view(out.data(), {n.b, n.s, n.h, n.e});
    context serial, on_pool(pool);
    for (context* ctx : {&serial, &on_pool}) {
      attention(in.q.view(), in.k.view(), in.v.view(), to, in.options, *ctx);
      const long before = allocations();
      attention(in.q.view(), in.k.view(), in.v.view(), to, in.options, *ctx);
      EXPECT_EQ(allocations() - before, 0);
    }
  }
}

TEST(Allocations, ReservedScratchIsEnough) {
  operands<float, float> in(attention_case{{1, 50, 300, 4, 2, 64, 64}, with_causal, layout::bshd});
  std::vector<float> out(50 * 4 * 64);
  context ctx;
  ctx.reserve(64 << 20);
  const long before = allocations();
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {1, 50, 4, 64}), in.options, ctx);
  EXPECT_EQ(allocations() - before, 0);
}

// A failed allocation, whichever it is, leaves everything as it was.
#ifndef GQA_NO_EXCEPTIONS
// Calls f() with each of its allocations failing in turn, and expect_unchanged() after each; until one succeeds.
template <class F, class Unchanged>
void fail_each_allocation(const F& f, const Unchanged& expect_unchanged) {
  for (long n = 1; n < 1000; ++n) {
    fail_allocation(n);
    bool failed = false;
    try {
      f();
    } catch (const std::bad_alloc&) {
      failed = true;
    } catch (const error& e) {
      failed = e.code() == errc::capacity;
    }
    fail_allocation(0);
    if (!failed) {
      EXPECT_GT(n, 1);  // there was one to fail
      return;
    }
    expect_unchanged();
  }
  ADD_FAILURE() << "allocates without end";
}

TEST(FailedAllocations, OfAForkMakeNoSequence) {
  paged_kv_cache<float> cache(1, 10, 16, 1, 8);
  const sequence_id parent = cache.create();
  cache.extend(parent, 40);
  sequence_id child{-1};
  fail_each_allocation([&] { child = cache.fork(parent); },
                       [&] {
                         EXPECT_EQ(cache.layer(0).batch(), 1);
                         EXPECT_EQ(cache.free_pages(), 7);
                         EXPECT_EQ(cache.length(parent), 40);
                       });
  EXPECT_EQ(cache.layer(0).batch(), 2);
  EXPECT_EQ(cache.length(child), 40);
}

TEST(FailedAllocations, OfGroupingKeepTheGroups) {
  std::vector<float> rows(60 * 4);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i * i % 17);
  query_groups<float> groups;
  context ctx;
  const tensor_view<const float, 2> few(rows.data(), {10, 4}), all(rows.data(), {60, 4});
  group_queries(few, {.groups = 3}, groups, ctx);
  const query_groups<float> before = groups;
  fail_each_allocation(
      [&] {
        context fresh;
        group_queries(all, {.groups = 20}, groups, fresh);
      },
      [&] { EXPECT_EQ(groups, before); });
  EXPECT_EQ(groups.rows(), 60);
}

// More tokens than are turned at a time: a retry after a failure must not turn the first ones again.
TEST(FailedAllocations, OfARotationTurnNothing) {
  const rope embedding(8);
  std::vector<float> x(1300 * 8);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13);
  const std::vector<float> before = x;
  std::vector<float> once = x;
  const std::vector<index_t> first{5};
  context ctx;
  embedding.rotate(view(once.data(), {1, 1300, 1, 8}), std::span(first), ctx);
  fail_each_allocation(
      [&] {
        embedding.rotate(view(x.data(), {1, 1300, 1, 8}), std::span(first), ctx);
      },
      [&] { EXPECT_EQ(x, before); });
  EXPECT_EQ(x, once);
}
#endif

}  // namespace
}  // namespace gqa::test
