// SPDX-License-Identifier: Apache-2.0
/// \file
/// A source of tiles of 8 bits, or of two types, as one of floats: where no instruction multiplies the integers, and
/// for float_products.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/mixed.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A tile's first `tokens` as floats in `to`, which holds tile_elements<float>(head_dim, value_dim); panels without any
/// of them are zeros.
template <class P>
[[nodiscard]] kv_tile<float> decode_tile(const kv_tile<P>& tile, index_t head_dim, index_t value_dim, index_t tokens,
                                         float* to) noexcept {
  const index_t columns = padded_value_dim(value_dim);
  float* const values = to + tile_panels * key_panel_elements<float>(head_dim);
  const index_t panels = ceil_div(tokens, panel_tokens);
  std::fill(to + panels * key_panel_elements<float>(head_dim), values, 0.0F);
  std::fill(values + panels * value_panel_elements<float>(value_dim),
            values + tile_panels * value_panel_elements<float>(value_dim), 0.0F);
  for (index_t n = 0; n < panels; ++n) {
    const P* const keys_from = tile.k[static_cast<std::size_t>(n)];
    const P* const values_from = tile.v[static_cast<std::size_t>(n)];
    float* const keys_to = to + n * key_panel_elements<float>(head_dim);
    float* const values_to = values + n * value_panel_elements<float>(value_dim);
    for (index_t t = 0; t < panel_tokens; ++t) {
      for (index_t d = 0; d < head_dim; ++d)
        keys_to[key_index<float>(t, d)] = static_cast<float>(key_at(keys_from, t, d, head_dim));
      for (index_t e = 0; e < columns; ++e)
        values_to[value_index<float>(t, e, value_dim)] =
            e < value_dim ? static_cast<float>(value_at(values_from, t, e, value_dim)) : 0.0F;
    }
  }
  return contiguous_tile<float>(to, head_dim, value_dim, tile.nonfinite_values);
}

/// Tiles are decoded when they are asked for: as plain tensors are packed, once in prefill, by each row tile in decode.
/// The source outlives it.
template <class Source>
class decoded_kv {
 public:
  using element = typename Source::element;
  using panel_element = float;

  explicit decoded_kv(const Source& kv) noexcept : kv_(kv) {}

  [[nodiscard]] index_t batch() const noexcept { return kv_.batch(); }
  [[nodiscard]] index_t kv_heads() const noexcept { return kv_.kv_heads(); }
  [[nodiscard]] index_t kv_len() const noexcept { return kv_.kv_len(); }
  [[nodiscard]] index_t length(index_t b) const noexcept { return kv_.length(b); }
  [[nodiscard]] index_t head_dim() const noexcept { return kv_.head_dim(); }
  [[nodiscard]] index_t value_dim() const noexcept { return kv_.value_dim(); }
  [[nodiscard]] fault find_fault() const noexcept { return kv_.find_fault(); }
  [[nodiscard]] index_t scratch_elements() const noexcept { return tile_elements<float>(head_dim(), value_dim()); }
  [[nodiscard]] kv_tile<float> tile(index_t b, index_t g, index_t i, index_t tokens, float* scratch) const noexcept {
    return decode_tile(kv_.tile(b, g, i, tokens, nullptr), head_dim(), value_dim(), tokens, scratch);
  }

  [[nodiscard]] bool has_sequence(index_t b) const noexcept requires requires(const Source& kv) { kv.has_sequence(b); }
  { return kv_.has_sequence(b); }
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept requires requires(const Source& kv) { kv.gone_tiles(b); }
  { return kv_.gone_tiles(b); }
  [[nodiscard]] index_t page_size() const noexcept requires requires(const Source& kv) { kv.page_size(); }
  { return kv_.page_size(); }
  [[nodiscard]] std::span<const std::int32_t> pages_of(index_t b) const noexcept requires requires(const Source& kv) {
    kv.pages_of(b);
  }
  { return kv_.pages_of(b); }
  [[nodiscard]] bool has_shared_pages(index_t b) const noexcept requires requires(const Source& kv) {
    kv.has_shared_pages(b);
  }
  { return kv_.has_shared_pages(b); }

 private:
  const Source& kv_;
};

/// What reads single elements of tiles works from: the source, or, where they are encoded, a decoded_kv of it.
template <class Source>
[[nodiscard]] const Source& as_elements(const Source& kv) noexcept {
  return kv;
}
template <class Source>
requires is_encoded<typename Source::panel_element>
[[nodiscard]] decoded_kv<Source> as_elements(const Source& kv) noexcept {
  return decoded_kv<Source>(kv);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
