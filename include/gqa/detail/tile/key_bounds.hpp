// SPDX-License-Identifier: Apache-2.0
/// \file
/// key_bounds: the largest and the smallest element of each channel, over the keys of each page of 16 or 64 tokens.
///
/// What a query q scores with any key k of a page is at most (Quest, Tang et al. 2024)
///
///     U = sum_d max(q_d max_d, q_d min_d) = [q+ | q-] . [max | min],    q+ = max(q, 0), q- = min(q, 0)
///
/// one product of length 2 D. A page has a row of bounds, [max | min], each part padded with zeros to whole packets:
/// 1/64 of the bytes of keys and values for pages of 64 tokens, 1/16 for 16. Bounds are of keys as stored, in their
/// type; of 8 bits in bfloat16, rounded away from what they bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/memory_piece.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// What the bounds of keys in panels of P are held in.
template <class P>
using bound_element = std::conditional_t<std::is_same_v<key_type<P>, q8>, Eigen::bfloat16, key_type<P>>;

/// The bounds of one page.
template <class P>
struct page_bounds {
  const bound_element<P>* row;  // [2, padded D]
  accumulator_t<P> largest;     // magnitude of its finite elements
};

template <class P>
class key_bounds {
 public:
  using B = bound_element<P>;
  using A = accumulator_t<P>;

  /// Elements of one part of a row.
  [[nodiscard]] static constexpr index_t padded(index_t head_dim) noexcept { return round_up(head_dim, panel_tokens); }

  /// Takes the memory of so many pages of 16 or 64 tokens, all empty. False if there is none.
  [[nodiscard]] bool build(index_t pages, index_t page_tokens, index_t head_dim,
                           std::pmr::memory_resource* memory) noexcept {
    const auto count = static_cast<std::size_t>(pages);
    const std::size_t bytes_of_rows = count * static_cast<std::size_t>(2 * padded(head_dim)) * sizeof(B);
    const std::size_t bytes = bytes_of_rows + count * (sizeof(A) + 1);
    if (!memory_.allocate(bytes + memory_piece::alignment, memory)) return false;
    rows_ = reinterpret_cast<B*>(memory_.data());
    largest_ = reinterpret_cast<A*>(memory_.data() + bytes_of_rows);
    filled_ = reinterpret_cast<std::uint8_t*>(largest_ + pages);
    std::fill_n(rows_, pages * 2 * padded(head_dim), B(0));
    std::fill_n(largest_, pages, A{0});
    std::fill_n(filled_, pages, std::uint8_t{0});
    tokens_ = page_tokens, head_dim_ = head_dim;
    return true;
  }
  void swap(key_bounds& other) noexcept {
    memory_.swap(other.memory_);
    std::swap(rows_, other.rows_), std::swap(largest_, other.largest_), std::swap(filled_, other.filled_);
    std::swap(tokens_, other.tokens_), std::swap(head_dim_, other.head_dim_);
  }

  /// Tokens of a page, 0 where there are no bounds.
  [[nodiscard]] index_t page_tokens() const noexcept { return tokens_; }
  /// Tokens that a page's bounds are of, from its first one on.
  [[nodiscard]] index_t tokens_in(index_t page) const noexcept { return filled_[page]; }
  [[nodiscard]] page_bounds<P> operator[](index_t page) const noexcept {
    return {rows_ + page * 2 * padded(head_dim_), largest_[page]};
  }

  /// Tokens `written` of a page, of which the first `valid` are the sequence's, have been stored; panel_of(n) are the
  /// keys of its n-th panel. New ones behind those that it has widen its bounds; after others they are made anew.
  template <class PanelOf>
  void update(index_t page, key_range written, index_t valid, const PanelOf& panel_of) noexcept {
    std::uint8_t& filled = filled_[page];
    const bool follows = written.begin == filled && written.begin > 0;
    const index_t end = follows ? written.end : (std::min)(std::max<index_t>(written.end, filled), valid);
    if (!follows) clear(page);
    for_each_panel(follows ? written.begin : 0, end, [&](index_t first, const panel_range& tokens) {
      widen(page, panel_of(first / panel_tokens), tokens);
    });
    filled = static_cast<std::uint8_t>(end);
  }
  /// Pages [first, first + count) are another sequence's now.
  void forget(index_t first, index_t count) noexcept {
    for (index_t page = first; page < first + count; ++page) clear(page);
    std::fill_n(filled_ + first, count, std::uint8_t{0});
  }
  /// The bounds of pages [from, from + count) for those from `to` on.
  void copy(index_t from, index_t to, index_t count) noexcept {
    const index_t row = 2 * padded(head_dim_);
    std::copy_n(rows_ + from * row, count * row, rows_ + to * row);
    std::copy_n(largest_ + from, count, largest_ + to);
    std::copy_n(filled_ + from, count, filled_ + to);
  }

 private:
  void clear(index_t page) noexcept {
    B* const row = rows_ + page * 2 * padded(head_dim_);
    std::fill_n(row, head_dim_, static_cast<B>(-std::numeric_limits<A>::infinity()));
    std::fill_n(row + padded(head_dim_), head_dim_, static_cast<B>(std::numeric_limits<A>::infinity()));
    largest_[page] = 0;
  }
  /// A channel with a NaN is unbounded.
  void widen(index_t page, const P* panel, const panel_range& tokens) noexcept {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    B* const most = rows_ + page * 2 * padded(head_dim_);
    B* const least = most + padded(head_dim_);
    A largest = 0;
    for (index_t d = 0; d < head_dim_; ++d) {
      auto high = static_cast<A>(most[d]), low = static_cast<A>(least[d]);
      for (index_t t = tokens.begin; t < tokens.end; ++t) {
        const auto x = static_cast<A>(key_at(panel, t, d, head_dim_));
        const bool bounded = std::abs(x) < infinity;  // not NaN, either
        high = bounded ? (std::max)(high, x) : infinity, low = bounded ? (std::min)(low, x) : -infinity;
      }
      most[d] = rounded_up(high), least[d] = -rounded_up(-low);
      for (const A x : {std::abs(static_cast<A>(most[d])), std::abs(static_cast<A>(least[d]))})
        largest = x < infinity ? (std::max)(largest, x) : largest;
    }
    largest_[page] = largest;
  }
  /// x, or the next element above it.
  [[nodiscard]] static B rounded_up(A x) noexcept {
    const B rounded = static_cast<B>(x);
    if constexpr (std::is_same_v<key_type<P>, q8>) {
      if (static_cast<A>(rounded) < x) {
        const auto bits = Eigen::numext::bit_cast<std::uint16_t>(rounded);
        const bool negative = bits > 0x8000u, zero = (bits & 0x7fffu) == 0;
        return Eigen::numext::bit_cast<B>(static_cast<std::uint16_t>(zero ? 1 : negative ? bits - 1 : bits + 1));
      }
    }
    return rounded;
  }

  memory_piece memory_;
  B* rows_ = nullptr;               // [pages, 2, padded D]
  A* largest_ = nullptr;            // [pages]
  std::uint8_t* filled_ = nullptr;  // [pages]
  index_t tokens_ = 0, head_dim_ = 1;
};

/// Why pages of bounds may not have so many tokens.
[[nodiscard]] inline fault find_bound_tokens_fault(index_t page_tokens) noexcept {
  if (page_tokens == panel_tokens || page_tokens == tile_tokens) return {};
  return make_fault(errc::option, "page_tokens: expected 16 or 64, got %lld", printable(page_tokens));
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
