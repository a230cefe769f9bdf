// SPDX-License-Identifier: Apache-2.0
/// \file
/// adapted_source: any kv_source (kv_source.hpp) as the engine reads it; adapted_keys: as checks see it.
///
/// Only this file probes which of its optional functions a kv_source has. The answers, and the source's own fault, are
/// kept for the call; after that a key tile costs one virtual call.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/kernel/block_operands.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Whether a call reads only whole key tiles, or also single panels of some (page_selection.hpp).
enum class tile_parts { whole, panels };

/// Whether some key tiles of a source may be gone.
template <class Source>
inline constexpr bool may_have_gaps = requires(const Source& kv) {
  kv.gone_tiles(index_t{});
};

/// All but the tiles of a source, which outlives it. Base: key_source, for checks, which compile no kernels then; or
/// the tile_source of the engine.
template <class Source, class Base>
class adapted_keys : public Base {
 protected:
  static constexpr bool has_rows = requires(const Source& kv) {
    kv.rows(index_t{}, index_t{}, index_t{});
    kv.ahead(index_t{}, group_visit{});
  };
  static constexpr bool has_gaps = may_have_gaps<Source>;
  static constexpr bool has_pages = requires(const Source& kv) { kv.pages_of(index_t{}); };
  static constexpr bool makes_tiles_in_cache = requires { requires Source::makes_tiles_in_cache; };
  static_assert(!(has_pages && (has_rows || has_gaps)),
                "gqa: sequences of a source that share pages have no rows to be read in place, and no tiles gone");

 public:
  explicit adapted_keys(const Source& kv) noexcept : kv_(kv), fault_(kv.find_fault()) {
    if (!fault_) this->facts_ = facts_of(kv);
  }

  [[nodiscard]] fault find_fault() const noexcept override { return fault_; }
  [[nodiscard]] GQA_ONCE fault find_overlap(const operand& out) const noexcept override {
    if constexpr (requires { kv_.keys(); }) {
      if (const auto f = find_overlap_fault(out, describe("k", kv_.keys()))) return f;
      if (const auto f = find_overlap_fault(out, describe("v", kv_.values()))) return f;
    }
    if constexpr (requires { kv_.tables(); }) {
      for (const operand& table : kv_.tables()) {
        if (const auto f = find_overlap_fault(out, table)) return f;
      }
    }
    return {};
  }
  [[nodiscard]] bool has_sequence(index_t b) const noexcept override {
    if constexpr (requires { kv_.has_sequence(b); }) return kv_.has_sequence(b);
    return true;
  }
  [[nodiscard]] index_t length(index_t b) const noexcept override { return kv_.length(b); }
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept override {
    if constexpr (has_gaps) return kv_.gone_tiles(b);
    return key_source::gone_tiles(b);
  }
  [[nodiscard]] std::span<const std::int32_t> pages_of(index_t b) const noexcept override {
    if constexpr (has_pages) return kv_.pages_of(b);
    return key_source::pages_of(b);
  }
  [[nodiscard]] bool has_shared_pages(index_t b) const noexcept override {
    if constexpr (has_pages) return kv_.has_shared_pages(b);
    return key_source::has_shared_pages(b);
  }
  void find_strips([[maybe_unused]] index_t b, [[maybe_unused]] index_t g, [[maybe_unused]] index_t i,
                   [[maybe_unused]] tile_strips& strips) const noexcept override {
    if constexpr (has_rows) {
      for (std::size_t n = 0; n < strips.k.size(); ++n) {
        const auto rows = kv_.rows(b, g, i * tile_tokens + static_cast<index_t>(n) * group_tokens);
        strips.k[n] = {rows.k.at, rows.k.stride};
        strips.v[n] = {rows.v.at, rows.v.stride};
      }
    }
  }
  [[nodiscard]] kv_ahead ahead(index_t g, const group_visit& visit) const noexcept override {
    if constexpr (has_rows) return kv_.ahead(g, visit);
    return key_source::ahead(g, visit);
  }

 private:
  [[nodiscard]] static source_facts facts_of(const Source& kv) noexcept {
    source_facts about;
    about.batch = kv.batch(), about.kv_heads = kv.kv_heads(), about.kv_len = kv.kv_len();
    about.head_dim = kv.head_dim(), about.value_dim = kv.value_dim();
    about.scratch_elements = kv.scratch_elements();
    if constexpr (has_pages) about.page_size = kv.page_size();
    about.has_strips = has_rows;
    if constexpr (requires { kv.has_whole_groups(); }) about.has_strips = has_rows && kv.has_whole_groups();
    about.has_gaps = has_gaps;
    if constexpr (requires { kv.heads_lie_together(); }) about.heads_lie_together = kv.heads_lie_together();
    about.scatters_panels = has_scattered_panels<Source>;
    about.makes_tiles_in_cache = makes_tiles_in_cache;
    return about;
  }

 protected:
  const Source& kv_;

 private:
  fault fault_;
};

/// The tiles as well, and the kernels that read them.
template <class Source, tile_parts Parts = tile_parts::whole>
class adapted_source final : public adapted_keys<Source, tile_source<typename Source::panel_element>> {
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;
  using keys = adapted_keys<Source, tile_source<P>>;

 public:
  explicit adapted_source(const Source& kv) noexcept : keys(kv) {
    if constexpr (!is_encoded<P>) this->kernels_ = kernels_for<A>();
    if constexpr (has_dot<P>) this->dot_kernels_ = kernels_for<dot_left<P>>();
  }
  [[nodiscard]] kv_tile<P> tile(index_t b, index_t g, index_t i, index_t tokens, P* scratch) const noexcept override {
    return this->kv_.tile(b, g, i, tokens, scratch);
  }

 private:
  template <class L>
  [[nodiscard]] source_kernels<P, L> kernels_for() const noexcept {
    source_kernels<P, L> kernels;
    if constexpr (keys::has_rows) {
      using rows = decltype(this->kv_.rows(index_t{}, index_t{}, index_t{}));
      if (this->about().has_strips) kernels.strips = &strip_table_of<A, L, typename rows::key, typename rows::value>;
    } else if constexpr (!keys::makes_tiles_in_cache) {
      if (this->about().scratch_elements > 0) return kernels;  // tiles are packed there, not streamed
      constexpr reading how = has_scattered_panels<Source> ? reading::scattered : reading::in_order;
      kernels.tiles = &stream_table_of<P, L, how>;
      if constexpr (Parts == tile_parts::panels) kernels.panels = &stream_table_of<P, L, reading::scattered>;
    }
    return kernels;
  }
};

/// A source as the engine reads it: itself where it is made for that.
template <tile_parts Parts = tile_parts::whole, class Source>
[[nodiscard]] adapted_source<Source, Parts> adapt(const Source& kv) noexcept {
  return adapted_source<Source, Parts>(kv);
}
template <tile_parts Parts = tile_parts::whole, class Source>
requires std::derived_from<Source, tile_source<typename Source::panel_element>>
[[nodiscard]] const Source& adapt(const Source& kv) noexcept {
  return kv;
}

/// A source as checks see it.
template <class Source>
[[nodiscard]] adapted_keys<Source, key_source> adapt_keys(const Source& kv) noexcept {
  return adapted_keys<Source, key_source>(kv);
}
template <std::derived_from<key_source> Source>
[[nodiscard]] const Source& adapt_keys(const Source& kv) noexcept {
  return kv;
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
