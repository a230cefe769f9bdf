// SPDX-License-Identifier: Apache-2.0
// Two conversations in one cache of bfloat16: prompts in chunks, a token guessed and taken back, and outputs of the
// same bits as if all tokens of a conversation had come in one call.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <vector>

#include "check.hpp"

int main() {
  constexpr gqa::index_t q_heads = 8, kv_heads = 2, dim = 64, row = q_heads * dim, kv_row = kv_heads * dim;
  constexpr gqa::index_t lengths[2] = {150, 90};
  gqa::huge_pages memory;  // outlives the cache
  gqa::kv_cache<Eigen::bfloat16> cache(2, kv_heads, 256, dim, dim, &memory), whole(1, kv_heads, 256, dim, dim, &memory);
  gqa::context ctx;

  const auto q = example::random(lengths[0] * row), k = example::random(lengths[0] * kv_row),
             v = example::random(lengths[0] * kv_row);
  const auto keys = [&](gqa::index_t from, gqa::index_t to) {
    return gqa::view(k.data() + from * kv_row, {1, to - from, kv_heads, dim});
  };
  const auto values = [&](gqa::index_t from, gqa::index_t to) {
    return gqa::view(v.data() + from * kv_row, {1, to - from, kv_heads, dim});
  };

  // Both prompts, 64 tokens at a time.
  for (gqa::index_t conversation = 0; conversation < 2; ++conversation) {
    for (gqa::index_t from = 0; from < lengths[conversation]; from += 64) {
      const gqa::index_t to = std::min(from + 64, lengths[conversation]);
      cache.append(conversation, keys(from, to), values(from, to));
    }
  }
  // A draft model's guess for both, which is wrong: one token each, and back.
  const auto guess = example::random(2 * kv_row);
  const auto guessed = gqa::view(guess.data(), {2, 1, kv_heads, dim});
  cache.append(guessed, guessed);
  for (gqa::index_t conversation = 0; conversation < 2; ++conversation)
    cache.truncate(conversation, lengths[conversation]);

  // One decode step of both: each query is at the end of its own conversation.
  std::vector<float> last, out(2 * row);
  for (const gqa::index_t length : lengths)
    last.insert(last.end(), q.data() + (length - 1) * row, q.data() + length * row);
  gqa::attention(gqa::view(last.data(), {2, 1, q_heads, dim}), cache, gqa::view(out.data(), {2, 1, q_heads, dim}),
                 {.causal = true}, ctx);

  // The longer one again: all of its tokens at once.
  std::vector<float> expected(q.size());
  whole.append(keys(0, lengths[0]), values(0, lengths[0]));
  gqa::attention(gqa::view(q.data(), {1, lengths[0], q_heads, dim}), whole,
                 gqa::view(expected.data(), {1, lengths[0], q_heads, dim}), {.causal = true}, ctx);
  return example::same_bits(out.data(), expected.data() + (lengths[0] - 1) * row, row) ? 0 : 1;
}
