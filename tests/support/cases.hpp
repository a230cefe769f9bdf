// SPDX-License-Identifier: Apache-2.0
// One attention call as data: shape, layouts, options, seed. The grid, the option pairs and the random cases are all
// made of it, and its name is made from it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

#include "rng.hpp"
#include "tensor.hpp"

namespace gqa::test {

// B batch, S q_len, T kv_len, H q_heads, G kv_heads, D head dim, E value dim.
struct shape {
  index_t b = 1, s = 1, t = 1, h = 1, g = 1, d = 8, e = 8;
};

enum option_bit : unsigned {
  with_causal = 1u << 0,
  with_window = 1u << 1,
  with_softcap = 1u << 2,
  with_alibi = 1u << 3,
  with_sinks = 1u << 4,
  with_mask = 1u << 5,
  with_bias = 1u << 6,
  with_lengths = 1u << 7,
  with_offset = 1u << 8,
  with_offsets = 1u << 9,
  with_scale = 1u << 10,
  with_groups = 1u << 11,
  with_broadcast_mask = 1u << 12,
  with_float_products = 1u << 13,
};
inline constexpr unsigned option_count = 14;

struct attention_case {
  test::shape shape;
  unsigned options = 0;
  layout kv_layout = layout::bshd;
  std::uint64_t seed = 1;
  double magnitude = 1;  // of the queries

  [[nodiscard]] std::string name() const {
    static constexpr std::array<const char*, option_count> names = {
        "causal",  "window", "softcap", "alibi", "sinks",  "mask",      "bias",
        "lengths", "offset", "offsets", "scale", "groups", "broadcast", "float_products"};
    std::ostringstream text;
    text << 'b' << shape.b << 'q' << shape.s << 't' << shape.t << 'h' << shape.h << 'g' << shape.g << 'd' << shape.d
         << 'e' << shape.e;
    for (unsigned i = 0; i < option_count; ++i) {
      if ((options >> i & 1) != 0) text << '_' << names[i];
    }
    text << (kv_layout == layout::bhsd ? "_bhsd" : "_bshd") << "_seed" << seed;
    return text.str();
  }
};

// The operands of a case, in K's element type (queries in Q's), and its options with the memory they point to.
template <class Q, class K>
struct operands {
  attention_case of;
  tensor<Q> q;
  tensor<K> k, v;
  attention_options options;
  std::vector<index_t> offsets, lengths, groups;
  std::vector<float> slopes, sinks, bias;
  std::unique_ptr<bool[]> mask;

  explicit operands(const attention_case& c)
      : of(c),
        q({c.shape.b, c.shape.s, c.shape.h, c.shape.d}, layout::bshd),
        k({c.shape.b, c.shape.t, c.shape.g, c.shape.d}, c.kv_layout),
        v({c.shape.b, c.shape.t, c.shape.g, c.shape.e}, c.kv_layout) {
    const auto& n = c.shape;
    rng random(c.seed);
    for (auto& x : q.data()) x = static_cast<Q>(static_cast<K>(random.normal() * c.magnitude));
    for (auto& x : k.data()) x = static_cast<K>(random.normal());
    for (auto& x : v.data()) x = static_cast<K>(random.normal());
    const auto has = [&](option_bit bit) { return (c.options & bit) != 0; };
    options.causal = has(with_causal);
    if (has(with_float_products)) options.float_products = std::is_same_v<Q, K>;  // not the default
    if (has(with_window)) options.window = {random.between(0, std::max<index_t>(n.t, 4)), random.between(-1, n.t)};
    if (has(with_softcap)) options.softcap = 0.5 + 20 * random.uniform();
    if (has(with_alibi)) {
      for (index_t h = 0; h < n.h; ++h)
        slopes.push_back(static_cast<float>(std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(n.h))));
      options.alibi_slopes = slopes;
    }
    if (has(with_sinks)) {
      for (index_t h = 0; h < n.h; ++h)
        sinks.push_back(random.chance(0.2) ? -std::numeric_limits<float>::infinity()
                                           : static_cast<float>(2 * random.normal()));
      options.sinks = sinks;
    }
    const index_t mask_b = has(with_broadcast_mask) ? 1 : n.b, mask_h = has(with_broadcast_mask) ? 1 : n.h;
    const std::array<index_t, 4> mask_extents{mask_b, mask_h, n.s, n.t};
    const auto mask_size = static_cast<std::size_t>(mask_b * mask_h * n.s * n.t);
    if (has(with_mask)) {
      mask = std::make_unique<bool[]>(std::max<std::size_t>(mask_size, 1));
      const double density = random.uniform();
      for (std::size_t i = 0; i < mask_size; ++i) mask[i] = random.chance(density);
      options.mask = tensor_view<const bool, 4>(mask.get(), mask_extents);
    }
    if (has(with_bias)) {
      bias.resize(std::max<std::size_t>(mask_size, 1));
      for (auto& x : bias)
        x = random.chance(0.1) ? -std::numeric_limits<float>::infinity() : static_cast<float>(random.normal());
      options.bias = tensor_view<const float, 4>(bias.data(), mask_extents);
    }
    if (has(with_lengths)) {
      for (index_t b = 0; b < n.b; ++b) lengths.push_back(random.between(0, n.t));
      options.kv_lengths = lengths;
    }
    if (has(with_offset) && !has(with_offsets)) options.query_offset = random.between(-5, n.t + 5);
    if (has(with_offsets)) {
      for (index_t b = 0; b < n.b; ++b) offsets.push_back(random.between(-5, n.t + 5));
      options.query_offsets = offsets;
    }
    if (has(with_scale)) options.scale = random.chance(0.2) ? 0.0 : random.normal();
    if (has(with_groups)) {
      for (index_t g = 1; g < n.g; ++g) groups.push_back(random.between(0, n.h));
      groups.push_back(0);
      groups.push_back(n.h);
      std::sort(groups.begin(), groups.end());
      options.group_offsets = groups;
    }
  }
};

// How many random cases a test draws: GQA_TEST_CASES, or 300.
inline unsigned number_of_random_cases() {
  const char* const text = std::getenv("GQA_TEST_CASES");
  const unsigned long number = text == nullptr ? 300 : std::strtoul(text, nullptr, 10);
  EXPECT_GT(number, 0u) << "GQA_TEST_CASES=" << text;
  return static_cast<unsigned>(number);
}

// A case drawn at random from what section "grid" of the tests covers: lengths around the tile, odd group sizes, common
// and uncommon head dims.
inline attention_case random_case(std::uint64_t seed) {
  rng random(seed ^ 0x5eed);
  attention_case c;
  c.seed = seed;
  auto& n = c.shape;
  n.b = random.pick({1, 1, 2, 3});
  n.g = random.pick({1, 2, 3});
  n.h = n.g * random.pick({1, 2, 3, 5, 7, 8});
  n.d = random.pick({1, 8, 40, 64, 65, 72, 80, 96, 128});
  n.e = random.chance(0.7) ? n.d : random.pick({1, 8, 40, 64, 65, 72, 80, 96, 128, 144});
  n.s = random.pick({0, 1, 1, 1, 2, 4, 5, 17, 33, 64});
  n.t = random.pick({0, 1, 7, 63, 64, 65, 97, 128, 191, 257, 1023, 1024, 1025, 1100});
  if (n.t > 1000) n.s = std::min<index_t>(n.s, 5);
  for (unsigned i = 0; i < option_count; ++i) {
    if (random.chance(0.25)) c.options |= 1u << i;
  }
  if (random.chance(0.5)) c.options |= with_causal;
  c.kv_layout = random.chance(0.5) ? layout::bshd : layout::bhsd;
  c.magnitude = random.chance(0.25) ? 4 : 1;
  return c;
}

}  // namespace gqa::test
