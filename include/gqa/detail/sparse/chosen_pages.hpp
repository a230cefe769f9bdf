// SPDX-License-Identifier: Apache-2.0
/// \file
/// chosen_pages: the rules of a round of page selection.
#pragma once

#include <cstdint>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/integers.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/sparse/page_ranker.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// The pages of a round: no key of others is seen.
template <class A>
class chosen_pages final : public row_rules<A> {
 public:
  /// pages [batch, kv_heads, words], a bit a page.
  chosen_pages(const call_shape& shape, std::span<const index_t> group_offsets, index_t page_tokens,
               std::uint64_t* pages, index_t words) noexcept
      : row_rules<A>({.hides = true, .hides_blocks = true, .shows_panels = true}),
        q_heads_(shape.q_heads),
        kv_heads_(shape.kv_heads),
        group_offsets_(group_offsets),
        page_tokens_(page_tokens),
        pages_(pages),
        words_(words) {}

  [[nodiscard]] visibility visible(const key_block& b) const noexcept override {
    const page_bits pages = pages_of(b.batch, b.q_head_begin);
    const index_t first = b.key_begin / page_tokens_, end = ceil_div(b.key_end, page_tokens_);
    if (end == first + 1) return pages.has(first) ? visibility::all : visibility::none;
    index_t seen = 0;
    for (index_t page = first; page < end; ++page) seen += pages.has(page) ? 1 : 0;
    return seen == 0 ? visibility::none : seen == end - first ? visibility::all : visibility::some;
  }
  [[nodiscard]] std::uint64_t visible_bits(std::uint64_t bits, const row_index& row,
                                           index_t first_key) const noexcept override {
    const page_bits pages = pages_of(row.batch, row.q_head);
    std::uint64_t seen = 0;
    for (index_t t = 0; t < tile_tokens; t += page_tokens_) {
      if (pages.has((first_key + t) / page_tokens_)) seen |= bits_between(t, t + page_tokens_);
    }
    return bits & seen;
  }
  [[nodiscard]] key_rules::seen_panels find_panels(index_t b, index_t first_head,
                                                   key_range tiles) const noexcept override {
    const page_bits pages = pages_of(b, first_head);
    for (index_t tile = tiles.begin; tile < tiles.end; ++tile) {
      if (const std::uint32_t panels = panels_of(pages, tile); panels != 0) return {tile, panels};
    }
    return {tiles.end, 0};
  }

 private:
  [[nodiscard]] page_bits pages_of(index_t b, index_t q_head) const noexcept {
    return page_bits(pages_ + (b * kv_heads_ + kv_head_of(q_head, q_heads_, kv_heads_, group_offsets_)) * words_);
  }
  [[nodiscard]] std::uint32_t panels_of(const page_bits& pages, index_t tile) const noexcept {
    if (page_tokens_ == tile_tokens) return pages.has(tile) ? all_panels : 0;
    std::uint32_t panels = 0;
    for (index_t n = 0; n < tile_panels; ++n)
      panels |= static_cast<std::uint32_t>(pages.has(tile * tile_panels + n)) << n;
    return panels;
  }

  index_t q_heads_, kv_heads_;
  std::span<const index_t> group_offsets_;
  index_t page_tokens_;
  std::uint64_t* pages_;
  index_t words_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
