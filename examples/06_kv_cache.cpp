// SPDX-License-Identifier: Apache-2.0
// Two conversations in one cache of bfloat16: prompts in chunks, a token guessed and taken back, and outputs of the
// same bits as if all tokens of a conversation had come in one call.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <vector>

#include "check.hpp"

namespace model {
constexpr gqa::index_t q_heads = 8, kv_heads = 2, dim = 64, row = q_heads * dim, kv_row = kv_heads * dim;
}

// Queries, keys and values of a conversation's tokens.
struct conversation {
  gqa::index_t length;
  std::vector<float> q = example::random(length * model::row), k = example::random(length * model::kv_row),
                     v = example::random(length * model::kv_row);

  auto keys(gqa::index_t from, gqa::index_t to) const {
    return gqa::view(k.data() + from * model::kv_row, {1, to - from, model::kv_heads, model::dim});
  }
  auto values(gqa::index_t from, gqa::index_t to) const {
    return gqa::view(v.data() + from * model::kv_row, {1, to - from, model::kv_heads, model::dim});
  }
};

int main() {
  const conversation conversations[] = {{150}, {90}};
  gqa::huge_pages memory;  // outlives the cache
  gqa::kv_cache<Eigen::bfloat16> cache(2, model::kv_heads, 256, model::dim, model::dim, &memory);
  gqa::context ctx;

  // Both prompts, up to 64 tokens at a time.
  for (gqa::index_t i = 0; i < 2; ++i) {
    const conversation& c = conversations[i];
    for (gqa::index_t from = 0; from < c.length; from += 64) {
      const gqa::index_t to = std::min(from + 64, c.length);
      cache.append(i, c.keys(from, to), c.values(from, to));
    }
  }
  // A draft model's guess for both, which is wrong: one token each, and back.
  const auto guess = example::random(2 * model::kv_row);
  const auto guessed = gqa::view(guess.data(), {2, 1, model::kv_heads, model::dim});
  cache.append(guessed, guessed);
  for (gqa::index_t i = 0; i < 2; ++i) cache.truncate(i, conversations[i].length);

  // One decode step of both: each query is at the end of its own conversation.
  std::vector<float> last, out(2 * model::row);
  for (const conversation& c : conversations) last.insert(last.end(), c.q.end() - model::row, c.q.end());
  gqa::attention(gqa::view(last.data(), {2, 1, model::q_heads, model::dim}), cache,
                 gqa::view(out.data(), {2, 1, model::q_heads, model::dim}), {.causal = true}, ctx);

  // Each again: all of its tokens at once.
  bool same = true;
  for (gqa::index_t i = 0; i < 2; ++i) {
    const conversation& c = conversations[i];
    gqa::kv_cache<Eigen::bfloat16> whole(1, model::kv_heads, c.length, model::dim);
    whole.append(c.keys(0, c.length), c.values(0, c.length));
    std::vector<float> expected(c.q.size());
    gqa::attention(gqa::view(c.q.data(), {1, c.length, model::q_heads, model::dim}), whole,
                   gqa::view(expected.data(), {1, c.length, model::q_heads, model::dim}), {.causal = true}, ctx);
    same = example::same_bits(out.data() + i * model::row, expected.data() + (c.length - 1) * model::row, model::row) &&
           same;
  }
  return example::ended(same ? 0 : 1);
}
