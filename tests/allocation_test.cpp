// SPDX-License-Identifier: Apache-2.0
// What a call takes from the heap. A program of its own: it replaces operator new.
#include <gtest/gtest.h>

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

// Whether f() was refused because there is no memory.
bool lacks_memory(const auto& f) {
#ifdef GQA_NO_EXCEPTIONS
  static_cast<void>(take_last_error());
  f();
  return take_last_error() == errc::capacity;
#else
  try {
    f();
  } catch (const error& e) {
    return e.code() == errc::capacity;
  }
  return false;
#endif
}

// Calls f() with each of its allocations failing in turn, and expect_unchanged() after each; until one succeeds. How
// many failed.
template <class F, class Unchanged>
long fail_each_allocation(const F& f, const Unchanged& expect_unchanged) {
  for (long n = 1; n < 1000; ++n) {
    fail_allocation(n);
    const bool failed = lacks_memory(f);
    fail_allocation(0);
    if (!failed) return n - 1;
    expect_unchanged();
  }
  ADD_FAILURE() << "allocates without end";
  return 0;
}

// A failed allocation, whichever it is, leaves everything as it was.
TEST(FailedAllocations, OfAForkMakeNoSequence) {
  paged_kv_cache<float> cache(1, 10, 16, 1, 8);
  const sequence_id parent = cache.create();
  cache.extend(parent, 40);
  sequence_id child{-1};
  const long failed = fail_each_allocation([&] { child = cache.fork(parent); },
                                           [&] {
                                             EXPECT_EQ(cache.layer(0).batch(), 1);
                                             EXPECT_EQ(cache.free_pages(), 7);
                                             EXPECT_EQ(cache.length(parent), 40);
                                           });
  EXPECT_GT(failed, 0);
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
#ifdef GQA_NO_EXCEPTIONS
  groups.order.reserve(60), groups.offsets.reserve(61);  // results that are standard vectors: see EveryDoor
  groups.representatives.reserve(240), groups.radii.reserve(60);
#endif
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

// Of a call that begins with nothing and whose n-th allocation fails, for every n: a capacity error, never the end of
// the program; and without exceptions no allocation that could only throw. (But for results that are standard vectors:
// reports, groups, lists of keys.)
class EveryDoor : public testing::Test {
 protected:
  static constexpr index_t heads = 4, kv_heads = 2, dim = 16, tokens = 200, few = 3;
  static constexpr index_t rows = tokens * heads / kv_heads;  // of a KV head

  template <class F>
  void expect_reports(const F& f) {
    const long before = throwing_allocations();
    f();
    if (can_only_report) {
      EXPECT_EQ(throwing_allocations() - before, 0);
    }
    EXPECT_GT(fail_each_allocation(f, [] {}), 0);
  }
  static std::vector<float> numbers(index_t n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * i % 19) / 7;
    return x;
  }
  tensor_view<const float, 4> queries(index_t n) const { return view(q.data(), {1, n, heads, dim}); }
  tensor_view<const float, 4> keys() const { return view(k.data(), {1, tokens, kv_heads, dim}); }
  tensor_view<float, 4> outputs(index_t n) { return view(out.data(), {1, n, heads, dim}); }
  partial_state<float> state(index_t n) { return {outputs(n), tensor_view<float, 3>(lse.data(), {1, n, heads})}; }
  std::vector<query_groups<float>> groups() const {
    std::vector<query_groups<float>> sets(kv_heads);
    context ctx;
    for (query_groups<float>& set : sets)
      group_queries(tensor_view<const float, 2>(q.data(), {rows, dim}), {.groups = 9}, set, ctx);
    return sets;
  }

#ifdef GQA_NO_EXCEPTIONS
  static constexpr bool can_only_report = true;
#else
  static constexpr bool can_only_report = false;
#endif
  const std::vector<float> q = numbers(tokens * heads * dim), k = numbers(tokens * kv_heads * dim);
  std::vector<float> out = std::vector<float>(q.size()), lse = std::vector<float>(tokens * heads);
};

TEST_F(EveryDoor, OfExactCallsReportsLackOfMemory) {
  expect_reports([&] {
    context ctx;
    attention(queries(tokens), keys(), keys(), outputs(tokens), {.causal = true}, ctx);
  });
  Eigen::ThreadPool pool(2);
  expect_reports([&] {
    context ctx(pool);
    attention(queries(few), keys(), keys(), outputs(few), {.causal = true}, ctx);
  });
  kv_cache<float> cache(1, kv_heads, tokens, dim);
  cache.append(keys(), keys());
  const std::vector<index_t> offsets{0, few};
  const std::vector<sequence_id> sequences{sequence_id{0}};
  const std::vector<index_t> positions(few, tokens - 1);
  expect_reports([&] {
    context ctx;
    batch_attention(tensor_view<const float, 3>(q.data(), {few, heads, dim}), offsets, cache, sequences,
                    tensor_view<float, 3>(out.data(), {few, heads, dim}), {.positions = positions}, ctx);
  });
}

TEST_F(EveryDoor, OfCachesReportsLackOfMemory) {
  const rope embedding(dim);
  const std::vector<index_t> positions(tokens, 5);
  expect_reports([&] {
    context ctx;
    const auto turns = embedding.turns<float>(positions, ctx);
    if (turns.tokens() == 0) return;
    kv_cache<Eigen::half> cache(1, kv_heads, tokens, dim);
    if (cache.batch() == 0) return;
    cache.append(turned(keys(), turns), keys());
  });
  const tensor_view<const float, 3> flat(k.data(), {tokens, kv_heads, dim});
  expect_reports([&] {
    paged_kv_cache<float> cache(1, 20, 16, kv_heads, dim);
    if (cache.layers() == 0) return;
    const sequence_id id = cache.create();
    if (static_cast<index_t>(id) < 0) return;
    cache.append(id, flat, flat);
  });
  expect_reports([&] {
    context ctx;
    ring_kv_cache<float> ring(1, kv_heads, 4, 100, dim);
    if (ring.batch() == 0) return;
    for (index_t t = 0; t < tokens; t += 2) {
      const auto some = view(k.data() + t * kv_heads * dim, {1, 2, kv_heads, dim});
      ring.append(some, some);
    }
    streaming_attention(queries(few), embedding, ring, outputs(few), {}, ctx);
  });
}

TEST_F(EveryDoor, OfGroupsReportsLackOfMemory) {
  for (const bool strict : {false, true}) {
    for (const bool has_alibi : {false, true}) {
      const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.0625f};
      grouped_options o;
      o.attention.causal = true;
      if (has_alibi) o.attention.alibi_slopes = slopes;
      o.block = 64, o.window = 16, o.always_group = true, o.strict_causal = strict;
      o.groupwise.form = groupwise_form::improved;
      if (!strict) o.tolerance = 0.5;
      expect_reports([&] {
        context ctx;
        grouped_attention(queries(tokens), keys(), keys(), outputs(tokens), o, ctx);
      });
    }
  }
  std::vector<float> slopes;
  const auto sets = groups();
  expect_reports([&] {
    context ctx;
    groupwise_attention(queries(tokens), keys(), keys(), std::span<const query_groups<float>>(sets), state(tokens), {},
                        {}, ctx);
  });
  expect_reports([&] {
    context ctx;
    within_group_attention(queries(tokens), keys(), keys(), std::span<const query_groups<float>>(sets), outputs(tokens),
                           {.causal = true}, ctx);
  });
}

TEST_F(EveryDoor, OfSparseCallsReportsLackOfMemory) {
  expect_reports([&] {
    const auto mask =
        block_sparse_mask::from_pairs({.q_len = tokens, .kv_len = tokens},
                                      [](index_t, index_t query, index_t key) { return (query + key) % 3 != 0; });
    const block_sparse_mask copy = mask;
    if (copy.blocks() > 0) static_cast<void>(copy.tiles(0, 0, 0));
  });
  expect_reports([&] { static_cast<void>(a_shape({.q_len = tokens, .kv_len = tokens}, 10, 20)); });
  expect_reports([&] { static_cast<void>(big_bird({.q_len = tokens, .kv_len = tokens}, {})); });
  kv_cache<float> cache(1, kv_heads, tokens, dim);
  cache.append(keys(), keys());
  expect_reports([&] {
    cache.keep_key_bounds();
    context ctx;
    page_attention(queries(few), cache, outputs(few), {.attention = {.causal = true}, .page_budget = 1}, ctx);
  });
  expect_reports([&] {
    context ctx;
    const projected_keys<float> projected(cache, {.rank = 3});
    if (projected.batch() == 0) return;
    projected_attention(queries(few), cache, projected, outputs(few), {.attention = {.causal = true}}, ctx);
  });
  latent_kv_cache<float> latent(1, tokens, dim, 8);
  latent.append(view(k.data(), {1, tokens, 1, dim}));
  expect_reports([&] {
    context ctx;
    attention(queries(few), latent, view(out.data(), {1, few, heads, 8}), {.causal = true}, ctx);
  });
}

TEST_F(EveryDoor, OfDiagnosticsReportsLackOfMemory) {
  expect_reports([&] {
    context ctx;
    attention_entropy(queries(few), keys(), {}, tensor_view<float, 3>(lse.data(), {1, few, heads}), ctx);
  });
}

#ifndef GQA_NO_EXCEPTIONS
// Results that are standard vectors: told as a capacity error, too. (Without exceptions as much is asked for before,
// in a way that reports, which cannot be shown by failing one allocation after the other.)
TEST_F(EveryDoor, WithResultsInVectorsReportsLackOfMemory) {
  kv_cache<float> cache(1, kv_heads, tokens, dim);
  cache.append(keys(), keys());
  cache.keep_key_bounds();
  expect_reports([&] {
    context ctx;
    page_report report;
    page_attention(queries(few), cache, outputs(few), {.attention = {.causal = true}, .page_budget = 1}, ctx, &report);
  });
  expect_reports([&] {
    context ctx;
    grouped_options o;
    o.attention.causal = true;
    o.block = 64, o.window = 16, o.always_group = true;
    grouped_report report;
    grouped_attention(queries(tokens), keys(), keys(), outputs(tokens), o, ctx, &report);
  });
  expect_reports([&] {
    context ctx;
    query_groups<float> set;
    group_queries(tensor_view<const float, 2>(q.data(), {rows, dim}), {.groups = 9}, set, ctx);
  });
  expect_reports([&] { static_cast<void>(top_keys(tensor_view<const float, 2>(q.data(), {3, 16}), 4)); });
  expect_reports([&] { static_cast<void>(cache.key(0, 3, 1)); });
  expect_reports([&] { static_cast<void>(yarn_frequencies(16, {.factor = 4, .trained_length = 100})); });
}
#endif

}  // namespace
}  // namespace gqa::test
