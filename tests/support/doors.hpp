// SPDX-License-Identifier: Apache-2.0
// That a call's check says what the call is refused with. Each call's test has its own, where it is compiled anyway.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "refusal.hpp"

namespace gqa::test {

// What every call of attention has, whatever its kind, for a test to spoil.
struct door_operands {
  static constexpr index_t tokens = 100, heads = 4, kv_heads = 2, dim = 16;

  std::vector<float> q_data = std::vector<float>(2 * heads * dim, 0.5f);
  std::vector<float> k_data = std::vector<float>(tokens * kv_heads * dim, 0.25f);
  std::vector<float> out_data = std::vector<float>(2 * heads * dim, -7.0f), lse_data = std::vector<float>(8, -7.0f);
  tensor_view<const float, 4> q{q_data.data(), {1, 2, heads, dim}}, k{k_data.data(), {1, tokens, kv_heads, dim}};
  partial_state<float> out{tensor_view<float, 4>(out_data.data(), {1, 2, heads, dim}),
                           tensor_view<float, 3>(lse_data.data(), {1, 2, heads})};
  attention_options options;
  kv_cache<float> cache{1, kv_heads, tokens, dim};

  door_operands() { cache.append(k, k), cache.keep_key_bounds(); }
  // Two groups of each KV head's rows.
  std::vector<query_groups<float>> groups() const {
    std::vector<query_groups<float>> sets(kv_heads);
    for (query_groups<float>& set : sets) {
      set.dim = dim, set.order = {0, 2, 1, 3}, set.offsets = {0, 2, 4};
      set.representatives = std::vector<float>(2 * dim, 0.5f), set.radii = {0, 0};
    }
    return sets;
  }
};

// Spoils operands in turn, and expects check(operands) to say what call(operands, context) is refused with, if it is.
template <class Check, class Call>
void expect_check_says_the_same(const Check& check, const Call& call) {
  using spoil = void (*)(door_operands&);
  static const std::vector<index_t> too_many{101}, zero{0};
  static const std::vector<float> slopes(4, 0.5f);
  static const bool hides[1] = {};
  const std::array<std::pair<spoil, bool>, 14> spoils{{
      // What no call takes.
      {[](door_operands& c) {
         c.q = {c.q_data.data(), {1, 2, 4, 15}, {0, 64, 16, 1}};
       },
       true},
      {[](door_operands& c) {
         c.q = {nullptr, {1, 2, 4, 16}};
       },
       true},
      {[](door_operands& c) {
         c.out.out = {c.q_data.data(), {1, 2, 4, 16}};
       },
       true},
      {[](door_operands& c) {
         c.out.out = {c.out_data.data(), {1, 2, 4, 16}, {0, 0, 16, 1}};
       },
       true},
      {[](door_operands& c) { c.options.scale = std::numeric_limits<double>::quiet_NaN(); }, true},
      {[](door_operands& c) { c.options.softcap = -1; }, true},
      {[](door_operands& c) { c.options.kv_lengths = too_many; }, true},
      {[](door_operands& c) { c.options.query_offset = index_t{1} << 62; }, true},
      // What some do not take.
      {[](door_operands&) {}, false},
      {[](door_operands& c) { c.options.causal = true; }, false},
      {[](door_operands& c) {
         c.options.query_offset = 98, c.options.window = {8, 0};
       },
       false},
      {[](door_operands& c) { c.options.alibi_slopes = slopes; }, false},
      {[](door_operands& c) {
         c.options.mask = tensor_view<const bool, 4>(hides, {1, 1, 2, 100}, {0, 0, 0, 0});
       },
       false},
      {[](door_operands& c) { c.options.query_offsets = zero; }, false},
  }};
  int taken = 0;
  for (std::size_t n = 0; n < spoils.size(); ++n) {
    door_operands c;
    spoils[n].first(c);
    const errc said = check(c);
    context ctx;
    const refusal r = refusal_of([&] { call(c, ctx); });
    EXPECT_EQ(said, r.code) << n << ": " << r.message;
    if (spoils[n].second) {
      EXPECT_NE(said, errc::ok) << n;
    }
    if (said == errc::ok) {
      ++taken;
    } else {
      EXPECT_EQ(c.out_data, std::vector<float>(c.out_data.size(), -7.0f)) << n;
    }
  }
  EXPECT_GT(taken, 0);
}

}  // namespace gqa::test
