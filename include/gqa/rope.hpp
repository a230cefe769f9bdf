// SPDX-License-Identifier: Apache-2.0
/// \file
/// rope: rotary position embedding of queries and keys, and how trained frequencies are stretched for longer texts.
///
/// Pair i of a row at position p turns by p f_i; with d rotated elements and a base b the frequencies are
///     f_i = b^(-2 i / d), i < d / 2            (RoFormer, Su et al. 2021)
/// stretched by a factor s over a trained length L:
///     linear  f_i / s                          (position interpolation, Chen et al. 2023)
///     ntk     the same with the base b s^(d / (d - 2)): the lowest as linear, the highest as they are (bloc97 2023)
///     yarn    f_i / s for pairs of less than beta_slow turns within L, f_i for those of more than beta_fast, between
///             them a ramp; rows grow by 0.1 ln s + 1    (Peng et al. 2023, with the rounding of its published code)
///     llama3  f_i / s for wavelengths above L / low, f_i for those below L / high, between them a ramp in 1 /
///     wavelength
///             (the released code of Llama 3.1)
/// The product of a query and a key then depends on their distance alone. Rows are turned in memory by rotate(), or on
/// their way into a call or a cache: turned() (rope_turns.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/rows.hpp>
#include <gqa/detail/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {

enum class rope_scaling { none, linear, ntk, yarn, llama3 };

struct rope_options {
  double base = 10000;
  index_t dims = 0;  ///< rotated elements, the first of a row, even; 0: all
  rope_pairing pairing = rope_pairing::neighbours;
  rope_scaling scaling = rope_scaling::none;
  double factor = 1;                       ///< s, at least 1
  index_t trained_length = 0;              ///< L, of yarn and llama3
  double beta_fast = 32, beta_slow = 1;    ///< of yarn, turns within L
  double low_factor = 1, high_factor = 4;  ///< of llama3, parts of L
};

inline namespace GQA_ISA {

class rope {
 public:
  /// \throws error  (errc::option) for dims that are odd or more than head_dim, and for numbers out of their ranges
  explicit rope(index_t head_dim, const rope_options& options = {});

  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  /// [dims / 2], radians a position.
  [[nodiscard]] std::span<const double> frequencies() const noexcept { return frequencies_; }
  /// What rotated elements grow by.
  [[nodiscard]] double magnitude() const noexcept { return magnitude_; }

  /// What turns tokens at these positions, to be used again for every layer.
  /// \tparam A      float, or double for rows of double
  /// \throws error  (errc::range) for positions beyond 2^60
  /// Cost: a sine and a cosine a pair and token, in double.
  template <class A>
  [[nodiscard]] rope_turns<A> turns(std::span<const index_t> positions, context& ctx) const {
    if (const auto f = find_positions_fault("positions", positions)) {
      detail::raise(f);
      return {0, pairs(), options_.pairing};
    }
    rope_turns<A> made(static_cast<index_t>(positions.size()), pairs(), options_.pairing);
    ctx.for_each(made.tokens(), [&](index_t token, index_t) {
      A *const cosines = made.cosines(token), *const sines = made.sines(token);
      const auto position = static_cast<double>(positions[static_cast<std::size_t>(token)]);
      for (index_t i = 0; i < pairs(); ++i) {
        const double angle = position * frequencies_[static_cast<std::size_t>(i)];
        cosines[i] = static_cast<A>(magnitude_ * std::cos(angle));
        sines[i] = static_cast<A>(magnitude_ * std::sin(angle));
      }
    });
    return made;
  }

  /// Turns rows in place.
  /// \param x      [B, S, H, D], any strides but of the last axis, of any element type; or [n, H, D], a tensor_view of
  ///               rank 3
  /// \param turns  of its tokens, sequence by sequence
  /// \throws error (errc::shape, errc::stride) before anything is written
  /// Cost: 4 multiply-adds a pair and row.
  template <detail::rows_like X, class A>
  void rotate(X&& x, const rope_turns<A>& turns, context& ctx) const {
    const auto rows = detail::as_rows(std::forward<X>(x));
    if (const auto f = find_rows_fault(rows, turns)) return detail::raise(f);
    rotate_rows(rows, turns, ctx);
  }
  /// The same once: token s of sequence b is at first_positions[b] + s.
  /// \param first_positions  [B]
  /// \throws error           the same, and (errc::range)
  template <tensor_like X>
  void rotate(X&& x, std::span<const index_t> first_positions, context& ctx) const {
    const auto rows = detail::as_rows(std::forward<X>(x));
    if (static_cast<index_t>(first_positions.size()) != rows.extent(0))
      return detail::raise(detail::make_fault(errc::shape, "first_positions: expected %lld entries, got %zu",
                                              detail::printable(rows.extent(0)), first_positions.size()));
    if (const auto f = find_positions_fault("first_positions", first_positions)) return detail::raise(f);
    for (std::size_t b = 0; b < first_positions.size() && rows.extent(1) > 0; ++b) {  // and the last ones
      const index_t last = first_positions[b] + rows.extent(1) - 1;
      if (const auto f = detail::find_position_fault("first_positions", b, last)) return detail::raise(f);
    }
    if (const auto f = find_head_dim_fault(rows)) return detail::raise(f);
    rotate_in_chunks(
        rows, [&](index_t b, index_t s) { return first_positions[static_cast<std::size_t>(b)] + s; }, ctx);
  }
  /// The same once, every token at a position of its own.
  /// \param positions  [n]
  template <detail::rows_like X>
  void rotate_each(X&& x, std::span<const index_t> positions, context& ctx) const {
    const auto rows = detail::as_rows(std::forward<X>(x));
    if (static_cast<index_t>(positions.size()) != rows.extent(0) * rows.extent(1))
      return detail::raise(detail::make_fault(errc::shape, "positions: expected %lld entries, got %zu",
                                              detail::printable(rows.extent(0) * rows.extent(1)), positions.size()));
    if (const auto f = find_positions_fault("positions", positions)) return detail::raise(f);
    if (const auto f = find_head_dim_fault(rows)) return detail::raise(f);
    rotate_in_chunks(
        rows, [&](index_t b, index_t s) { return positions[static_cast<std::size_t>(b * rows.extent(1) + s)]; }, ctx);
  }

 private:
  [[nodiscard]] index_t pairs() const noexcept { return static_cast<index_t>(frequencies_.size()); }

  [[nodiscard]] static detail::fault find_positions_fault(const char* name,
                                                          std::span<const index_t> positions) noexcept {
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (const auto f = detail::find_position_fault(name, i, positions[i])) return f;
    }
    return {};
  }
  template <class T>
  [[nodiscard]] detail::fault find_head_dim_fault(const tensor_view<T, 4>& rows) const noexcept {
    static_assert(!std::is_const_v<T>, "gqa: rows are rotated in place");
    const detail::operand x = detail::describe("x", rows);
    if (const auto f = detail::find_output_fault(x)) return f;
    return detail::find_extent_fault(x, 3, head_dim_, "the head dim");
  }
  template <class T, class A>
  [[nodiscard]] detail::fault find_rows_fault(const tensor_view<T, 4>& rows,
                                              const rope_turns<A>& turns) const noexcept {
    if (const auto f = find_head_dim_fault(rows)) return f;
    if (turns.pairs() != pairs() || turns.pairing() != options_.pairing)
      return detail::make_fault(errc::shape, "turns: expected those of this rope, of %lld pairs, got some of %lld",
                                detail::printable(pairs()), detail::printable(turns.pairs()));
    return detail::find_turns_fault(rows, turns);
  }

  /// Checked rows, whose turns are made for so many tokens at a time.
  template <class T, class PositionOf>
  void rotate_in_chunks(const tensor_view<T, 4>& x, const PositionOf& position_of, context& ctx) const {
    constexpr index_t chunk = 512;
    std::vector<index_t> positions;
    for (index_t b = 0; b < x.extent(0); ++b) {
      for (index_t first = 0; first < x.extent(1); first += chunk) {
        positions.clear();
        for (index_t s = first; s < (std::min)(first + chunk, x.extent(1)); ++s) positions.push_back(position_of(b, s));
        const tensor_view<T, 4> some(&x(b, first, 0, 0),
                                     {1, static_cast<index_t>(positions.size()), x.extent(2), x.extent(3)},
                                     {0, x.stride(1), x.stride(2), x.stride(3)});
        rotate_rows(some, turns<accumulator_t<T>>(positions, ctx), ctx);
      }
    }
  }

  template <class T, class A>
  void rotate_rows(const tensor_view<T, 4>& x, const rope_turns<A>& turns, context& ctx) const {
    ctx.for_each(turns.tokens(), [&](index_t token, index_t) {
      for (index_t h = 0; h < x.extent(2); ++h) {
        T* const row = &x(token / x.extent(1), token % x.extent(1), h, 0);
        detail::turn_pairs(row, turns, token, [row](index_t d, A turned) { row[d] = static_cast<T>(turned); });
      }
    });
  }

  void set_frequencies();

  index_t head_dim_;
  rope_options options_;
  std::vector<double> frequencies_;
  double magnitude_ = 1;
};

inline rope::rope(index_t head_dim, const rope_options& options) : head_dim_(head_dim), options_(options) {
  const auto find_fault = [&]() -> detail::fault {
    using detail::make_fault, detail::printable;
    if (head_dim < 1) return make_fault(errc::shape, "rope: expected head_dim >= 1, got %lld", printable(head_dim));
    if (options.dims < 0 || options.dims > head_dim || (options.dims == 0 ? head_dim : options.dims) % 2 != 0)
      return make_fault(errc::option, "rope dims: expected an even number up to %lld, got %lld", printable(head_dim),
                        printable(options.dims));
    if (!(options.base > 1 && std::isfinite(options.base)))
      return make_fault(errc::option, "rope base: expected a finite number above 1, got %g", options.base);
    if (options.pairing < rope_pairing::neighbours || options.pairing > rope_pairing::halves ||
        options.scaling < rope_scaling::none || options.scaling > rope_scaling::llama3)
      return make_fault(errc::option, "rope pairing, scaling: expected enumerators, got %d, %d",
                        static_cast<int>(options.pairing), static_cast<int>(options.scaling));
    if (!(options.factor >= 1 && std::isfinite(options.factor)))
      return make_fault(errc::option, "rope factor: expected a finite number of at least 1, got %g", options.factor);
    const bool is_trained = options.scaling == rope_scaling::yarn || options.scaling == rope_scaling::llama3;
    if (is_trained && options.trained_length < 1)
      return make_fault(errc::option, "rope trained_length: expected 1 or more, got %lld",
                        printable(options.trained_length));
    if (options.scaling == rope_scaling::yarn && !(options.beta_slow > 0 && options.beta_fast > options.beta_slow))
      return make_fault(errc::option,
                        "rope beta_fast, beta_slow: expected the first above the other above 0, got %g, %g",
                        options.beta_fast, options.beta_slow);
    if (options.scaling == rope_scaling::llama3 &&
        !(options.low_factor > 0 && options.high_factor > options.low_factor))
      return make_fault(errc::option,
                        "rope high_factor, low_factor: expected the first above the other above 0, got %g, %g",
                        options.high_factor, options.low_factor);
    return {};
  };
  if (const auto f = find_fault()) {
    head_dim_ = 0;  // where raise() returns: what turns nothing fits no rows
    detail::raise(f);
    return;
  }
  set_frequencies();
}

inline void rope::set_frequencies() {
  const rope_options& o = options_;
  const auto dims = static_cast<double>(o.dims == 0 ? head_dim_ : o.dims);
  const auto length = static_cast<double>(o.trained_length);
  const double stretch = o.scaling == rope_scaling::ntk && dims > 2 ? std::pow(o.factor, dims / (dims - 2)) : 1;
  // Where on the scale of pairs a pair lies that makes so many turns within the trained length.
  const auto pair_of_turns = [&](double turns) {
    return dims * std::log(length / (turns * 2 * std::numbers::pi)) / (2 * std::log(o.base));
  };
  for (double i = 0; i < dims / 2; ++i) {
    const double own = std::pow(o.base * stretch, -2 * i / dims), stretched = own / o.factor;
    double kept = 1;  // the part of the frequency that is not stretched
    if (o.scaling == rope_scaling::linear) kept = 0;
    if (o.scaling == rope_scaling::yarn) {
      const double low = (std::max)(std::floor(pair_of_turns(o.beta_fast)), 0.0);
      const double high = (std::min)(std::ceil(pair_of_turns(o.beta_slow)), dims - 1);
      kept = 1 - std::clamp((i - low) / (std::max)(high - low, 0.001), 0.0, 1.0);
    }
    if (o.scaling == rope_scaling::llama3) {
      const double turns = length * own / (2 * std::numbers::pi);
      kept = std::clamp((turns - o.low_factor) / (o.high_factor - o.low_factor), 0.0, 1.0);
    }
    frequencies_.push_back(kept * own + (1 - kept) * stretched);
  }
  if (o.scaling == rope_scaling::yarn) magnitude_ = 0.1 * std::log(o.factor) + 1;
}

}  // namespace GQA_ISA
}  // namespace gqa
