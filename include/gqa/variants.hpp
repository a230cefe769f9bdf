// SPDX-License-Identifier: Apache-2.0
/// \file
/// Variants: a user's own score function and mask, inlined into the tile loop.
///
/// A variant is a small struct with one or more of
///     float score(float s, const position& p) const;         // replaces the score (double over double inputs)
///     bool visible(const position& p) const;                 // false hides the key
///     visibility visible(const key_block& block) const;      // of a block of any size, so that tiles are skipped
///     std::uint64_t visible_bits(const position& p) const;   // of 64 keys from p.key, a multiple of 64, a bit each
///     key_range keys(key_range queries) const;               // no query of these positions sees any key outside
///     index_t query_block() const;                           // queries of a block of so many mostly see the same
/// score() and visible(position) are asked only about keys that the options leave visible; visible(block) about whole
/// rectangles of queries and keys, of which the options may hide a part; visible_bits(), in the place of
/// visible(position) where there are both, about 64 keys of which the options may hide some and of which the last may
/// not be there. keys() spares a long sequence from asking about every block; beside it there must be another function
/// that hides. query_block() spares queries of one block the keys that only those of another see. All are asked from
/// several threads at once and in no promised order, and must agree with each other.
/// What is absent costs nothing. (The idea: FlashInfer's attention variants, Ye et al. 2025.)
#pragma once

#include <concepts>
#include <cstdint>

#include <gqa/config.hpp>

namespace gqa {

/// One query-key pair. Positions are absolute: `query` is the query offset plus the index in the call, `key` counts
/// from 0.
struct position {
  index_t batch = 0;
  index_t q_head = 0;
  index_t query = 0;
  index_t key = 0;
};

/// The query-key pairs of all positions in half-open ranges, for some query heads of one sequence.
struct key_block {
  index_t batch = 0;
  index_t q_head_begin = 0, q_head_end = 0;
  index_t query_begin = 0, query_end = 0;
  index_t key_begin = 0, key_end = 0;
};

/// Positions [begin, end); empty if end <= begin.
struct key_range {
  index_t begin = 0;
  index_t end = 0;

  [[nodiscard]] constexpr index_t size() const noexcept { return end > begin ? end - begin : 0; }
  [[nodiscard]] friend constexpr bool operator==(const key_range&, const key_range&) = default;
};

/// How much of a block a variant leaves visible. `some` is always a legal answer.
enum class visibility { none, some, all };

namespace detail {

template <class V, class A>
concept scores = requires(const V& v, A s, const position& p) {
  { v.score(s, p) } -> std::convertible_to<A>;
};
template <class V>
concept hides_positions = requires(const V& v, const position& p) {
  { v.visible(p) } -> std::same_as<bool>;
};
template <class V>
concept hides_blocks = requires(const V& v, const key_block& b) {
  { v.visible(b) } -> std::same_as<visibility>;
};

template <class V>
concept hides_bits = requires(const V& v, const position& p) {
  { v.visible_bits(p) } -> std::same_as<std::uint64_t>;
};
template <class V>
concept bounds_keys = requires(const V& v, const key_range& queries) {
  { v.keys(queries) } -> std::same_as<key_range>;
};
template <class V>
concept has_query_blocks = requires(const V& v) {
  { v.query_block() } -> std::same_as<index_t>;
};
/// Whether a variant hides any keys.
template <class V>
inline constexpr bool hides_keys = hides_positions<V> || hides_blocks<V> || hides_bits<V>;

/// The absence of a variant.
struct no_variant {};

}  // namespace detail

/// A type with at least one of the first four functions above.
template <class V>
concept attention_variant = detail::scores<V, float> || detail::scores<V, double> || detail::hides_keys<V>;

}  // namespace gqa
