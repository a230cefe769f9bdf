// SPDX-License-Identifier: Apache-2.0
// A prompt in one call, then tokens one by one, over keys and values in memory of your own.
#include <gqa/gqa.hpp>

#include "check.hpp"

int main() {
  constexpr gqa::index_t prompt = 100, total = 104, q_heads = 8, kv_heads = 2, dim = 64;
  // All keys and values there will be: [1, T, G, D] memory, of which a growing front part is in use.
  std::vector<float> q = example::random(total * q_heads * dim), out(q.size());
  std::vector<float> k = example::random(total * kv_heads * dim), v = example::random(total * kv_heads * dim);

  gqa::context ctx;  // keeps scratch memory between calls
  const auto step = [&](gqa::index_t from, gqa::index_t to) {
    const gqa::index_t row = q_heads * dim;
    gqa::attention(gqa::view(q.data() + from * row, {1, to - from, q_heads, dim}),  // the new queries
                   gqa::view(k.data(), {1, to, kv_heads, dim}),                     // all keys so far
                   gqa::view(v.data(), {1, to, kv_heads, dim}),
                   gqa::view(out.data() + from * row, {1, to - from, q_heads, dim}), {.causal = true}, ctx);
  };
  step(0, prompt);                                               // prefill
  for (gqa::index_t t = prompt; t < total; ++t) step(t, t + 1);  // decode: the query is at the end of the keys

  std::vector<float> expected(q.size());
  gqa::reference::attention(gqa::view(q.data(), {1, total, q_heads, dim}),
                            gqa::view(k.data(), {1, total, kv_heads, dim}),
                            gqa::view(v.data(), {1, total, kv_heads, dim}),
                            gqa::view(expected.data(), {1, total, q_heads, dim}), {.causal = true});
  return example::ended(example::same(out, expected));
}
