// SPDX-License-Identifier: Apache-2.0
/// \file
/// rope: rotary position embedding of queries and keys.
///
/// Pair i of a row at position p turns by p f_i, and grows by a magnitude; by which frequencies is the model's: any
/// list, or one by the rules of rope_frequencies.hpp, which names their sources. The product of a query and a key then
/// depends on their distance alone. Rows are turned in memory by rotate(), or on their way into a call or a cache:
/// turned() (rope_turns.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/tile/narrowing.hpp>
#include <gqa/detail/tile/rows.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/rope_frequencies.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {

/// The rules that need no more than numbers.
enum class rope_scaling { none, linear, ntk, yarn, llama3 };

struct rope_options {
  double base = 10000;
  index_t dims = 0;  ///< rotated elements, the first of a row, even; 0: all
  rope_pairing pairing = rope_pairing::neighbours;
  rope_scaling scaling = rope_scaling::none;
  double factor = 1;                       ///< s, at least 1
  index_t trained_length = 0;              ///< L, of yarn and llama3
  double beta_fast = 32, beta_slow = 1;    ///< of yarn, turns within L; more of its numbers: yarn_frequencies()
  double low_factor = 1, high_factor = 4;  ///< of llama3, parts of L
};

inline namespace GQA_ISA {

class rope {
 public:
  /// \throws error  (errc::option) for dims that are odd or more than head_dim, and for numbers out of their ranges
  explicit rope(index_t head_dim, const rope_options& options = {});
  /// By any frequencies: those of a rule, or a model's own.
  /// \param frequencies  of the first pairs of a row: up to head_dim / 2
  /// \throws error       errc::shape for more pairs than fit a row, errc::option for numbers that are not finite
  template <std::same_as<rope_frequencies> F>  // so that {} stays options
  rope(index_t head_dim, F frequencies, rope_pairing pairing = rope_pairing::neighbours);

  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  [[nodiscard]] rope_pairing pairing() const noexcept { return pairing_; }
  /// [dims / 2], radians a position. (Of a temporary a copy, which outlives it.)
  [[nodiscard]] std::span<const double> frequencies() const& noexcept { return frequencies_.radians; }
  [[nodiscard]] std::vector<double> frequencies() && noexcept { return std::move(frequencies_.radians); }
  /// What rotated elements grow by.
  [[nodiscard]] double magnitude() const noexcept { return frequencies_.magnitude; }

  /// What turns tokens at these positions, to be used again for every layer.
  /// \tparam A      float, or double for rows of double
  /// \throws error  (errc::range) for positions beyond 2^60
  /// Cost: a sine and a cosine a pair and token, in double.
  template <class A>
  [[nodiscard]] rope_turns<A> turns(std::span<const index_t> positions, context& ctx) const {
    if (const auto f = find_positions_fault("positions", positions)) {
      detail::raise(f);
      return {0, pairs(), pairing_};
    }
    return turns_by<A>(static_cast<index_t>(positions.size()), ctx,
                       [positions](index_t token, index_t) { return positions[static_cast<std::size_t>(token)]; });
  }
  /// The same of tokens with a position on each of several axes, as those of images and videos have (Qwen2-VL, Wang et
  /// al. 2024): each pair turns by the position on its own axis.
  /// \param positions     [axes, n]
  /// \param axis_of_pair  [pairs]: axes_of_sections(), or any other order
  /// \throws error        errc::shape for other numbers of entries, errc::range for positions beyond 2^60 and for axes
  ///                      that there are not
  template <class A>
  [[nodiscard]] rope_turns<A> turns_of_axes(const tensor_view<const index_t, 2>& positions,
                                            std::span<const index_t> axis_of_pair, context& ctx) const {
    if (const auto f = find_axes_fault(positions, axis_of_pair)) {
      detail::raise(f);
      return {0, pairs(), pairing_};
    }
    return turns_by<A>(positions.extent(1), ctx, [&](index_t token, index_t pair) {
      return positions(axis_of_pair[static_cast<std::size_t>(pair)], token);
    });
  }

  /// Turns rows in place.
  /// \param x      [B, S, H, D], any strides but of the last axis, of any element type; or [n, H, D], a tensor_view of
  ///               rank 3
  /// \param turns  of its tokens, sequence by sequence
  /// \throws error (errc::shape, errc::stride), and errc::range for rows of 16 bits that would leave the range of their
  ///               type, before anything is written
  /// Cost: 4 multiply-adds a pair and row; of 16 bits rows are read once before.
  template <detail::rows_like X, class A>
  void rotate(X&& x, const rope_turns<A>& turns, context& ctx) const {
    const auto rows = detail::as_rows(std::forward<X>(x));
    if (const auto f = find_rows_fault(rows, turns)) return detail::raise(f);
    using turned_by = std::pair<const rope_turns<A>&, index_t>;
    if (const auto f = find_range_fault(rows, [&](index_t b, index_t s) {
          return turned_by{turns, b * rows.extent(1) + s};
        }))
      return detail::raise(f);
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
    if (const auto f = find_head_dim_fault(rows)) return detail::raise(f);
    if (const auto f = find_positions_fault("first_positions", first_positions)) return detail::raise(f);
    for (std::size_t b = 0; b < first_positions.size() && rows.extent(1) > 0; ++b) {  // and the last ones
      const index_t last = first_positions[b] + rows.extent(1) - 1;
      if (const auto f = detail::find_position_fault("first_positions", b, last)) return detail::raise(f);
    }
    rotate_in_chunks(
        rows, [&](index_t b, index_t s) { return first_positions[static_cast<std::size_t>(b)] + s; }, ctx);
  }
  /// The same once, every token at a position of its own.
  /// \param positions  [n]
  template <detail::rows_like X>
  void rotate_each(X&& x, std::span<const index_t> positions, context& ctx) const {
    const auto rows = detail::as_rows(std::forward<X>(x));
    if (const auto f = find_head_dim_fault(rows)) return detail::raise(f);
    if (static_cast<index_t>(positions.size()) != rows.extent(0) * rows.extent(1))
      return detail::raise(detail::make_fault(errc::shape, "positions: expected %lld entries, got %zu",
                                              detail::printable(rows.extent(0) * rows.extent(1)), positions.size()));
    if (const auto f = find_positions_fault("positions", positions)) return detail::raise(f);
    rotate_in_chunks(
        rows, [&](index_t b, index_t s) { return positions[static_cast<std::size_t>(b * rows.extent(1) + s)]; }, ctx);
  }

 private:
  [[nodiscard]] index_t pairs() const noexcept { return static_cast<index_t>(frequencies_.radians.size()); }
  /// The element that a rotated one turns with.
  [[nodiscard]] index_t partner_of(index_t d) const noexcept {
    if (pairing_ == rope_pairing::neighbours) return d ^ 1;
    return d < pairs() ? d + pairs() : d - pairs();
  }

  /// Turns of tokens whose pairs are at position_of(token, pair).
  template <class A, class PositionOf>
  [[nodiscard]] rope_turns<A> turns_by(index_t tokens, context& ctx, const PositionOf& position_of) const {
    rope_turns<A> made(tokens, pairs(), pairing_);
    ctx.for_each(made.tokens(), [&](index_t token, index_t) { set_turns(made, token, position_of); });
    return made;
  }
  template <class A, class PositionOf>
  void set_turns(rope_turns<A>& made, index_t token, const PositionOf& position_of) const noexcept {
    A *const cosines = made.cosines(token), *const sines = made.sines(token);
    for (index_t i = 0; i < pairs(); ++i) {
      const double angle =
          static_cast<double>(position_of(token, i)) * frequencies_.radians[static_cast<std::size_t>(i)];
      cosines[i] = static_cast<A>(magnitude() * std::cos(angle));
      sines[i] = static_cast<A>(magnitude() * std::sin(angle));
    }
  }

  [[nodiscard]] static detail::fault find_positions_fault(const char* name,
                                                          std::span<const index_t> positions) noexcept {
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (const auto f = detail::find_position_fault(name, i, positions[i])) return f;
    }
    return {};
  }
  [[nodiscard]] detail::fault find_axes_fault(const tensor_view<const index_t, 2>& positions,
                                              std::span<const index_t> axis_of_pair) const noexcept {
    using detail::make_fault, detail::printable;
    if (static_cast<index_t>(axis_of_pair.size()) != pairs())
      return make_fault(errc::shape, "axis_of_pair: expected %lld entries, got %zu", printable(pairs()),
                        axis_of_pair.size());
    if (const auto f = detail::find_extents_fault(detail::describe("positions", positions))) return f;
    const index_t axes = positions.extent(0), tokens = positions.extent(1);
    for (std::size_t i = 0; i < axis_of_pair.size(); ++i) {
      if (axis_of_pair[i] < 0 || axis_of_pair[i] >= axes)
        return make_fault(errc::range, "axis_of_pair[%zu]: expected 0 to %lld, got %lld", i, printable(axes - 1),
                          printable(axis_of_pair[i]));
    }
    for (index_t axis = 0; axis < axes; ++axis) {
      for (index_t token = 0; token < tokens; ++token) {
        const auto at = static_cast<std::size_t>(axis * tokens + token);
        if (const auto f = detail::find_position_fault("positions", at, positions(axis, token))) return f;
      }
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
    if (turns.pairs() != pairs() || turns.pairing() != pairing_)
      return detail::make_fault(errc::shape, "turns: expected those of this rope, of %lld pairs, got some of %lld",
                                detail::printable(pairs()), detail::printable(turns.pairs()));
    return detail::find_turns_fault(rows, turns);
  }

  /// Finite rows of 16 bits whose elements, turned, would round to infinity. turns_of(b, s): the turns of a token, and
  /// its number among them; asked only of rows that are long enough for that.
  template <class T, class TurnsOf>
  [[nodiscard]] detail::fault find_range_fault(const tensor_view<T, 4>& x, const TurnsOf& turns_of) const noexcept {
    if constexpr (sizeof(T) > 2) return {};
    const double most = detail::largest_of<T>(), grows = std::abs(magnitude()) * 1.4143;  // by a factor of at most
    for (index_t b = 0; b < x.extent(0); ++b) {
      for (index_t s = 0; s < x.extent(1); ++s) {
        for (index_t h = 0; h < x.extent(2); ++h) {
          const T* const row = &x(b, s, h, 0);
          float largest = 0;
          for (index_t d = 0; d < 2 * pairs(); ++d) largest = (std::max)(largest, std::abs(static_cast<float>(row[d])));
          if (!(static_cast<double>(largest) * grows > most)) continue;
          const auto [turns, token] = turns_of(b, s);
          index_t at = -1;
          detail::turn_pairs(row, turns, token, [&](index_t d, float turned) {
            const auto is_finite = [row](index_t e) { return std::isfinite(static_cast<float>(row[e])); };
            if (is_finite(d) && is_finite(partner_of(d)) && std::isinf(static_cast<float>(static_cast<T>(turned))))
              at = d;
          });
          if (at >= 0)
            return detail::make_fault(errc::range,
                                      "x[%lld, %lld, %lld, %lld]: expected a number that turned stays finite in its "
                                      "type (up to %g), got %g",
                                      detail::printable(b), detail::printable(s), detail::printable(h),
                                      detail::printable(at), most, static_cast<double>(static_cast<float>(row[at])));
        }
      }
    }
    return {};
  }

  /// Checked rows, whose turns are made for so many tokens at a time, in memory that is had before any row is turned.
  template <class T, class PositionOf>
  void rotate_in_chunks(const tensor_view<T, 4>& x, const PositionOf& position_of, context& ctx) const {
    using A = accumulator_t<T>;
    constexpr index_t chunk = 512;
    const index_t tokens = x.extent(0) * x.extent(1);
    if (tokens == 0) return;
    rope_turns<A> some((std::min)(chunk, tokens), pairs(), pairing_);
    if (some.tokens() == 0) return;
    using turned_by = std::pair<const rope_turns<A>&, index_t>;
    if (const auto f = find_range_fault(x, [&](index_t b, index_t s) {
          set_turns(some, 0, [&](index_t, index_t) { return position_of(b, s); });
          return turned_by{some, 0};
        }))
      return detail::raise(f);
    const auto turn_token = [&](index_t token, index_t slot) {
      const index_t b = token / x.extent(1), s = token % x.extent(1);
      set_turns(some, slot, [&](index_t, index_t) { return position_of(b, s); });
      for (index_t h = 0; h < x.extent(2); ++h) turn_row(&x(b, s, h, 0), some, slot);
    };
    for (index_t first = 0; first < tokens; first += chunk)
      ctx.for_each((std::min)(chunk, tokens - first), [&](index_t n, index_t) { turn_token(first + n, n); });
  }
  template <class T, class A>
  static void turn_row(T* row, const rope_turns<A>& turns, index_t token) noexcept {
    detail::turn_pairs(row, turns, token, [row](index_t d, A turned) { row[d] = static_cast<T>(turned); });
  }

  template <class T, class A>
  void rotate_rows(const tensor_view<T, 4>& x, const rope_turns<A>& turns, context& ctx) const {
    ctx.for_each(turns.tokens(), [&](index_t token, index_t) {
      for (index_t h = 0; h < x.extent(2); ++h)
        turn_row(&x(token / x.extent(1), token % x.extent(1), h, 0), turns, token);
    });
  }

  index_t head_dim_;
  rope_pairing pairing_;
  rope_frequencies frequencies_;
};

inline rope::rope(index_t head_dim, const rope_options& options) : head_dim_(head_dim), pairing_(options.pairing) {
  const index_t dims = options.dims == 0 ? head_dim : options.dims;
  const auto find_fault = [&]() -> detail::fault {
    using detail::make_fault, detail::printable;
    if (head_dim < 1) return make_fault(errc::shape, "rope: expected head_dim >= 1, got %lld", printable(head_dim));
    if (options.dims < 0 || options.dims > head_dim || dims % 2 != 0)
      return make_fault(errc::option, "rope dims: expected an even number up to %lld, got %lld", printable(head_dim),
                        printable(options.dims));
    if (options.pairing < rope_pairing::neighbours || options.pairing > rope_pairing::halves ||
        options.scaling < rope_scaling::none || options.scaling > rope_scaling::llama3)
      return make_fault(errc::option, "rope pairing, scaling: expected enumerators, got %d, %d",
                        static_cast<int>(options.pairing), static_cast<int>(options.scaling));
    return detail::find_frequencies_fault(dims, options.base, options.factor);
  };
  if (const auto f = find_fault()) {
    head_dim_ = 0;  // where raise() returns: what turns nothing fits no rows
    detail::raise(f);
    return;
  }
  switch (options.scaling) {
    case rope_scaling::none:
      frequencies_ = own_frequencies(dims, options.base);
      break;
    case rope_scaling::linear:
      frequencies_ = linear_frequencies(dims, options.base, options.factor);
      break;
    case rope_scaling::ntk:
      frequencies_ = ntk_frequencies(dims, options.base, options.factor);
      break;
    case rope_scaling::yarn:
      frequencies_ = yarn_frequencies(dims, {.base = options.base,
                                             .factor = options.factor,
                                             .trained_length = options.trained_length,
                                             .beta_fast = options.beta_fast,
                                             .beta_slow = options.beta_slow});
      break;
    case rope_scaling::llama3:
      frequencies_ = llama3_frequencies(
          dims, {options.base, options.factor, options.trained_length, options.low_factor, options.high_factor});
      break;
  }
  if (frequencies_.radians.empty()) head_dim_ = 0;
}

template <std::same_as<rope_frequencies> F>
rope::rope(index_t head_dim, F frequencies, rope_pairing pairing)
    : head_dim_(head_dim), pairing_(pairing), frequencies_(std::move(frequencies)) {
  const auto find_fault = [&]() -> detail::fault {
    using detail::make_fault, detail::printable;
    if (head_dim < 1) return make_fault(errc::shape, "rope: expected head_dim >= 1, got %lld", printable(head_dim));
    if (2 * pairs() > head_dim)
      return make_fault(errc::shape, "rope frequencies: expected up to %lld pairs, got %lld", printable(head_dim / 2),
                        printable(pairs()));
    if (pairing < rope_pairing::neighbours || pairing > rope_pairing::halves)
      return make_fault(errc::option, "rope pairing: expected an enumerator, got %d", static_cast<int>(pairing));
    if (!std::isfinite(magnitude()))
      return make_fault(errc::option, "rope magnitude: expected a finite number, got %g", magnitude());
    for (std::size_t i = 0; i < frequencies_.radians.size(); ++i) {
      if (!std::isfinite(frequencies_.radians[i]))
        return make_fault(errc::option, "rope frequencies[%zu]: expected a finite number, got %g", i,
                          frequencies_.radians[i]);
    }
    return {};
  };
  if (const auto f = find_fault()) {
    head_dim_ = 0;
    frequencies_ = {};
    detail::raise(f);
  }
}

}  // namespace GQA_ISA
}  // namespace gqa
