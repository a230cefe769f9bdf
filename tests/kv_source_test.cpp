// SPDX-License-Identifier: Apache-2.0
// Sources of keys and values that are not plain tensors.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

// Keys and values that lie in memory as tiles and are read there: what a cache does.
class stored_tiles {
 public:
  using element = float;
  using panel_element = float;

  stored_tiles(const tensor_view<const float, 4>& k, const tensor_view<const float, 4>& v) : plain_(k, v) {
    const index_t tiles = (plain_.kv_len() + 63) / 64;
    memory_.resize(static_cast<std::size_t>(plain_.batch() * plain_.kv_heads() * tiles * plain_.scratch_elements()));
    float* next = memory_.data();
    for (index_t b = 0; b < plain_.batch(); ++b)
      for (index_t g = 0; g < plain_.kv_heads(); ++g)
        for (index_t i = 0; i < tiles; ++i, next += plain_.scratch_elements())
          tiles_.push_back(plain_.tile(b, g, i, std::min<index_t>(64, plain_.kv_len() - 64 * i), next));
  }

  index_t batch() const { return plain_.batch(); }
  index_t kv_heads() const { return plain_.kv_heads(); }
  index_t kv_len() const { return plain_.kv_len(); }
  index_t head_dim() const { return plain_.head_dim(); }
  index_t value_dim() const { return plain_.value_dim(); }
  index_t length(index_t) const { return plain_.kv_len(); }
  index_t scratch_elements() const { return 0; }
  detail::kv_tile<float> tile(index_t b, index_t g, index_t i, index_t, float*) const {
    return tiles_[static_cast<std::size_t>((b * kv_heads() + g) * ((kv_len() + 63) / 64) + i)];
  }
  detail::fault find_fault() const { return {}; }

 private:
  dense_kv<float, float> plain_;
  std::vector<float> memory_;
  std::vector<detail::kv_tile<float>> tiles_;
};
static_assert(kv_source<stored_tiles>);
static_assert(kv_source<dense_kv<float, float>>);

TEST(KvSource, OfStoredTilesIsReadWhereItLies) {
  Eigen::ThreadPool pool(2);
  for (const index_t s : {1, 5, 97, 200}) {
    const operands<float, float> in(attention_case{{2, s, 300, 4, 2, 65, 65}, with_causal | with_sinks, layout::bshd});
    const stored_tiles kv(in.k.view(), in.v.view());
    context serial, on_pool(pool);
    const auto expected = run(in, serial);
    for (context* ctx : {&serial, &on_pool}) {
      std::vector<float> out(expected.out.size());
      attention(in.q.view(), kv, view(out.data(), {2, s, 4, 65}), in.options, *ctx);
      EXPECT_EQ(out, expected.out) << "q_len " << s;
    }
  }
}

}  // namespace
}  // namespace gqa::test
