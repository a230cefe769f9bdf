// SPDX-License-Identifier: Apache-2.0
/// \file
/// A source of tiles of 8 bits, or of two types, as one of floats: where no instruction multiplies the integers, and
/// for float_products.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/cache/adapted_source.hpp>
#include <gqa/detail/engine/tile_source.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/tile.hpp>

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

/// The tiles of a source as floats. They are decoded when they are asked for, as plain tensors are packed: once in
/// prefill, by each row tile in decode.
template <class P>
class decoded_tiles : public wrapped_source<float> {
 public:
  explicit decoded_tiles(const tile_source<P>& inner) noexcept : wrapped_source<float>(inner), inner_(inner) {
    this->facts_.scratch_elements = tile_elements<float>(head_dim(), value_dim());
    this->facts_.scatters_panels = this->facts_.makes_tiles_in_cache = false;  // tiles are packed into scratch
    this->facts_.heads_lie_together = false;                                   // each head is decoded by itself
  }
  [[nodiscard]] kv_tile<float> tile(index_t b, index_t g, index_t i, index_t tokens,
                                    float* scratch) const noexcept override {
    return decode_tile(inner_.tile(b, g, i, tokens, nullptr), head_dim(), value_dim(), tokens, scratch);
  }

 private:
  const tile_source<P>& inner_;
};

/// What is built before decoded_kv's tiles are.
template <class Source>
struct decoded_source {
  adapted_source<Source> encoded;
};
/// A kv_source's tiles as floats; it outlives them.
template <class Source>
class decoded_kv final : decoded_source<Source>, public decoded_tiles<typename Source::panel_element> {
 public:
  using element = typename Source::element;
  explicit decoded_kv(const Source& kv) noexcept
      : decoded_source<Source>{adapted_source<Source>(kv)},
        decoded_tiles<typename Source::panel_element>(this->encoded) {}
};

template <class Source>
inline constexpr bool may_have_gaps<decoded_kv<Source>> = may_have_gaps<Source>;

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
