// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_ranker: which pages of a KV head some rows of queries read next, and what those that they have not read may
/// weigh.
///
/// A page is a key tile of 64 keys. For each row r and page p the bounds of its keys (key_bounds.hpp) give
///
///     w_rp = sum over the page's bounds of n 2^(U - m_r),    U >= every score with one of the n keys, base 2
///
/// (m_r: the largest U of the row). With R_r the mass read so far, in the same unit, the unread rest is certified to be
/// at most W / (W + R), W the sum of its w. Pages are ordered by the largest w_rp / R_r of any row, so that rows of a
/// group choose together and each page is read once for all of them. Order is by eighths of a power of two, and by
/// position among equals: a counting sort, for sorting would cost as much as bounds.
///
/// Cost of R rows over P pages: 2 R P D multiply-adds for bounds of 64 keys (4 times as many for 16) and P bounds read,
/// once; R P additions a round.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/carver.hpp>
#include <gqa/detail/exp2.hpp>
#include <gqa/detail/key_bounds.hpp>
#include <gqa/detail/row_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/tile_kernel.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// The products of R rows q [R, q_stride] with up to 16 rows of bounds, `length` elements each: u [R, 16].
template <int Rows, class A, class B>
void multiply_bounds(const std::array<const B*, panel_tokens>& bounds, index_t count, const A* q, index_t q_stride,
                     index_t length, A* u) noexcept {
  constexpr index_t width = packet_size<A>;
  alignas(64) A lanes[Rows][panel_tokens * width] = {};
  for (index_t n = 0; n < count; ++n)
    dot_lanes<Rows>(bounds[static_cast<std::size_t>(n)], q, q_stride, length, lanes[0] + n * width,
                    panel_tokens * width);
  for (int r = 0; r < Rows; ++r) {
    for (index_t n = 0; n < panel_tokens; n += width)
      store(u + r * panel_tokens + n, sum_lanes_each(lanes[r] + n * width));
  }
}

/// Tiles as bits.
class tile_bits {
 public:
  tile_bits() noexcept = default;
  explicit tile_bits(std::uint64_t* words) noexcept : words_(words) {}
  [[nodiscard]] static constexpr index_t words(index_t tiles) noexcept { return ceil_div(tiles, 64); }

  [[nodiscard]] bool has(index_t tile) const noexcept { return (words_[tile / 64] >> tile % 64 & 1) != 0; }
  void add(index_t tile) noexcept { words_[tile / 64] |= std::uint64_t{1} << tile % 64; }
  void clear(index_t tiles) noexcept { std::fill_n(words_, words(tiles), std::uint64_t{0}); }

 private:
  std::uint64_t* words_ = nullptr;
};

/// A: accumulators.
template <class A>
class page_ranker {
 public:
  /// Of one KV head: rows of queries, key tiles that some of them see, bounds of a tile.
  struct shape {
    index_t rows, tiles, bounds_of_tile;
  };

  /// Gives out pieces of memory and returns its bytes; of nullptr, only the bytes.
  std::size_t carve(std::byte* memory, const shape& s) noexcept {
    carver take(memory);
    take(mass_, s.rows * padded_pages(s)), take(top_, s.rows);
    take(rank_, s.tiles), take(order_, s.tiles), take(sorted_, s.tiles);
    std::uint64_t* words = nullptr;
    take(words, tile_bits::words(s.tiles));
    read_ = tile_bits(words), shape_ = s;
    return take.used();
  }

  /// Starts with nothing read.
  void begin() noexcept {
    unread_ = 0;
    read_.clear(shape_.tiles);
    std::fill_n(top_, shape_.rows, -std::numeric_limits<A>::infinity());
  }
  /// U of row r and the n-th bounds, to be filled in; of pages that it does not see -inf.
  [[nodiscard]] A& bound(index_t r, index_t n) noexcept { return mass_[r * padded_pages(shape_) + n]; }

  /// Turns the bounds into masses, `keys_of(n)` the keys that the n-th are of. Pages with a bound that is no number
  /// must be read: must_read(tile).
  template <class KeysOf, class MustRead>
  void weigh(const KeysOf& keys_of, const MustRead& must_read) noexcept {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    const index_t pages = shape_.tiles * shape_.bounds_of_tile;
    for (index_t r = 0; r < shape_.rows; ++r) {
      A* const u = &bound(r, 0);
      for (index_t n = 0; n < pages; ++n) {
        if (!(u[n] < infinity)) must_read(n / shape_.bounds_of_tile), u[n] = -infinity;
        top_[r] = std::max(top_[r], u[n]);
      }
      std::fill(u + pages, u + padded_pages(shape_), -infinity);
      const A top = top_[r] > -infinity ? top_[r] : A{0};
      for (index_t n = 0; n < padded_pages(shape_); n += packet_size<A>)
        store(u + n, exp2_packet<A>(sub(load(u + n), broadcast(top))));
      for (index_t tile = 0; tile < shape_.tiles; ++tile) {
        A mass = 0;
        for (index_t n = tile * shape_.bounds_of_tile; n < (tile + 1) * shape_.bounds_of_tile; ++n)
          mass += static_cast<A>(keys_of(n)) * u[n];
        u[tile] = mass;
      }
    }
    for (index_t tile = 0; tile < shape_.tiles; ++tile) order_[tile] = static_cast<std::int32_t>(tile);
    unread_ = shape_.tiles;
  }

  /// Base-2 logarithm of the unit of a row's masses.
  [[nodiscard]] A unit(index_t r) const noexcept { return top_[r]; }
  [[nodiscard]] index_t unread() const noexcept { return unread_; }
  [[nodiscard]] index_t read() const noexcept { return shape_.tiles - unread_; }
  [[nodiscard]] bool is_read(index_t tile) const noexcept { return read_.has(tile); }

  void take(index_t tile) noexcept { read_.add(tile); }
  /// Forgets the pages that have been taken.
  void drop_taken() noexcept {
    const auto end = std::remove_if(order_, order_ + unread_, [&](std::int32_t tile) { return read_.has(tile); });
    unread_ = end - order_;
  }
  /// What the unread pages may weigh for row r, in its unit.
  [[nodiscard]] double rest(index_t r) const noexcept {
    double sum = 0;
    for (index_t n = 0; n < unread_; ++n) sum += static_cast<double>(mass_of(r, order_[n]));
    return sum;
  }

  /// Orders the unread pages by the largest share that they may have of what a row can do without: limit(r), in its
  /// unit.
  template <class Limit>
  void sort(const Limit& limit) noexcept {
    constexpr index_t bins = 512;  // eighths: masses within 2^64 of the largest
    std::fill_n(rank_, shape_.tiles, -std::numeric_limits<A>::infinity());
    for (index_t r = 0; r < shape_.rows; ++r) {
      const double allowed = std::max(limit(r), std::numeric_limits<double>::min());
      const auto factor = static_cast<A>(std::min(1 / allowed, static_cast<double>(std::numeric_limits<A>::max())));
      for (index_t n = 0; n < unread_; ++n) {
        const std::int32_t tile = order_[n];
        rank_[tile] = std::max(rank_[tile], mass_of(r, tile) * factor);
      }
    }
    A largest = 0;
    for (index_t n = 0; n < unread_; ++n) largest = std::max(largest, rank_[order_[n]]);
    std::array<index_t, bins + 1> starts{};
    const auto bin_of = [&](std::int32_t tile) {
      const A share = rank_[tile] / largest;  // NaN where all are 0
      if (!(share > 0)) return bins - 1;
      int exponent = 0;
      const A fraction = std::frexp(share, &exponent);  // in [1/2, 1)
      const index_t eighths = -8 * index_t{exponent} + static_cast<index_t>((A{1} - fraction) * 16);
      return std::clamp<index_t>(eighths + 8, 0, bins - 1);
    };
    for (index_t n = 0; n < unread_; ++n) ++starts[static_cast<std::size_t>(bin_of(order_[n]) + 1)];
    for (std::size_t bin = 1; bin <= bins; ++bin) starts[bin] += starts[bin - 1];
    for (index_t n = 0; n < unread_; ++n) sorted_[starts[static_cast<std::size_t>(bin_of(order_[n]))]++] = order_[n];
    std::copy_n(sorted_, unread_, order_);
  }

  /// How many of the unread pages, in their order, must be read so that no row is left with more than limit(r).
  template <class Limit>
  [[nodiscard]] index_t count_needed(const Limit& limit) const noexcept {
    index_t needed = 0;
    for (index_t r = 0; r < shape_.rows; ++r) {
      const double allowed = limit(r);
      double sum = 0;
      index_t n = unread_;
      for (; n > needed; --n) {
        sum += static_cast<double>(mass_of(r, order_[n - 1]));
        if (!(sum <= allowed)) break;
      }
      needed = std::max(needed, n);
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
  [[nodiscard]] static index_t padded_pages(const shape& s) noexcept {
    return round_up(s.tiles * s.bounds_of_tile, panel_tokens);
  }
  [[nodiscard]] A mass_of(index_t r, index_t tile) const noexcept { return mass_[r * padded_pages(shape_) + tile]; }

  shape shape_{};
  A* mass_ = nullptr;              // [rows, padded pages]: bounds, then masses of tiles
  A* top_ = nullptr;               // [rows]
  A* rank_ = nullptr;              // [tiles]
  std::int32_t* order_ = nullptr;  // [tiles]: those that are not read
  std::int32_t* sorted_ = nullptr;
  tile_bits read_;
  index_t unread_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
