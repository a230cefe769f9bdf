// SPDX-License-Identifier: Apache-2.0
/// \file
/// paged_view: an engine's own pages and page tables as a kv_source. No copy; nothing is kept but pointers.
///
/// A page holds page_size tokens of all KV heads, row by row, at any strides: k_pages [P, page_size, G, D] and v_pages
/// [P, page_size, G, E]. The table is compressed: the pages of sequence n are page_indices[page_offsets[n],
/// page_offsets[n + 1]), in the order of its tokens, of which the first lengths[n] are valid. (vLLM's and FlashInfer's
/// layout, Kwon et al. 2023, Ye et al. 2025.)
///
/// Pages of a multiple of 16 tokens are read in place by few rows (decode at group sizes up to six), as plain tensors
/// are; everything else packs a tile of 64 tokens from the pages that it lies in. A page may belong to several
/// sequences, and to one several times.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// \tparam T  float, double, Eigen::half or Eigen::bfloat16
template <class T>
class paged_view {
  static_assert(detail::storable<T>, "gqa: pages hold float, double, half or bfloat16");

 public:
  using element = T;
  using panel_element = detail::packed_element<T, T>;

  /// Checked where it is used: a call over it throws, before anything is written,
  ///   error(errc::shape)   for pages that do not fit each other, or a table of another number of sequences
  ///   error(errc::page)    for offsets that do not ascend within page_indices, and for pages that there are not
  ///   error(errc::length)  for lengths below 0 or beyond a sequence's pages
  /// Cost of that: one look at each page in use.
  /// \param k_pages, v_pages  [P, page_size, G, D], [P, page_size, G, E]
  /// \param page_indices      [pages of all sequences]; those beyond a sequence's length may be anything
  /// \param page_offsets      [n + 1]
  /// \param lengths           [n]; spans and pages must outlive the view
  paged_view(tensor_view<const T, 4> k_pages, tensor_view<const T, 4> v_pages,
             std::span<const std::int32_t> page_indices, std::span<const std::int32_t> page_offsets,
             std::span<const index_t> lengths) noexcept
      : k_(detail::without_idle_strides(k_pages)),
        v_(detail::without_idle_strides(v_pages)),
        indices_(page_indices),
        offsets_(page_offsets),
        lengths_(lengths) {}

  [[nodiscard]] index_t page_size() const noexcept { return k_.extent(1); }

  // What makes it a kv_source (kv_source.hpp).
  [[nodiscard]] index_t batch() const noexcept { return static_cast<index_t>(lengths_.size()); }
  [[nodiscard]] index_t kv_heads() const noexcept { return k_.extent(2); }
  [[nodiscard]] index_t kv_len() const noexcept {
    return lengths_.empty() ? 0 : *std::max_element(lengths_.begin(), lengths_.end());
  }
  [[nodiscard]] index_t head_dim() const noexcept { return k_.extent(3); }
  [[nodiscard]] index_t value_dim() const noexcept { return v_.extent(3); }
  [[nodiscard]] index_t length(index_t b) const noexcept { return lengths_[static_cast<std::size_t>(b)]; }
  [[nodiscard]] const tensor_view<const T, 4>& keys() const noexcept { return k_; }
  [[nodiscard]] const tensor_view<const T, 4>& values() const noexcept { return v_; }
  /// The tables, which no output may overlap either.
  [[nodiscard]] std::array<detail::operand, 3> tables() const noexcept {
    return {detail::describe("page_indices", indices_), detail::describe("page_offsets", offsets_),
            detail::describe("lengths", lengths_)};
  }
  [[nodiscard]] index_t scratch_elements() const noexcept {
    return detail::tile_elements<panel_element>(head_dim(), value_dim());
  }
  [[nodiscard]] detail::fault find_fault() const noexcept;
  [[nodiscard]] detail::kv_tile<panel_element> tile(index_t b, index_t g, index_t i, index_t tokens,
                                                    panel_element* scratch) const noexcept;
  [[nodiscard]] bool heads_lie_together() const noexcept { return detail::heads_lie_together(k_); }
  [[nodiscard]] bool has_whole_groups() const noexcept { return page_size() % detail::group_tokens == 0; }
  [[nodiscard]] detail::kv_rows<T, T> rows(index_t b, index_t g, index_t first) const noexcept {
    const place at = place_of(b, first);
    return {{&k_(at.page, at.token, g, 0), k_.stride(1)}, {&v_(at.page, at.token, g, 0), v_.stride(1)}};
  }
  /// Where the next page lies is for the hardware to find out.
  [[nodiscard]] detail::kv_ahead ahead(index_t, const detail::group_visit&) const noexcept { return {}; }

 private:
  struct place {
    index_t page, token;
  };
  [[nodiscard]] place place_of(index_t b, index_t token) const noexcept {
    const auto at = static_cast<std::size_t>(offsets_[static_cast<std::size_t>(b)] + token / page_size());
    return {indices_[at], token % page_size()};
  }

  tensor_view<const T, 4> k_, v_;
  std::span<const std::int32_t> indices_, offsets_;
  std::span<const index_t> lengths_;
};

template <class T>
detail::fault paged_view<T>::find_fault() const noexcept {
  using detail::make_fault, detail::printable;
  if (const auto f = detail::find_kv_fault(detail::describe("k_pages", k_), detail::describe("v_pages", v_))) return f;
  const std::size_t n = lengths_.size();
  if (offsets_.size() != n + 1)
    return make_fault(errc::shape, "page_offsets: expected %zu entries (one more than lengths), got %zu", n + 1,
                      offsets_.size());
  if (n > 0 && page_size() < 1)
    return make_fault(errc::shape, "k_pages: expected pages of at least 1 token, got %lld", printable(page_size()));
  std::int32_t before = 0;
  for (std::size_t i = 0; i <= n; ++i) {
    if (offsets_[i] < before || static_cast<std::size_t>(offsets_[i]) > indices_.size())
      return make_fault(errc::page, "page_offsets[%zu]: expected %lld to %zu (the page indices there are), got %lld", i,
                        printable(before), indices_.size(), printable(offsets_[i]));
    before = offsets_[i];
  }
  for (std::size_t i = 0; i < n; ++i) {
    const index_t pages = offsets_[i + 1] - offsets_[i], length = lengths_[i];
    if (length < 0 || length > detail::position_limit || (length > 0 && (length - 1) / page_size() >= pages))
      return make_fault(errc::length, "lengths[%zu]: expected 0 to what fits %lld pages of %lld tokens, got %lld", i,
                        printable(pages), printable(page_size()), printable(length));
    for (index_t page = 0; page < detail::ceil_div(length, page_size()); ++page) {
      const auto at = static_cast<std::size_t>(offsets_[i] + page);
      if (indices_[at] < 0 || indices_[at] >= k_.extent(0))
        return make_fault(errc::page, "page_indices[%zu]: expected 0 to %lld (the pages there are), got %lld", at,
                          printable(k_.extent(0) - 1), printable(indices_[at]));
    }
  }
  return {};
}

template <class T>
detail::kv_tile<typename paged_view<T>::panel_element> paged_view<T>::tile(index_t b, index_t g, index_t i,
                                                                           index_t tokens,
                                                                           panel_element* scratch) const noexcept {
  using P = panel_element;
  constexpr index_t panel_tokens = detail::panel_tokens;
  P* const values = scratch + detail::tile_panels * detail::key_panel_elements<P>(head_dim());
  std::uint32_t nonfinite = 0;
  for (index_t panel = 0; panel < detail::tile_panels; ++panel) {
    const index_t first = i * detail::tile_tokens + panel * panel_tokens;
    const index_t count = std::clamp<index_t>(tokens - panel * panel_tokens, 0, panel_tokens);
    P* const to_keys = scratch + panel * detail::key_panel_elements<P>(head_dim());
    P* const to_values = values + panel * detail::value_panel_elements<P>(value_dim());
    // The pieces of a panel that lie in one page each; of an empty one a piece of no tokens, which clears it.
    for (index_t done = 0; done < std::max<index_t>(count, 1);) {
      const place at = count == 0 ? place{0, 0} : place_of(b, first + done);
      const index_t piece = (std::min)(count - done, page_size() - at.token);
      const detail::panel_range range{done, done + piece};
      detail::pack_key_panel(&k_(at.page, at.token, g, 0), k_.stride(1), range, head_dim(), to_keys);
      if (detail::pack_value_panel(&v_(at.page, at.token, g, 0), v_.stride(1), range, value_dim(), to_values))
        nonfinite |= std::uint32_t{1} << panel;
      done += std::max<index_t>(piece, 1);
    }
  }
  return detail::contiguous_tile<P>(scratch, head_dim(), value_dim(), nonfinite);
}

}  // namespace GQA_ISA
}  // namespace gqa
