// SPDX-License-Identifier: Apache-2.0
// Strides, 16-bit words, padded sequences: an engine's memory as it is.
#include <gqa/gqa.hpp>

#include <array>
#include <cstdint>

#include "check.hpp"

int main() {
  constexpr gqa::index_t batch = 2, capacity = 256, q_heads = 8, kv_heads = 2, dim = 64;
  // One buffer with keys and values as bfloat16 bits, [batch][kv head][capacity][2 * dim]: a key, then its value.
  const std::vector<float> numbers = example::random(batch * kv_heads * capacity * 2 * dim);
  std::vector<std::uint16_t> words;
  for (const float x : numbers) words.push_back(Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(x)));

  const std::array<gqa::index_t, 4> extents{batch, capacity, kv_heads, dim};  // always [B, T, G, D] ...
  const std::array<gqa::index_t, 4> strides{kv_heads * capacity * 2 * dim, 2 * dim, capacity * 2 * dim,
                                            1};  // ... with any strides
  const auto k = gqa::view_as<Eigen::bfloat16>(std::as_const(words).data(), extents, strides);
  const auto v = gqa::view_as<Eigen::bfloat16>(std::as_const(words).data() + dim, extents, strides);

  const std::array<gqa::index_t, 2> lengths{200, 37};  // keys in use; what lies behind them is never read
  std::vector<float> q = example::random(batch * q_heads * dim), out(q.size()), expected(q.size());  // float queries
  const gqa::attention_options options{.causal = true, .kv_lengths = lengths};
  gqa::attention(gqa::view(q.data(), {batch, 1, q_heads, dim}), k, v, gqa::view(out.data(), {batch, 1, q_heads, dim}),
                 options);

  gqa::reference::attention(gqa::view(q.data(), {batch, 1, q_heads, dim}), k, v,
                            gqa::view(expected.data(), {batch, 1, q_heads, dim}), options);
  return example::ended(example::same(out, expected));
}
