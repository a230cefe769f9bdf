// SPDX-License-Identifier: Apache-2.0
// Pages of one pool: the bits of a kv_cache through any history of sequences, exact accounts, and pools that run out.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/refusal.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

struct geometry {
  index_t layers, heads, kv_heads, dim, value_dim;
};

// What a sequence should hold: keys and values of its tokens, [layers][tokens * heads * dim].
template <class T>
struct model_sequence {
  using X = detail::read_element<T>;  // of rows, and of queries

  std::vector<std::vector<X>> k, v;
  index_t length = 0;
};

// A cache and the model of it.
template <class T>
struct history {
  using X = detail::read_element<T>;

  geometry of;
  paged_kv_cache<T> cache;
  std::vector<std::optional<model_sequence<T>>> model;  // by number
  rng random;

  history(const geometry& g, index_t pages, index_t page_size, std::uint64_t seed)
      : of(g), cache(g.layers, pages, page_size, g.kv_heads, g.dim, g.value_dim), random(seed) {}

  std::vector<X> tokens(index_t count, index_t dim) {
    std::vector<X> x;
    for (index_t i = 0; i < count * of.kv_heads * dim; ++i)
      x.push_back(static_cast<X>(static_cast<float>(random.normal())));
    return x;
  }
  // Values, of which few are NaN or infinite.
  std::vector<X> values(index_t count) {
    std::vector<X> x = tokens(count, of.value_dim);
    if (count > 0 && random.chance(0.05)) {
      const auto infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
      x[static_cast<std::size_t>(random.between(0, static_cast<index_t>(x.size()) - 1))] =
          static_cast<X>(random.chance(0.5) ? infinity : nan);
    }
    return x;
  }
  std::vector<index_t> living() const {
    std::vector<index_t> all;
    for (std::size_t n = 0; n < model.size(); ++n)
      if (model[n]) all.push_back(static_cast<index_t>(n));
    return all;
  }
  model_sequence<T>& at(sequence_id id) { return *model[static_cast<std::size_t>(id)]; }
  void put(sequence_id id, model_sequence<T> s) {
    const auto n = static_cast<std::size_t>(id);
    if (model.size() <= n) model.resize(n + 1);
    ASSERT_FALSE(model[n]) << "a number given twice";
    model[n] = std::move(s);
  }
  void create() {
    model_sequence<T> s;
    s.k.resize(static_cast<std::size_t>(of.layers)), s.v.resize(static_cast<std::size_t>(of.layers));
    put(cache.create(), std::move(s));
  }
  void fork(sequence_id id) {
    const auto copy = at(id);
    put(cache.fork(id), copy);
  }
  // Room, then each layer's tokens in pieces.
  void extend(sequence_id id, index_t count) {
    model_sequence<T>& s = at(id);
    cache.extend(id, count);
    for (index_t layer = 0; layer < of.layers; ++layer) {
      const auto k = tokens(count, of.dim), v = values(count);
      for (index_t first = 0; first < count;) {
        const index_t piece = random.between(1, count - first);
        write(layer, id, s.length + first, k.data() + first * of.kv_heads * of.dim,
              v.data() + first * of.kv_heads * of.value_dim, piece);
        first += piece;
      }
      auto& to_k = s.k[static_cast<std::size_t>(layer)];
      auto& to_v = s.v[static_cast<std::size_t>(layer)];
      to_k.insert(to_k.end(), k.begin(), k.end()), to_v.insert(to_v.end(), v.begin(), v.end());
    }
    s.length += count;
  }
  void write(index_t layer, sequence_id id, index_t position, const X* k, const X* v, index_t count) {
    cache.write(layer, id, position, tensor_view<const X, 3>(k, {count, of.kv_heads, of.dim}),
                tensor_view<const X, 3>(v, {count, of.kv_heads, of.value_dim}));
  }
  // Tokens that there are, anew.
  void rewrite(sequence_id id, index_t position, index_t count) {
    for (index_t layer = 0; layer < of.layers; ++layer) {
      const auto k = tokens(count, of.dim), v = values(count);
      write(layer, id, position, k.data(), v.data(), count);
      const auto l = static_cast<std::size_t>(layer);
      std::copy(k.begin(), k.end(), at(id).k[l].begin() + position * of.kv_heads * of.dim);
      std::copy(v.begin(), v.end(), at(id).v[l].begin() + position * of.kv_heads * of.value_dim);
    }
  }
  void truncate(sequence_id id, index_t length) {
    cache.truncate(id, length);
    model_sequence<T>& s = at(id);
    for (auto& k : s.k) k.resize(static_cast<std::size_t>(length * of.kv_heads * of.dim));
    for (auto& v : s.v) v.resize(static_cast<std::size_t>(length * of.kv_heads * of.value_dim));
    s.length = length;
  }
  void erase(sequence_id id) {
    cache.erase(id);
    model[static_cast<std::size_t>(id)].reset();
  }

  // Pages that somebody has, and those that nobody has, are all there are; lengths are those of the model.
  void expect_accounts() const {
    std::set<std::int32_t> used;
    for (const index_t n : living()) {
      const auto id = static_cast<sequence_id>(n);
      const index_t length = model[static_cast<std::size_t>(n)]->length;
      ASSERT_EQ(cache.length(id), length);
      const auto own = cache.pages_of(id);
      ASSERT_EQ(static_cast<index_t>(own.size()), (length + cache.page_size() - 1) / cache.page_size());
      ASSERT_EQ(std::set<std::int32_t>(own.begin(), own.end()).size(), own.size());
      used.insert(own.begin(), own.end());
    }
    ASSERT_EQ(cache.free_pages(), cache.pages() - static_cast<index_t>(used.size()));
  }

  // A batch of some sequences' last tokens, beside each alone over a kv_cache of its model.
  void expect_bits(index_t layer, context& ctx) {
    std::vector<sequence_id> sequences;
    std::vector<index_t> offsets{0};
    std::vector<X> q;
    for (const index_t n : living()) {
      if (random.chance(0.4)) continue;
      const index_t length = model[static_cast<std::size_t>(n)]->length;
      const index_t queries = std::min(length, random.chance(0.5) ? 1 : random.between(0, 40));
      sequences.push_back(static_cast<sequence_id>(n));
      offsets.push_back(offsets.back() + queries);
    }
    const index_t total = offsets.back();
    for (index_t i = 0; i < total * of.heads * of.dim; ++i)
      q.push_back(static_cast<X>(static_cast<float>(random.normal())));
    std::vector<X> out(static_cast<std::size_t>(total * of.heads * of.value_dim), static_cast<X>(9.0f));
    batch_options options;
    options.common.causal = true;
    batch_attention(tensor_view<const X, 3>(q.data(), {total, of.heads, of.dim}), offsets, cache.layer(layer),
                    sequences, tensor_view<X, 3>(out.data(), {total, of.heads, of.value_dim}), options, ctx);
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const model_sequence<T>& s = at(sequences[i]);
      const index_t queries = offsets[i + 1] - offsets[i];
      kv_cache<T> alone(1, of.kv_heads, s.length, of.dim, of.value_dim);
      alone.append(
          tensor_view<const X, 4>(s.k[static_cast<std::size_t>(layer)].data(), {1, s.length, of.kv_heads, of.dim}),
          tensor_view<const X, 4>(s.v[static_cast<std::size_t>(layer)].data(),
                                  {1, s.length, of.kv_heads, of.value_dim}));
      std::vector<X> expected(static_cast<std::size_t>(queries * of.heads * of.value_dim));
      attention(tensor_view<const X, 4>(q.data() + offsets[i] * of.heads * of.dim, {1, queries, of.heads, of.dim}),
                alone, view(expected.data(), {1, queries, of.heads, of.value_dim}), {.causal = true}, ctx);
      if (queries == 0) continue;
      for (std::size_t n = 0; n < expected.size(); ++n) {
        const X x = expected[n], actual = out[static_cast<std::size_t>(offsets[i] * of.heads * of.value_dim) + n];
        const bool is_nan = std::isnan(static_cast<double>(x));
        ASSERT_TRUE(is_nan ? std::isnan(static_cast<double>(actual)) : std::memcmp(&actual, &x, sizeof x) == 0)
            << "sequence " << static_cast<index_t>(sequences[i]) << " of " << s.length << ", " << queries
            << " queries, element " << n;
      }
    }
  }
};

// One random step; says whether the pool had room for it.
template <class T>
bool step(history<T>& h) {
  const auto all = h.living();
  const double what = h.random.uniform();
  if (all.empty() || (what < 0.1 && all.size() < 12)) return h.create(), true;
  const auto id = static_cast<sequence_id>(
      all[static_cast<std::size_t>(h.random.between(0, static_cast<index_t>(all.size()) - 1))]);
  const index_t length = h.cache.length(id);
  // Steps that need pages are not tried where there may be none: RunsOut tests those.
  const index_t room = h.cache.free_pages() * h.cache.page_size() - 2 * h.cache.page_size();
  if (what < 0.2 && all.size() < 12) {
    h.fork(id);
  } else if (what < 0.6) {
    const index_t count = h.random.chance(0.5) ? 1 : h.random.between(0, 90);
    if (count > room) return false;
    h.extend(id, count);
  } else if (what < 0.7 && length > 0) {
    const index_t position = h.random.between(0, length - 1), count = h.random.between(1, length - position);
    if (count + 2 * h.cache.page_size() > room) return false;
    h.rewrite(id, position, count);
  } else if (what < 0.85) {
    h.truncate(id, h.random.between(0, length));
  } else if (what < 0.9) {
    h.erase(id);
  }
  return true;
}

template <class T>
void expect_any_history(const geometry& g, index_t page_size, index_t steps, std::uint64_t seed) {
  SCOPED_TRACE("pages of " + std::to_string(page_size));
  history<T> h(g, 60 * 64 / page_size + 10, page_size, seed);
  Eigen::ThreadPool pool(3);
  context serial, threads(pool);
  for (index_t i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
    step(h);
    h.expect_accounts();
    if (i % 7 == 0) h.expect_bits(h.random.between(0, g.layers - 1), i % 2 == 0 ? serial : threads);
  }
  for (const index_t n : h.living()) h.erase(static_cast<sequence_id>(n));
  EXPECT_EQ(h.cache.free_pages(), h.cache.pages());
}
TEST(PagedKvCache, HasTheBitsOfAKvCacheThroughAnyHistory) {
  std::uint64_t seed = 0;
  for (const index_t page_size : {16, 32, 48, 64, 80, 128}) {
    expect_any_history<float>({2, 4, 2, 24, 40}, page_size, 1000, ++seed);
    expect_any_history<Eigen::bfloat16>({1, 6, 2, 33, 17}, page_size, 500, ++seed);
  }
  expect_any_history<double>({1, 2, 2, 8, 8}, 16, 300, ++seed);
  expect_any_history<Eigen::half>({1, 4, 1, 16, 16}, 64, 300, ++seed);
}
TEST(PagedKvCache, HasTheBitsOfAKvCacheInEightBits) {
  expect_any_history<q8>({2, 4, 2, 24, 40}, 16, 500, 20);
  expect_any_history<q8>({1, 6, 2, 33, 17}, 48, 500, 21);
  expect_any_history<q8>({1, 8, 1, 64, 100}, 64, 500, 22);
  expect_any_history<kv_types<Eigen::bfloat16, q8>>({1, 4, 2, 40, 24}, 32, 300, 23);
}

#ifndef GQA_NO_EXCEPTIONS
// Whatever needs a page when there is none changes nothing.
TEST(PagedKvCache, RunsOutWithoutALoss) {
  context ctx;
  for (index_t pages = 0; pages <= 12; ++pages) {
    history<float> h({2, 2, 1, 8, 8}, pages, 16, 5);
    index_t refused = 0;
    for (int i = 0; i < 400; ++i) {
      const auto all = h.living();
      if (all.size() < 4) {
        all.empty() || h.random.chance(0.5) ? h.create() : h.fork(static_cast<sequence_id>(all[0]));
        continue;
      }
      const auto id = static_cast<sequence_id>(all[static_cast<std::size_t>(h.random.between(0, 3))]);
      const index_t length = h.cache.length(id), free = h.cache.free_pages();
      if (h.random.chance(0.15)) {
        h.erase(id);
      } else if (h.random.chance(0.2)) {
        h.truncate(id, h.random.between(0, length));
      } else if (h.random.chance(0.3) && length > 0) {
        // Rewriting needs a page for each shared one.
        const index_t position = h.random.between(0, length - 1), count = h.random.between(1, length - position);
        index_t shared = 0;
        const auto own = h.cache.pages_of(id);
        for (index_t page = position / 16; page <= (position + count - 1) / 16; ++page) {
          index_t owners = 0;
          for (const index_t n : all) {
            const auto others = h.cache.pages_of(static_cast<sequence_id>(n));
            owners += std::count(others.begin(), others.end(), own[static_cast<std::size_t>(page)]);
          }
          shared += owners > 1 ? 1 : 0;
        }
        const auto k = h.tokens(count, 8), v = h.tokens(count, 8);
        if (shared > free) {
          EXPECT_EQ(code_of([&] { h.write(1, id, position, k.data(), v.data(), count); }), errc::capacity);
          ++refused;
        } else {
          h.rewrite(id, position, count);
        }
      } else {
        const index_t count = h.random.between(0, 40);
        try {
          h.extend(id, count);
        } catch (const error& e) {
          EXPECT_EQ(e.code(), errc::capacity);
          EXPECT_GT((length + count + 15) / 16 - (length + 15) / 16 + 1, free);  // one more for a shared page
          ++refused;
        }
      }
      h.expect_accounts();
      if (i % 10 == 0) h.expect_bits(1, ctx);
      if (::testing::Test::HasFatalFailure()) return;
    }
    EXPECT_GT(refused, pages < 8 ? 20 : 0) << pages;
  }
}

TEST(PagedKvCache, RefusesWhatIsNotThere) {
  const index_t most = std::numeric_limits<index_t>::max();
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(0, 4, 16, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, -1, 16, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, 8, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, 0, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, -16, 1, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, 16, 0, 8); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, 16, 1, 0); }), errc::shape);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, 4, 16, 1, 8, 0); }), errc::shape);
  EXPECT_EQ(code_of([=] { paged_kv_cache<float>(1, most, 16, 1, 8); }), errc::capacity);
  EXPECT_EQ(code_of([=] { paged_kv_cache<float>(most / 4, 2, 16, most / 4, 8); }), errc::capacity);
  EXPECT_EQ(code_of([] { paged_kv_cache<float>(1, index_t{1} << 31, 16, 1, 1); }), errc::capacity);

  paged_kv_cache<float> cache(2, 4, 16, 2, 8, 4);
  const sequence_id id = cache.create();
  cache.extend(id, 20);
  const std::vector<float> x(64 * 2 * 8, 1.0f);
  const auto rows = [&](index_t count, index_t heads, index_t dim) {
    return tensor_view<const float, 3>(x.data(), {count, heads, dim});
  };
  for (const sequence_id none : {sequence_id{1}, sequence_id{-1}, static_cast<sequence_id>(most)}) {
    EXPECT_EQ(code_of([&] { (void)cache.fork(none); }), errc::range);
    EXPECT_EQ(code_of([&] { cache.extend(none, 1); }), errc::range);
    EXPECT_EQ(code_of([&] { cache.truncate(none, 0); }), errc::range);
    EXPECT_EQ(code_of([&] { cache.erase(none); }), errc::range);
    EXPECT_EQ(code_of([&] { cache.write(0, none, 0, rows(1, 2, 8), rows(1, 2, 4)); }), errc::range);
    EXPECT_EQ(cache.length(none), 0);
    EXPECT_TRUE(cache.pages_of(none).empty());
  }
  EXPECT_EQ(code_of([&] { cache.extend(id, -1); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.extend(id, 45); }), errc::capacity);
  EXPECT_EQ(code_of([&] { cache.extend(id, most); }), errc::capacity);
  EXPECT_EQ(code_of([&] { cache.truncate(id, 21); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.truncate(id, -1); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.write(2, id, 0, rows(1, 2, 8), rows(1, 2, 4)); }), errc::range);
  EXPECT_EQ(code_of([&] { cache.write(-1, id, 0, rows(1, 2, 8), rows(1, 2, 4)); }), errc::range);
  EXPECT_EQ(code_of([&] { cache.write(0, id, -1, rows(1, 2, 8), rows(1, 2, 4)); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 20, rows(1, 2, 8), rows(1, 2, 4)); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.write(0, id, most, rows(1, 2, 8), rows(1, 2, 4)); }), errc::length);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 20, rows(0, 2, 8), rows(0, 2, 4)); }), errc::ok);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 0, rows(1, 1, 8), rows(1, 1, 4)); }), errc::shape);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 0, rows(1, 2, 7), rows(1, 2, 4)); }), errc::shape);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 0, rows(1, 2, 8), rows(1, 2, 8)); }), errc::shape);
  EXPECT_EQ(code_of([&] { cache.write(0, id, 0, rows(2, 2, 8), rows(1, 2, 4)); }), errc::shape);
  EXPECT_EQ(code_of([&] { cache.append(id, rows(1, 2, 8), rows(1, 2, 4)); }), errc::option);  // two layers
  EXPECT_EQ(cache.length(id), 20);
  EXPECT_EQ(cache.free_pages(), 2);

  float q[2 * 8] = {}, out[2 * 4] = {};
  context ctx;
  const std::vector<index_t> offsets{0, 1};
  const auto attend = [&](index_t layer, sequence_id which) {
    const std::vector<sequence_id> sequences{which};
    return code_of([&] {
      batch_attention(tensor_view<const float, 3>(q, {1, 2, 8}), offsets, cache.layer(layer), sequences,
                      tensor_view<float, 3>(out, {1, 2, 4}), {}, ctx);
    });
  };
  EXPECT_EQ(attend(1, id), errc::ok);
  EXPECT_EQ(attend(2, id), errc::range);
  EXPECT_EQ(attend(-1, id), errc::range);
  EXPECT_EQ(attend(0, sequence_id{1}), errc::range);
  const sequence_id other = cache.create();
  cache.erase(id);
  EXPECT_EQ(attend(0, id), errc::range);  // gone
  EXPECT_EQ(attend(0, other), errc::ok);
}
#endif

// Room is room: what extend() promised, write() cannot lack.
TEST(PagedKvCache, CopiesASharedPageWhenItGrows) {
  paged_kv_cache<float> cache(1, 2, 16, 1, 8);
  const std::vector<float> x(10 * 8, 2.0f);
  const auto rows = [&](index_t count) { return tensor_view<const float, 3>(x.data(), {count, 1, 8}); };
  const sequence_id first = cache.create();
  cache.append(first, rows(10), rows(10));
  const sequence_id second = cache.fork(first);
  EXPECT_EQ(cache.free_pages(), 1);
  cache.extend(second, 1);
  EXPECT_EQ(cache.free_pages(), 0);
  EXPECT_NE(cache.pages_of(first)[0], cache.pages_of(second)[0]);
  cache.write(0, second, 10, rows(1), rows(1));
}

// NaN of those who had a page before reaches nobody.
TEST(PagedKvCache, KeepsNoValuesOfThoseBefore) {
  paged_kv_cache<float> cache(1, 2, 64, 1, 8);
  const std::vector<float> nan(100 * 8, std::numeric_limits<float>::quiet_NaN()), ones(100 * 8, 1.0f);
  const auto rows = [](const std::vector<float>& x, index_t count) {
    return tensor_view<const float, 3>(x.data(), {count, 1, 8});
  };
  const sequence_id first = cache.create();
  cache.append(first, rows(nan, 100), rows(nan, 100));
  cache.erase(first);
  const sequence_id second = cache.create();
  context ctx;
  for (index_t length = 1; length <= 100; ++length) {
    cache.append(second, rows(ones, 1), rows(ones, 1));
    std::vector<float> out(8);
    const std::vector<index_t> offsets{0, 1};
    const std::vector<sequence_id> sequences{second};
    batch_attention(rows(ones, 1), offsets, cache.layer(0), sequences, tensor_view<float, 3>(out.data(), {1, 1, 8}), {},
                    ctx);
    ASSERT_EQ(out, std::vector<float>(8, 1.0f)) << length;
  }
}

TEST(PagedKvCache, HoldsAThousandSequences) {
  history<float> h({1, 2, 1, 8, 8}, 4000, 16, 11);
  context ctx;
  for (int round = 0; round < 3; ++round) {
    while (h.living().size() < 1000) h.random.chance(0.3) && !h.living().empty() ? h.fork(sequence_id{0}) : h.create();
    for (index_t n = 0; n < 1000; ++n) h.extend(static_cast<sequence_id>(n), h.random.between(0, 20));
    h.expect_accounts();
    h.expect_bits(0, ctx);
    for (index_t n = 1; n < 1000; n += h.random.between(1, 5)) h.erase(static_cast<sequence_id>(n));
  }
}

TEST(PagedKvCache, MayBeReadByManyAtOnce) {
  history<float> h({1, 4, 2, 32, 32}, 100, 64, 13);
  h.create();
  h.extend(sequence_id{0}, 700);
  h.fork(sequence_id{0});
  h.extend(sequence_id{1}, 30);
  std::vector<std::vector<float>> outs(4, std::vector<float>(2 * 4 * 32));
  std::vector<std::thread> threads;
  const std::vector<float> q(2 * 4 * 32, 0.3f);
  for (std::vector<float>& out : outs) {
    threads.emplace_back([&] {
      context ctx;
      const std::vector<index_t> offsets{0, 1, 2};
      const std::vector<sequence_id> sequences{sequence_id{0}, sequence_id{1}};
      for (int i = 0; i < 20; ++i)
        batch_attention(tensor_view<const float, 3>(q.data(), {2, 4, 32}), offsets, h.cache.layer(0), sequences,
                        tensor_view<float, 3>(out.data(), {2, 4, 32}), {}, ctx);
    });
  }
  for (std::thread& t : threads) t.join();
  for (const auto& out : outs) EXPECT_EQ(out, outs[0]);
}

TEST(PagedKvCache, Moves) {
  paged_kv_cache<float> cache(1, 4, 16, 1, 8);
  const std::vector<float> x(20 * 8, 2.0f);
  const sequence_id id = cache.create();
  cache.append(id, tensor_view<const float, 3>(x.data(), {20, 1, 8}),
               tensor_view<const float, 3>(x.data(), {20, 1, 8}));
  paged_kv_cache<float> moved(std::move(cache));
  EXPECT_EQ(moved.length(id), 20);
  EXPECT_EQ(moved.free_pages(), 2);
  paged_kv_cache<float> other(1, 1, 16, 1, 8);
  other = std::move(moved);
  std::vector<float> out(8);
  const std::vector<index_t> offsets{0, 1};
  const std::vector<sequence_id> sequences{id};
  context ctx;
  batch_attention(tensor_view<const float, 3>(x.data(), {1, 1, 8}), offsets, other.layer(0), sequences,
                  tensor_view<float, 3>(out.data(), {1, 1, 8}), {}, ctx);
  EXPECT_EQ(out[0], 2);
}

}  // namespace
}  // namespace gqa::test
