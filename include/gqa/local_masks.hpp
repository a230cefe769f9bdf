// SPDX-License-Identifier: Apache-2.0
/// \file
/// Local masks: variants (variants.hpp) by which a query sees keys near its own position.
///
///     attention(q, k, v, out, options, gqa::block_local(256, 1), ctx);
///
/// Positions are absolute, so a mask does the same in prefill, append and decode. The options of the call hide keys as
/// well: with options.causal each mask becomes its causal form. A plain sliding window needs no mask: options.window.
///
/// What a query sees is a band of keys whose ends grow with its position, and for some masks a lattice in it or some
/// first keys beside it. Tiles outside of all bands are not visited, tiles inside take the path without a mask, so the
/// cost is that of the band: linear in the length.
#pragma once

#include <algorithm>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/error.hpp>
#include <gqa/variants.hpp>

namespace gqa {
namespace detail {

/// The variant of a mask that has
///     key_range band(index_t query) const     keys that a query may see, both ends growing with its position
///     index_t step() const                    of those, every step-th from the query on
///     index_t first_keys() const              and the first keys of the sequence
template <class Mask>
class band_mask {
 public:
  [[nodiscard]] bool visible(const position& p) const noexcept {
    const key_range band = self().band(p.query);
    const bool in_band = band.begin <= p.key && p.key < band.end && (p.key - p.query) % self().step() == 0;
    return in_band || p.key < self().first_keys();
  }

  [[nodiscard]] std::uint64_t visible_bits(const position& p) const noexcept {
    const key_range band = self().band(p.query);
    const index_t step = self().step();
    std::uint64_t bits = bits_between(band.begin - p.key, band.end - p.key);
    if (step > 1) {
      std::uint64_t lattice = 0;
      for (index_t i = ((p.query - p.key) % step + step) % step; i < 64; i += step) lattice |= std::uint64_t{1} << i;
      bits &= lattice;
    }
    return bits | bits_between(0, self().first_keys() - p.key);
  }

  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    const key_range first = self().band(b.query_begin), last = self().band(b.query_end - 1);
    if (b.key_end <= self().first_keys()) return visibility::all;
    if (self().step() == 1 && last.begin <= b.key_begin && b.key_end <= first.end) return visibility::all;
    const bool apart = b.key_end <= first.begin || last.end <= b.key_begin;
    return apart && b.key_begin >= self().first_keys() ? visibility::none : visibility::some;
  }

  [[nodiscard]] key_range keys(key_range queries) const noexcept {
    const key_range first = self().band(queries.begin), last = self().band(queries.end - 1);
    if (self().first_keys() > 0) return {0, (std::max)(last.end, self().first_keys())};
    return {first.begin, last.end};
  }

  [[nodiscard]] index_t step() const noexcept { return 1; }
  [[nodiscard]] index_t first_keys() const noexcept { return 0; }

 protected:
  /// An argument of a mask's constructor, which counts steps of `unit` positions: `value`, or an error and `least`.
  [[nodiscard]] static index_t at_least(index_t least, index_t value, const char* name, index_t unit = 1) {
    const index_t most = position_limit / unit;
    if (value >= least && value <= most) return value;
    raise(make_fault(errc::option, "%s: expected %lld to %lld, got %lld", name, printable(least), printable(most),
                     printable(value)));
    return least;
  }

 private:
  [[nodiscard]] const Mask& self() const noexcept { return static_cast<const Mask&>(*this); }
};

}  // namespace detail

/// Keys [query - left, query + right]: options.window as a mask, to be combined with other variants.
class sliding_window : public detail::band_mask<sliding_window> {
 public:
  sliding_window(index_t left, index_t right)
      : left_(at_least(0, left, "sliding_window: left")), right_(at_least(0, right, "sliding_window: right")) {}
  [[nodiscard]] key_range band(index_t query) const noexcept { return {query - left_, query + right_ + 1}; }

 private:
  index_t left_, right_;
};

/// Positions are cut into blocks of `size`; a query sees its own block, `before` blocks before and `after` behind it.
/// With none of those it is chunked attention (Llama 4). (BigBird's and Longformer's local part: Zaheer et al. 2020.)
class block_local : public detail::band_mask<block_local> {
 public:
  explicit block_local(index_t size, index_t before = 0, index_t after = 0)
      : size_(at_least(1, size, "block_local: size")),
        before_(at_least(0, before, "block_local: before", size_)),
        after_(at_least(0, after, "block_local: after", size_)) {}
  [[nodiscard]] key_range band(index_t query) const noexcept {
    const index_t block = detail::floor_div(query, size_);
    return {(block - before_) * size_, (block + after_ + 1) * size_};
  }

 private:
  index_t size_, before_, after_;
};

/// Attention in chunks of `size` positions: nothing is seen across their borders.
[[nodiscard]] inline block_local chunked(index_t size) {
  return block_local(size);
}

/// Keys query + j dilation for -left <= j <= right. (Longformer, Beltagy et al. 2020.)
class dilated_window : public detail::band_mask<dilated_window> {
 public:
  dilated_window(index_t left, index_t right, index_t dilation)
      : dilation_(at_least(1, dilation, "dilated_window: dilation")),
        left_(at_least(0, left, "dilated_window: left", dilation_)),
        right_(at_least(0, right, "dilated_window: right", dilation_)) {}
  [[nodiscard]] key_range band(index_t query) const noexcept {
    return {query - left_ * dilation_, query + right_ * dilation_ + 1};
  }
  [[nodiscard]] index_t step() const noexcept { return dilation_; }

 private:
  index_t dilation_, left_, right_;
};

/// The `size` keys nearest to the query of a sequence of `length`: centred on it, and shifted, not clipped, at the
/// borders, so that each query sees as many (all there are, if fewer). Of an even size one more lies before the query.
/// (Neighbourhood attention, Hassani et al. 2023.)
class neighbourhood : public detail::band_mask<neighbourhood> {
 public:
  neighbourhood(index_t size, index_t length)
      : size_(at_least(1, size, "neighbourhood: size")), length_(at_least(0, length, "neighbourhood: length")) {}
  [[nodiscard]] key_range band(index_t query) const noexcept {
    const index_t begin = std::clamp<index_t>(query - size_ / 2, 0, std::max<index_t>(length_ - size_, 0));
    return {begin, (std::min)(begin + size_, length_)};
  }

 private:
  index_t size_, length_;
};

/// The first `sinks` keys, and keys [query - left, query + right]. (StreamingLLM, Xiao et al. 2024.)
class sinks_and_window : public detail::band_mask<sinks_and_window> {
 public:
  sinks_and_window(index_t sinks, index_t left, index_t right = 0)
      : sinks_(at_least(0, sinks, "sinks_and_window: sinks")),
        left_(at_least(0, left, "sinks_and_window: left")),
        right_(at_least(0, right, "sinks_and_window: right")) {}
  [[nodiscard]] key_range band(index_t query) const noexcept { return {query - left_, query + right_ + 1}; }
  [[nodiscard]] index_t first_keys() const noexcept { return sinks_; }

 private:
  index_t sinks_, left_, right_;
};

}  // namespace gqa
