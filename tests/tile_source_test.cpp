// SPDX-License-Identifier: Apache-2.0
// What the engine knows of sources: abilities found in any kv_source, and passed on by wrappers.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include <gqa/gqa.hpp>

namespace gqa::test {
namespace {

// A source that answers every question in a way of its own.
class talkative_source final : public detail::tile_source<float> {
 public:
  talkative_source() noexcept {
    facts_ = {.batch = 3,
              .kv_heads = 4,
              .kv_len = 500,
              .head_dim = 8,
              .value_dim = 24,
              .scratch_elements = 0,
              .page_size = 16,
              .has_strips = true,
              .has_gaps = true,
              .heads_lie_together = true,
              .scatters_panels = true,
              .makes_tiles_in_cache = true};
    kernels_.tiles = &detail::stream_table_of<float, float, detail::reading::in_order>;
    kernels_.strips = &detail::strip_table_of<float, float, float, float>;
  }
  [[nodiscard]] detail::fault find_fault() const noexcept override {
    return detail::make_fault(errc::page, "of its own");
  }
  [[nodiscard]] detail::fault find_overlap(const detail::operand&) const noexcept override {
    return detail::make_fault(errc::stride, "an overlap");
  }
  [[nodiscard]] bool has_sequence(index_t b) const noexcept override { return b == 2; }
  [[nodiscard]] index_t length(index_t b) const noexcept override { return 100 + b; }
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept override { return {b, b + 1}; }
  [[nodiscard]] std::span<const std::int32_t> pages_of(index_t) const noexcept override { return pages_; }
  [[nodiscard]] bool has_shared_pages(index_t b) const noexcept override { return b == 1; }
  void find_strips(index_t, index_t, index_t i, detail::tile_strips& strips) const noexcept override {
    strips.k[0].stride = 7 * i;
  }
  [[nodiscard]] detail::kv_ahead ahead(index_t g, const detail::group_visit&) const noexcept override {
    return {{g, 1}, {g, 2}};
  }
  [[nodiscard]] detail::kv_tile<float> tile(index_t, index_t, index_t, index_t, float*) const noexcept override {
    return {};
  }

 private:
  std::array<std::int32_t, 2> pages_{5, 6};
};

// A wrapper that changes nothing.
class wrapper final : public detail::wrapped_source<float> {
 public:
  explicit wrapper(const detail::tile_source<float>& inner) noexcept : wrapped_source<float>(inner), inner_(inner) {}
  [[nodiscard]] detail::kv_tile<float> tile(index_t b, index_t g, index_t i, index_t tokens,
                                            float* scratch) const noexcept override {
    return inner_.tile(b, g, i, tokens, scratch);
  }

 private:
  const detail::tile_source<float>& inner_;
};

TEST(WrappedSource, PassesOnAllThatItsSourceCan) {
  const talkative_source source;
  const wrapper wrapped(source);
  const detail::source_facts& facts = wrapped.about();
  EXPECT_EQ(facts.batch, 3);
  EXPECT_EQ(facts.kv_heads, 4);
  EXPECT_EQ(facts.kv_len, 500);
  EXPECT_EQ(facts.head_dim, 8);
  EXPECT_EQ(facts.value_dim, 24);
  EXPECT_EQ(facts.page_size, 16);
  EXPECT_TRUE(facts.has_strips && facts.has_gaps && facts.heads_lie_together && facts.scatters_panels &&
              facts.makes_tiles_in_cache);
  EXPECT_EQ(wrapped.find_fault().code, errc::page);
  EXPECT_EQ(wrapped.find_overlap({}).code, errc::stride);
  EXPECT_TRUE(wrapped.has_sequence(2));
  EXPECT_FALSE(wrapped.has_sequence(1));
  EXPECT_EQ(wrapped.length(2), 102);
  EXPECT_EQ(wrapped.gone_tiles(2), (key_range{2, 3}));
  EXPECT_EQ(wrapped.pages_of(0).size(), 2U);
  EXPECT_TRUE(wrapped.has_shared_pages(1));
  detail::tile_strips strips{};
  wrapped.find_strips(0, 0, 3, strips);
  EXPECT_EQ(strips.k[0].stride, 21);
  EXPECT_EQ(wrapped.ahead(3, {1, 1}).k.bytes, 3);
  EXPECT_EQ(wrapped.kernels<float>().tiles, source.kernels<float>().tiles);
  EXPECT_NE(wrapped.kernels<float>().strips, nullptr);
}

TEST(AdaptedSource, FindsWhatASourceHas) {
  const std::vector<float> x(2 * 100 * 3 * 16);
  const auto rows = view(x.data(), {2, 100, 3, 16});
  const auto plain = kv_view(rows, rows);
  const detail::adapted_source dense(plain);
  EXPECT_TRUE(dense.about().has_strips && dense.about().heads_lie_together);
  EXPECT_GT(dense.about().scratch_elements, 0);
  EXPECT_NE(dense.kernels<float>().strips, nullptr);
  EXPECT_EQ(dense.kernels<float>().tiles, nullptr);  // there are none in memory

  kv_cache<float> cache(2, 3, 100, 16);
  const detail::adapted_source of_cache(cache);
  EXPECT_EQ(of_cache.about().scratch_elements, 0);
  EXPECT_FALSE(of_cache.about().has_strips || of_cache.about().has_gaps || of_cache.about().scatters_panels);
  EXPECT_NE(of_cache.kernels<float>().tiles, nullptr);
  EXPECT_EQ(of_cache.kernels<float>().panels, nullptr);
  EXPECT_NE((detail::adapted_source<kv_cache<float>, detail::tile_parts::panels>(cache).kernels<float>().panels),
            nullptr);

  const ring_kv_cache<float> ring(1, 3, 0, 100, 16);
  EXPECT_TRUE(detail::adapted_source(ring).about().has_gaps);

  paged_kv_cache<float> pool(1, 4, 16, 3, 16);
  const auto layer = pool.layer(0);
  const detail::adapted_source pages(layer);
  EXPECT_EQ(pages.about().page_size, 16);
  EXPECT_TRUE(pages.about().scatters_panels);

  const latent_kv_cache<float> latent(1, 100, 16, 8);
  EXPECT_TRUE(detail::adapted_source(latent).about().makes_tiles_in_cache);
  EXPECT_EQ(detail::adapted_source(latent).kernels<float>().tiles, nullptr);
}

// A source that is wrong is asked for nothing but what is wrong with it.
TEST(AdaptedSource, AsksNothingOfASourceThatIsWrong) {
  const std::vector<float> x(64);
  const std::vector<std::int32_t> indices{9}, offsets{0, 1};
  const std::vector<index_t> lengths{16};
  const auto pages = view(x.data(), {1, 16, 1, 4});
  const paged_view<float> kv(pages, pages, indices, offsets, lengths);
  const detail::adapted_source source(kv);
  EXPECT_EQ(source.find_fault().code, errc::page);
  EXPECT_EQ(source.batch(), 0);
}

}  // namespace
}  // namespace gqa::test
