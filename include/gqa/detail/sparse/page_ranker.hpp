// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_ranker: which pages of a KV head some rows of queries read next, and what those that they have not read may
/// weigh.
///
/// A page is 64 keys or 16 (page_reader.hpp). For each row r and page p the bounds of its keys give
///
///     w_rp = sum over the page's bounds of n 2^(U - m_r)
///
/// U no less than any score, base 2, with one of the n keys of a bound, or, with n = 1, than the logarithm of the sum
/// of 2^score of all of the page's keys (m_r: the largest U of the row; no less than 2^-120 n, for what is too small
/// for a number is not nothing beside scores that all stay far below their bounds). With R_r the mass read so far, in
/// the same unit, the unread rest is certified to be at most W / (W + R), W the sum of its w. Pages are ordered by the
/// largest w_rp / R_r of any row, so that rows of a group choose together and each page is read once for all of them.
/// Order is by eighths of a power of two, and by position among equals: a counting sort, for sorting would cost as much
/// as bounds.
///
/// Cost of R rows over P pages: R P powers, once, and R P additions a round.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/simd/exp2.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Pages as bits.
class page_bits {
 public:
  page_bits() noexcept = default;
  explicit page_bits(std::uint64_t* words) noexcept : words_(words) {}
  [[nodiscard]] static constexpr index_t words(index_t pages) noexcept { return ceil_div(pages, 64); }

  [[nodiscard]] bool has(index_t page) const noexcept { return (words_[page / 64] >> page % 64 & 1) != 0; }
  void add(index_t page) noexcept { words_[page / 64] |= std::uint64_t{1} << page % 64; }
  void clear(index_t pages) noexcept { std::fill_n(words_, words(pages), std::uint64_t{0}); }

 private:
  std::uint64_t* words_ = nullptr;
};

/// A: accumulators.
template <class A>
class page_ranker {
 public:
  /// Of one KV head: rows of queries, pages that some of them may see, bounds of a page.
  struct shape {
    index_t rows, pages, bounds_of_page;
  };

  /// Gives out pieces of memory and returns its bytes; of nullptr, only the bytes.
  std::size_t carve(std::byte* memory, const shape& s) noexcept {
    carver take(memory);
    take(mass_, s.rows * padded_bounds(s)), take(top_, s.rows), take(total_, s.rows);
    take(rank_, round_up(s.pages, panel_tokens)), take(order_, s.pages), take(sorted_, s.pages);
    std::uint64_t* words = nullptr;
    take(words, page_bits::words(s.pages));
    read_ = page_bits(words), shape_ = s;
    return take.used();
  }

  /// Starts with nothing read.
  void begin() noexcept { read_.clear(shape_.pages); }
  /// The bound of what is not seen: its mass is 0 beside any other.
  static constexpr A unseen = std::numeric_limits<A>::lowest() / 4;
  /// U of row r and the n-th bounds, to be filled in; of pages that it does not see `unseen`.
  [[nodiscard]] A& bound(index_t r, index_t n) noexcept { return mass_[r * padded_bounds(shape_) + n]; }

  /// Turns the bounds into masses, of so many keys each. Pages with a bound that is no number must be read:
  /// must_read(page).
  template <class MustRead>
  void weigh(index_t keys, const MustRead& must_read) noexcept {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    constexpr index_t width = packet_size<A>;
    const index_t bounds = shape_.pages * shape_.bounds_of_page, padded = padded_bounds(shape_);
    for (index_t r = 0; r < shape_.rows; ++r) {
      A* const u = &bound(r, 0);
      std::fill(u + bounds, u + padded, unseen);
      packet<A> off = zeros<A>();  // NaN where a bound is no number, or infinite
      for (index_t n = 0; n < padded; n += width) off = add(off, sub(load(u + n), load(u + n)));
      for (index_t n = 0; n < bounds && lane_sum<A>(off) != 0; ++n) {
        if (!(std::abs(u[n]) < infinity)) must_read(n / shape_.bounds_of_page), u[n] = unseen;
      }
      packet<A> most = broadcast(unseen);
      for (index_t n = 0; n < padded; n += width) most = max_or_nan(load(u + n), most);
      top_[r] = max_lane<A>(most);
      const packet<A> top = broadcast(top_[r]);
      packet<A> sum = zeros<A>();
      for (index_t n = 0; n < padded; n += width) {
        const packet<A> bound = load(u + n), most_keys = broadcast(static_cast<A>(keys));
        const packet<A> power = exp2_packet<A>(max_or_nan(sub(bound, top), broadcast(A{-120})));
        const packet<A> mass =
            select_bits<A>(equal_bits<A>(bound, broadcast(unseen)), zeros<A>(), mul<A>(power, most_keys));
        store(u + n, mass), sum = add(sum, mass);
      }
      total_[r] = lane_sum<A>(sum);
    }
    std::iota(order_, order_ + shape_.pages, 0);
    unread_ = shape_.pages;
  }
  /// The n-th bounds are of `keys` keys, not of `all`.
  void shrink(index_t n, index_t keys, index_t all) noexcept {
    for (index_t r = 0; r < shape_.rows; ++r) bound(r, n) *= static_cast<A>(keys) / static_cast<A>(all);
  }
  /// From masses of bounds to those of pages.
  void add_up() noexcept {
    const index_t some = shape_.bounds_of_page;
    for (index_t r = 0; r < shape_.rows && some > 1; ++r) {
      A* const u = &bound(r, 0);
      for (index_t page = 0; page < shape_.pages; ++page)
        u[page] = std::accumulate(u + page * some, u + (page + 1) * some, A{0});
    }
  }
  /// About what all of a row's pages may weigh.
  [[nodiscard]] double total(index_t r) const noexcept { return static_cast<double>(total_[r]); }

  /// Base-2 logarithm of the unit of a row's masses.
  [[nodiscard]] A unit(index_t r) const noexcept { return top_[r]; }
  [[nodiscard]] index_t unread() const noexcept { return unread_; }
  [[nodiscard]] index_t read() const noexcept { return shape_.pages - unread_; }
  [[nodiscard]] bool is_read(index_t page) const noexcept { return read_.has(page); }

  void take(index_t page) noexcept { read_.add(page); }
  /// Forgets the pages that have been taken.
  void drop_taken() noexcept {
    const auto end = std::remove_if(order_, order_ + unread_, [&](std::int32_t page) { return read_.has(page); });
    unread_ = end - order_;
  }
  /// What the unread pages may weigh for row r, in its unit.
  [[nodiscard]] double rest(index_t r) const noexcept { return sum_of(r, 0, unread_); }

  /// Orders the unread pages by the largest share that they may have of what a row can do without: limit(r), in its
  /// unit.
  template <class Limit>
  void sort(const Limit& limit) noexcept {
    constexpr index_t bins = 512, width = packet_size<A>;  // eighths: masses within 2^64 of the largest
    const index_t padded = round_up(shape_.pages, panel_tokens);
    std::fill_n(rank_, padded, A{0});
    for (index_t r = 0; r < shape_.rows; ++r) {
      const double allowed = (std::max)(limit(r), (std::numeric_limits<double>::min)());
      const auto most = static_cast<double>((std::numeric_limits<A>::max)());
      const packet<A> factor = broadcast(static_cast<A>((std::min)(1 / allowed, most)));
      const A* const masses = mass_ + r * padded_bounds(shape_);
      for (index_t page = 0; page < padded; page += width)
        store(rank_ + page, max_or_nan(mul<A>(load(masses + page), factor), load(rank_ + page)));
    }
    // Of numbers of one sign, their bits are in their order: the exponent, and three bits of the fraction.
    using bits = std::conditional_t<sizeof(A) == sizeof(float), std::int32_t, std::int64_t>;
    const auto eighths_of = [&](std::int32_t page) {
      return static_cast<index_t>(std::bit_cast<bits>(rank_[page]) >> (std::numeric_limits<A>::digits - 4));
    };
    index_t largest = 0;
    for (index_t n = 0; n < unread_; ++n) largest = (std::max)(largest, eighths_of(order_[n]));
    const auto bin_of = [&](std::int32_t page) {
      return static_cast<std::size_t>((std::min)(largest - eighths_of(page), bins - 1));
    };
    std::array<index_t, bins + 1> starts{};
    for (index_t n = 0; n < unread_; ++n) ++starts[bin_of(order_[n]) + 1];
    for (std::size_t bin = 1; bin <= bins; ++bin) starts[bin] += starts[bin - 1];
    for (index_t n = 0; n < unread_; ++n) sorted_[starts[bin_of(order_[n])]++] = order_[n];
    std::swap(order_, sorted_);
  }

  /// How many of the unread pages, in their order, must be read so that no row is left with more than limit(r).
  template <class Limit>
  [[nodiscard]] index_t count_needed(const Limit& limit) const noexcept {
    index_t needed = 0;
    for (index_t r = 0; r < shape_.rows; ++r) {
      const double allowed = limit(r);
      double sum = 0;
      index_t n = unread_;
      while (n > needed) {  // many at a time, and then one by one
        const index_t some = std::min<index_t>(n - needed, 64);
        const double with_some = sum + sum_of(r, n - some, n);
        if (!(with_some <= allowed)) break;
        sum = with_some, n -= some;
      }
      for (; n > needed; --n) {
        sum += static_cast<double>(mass_of(r, order_[n - 1]));
        if (!(sum <= allowed)) break;
      }
      needed = (std::max)(needed, n);
    }
    return needed;
  }
  /// Takes the first `count` of the unread pages; each is told.
  template <class Told>
  void take_first(index_t count, const Told& told) noexcept {
    for (index_t n = 0; n < count; ++n) take(order_[n]), told(order_[n]);
    unread_ -= count;
    std::copy_n(order_ + count, unread_, order_);
  }

 private:
  [[nodiscard]] static index_t padded_bounds(const shape& s) noexcept {
    return round_up(s.pages * s.bounds_of_page, panel_tokens);
  }
  [[nodiscard]] A mass_of(index_t r, index_t page) const noexcept { return mass_[r * padded_bounds(shape_) + page]; }

  /// Of the unread pages [begin, end): four sums, for one would wait for itself.
  [[nodiscard]] double sum_of(index_t r, index_t begin, index_t end) const noexcept {
    std::array<double, 4> sums{};
    for (index_t n = begin; n < end; ++n)
      sums[static_cast<std::size_t>(n % 4)] += static_cast<double>(mass_of(r, order_[n]));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  shape shape_{};
  A* mass_ = nullptr;              // [rows, padded bounds]: bounds, then masses of pages
  A* top_ = nullptr;               // [rows]
  A* total_ = nullptr;             // [rows]
  A* rank_ = nullptr;              // [pages]
  std::int32_t* order_ = nullptr;  // [pages]: those that are not read
  std::int32_t* sorted_ = nullptr;
  page_bits read_;
  index_t unread_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
