// SPDX-License-Identifier: Apache-2.0
// How calls are divided: everything once, everyone busy, nothing planned twice.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/rng.hpp"
#include "support/tensor.hpp"

namespace gqa::test {
namespace {

// A cache that counts the tiles that are read of it.
struct counting_cache {
  using element = float;
  using panel_element = kv_cache<float>::panel_element;
  const kv_cache<float>& cache;
  index_t* visits;

  index_t batch() const noexcept { return cache.batch(); }
  index_t kv_heads() const noexcept { return cache.kv_heads(); }
  index_t kv_len() const noexcept { return cache.kv_len(); }
  index_t head_dim() const noexcept { return cache.head_dim(); }
  index_t value_dim() const noexcept { return cache.value_dim(); }
  index_t length(index_t b) const noexcept { return cache.length(b); }
  index_t scratch_elements() const noexcept { return 0; }
  auto tile(index_t b, index_t g, index_t i, index_t tokens, float* scratch) const noexcept {
    ++*visits;
    return cache.tile(b, g, i, tokens, scratch);
  }
  detail::fault find_fault() const noexcept { return cache.find_fault(); }
};

// Runs tasks one by one and reckons what workers would have done: each takes the next task when it is free.
class reckoning_executor {
 public:
  reckoning_executor(index_t workers, const index_t& visits) : workers_(workers), visits_(visits) {}
  index_t concurrency() const { return workers_; }
  void run(index_t tasks, const std::function<void(index_t, index_t)>& f) {
    std::vector<index_t> busy_until(static_cast<std::size_t>(workers_), 0);
    for (index_t task = 0; task < tasks; ++task) {
      const index_t before = visits_;
      f(task, 0);
      *std::min_element(busy_until.begin(), busy_until.end()) += visits_ - before;
    }
    time_ += *std::max_element(busy_until.begin(), busy_until.end());
  }
  index_t time() const { return time_; }

 private:
  index_t workers_;
  const index_t& visits_;
  index_t time_ = 0;
};

// The time of a call over so many workers, in visits, over that of an even division.
double imbalance(index_t q_len, const std::vector<index_t>& lengths, index_t heads, index_t kv_heads, index_t workers) {
  const auto batch = static_cast<index_t>(lengths.size());
  const index_t most = *std::max_element(lengths.begin(), lengths.end());
  kv_cache<float> cache(batch, kv_heads, most, 8);
  const tensor<float> tokens({1, most, kv_heads, 8}, layout::bshd);
  for (index_t b = 0; b < batch; ++b) {
    const index_t length = lengths[static_cast<std::size_t>(b)];
    const auto some = slice(tokens.view(), 1, 0, length);
    cache.append(b, some, some);
  }
  const tensor<float> q({batch, q_len, heads, 8}, layout::bshd);
  tensor<float> out({batch, q_len, heads, 8}, layout::bshd);
  index_t visits = 0;
  reckoning_executor executor(workers, visits);
  context ctx(executor);
  attention(q.view(), counting_cache{cache, &visits}, out.view(), {.causal = true}, ctx);
  return static_cast<double>(executor.time() * workers) / static_cast<double>(visits);
}

TEST(Plan, KeepsEveryWorkerBusy) {
  // No task is more than a quarter of a worker's share where splits of 16 tiles are not.
  constexpr double most = 1.25;
  std::vector<index_t> many(200, 100), few(5, 4'000), mixture(50, 100), ladder(24);
  mixture[20] = 20'000;
  for (std::size_t i = 0; i < ladder.size(); ++i) ladder[i] = static_cast<index_t>(i + 1) * 500;
  for (const index_t workers : {2, 3, 4, 8}) {
    EXPECT_LE(imbalance(1, {65'536}, 8, 8, workers), most) << workers;
    EXPECT_LE(imbalance(1, {65'536}, 8, 1, workers), most) << workers;
    EXPECT_LE(imbalance(1, many, 8, 2, workers), most) << workers;
    EXPECT_LE(imbalance(1, few, 4, 1, workers), most) << workers;
    EXPECT_LE(imbalance(1, mixture, 4, 2, workers), most) << workers;
    EXPECT_LE(imbalance(1, ladder, 4, 2, workers), most) << workers;
    EXPECT_LE(imbalance(48, mixture, 8, 2, workers), most) << workers;
    EXPECT_LE(imbalance(1'500, {1'500}, 8, 2, workers), most) << workers;
    EXPECT_LE(imbalance(24, {20'000}, 4, 1, workers), most) << workers;
  }
}

struct counted_calls {
  index_t tiles = 0, visits = 0;
};

const detail::call_plan* plan_of(const detail::plan_request& request, const std::vector<detail::family_request>& asks,
                                 context& ctx, counted_calls& counted) {
  const auto asks_of = [&](index_t b) { return ++counted.tiles, asks[static_cast<std::size_t>(b)]; };
  const auto visits_of = [&](index_t b) {
    const detail::family_request& s = asks[static_cast<std::size_t>(b)];
    return ++counted.visits, s.row_tiles * s.tiles.size() * std::max<index_t>(s.most_rows, 8);
  };
  return detail::find_plan(request, asks_of, visits_of, ctx);
}

TEST(Plan, IsMadeOncePerShape) {
  context ctx;
  counted_calls counted;
  detail::plan_request request{.families = 2, .kv_heads = 8, .workers = 2, .visit_products = 100'000};
  std::vector<detail::family_request> tiles{{{{0, 10}}, 1, 4}, {{{0, 300}}, 1, 4}};
  ASSERT_NE(plan_of(request, tiles, ctx, counted), nullptr);
  EXPECT_EQ(counted.visits, 2);
  ASSERT_NE(plan_of(request, tiles, ctx, counted), nullptr);
  EXPECT_EQ(counted.visits, 2);
  tiles[0].tiles = {{0, 11}};  // a sequence began a tile
  ASSERT_NE(plan_of(request, tiles, ctx, counted), nullptr);
  EXPECT_EQ(counted.visits, 4);
  tiles[1].most_rows = 8;  // or has more queries
  ASSERT_NE(plan_of(request, tiles, ctx, counted), nullptr);
  EXPECT_EQ(counted.visits, 6);
  request.workers = 3;
  EXPECT_EQ(plan_of(request, tiles, ctx, counted)->workers, 3);
  EXPECT_EQ(counted.visits, 8);
  request.families = 1;
  EXPECT_EQ(plan_of(request, tiles, ctx, counted)->families.size(), 1u);
  EXPECT_EQ(counted.visits, 9);
}

TEST(Plan, CoversEverySequenceOnceWithinItsMemory) {
  rng random(7);
  context ctx;
  counted_calls counted;
  for (int round = 0; round < 2'000; ++round) {
    const auto below = [&](index_t n) { return random.between(0, n - 1); };
    const index_t sequences = 1 + below(20);
    detail::plan_request request{.families = sequences, .kv_heads = 1 + below(9)};
    request.workers = 1 + below(9);
    request.visit_products = 1 + below(100'000);
    request.packed_tile_bytes = below(2) * (1 + below(200'000));
    request.state_bytes = 1 + below(200'000);
    request.bundles = below(4) == 0;
    std::vector<detail::family_request> tiles;
    for (index_t b = 0; b < sequences; ++b) {
      const index_t begin = below(100);
      const key_range seen{begin, begin + 1 + below(below(6) == 0 ? 2'000 : 30)};
      const index_t row_tiles = request.bundles ? below(2) : below(5);  // 0: a sequence without queries
      tiles.push_back({below(5) == 0 || row_tiles == 0 ? key_range{0, 0} : seen, row_tiles, 1 + below(96)});
    }
    const detail::call_plan& plan = *plan_of(request, tiles, ctx, counted);
    ASSERT_TRUE(plan.workers == 1 || plan.workers == request.workers);
    ASSERT_EQ(request.kv_heads % plan.bundle, 0);
    std::vector<int> seen(static_cast<std::size_t>(sequences), 0);
    index_t next = 0;
    for (const detail::plan_wave& w : plan.waves) {
      ASSERT_EQ(w.first, next);
      ASSERT_LT(w.first, w.end);
      ASSERT_TRUE(w.heads == request.kv_heads || (w.heads >= 1 && w.end == w.first + 1));
      next = w.end;
      index_t tasks = 0, slots = 0, states = 0, merges = 0;
      for (index_t n = w.first; n < w.end; ++n) {
        const detail::family_plan& s = plan.families[static_cast<std::size_t>(n)];
        ++seen[static_cast<std::size_t>(s.family)];
        ASSERT_EQ(s.first_task, tasks);
        ASSERT_EQ(s.first_slot, slots);
        ASSERT_EQ(s.first_merge, merges);
        ASSERT_EQ(s.first_state, states);
        ASSERT_EQ(s.tasks, s.asks.row_tiles * s.parts);
        ASSERT_EQ(s.merges, s.parts > 1 ? s.asks.row_tiles : 0);
        ASSERT_TRUE(s.parts == 1 || s.parts == s.asks.tiles.splits());
        if (request.packed_tile_bytes > 0 && s.asks.row_tiles > 1) {
          ASSERT_GE(s.slots, s.asks.tiles.size());
          ASSERT_EQ(s.slots % detail::tiles_packed_together, 0);
        } else {
          ASSERT_EQ(s.slots, 0);
        }
        tasks += s.tasks, slots += s.slots, merges += s.merges;
        if (s.parts > 1) states += s.tasks;
      }
      ASSERT_LE(w.heads * slots, plan.most_slots);
      ASSERT_LE(w.heads * states, plan.most_states);
      if (w.heads > 1) {
        ASSERT_LE(static_cast<double>(w.heads * slots * request.packed_tile_bytes), detail::packed_bytes);
      }
    }
    ASSERT_EQ(next, sequences);
    ASSERT_LE(static_cast<double>(plan.most_states * request.state_bytes), detail::split_state_bytes);
    ASSERT_EQ(seen, std::vector<int>(static_cast<std::size_t>(sequences), 1));
  }
}

}  // namespace
}  // namespace gqa::test
