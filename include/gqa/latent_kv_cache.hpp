// SPDX-License-Identifier: Apache-2.0
/// \file
/// latent_kv_cache: keys and values of one KV head, of which the values are the first channels of the keys: the latent
/// vectors of multi-head latent attention (MLA; DeepSeek-V2, 2024), kept and read once.
///
/// A token is a row of `head_dim` elements, in MLA [c | k_rope], 512 + 64 of them, of which the first `value_dim`, c,
/// are its value, too. Only panels of keys are stored; those of a tile's values are made from them where the kernel
/// needs them, in cache. So memory holds, and gives, head_dim elements a token: of DeepSeek-V2 1/57 of what keys and
/// values of its 128 heads would be.
///
/// Memory: [batch][tile of 64 tokens][panel of 16: keys], from one allocation at construction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/memory_piece.hpp>
#include <gqa/detail/tile/narrowing.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// A kv_source of one KV head and up to `capacity` tokens a sequence. One writer at a time, and no reader meanwhile.
/// \tparam T  float, double, Eigen::half or Eigen::bfloat16
template <class T>
class latent_kv_cache {
  static_assert(detail::storable<T>, "gqa: a latent_kv_cache holds float, double, half or bfloat16");

 public:
  using element = T;
  using panel_element = T;
  static constexpr bool makes_tiles_in_cache = true;

  /// \param head_dim   elements of a token; \param value_dim  of which so many are its value: 1 to head_dim
  /// \param memory     where the tokens come from, to be kept until the cache is gone; null: operator new
  /// \throws error     errc::shape for extents that cannot be, errc::capacity if there is no memory
  latent_kv_cache(index_t batch, index_t capacity, index_t head_dim, index_t value_dim,
                  std::pmr::memory_resource* memory = nullptr) {
    const auto find_fault = [&]() -> detail::fault {
      constexpr const char* name = "latent_kv_cache";
      if (const auto f = detail::find_least_fault(name, "batch", 0, batch)) return f;
      if (const auto f = detail::find_least_fault(name, "capacity", 0, capacity)) return f;
      if (const auto f = detail::find_least_fault(name, "value_dim", 1, value_dim)) return f;
      return detail::find_least_fault(name, "head_dim", value_dim, head_dim);
    };
    if (const auto f = find_fault()) {
      detail::raise(f);
      return;
    }
    const auto size = [](index_t n) { return static_cast<double>(std::max<index_t>(n, 1)); };
    const double estimate =
        size(batch) * ((size(capacity) + detail::tile_tokens) * (size(head_dim) + 2) * sizeof(T) + sizeof(index_t));
    if (estimate < size(detail::position_limit / 16) && allocate(batch, capacity, head_dim, value_dim, memory)) return;
    detail::raise(
        detail::make_fault(errc::capacity, "latent_kv_cache: expected memory for some %.3g bytes, got none", estimate));
  }
  latent_kv_cache(latent_kv_cache&& other) noexcept { swap(other); }
  latent_kv_cache& operator=(latent_kv_cache&& other) noexcept {
    latent_kv_cache(std::move(other)).swap(*this);
    return *this;
  }

  /// Appends t tokens to every sequence, rounded to nearest even.
  /// \param rows   [B, t, 1, D] in T or float
  /// \throws error (errc::shape, errc::capacity), errc::range for a finite float that T would make infinite; nothing is
  ///               written then
  template <tensor_like Rows>
  void append(Rows&& rows) {
    append_to(0, batch_, detail::as_view(std::forward<Rows>(rows)));
  }
  /// The same to one sequence. rows: [1, t, 1, D].
  template <tensor_like Rows>
  void append(index_t sequence, Rows&& rows) {
    if (const auto f = find_sequence_fault(sequence)) return detail::raise(f);
    append_to(sequence, 1, detail::as_view(std::forward<Rows>(rows)));
  }
  /// Forgets all tokens of a sequence from position `length` on.
  /// \throws error (errc::range, errc::length)
  void truncate(index_t sequence, index_t length) {
    if (const auto f = find_sequence_fault(sequence)) return detail::raise(f);
    if (length < 0 || length > lengths_[sequence])
      return detail::raise(detail::make_fault(errc::length,
                                              "length: expected 0 to %lld (the tokens there are), got %lld",
                                              detail::printable(lengths_[sequence]), detail::printable(length)));
    lengths_[sequence] = length;
  }
  void clear() noexcept { std::fill_n(lengths_, batch_, index_t{0}); }

  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }
  /// Tokens of a sequence; 0 for one that there is not.
  [[nodiscard]] index_t length(index_t sequence) const noexcept {
    return sequence >= 0 && sequence < batch_ ? lengths_[sequence] : 0;
  }
  /// Copies tokens [first, first + count) of a sequence, as stored, to rows [count, D], `stride` elements apart.
  /// \throws error (errc::range) for tokens that there are not
  template <class X>
  void copy_rows(index_t sequence, index_t first, index_t count, X* to, index_t stride) const {
    if (const auto f = find_sequence_fault(sequence)) return detail::raise(f);
    if (first < 0 || count < 0 || count > lengths_[sequence] - first)
      return detail::raise(detail::make_fault(errc::range, "tokens: expected some of %lld, got %lld from %lld on",
                                              detail::printable(lengths_[sequence]), detail::printable(count),
                                              detail::printable(first)));
    for (index_t t = first; t < first + count; ++t) {
      const T* const panel = panel_at(sequence, t);
      for (index_t d = 0; d < head_dim_; ++d)
        to[(t - first) * stride + d] = static_cast<X>(detail::key_at(panel, t % detail::panel_tokens, d, head_dim_));
    }
  }

  // What makes it a kv_source (kv_source.hpp).
  [[nodiscard]] index_t batch() const noexcept { return batch_; }
  [[nodiscard]] index_t kv_heads() const noexcept { return 1; }
  [[nodiscard]] index_t kv_len() const noexcept {
    return batch_ == 0 ? 0 : *std::max_element(lengths_, lengths_ + batch_);
  }
  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  [[nodiscard]] index_t value_dim() const noexcept { return value_dim_; }
  [[nodiscard]] detail::fault find_fault() const noexcept { return {}; }
  [[nodiscard]] index_t scratch_elements() const noexcept {
    return detail::tile_panels * detail::value_panel_elements<T>(value_dim_);
  }
  [[nodiscard]] detail::kv_tile<T> tile(index_t b, index_t, index_t i, index_t tokens, T* scratch) const noexcept {
    detail::kv_tile<T> tile;
    for (index_t panel = 0; panel < detail::tile_panels; ++panel) {
      const auto n = static_cast<std::size_t>(panel);
      tile.k[n] = panel_at(b, i * detail::tile_tokens + panel * detail::panel_tokens);
      T* const values = scratch + panel * detail::value_panel_elements<T>(value_dim_);
      if (panel * detail::panel_tokens < tokens) detail::values_of_keys(tile.k[n], value_dim_, values);
      tile.v[n] = values;
    }
    tile.next = panel_at(b, (i + 1) * detail::tile_tokens);
    tile.nonfinite_values = nonfinite_[b * tiles_ + i];
    return tile;
  }

 private:
  void swap(latent_kv_cache& other) noexcept {
    memory_.swap(other.memory_);
    std::swap(batch_, other.batch_), std::swap(capacity_, other.capacity_), std::swap(tiles_, other.tiles_);
    std::swap(head_dim_, other.head_dim_), std::swap(value_dim_, other.value_dim_);
    std::swap(panels_, other.panels_), std::swap(lengths_, other.lengths_), std::swap(nonfinite_, other.nonfinite_);
  }
  [[nodiscard]] bool allocate(index_t batch, index_t capacity, index_t head_dim, index_t value_dim,
                              std::pmr::memory_resource* memory) noexcept {
    const index_t tiles = detail::ceil_div(capacity, detail::tile_tokens);
    const index_t elements = batch * tiles * detail::tile_panels * detail::key_panel_elements<T>(head_dim);
    const std::size_t bytes_of_panels = static_cast<std::size_t>(detail::round_up(elements * index_t{sizeof(T)}, 64));
    const std::size_t bytes_of_lengths = static_cast<std::size_t>(batch) * sizeof(index_t);
    const std::size_t bytes = bytes_of_panels + bytes_of_lengths + static_cast<std::size_t>(batch * tiles);
    if (!memory_.allocate(bytes + detail::memory_piece::alignment, memory)) return false;
    panels_ = reinterpret_cast<T*>(memory_.data());
    lengths_ = reinterpret_cast<index_t*>(memory_.data() + bytes_of_panels);
    nonfinite_ = reinterpret_cast<std::uint8_t*>(lengths_ + batch);
    std::fill_n(nonfinite_, batch * tiles, std::uint8_t{0});
    batch_ = batch, capacity_ = capacity, tiles_ = tiles, head_dim_ = head_dim, value_dim_ = value_dim;
    clear();
    return true;
  }

  [[nodiscard]] detail::fault find_sequence_fault(index_t sequence) const noexcept {
    if (sequence >= 0 && sequence < batch_) return {};
    return detail::make_fault(errc::range, "sequence: expected 0 to %lld, got %lld", detail::printable(batch_ - 1),
                              detail::printable(sequence));
  }
  template <class X>
  [[nodiscard]] detail::fault find_append_fault(index_t first, index_t count,
                                                const tensor_view<X, 4>& rows) const noexcept {
    const detail::operand r = detail::describe("rows", rows);
    if (const auto f = detail::find_layout_fault(r)) return f;
    if (const auto f = detail::find_extent_fault(r, 0, count, "the sequences written to")) return f;
    if (const auto f = detail::find_extent_fault(r, 2, 1, "one head")) return f;
    if (const auto f = detail::find_extent_fault(r, 3, head_dim_, "the cache's head dim")) return f;
    for (index_t b = first; b < first + count; ++b) {
      if (rows.extent(1) > capacity_ - lengths_[b])
        return detail::make_fault(
            errc::capacity, "rows: expected at most %lld tokens (the room left in sequence %lld), got %lld",
            detail::printable(capacity_ - lengths_[b]), detail::printable(b), detail::printable(rows.extent(1)));
    }
    return {};
  }
  template <class X>
  void append_to(index_t first, index_t count, const tensor_view<X, 4>& all) {
    static_assert(detail::is_taken_by_cache_of<X, T>, "gqa: a cache takes what it holds, or float");
    if (const auto f = find_append_fault(first, count, all)) return detail::raise(f);
    const auto rows = detail::without_idle_strides(all);
    detail::plain_keys<std::remove_const_t<X>> plain{tensor_view<const std::remove_const_t<X>, 4>(rows)};
    if (const auto f = detail::find_narrowing_fault<T>("rows", plain, count, rows.extent(1), 1, head_dim_))
      return detail::raise(f);
    for (index_t b = first; b < first + count; ++b) {
      const index_t before = lengths_[b], after = before + rows.extent(1);
      detail::for_each_panel(before, after, [&](index_t panel, detail::panel_range tokens) {
        const X* const from = &rows(b - first, panel + tokens.begin - before, 0, 0);
        T* const to = panel_at(b, panel);
        detail::pack_key_panel(from, rows.stride(1), tokens, head_dim_, to);
        const auto bit = static_cast<std::uint8_t>(1U << panel % detail::tile_tokens / detail::panel_tokens);
        std::uint8_t& flags = nonfinite_[b * tiles_ + panel / detail::tile_tokens];
        if (tokens.starts) flags = static_cast<std::uint8_t>(flags & ~bit);  // what was there before is gone
        if (has_nonfinite(to, tokens)) flags = static_cast<std::uint8_t>(flags | bit);
      });
      lengths_[b] = after;
    }
  }
  /// Whether a value among some tokens of a panel, as stored, is NaN or infinite: 0 times it is not 0.
  [[nodiscard]] bool has_nonfinite(const T* panel, const detail::panel_range& tokens) const noexcept {
    using A = accumulator_t<T>;
    A probe = 0;
    for (index_t d = 0; d < value_dim_; ++d) {
      for (index_t t = tokens.begin; t < tokens.end; ++t)
        probe += static_cast<A>(panel[detail::key_index<T>(t, d)]) * A{0};
    }
    return probe != 0;
  }
  [[nodiscard]] T* panel_at(index_t b, index_t token) const noexcept {
    return panels_ +
           (b * tiles_ * detail::tile_panels + token / detail::panel_tokens) * detail::key_panel_elements<T>(head_dim_);
  }

  detail::memory_piece memory_;  // panels, lengths, flags
  index_t batch_ = 0, capacity_ = 0, tiles_ = 0, head_dim_ = 1, value_dim_ = 1;
  T* panels_ = nullptr;
  index_t* lengths_ = nullptr;         // [batch]
  std::uint8_t* nonfinite_ = nullptr;  // [batch][tile]: bit i, panel i may hold a value that is not finite
};

}  // namespace GQA_ISA
}  // namespace gqa
