// SPDX-License-Identifier: Apache-2.0
/// \file
/// Variants: a user's own score function and mask, inlined into the tile loop.
///
/// A variant is a small struct with one or more of
///     float score(float s, const position& p) const;         // replaces the score (double over double inputs)
///     bool visible(const position& p) const;                 // false hides the key
///     visibility visible(const key_block& block) const;      // of a whole block, so that tiles are skipped
/// score() and visible(position) are asked only about keys that the options leave visible; visible(block) about whole
/// rectangles of queries and keys, of which the options may hide a part. All are asked from several threads at once and
/// in no promised order; `none` and `all` must agree with what visible(position) would say. What is absent costs
/// nothing. (The idea: FlashInfer's attention variants, Ye et al. 2025.)
#pragma once

#include <concepts>

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

/// The absence of a variant.
struct no_variant {};

}  // namespace detail

/// A type with at least one of the three functions above.
template <class V>
concept attention_variant =
    detail::scores<V, float> || detail::scores<V, double> || detail::hides_positions<V> || detail::hides_blocks<V>;

}  // namespace gqa
