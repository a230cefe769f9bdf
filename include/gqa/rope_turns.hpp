// SPDX-License-Identifier: Apache-2.0
/// \file
/// rope_turns: what rotary embedding (rope.hpp) turns a step's tokens by; turned(): rows that are turned on their way.
///
/// Instead of rows that rope::rotate() turns in memory, attention() and batch_attention() take turned(q, turns), and
/// the appends and writes of caches turned(k, turns): q and k stay as they are, and each row is turned when it is
/// loaded or stored. Rows of float and double get the bits that rotate() gives them, and so do keys of 16 bits on
/// their way into a cache of their type. Others of 16 bits are spared a rounding in between: keys on their way to 8
/// bits, queries that meet keys as floats or in 8 bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/reporting_vector.hpp>

namespace gqa {

/// Which elements of a row turn together: (2 i, 2 i + 1) (GPT-J, the checkpoints of Llama), or (i, i + d / 2)
/// (GPT-NeoX, Hugging Face's permuted Llama).
enum class rope_pairing { neighbours, halves };

/// Sines and cosines of tokens' positions, for all layers and heads of a step: made by rope::turns(). A: accumulators
/// of what is turned.
template <class A>
class rope_turns {
 public:
  /// Zeros.
  /// \throws error  errc::capacity; where that returns, there are no tokens
  rope_turns(index_t tokens, index_t pairs, rope_pairing pairing) : pairs_(pairs), pairing_(pairing) {
    if (detail::make_zeros(turns_, static_cast<std::size_t>(2 * tokens * pairs), "turns")) tokens_ = tokens;
  }
  rope_turns(const rope_turns& other) : rope_turns(other.tokens_, other.pairs_, other.pairing_) {
    if (tokens_ == other.tokens_) std::copy(other.turns_.begin(), other.turns_.end(), turns_.begin());
  }
  rope_turns(rope_turns&& other) noexcept { swap(other); }
  rope_turns& operator=(rope_turns other) noexcept {
    swap(other);
    return *this;
  }
  ~rope_turns() = default;

  [[nodiscard]] index_t tokens() const noexcept { return tokens_; }
  [[nodiscard]] index_t pairs() const noexcept { return pairs_; }
  [[nodiscard]] rope_pairing pairing() const noexcept { return pairing_; }
  /// [pairs] of a token.
  [[nodiscard]] A* cosines(index_t token) noexcept { return turns_.data() + 2 * pairs_ * token; }
  [[nodiscard]] const A* cosines(index_t token) const noexcept { return turns_.data() + 2 * pairs_ * token; }
  [[nodiscard]] A* sines(index_t token) noexcept { return cosines(token) + pairs_; }
  [[nodiscard]] const A* sines(index_t token) const noexcept { return cosines(token) + pairs_; }

 private:
  void swap(rope_turns& other) noexcept {
    std::swap(tokens_, other.tokens_), std::swap(pairs_, other.pairs_), std::swap(pairing_, other.pairing_);
    turns_.swap(other.turns_);
  }

  index_t tokens_ = 0, pairs_ = 0;
  rope_pairing pairing_ = rope_pairing::neighbours;
  detail::reporting_vector<A> turns_;  // [tokens][cosines, sines]
};

/// Rows, in whatever form a call takes them (a reference to what outlives this, or a view), and the turns of their
/// tokens, sequence by sequence, which outlive it.
template <class Rows, class A>
struct turned_rows {
  Rows rows;
  const rope_turns<A>& turns;
};

/// \param rows   a tensor_view, or what view() takes
/// \param turns  of as many tokens; outlives what is returned
template <class Rows, class A>
[[nodiscard]] turned_rows<Rows, A> turned(Rows&& rows, const rope_turns<A>& turns) {
  return {std::forward<Rows>(rows), turns};
}

}  // namespace gqa
