// SPDX-License-Identifier: Apache-2.0
// Doors beside attention() check all that it checks: strides and extents that reach out of memory, null data, outputs
// over inputs, enumerators that there are not - before anything is allocated or written.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/doors.hpp"
#include "support/kernels.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

constexpr index_t huge = index_t{1} << 62;

// f is refused with this code, and words that name this argument.
template <class F>
void expect_refused(errc code, const std::string& argument, const F& f) {
  const refusal r = refusal_of(f);
  EXPECT_EQ(r.code, code) << argument << ": " << r.message;
  EXPECT_NE(r.message.find(argument), std::string::npos) << r.message;
}

struct call {
  std::vector<float> q = std::vector<float>(2 * 4 * 16, 0.5f), k = std::vector<float>(10 * 2 * 16, 0.5f);
  std::vector<float> of_rows = std::vector<float>(8, -7.0f), lse = of_rows;
  tensor_view<const float, 4> q_view{q.data(), {1, 2, 4, 16}}, k_view{k.data(), {1, 10, 2, 16}};
  tensor_view<float, 3> rows{of_rows.data(), {1, 2, 4}};
  tensor_view<const float, 3> lse_view{lse.data(), {1, 2, 4}};
  context ctx;
};

TEST(Doors, OfEntropyAndMass) {
  call c;
  const auto entropy = [&](const auto& q, const auto& to, const attention_options& o = {}) {
    return [&, q, to, o] { attention_entropy(q, c.k_view, o, to, c.ctx); };
  };
  const auto mass = [&](const auto& q, const auto& to, const attention_options& o = {}) {
    return [&, q, to, o] {
      attention_mass(q, kv_view(c.k_view, c.k_view), sliding_window(3, 0), c.lse_view, o, to, c.ctx);
    };
  };
  const auto expect_both = [&](errc code, const std::string& of_entropy, const std::string& of_mass, const auto& q,
                               const auto& to, const attention_options& o = {}) {
    expect_refused(code, of_entropy, entropy(q, to, o));
    expect_refused(code, of_mass, mass(q, to, o));
  };
  const tensor_view<float, 3> null(nullptr, {1, 2, 4}), far(c.of_rows.data(), {1, 2, 4}, {8, huge, 1}),
      same(c.of_rows.data(), {1, 2, 4}, {8, 0, 1}), over_q(c.q.data() + 3, {1, 2, 4}), over_k(c.k.data(), {1, 2, 4}),
      of_others(c.of_rows.data(), {1, 2, 3});
  expect_both(errc::shape, "entropy", "mass", c.q_view, null);
  expect_both(errc::stride, "entropy", "mass", c.q_view, far);
  expect_both(errc::stride, "entropy", "mass", c.q_view, same);
  expect_both(errc::stride, "entropy", "mass", c.q_view, over_q);
  expect_both(errc::stride, "entropy", "mass", c.q_view, over_k);
  expect_both(errc::shape, "entropy", "mass", c.q_view, of_others);
  // An absurd query is refused before memory for its outputs is asked for: 8 TB of it.
  const tensor_view<const float, 4> absurd(c.q.data(), {1, index_t{1} << 36, 4, 16}, {0, 0, 16, 1});
  const tensor_view<float, 3> absurd_rows(c.of_rows.data(), {1, index_t{1} << 36, 4}, {0, 0, 1});
  expect_refused(errc::stride, "entropy", entropy(absurd, absurd_rows));
  std::vector<index_t> lengths{10};
  attention_options o;
  o.kv_lengths = lengths;
  expect_refused(errc::stride, "options.kv_lengths", [&] {
    attention_entropy(c.q_view, c.k_view, o,
                      tensor_view<float, 3>(reinterpret_cast<float*>(lengths.data()), {1, 2, 4}, {0, 4, 1}), c.ctx);
  });
  EXPECT_EQ(c.of_rows, std::vector<float>(8, -7.0f));
}

TEST(Doors, OfMapsAndSimilarity) {
  call c;
  std::vector<float> map(20, -7.0f);
  const auto map_to = [&](const tensor_view<float, 2>& to) {
    return [&, to] { attention_map(c.q_view, c.k_view, c.lse_view, attention_options{}, {0, 0, {0, 2}, {0, 10}}, to); };
  };
  expect_refused(errc::shape, "weights", map_to({nullptr, {2, 10}}));
  expect_refused(errc::stride, "weights", map_to({map.data(), {2, 10}, {huge, 1}}));
  expect_refused(errc::stride, "weights", map_to({map.data(), {2, 10}, {0, 1}}));
  expect_refused(errc::stride, "weights", map_to({c.q.data(), {2, 10}}));
  expect_refused(errc::stride, "weights", map_to({c.k.data() + 5, {2, 10}}));
  expect_refused(errc::stride, "weights", map_to({c.lse.data() - 12, {2, 10}}));
  EXPECT_EQ(map, std::vector<float>(20, -7.0f));

  std::vector<double> similarity(2 * 2 * 2, -7.0), x(16 * 8, 1.0);
  const auto similarity_to = [&](const tensor_view<double, 3>& to) {
    return [&, to] { head_similarity(tensor_view<const double, 4>(x.data(), {1, 2, 4, 16}), 2, to); };
  };
  expect_refused(errc::shape, "similarity", similarity_to({nullptr, {2, 2, 2}}));
  expect_refused(errc::stride, "similarity", similarity_to({similarity.data(), {2, 2, 2}, {huge, 2, 1}}));
  expect_refused(errc::stride, "similarity", similarity_to({similarity.data(), {2, 2, 2}, {1, 1, 1}}));
  expect_refused(errc::stride, "similarity", similarity_to({x.data() + 9, {2, 2, 2}}));
  EXPECT_EQ(similarity, std::vector<double>(8, -7.0));
}

TEST(Doors, OfTopKeys) {
  const std::vector<float> weights(20, 0.5f);
  const auto of = [&](const tensor_view<const float, 2>& w) { return [w] { static_cast<void>(top_keys(w, 3)); }; };
  expect_refused(errc::shape, "weights", of({nullptr, {2, 10}}));
  expect_refused(errc::shape, "weights", of({weights.data(), {2, -1}}));
  expect_refused(errc::stride, "weights", of({weights.data(), {2, 10}, {huge, 1}}));
}

TEST(Doors, OfBlockSparseMasks) {
  const block_sparse_shape shape{.q_len = 64, .kv_len = 128, .query_block = 32};
  const auto of = [&](const block_sparse_shape& s, const tensor_view<const bool, 3>& blocks) {
    return [s, blocks] { static_cast<void>(block_sparse_mask::from_blocks(s, 64, blocks)); };
  };
  expect_refused(errc::shape, "blocks", of(shape, {nullptr, {1, 2, 2}}));
  const std::array<bool, 8> some{true, true, true, true};
  expect_refused(errc::stride, "blocks", of(shape, {some.data(), {1, 2, 2}, {4, huge, 1}}));
  block_sparse_shape wide = shape;
  wide.query_block = index_t{1} << 36;
  expect_refused(errc::shape, "query_block", of(wide, {some.data(), {1, 1, 2}}));
  expect_refused(errc::shape, "query_block", [&] {
    static_cast<void>(block_sparse_mask::from_pairs(wide, [](index_t, index_t, index_t) { return true; }));
  });
  // Accessors beyond what there is find nothing.
  const auto mask = block_sparse_mask::from_blocks(shape, 64, {some.data(), {1, 2, 2}});
  EXPECT_EQ(mask.tiles(0, 0, 1).size(), 2u);
  for (const auto& [batch, list, block] :
       {std::array<index_t, 3>{0, 0, 2}, {0, 0, -1}, {0, 1, 0}, {0, -1, 0}, {-1, 0, 0}, {0, 0, huge}, {0, huge, 0}})
    EXPECT_TRUE(mask.tiles(batch, list, block).empty());
}

TEST(Doors, OfLatentAttention) {
  constexpr index_t rank = 8, rope = 4, nope = 6, heads = 2, value_dim = 5, tokens = 9;
  latent_kv_cache<float> cache(1, 16, rank + rope, rank);
  const std::vector<float> rows(tokens * (rank + rope), 0.5f);
  cache.append(view(rows.data(), {1, tokens, 1, rank + rope}));
  std::vector<float> q_nope(heads * nope, 0.5f), q_rope(heads * rope, 0.5f), w_k(heads * nope * rank, 0.5f),
      w_v(heads * value_dim * rank, 0.5f), out(heads * value_dim, -7.0f);
  latent_projections w{{w_k.data(), {heads, nope, rank}}, {w_v.data(), {heads, value_dim, rank}}};
  latent_options options;
  context ctx;
  const auto to = [&](const tensor_view<float, 4>& result) {
    latent_attention(view(q_nope.data(), {1, 1, heads, nope}), view(q_rope.data(), {1, 1, heads, rope}), cache, w,
                     result, options, ctx);
  };
  const tensor_view<float, 4> sound(out.data(), {1, 1, heads, value_dim});
  const auto run = [&] { to(sound); };
  const latent_projections before = w;
  w.keys = {w_k.data(), {heads, nope, rank}, {huge, rank, 1}};
  expect_refused(errc::stride, "projections.keys", run);
  w.keys = {w_k.data(), {heads, nope, rank}, {nope * rank, huge, 1}};
  expect_refused(errc::stride, "projections.keys", run);
  w = before, w.values = {nullptr, {heads, value_dim, rank}};
  expect_refused(errc::shape, "projections.values", run);
  w = before;
  options.form = static_cast<latent_form>(7);
  expect_refused(errc::option, "options.form", run);
  options = {};
  // Outputs over themselves, over lengths, over a mask.
  expect_refused(errc::stride, "out", [&] { to({out.data(), {1, 1, heads, value_dim}, {0, 0, 2, 1}}); });
  std::vector<index_t> lengths(5, 3);
  options.attention.kv_lengths = std::span(lengths).first(1);
  expect_refused(errc::stride, "options.kv_lengths", [&] {
    to({reinterpret_cast<float*>(lengths.data()), {1, 1, heads, value_dim}});
  });
  options = {};
  std::vector<float> mask(heads * value_dim, 0.0f);
  options.attention.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(mask.data()), {1, 1, 1, tokens});
  expect_refused(errc::stride, "options.mask", [&] { to({mask.data(), {1, 1, heads, value_dim}}); });
  EXPECT_EQ(out, std::vector<float>(out.size(), -7.0f));
  options = {};
  run();
  EXPECT_NE(out[0], -7.0f);
}

TEST(Doors, OfRope) {
  const rope embedding(8);
  std::vector<float> x(3 * 8, 1.0f);
  context ctx;
  const std::vector<index_t> one{index_t{1} << 60};
  const tensor_view<float, 4> absurd(x.data(), {1, huge, 1, 8}, {0, 0, 8, 1});
  expect_refused(errc::shape, "x", [&] { embedding.rotate(absurd, std::span(one), ctx); });
  const tensor_view<float, 4> both(x.data(), {huge, 4, 1, 8}, {0, 0, 8, 1});
  expect_refused(errc::shape, "x", [&] { embedding.rotate_each(both, {}, ctx); });
  EXPECT_EQ(x, std::vector<float>(x.size(), 1.0f));
}

TEST(Doors, OfProjectedKeys) {
  kv_cache<float> cache(1, 2, 16, 8);
  const projected_keys<float> keys(cache, {.rank = 2});
  EXPECT_EQ(keys.rank(0, 1), 2);
  for (const auto& [sequence, head] : {std::array<index_t, 2>{0, 2}, {0, -1}, {1, 0}, {-1, 0}, {huge, huge}}) {
    EXPECT_EQ(keys.rank(sequence, head), 0);
    EXPECT_EQ(keys.residual(sequence, head), 0);
  }
  EXPECT_EQ(keys.length(1), 0);
  EXPECT_EQ(keys.length(-1), 0);
}

// Strides of axes with one index are never stepped over: any number will do, for log-sum-exps as for outputs.
TEST(Doors, OfAttentionAndMergesHaveChecks) {
  expect_check_says_the_same([](const door_operands& c) { return check(c.q, c.cache, c.out, c.options); },
                             [](door_operands& c, context& ctx) { attention(c.q, c.cache, c.out, c.options, ctx); });
  door_operands c;
  std::vector<float> others(c.out_data.size());
  const partial_state<float> other{tensor_view<float, 4>(others.data(), {1, 2, 4, 16}),
                                   tensor_view<float, 3>(others.data(), {1, 2, 4})};
  EXPECT_EQ(check(c.out, other), errc::ok);
  EXPECT_EQ(check(c.out, partial_state<float>{tensor_view<float, 4>(others.data(), {1, 2, 4, 8}), other.lse}),
            errc::shape);
  const std::vector<partial_state<const float>> states{other, c.out};
  EXPECT_EQ(check<float>(states, c.out), errc::ok);
}

TEST(Doors, TakeAnyStrideOfAnAxisOfOne) {
  call c;
  std::vector<float> out(2 * 4 * 16), lse(8);
  const partial_state<float> state{{out.data(), {1, 2, 4, 16}, {huge, 64, 16, 1}},
                                   {lse.data(), {1, 2, 4}, {huge, 4, 1}}};
  attention(c.q_view, c.k_view, c.k_view, state, {}, c.ctx);
  EXPECT_NE(lse[7], 0);
}

}  // namespace
}  // namespace gqa::test
