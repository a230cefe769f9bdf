// SPDX-License-Identifier: Apache-2.0
// A score function and a mask of your own, inlined into the tile loop: documents packed into one sequence, with scores
// that fade over distance.
#include <gqa/gqa.hpp>

#include <algorithm>

#include "check.hpp"

struct fading_documents {
  gqa::index_t document;  // tokens of a document

  float score(float s, const gqa::position& p) const { return s - 0.01f * static_cast<float>(p.query - p.key); }

  // A key is visible within its query's document.
  bool visible(const gqa::position& p) const { return p.query / document == p.key / document; }

  // The same of a whole block, so that tiles of other documents are skipped. `some` would always be right.
  gqa::visibility visible(const gqa::key_block& b) const {
    const gqa::index_t first_query = b.query_begin / document, last_query = (b.query_end - 1) / document;
    const gqa::index_t first_key = b.key_begin / document, last_key = (b.key_end - 1) / document;
    if (last_key < first_query || last_query < first_key) return gqa::visibility::none;
    const bool one = first_query == last_query && first_key == last_key && first_query == first_key;
    return one ? gqa::visibility::all : gqa::visibility::some;
  }
};

int main() {
  constexpr gqa::index_t tokens = 400, q_heads = 4, kv_heads = 1, dim = 64;
  const std::vector<float> q = example::random(tokens * q_heads * dim);
  const std::vector<float> k = example::random(tokens * kv_heads * dim), v = example::random(tokens * kv_heads * dim);
  std::vector<float> out(q.size()), expected(q.size());
  const auto q_view = gqa::view(q.data(), {1, tokens, q_heads, dim});
  const auto k_view = gqa::view(k.data(), {1, tokens, kv_heads, dim}),
             v_view = gqa::view(v.data(), {1, tokens, kv_heads, dim});

  const fading_documents variant{90};
  gqa::context ctx;
  gqa::attention(q_view, k_view, v_view, gqa::view(out.data(), {1, tokens, q_heads, dim}), {.causal = true}, variant,
                 ctx);

  gqa::reference::attention(q_view, k_view, v_view, gqa::view(expected.data(), {1, tokens, q_heads, dim}),
                            {.causal = true}, variant);
  return example::ended(example::same(out, expected));
}
