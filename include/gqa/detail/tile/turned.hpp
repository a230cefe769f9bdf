// SPDX-License-Identifier: Apache-2.0
/// \file
/// Turning rows (rope_turns.hpp): in memory, on the way to a kernel, on the way into a cache.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/rows.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Calls put(element, value) for the two elements of each pair of a row, both of which it has read by then: a row may
/// be put where it is.
template <class T, class A, class Put>
void turn_pairs(const T* row, const rope_turns<A>& turns, index_t token, const Put& put) noexcept {
  const A *const cosines = turns.cosines(token), *const sines = turns.sines(token);
  const index_t pairs = turns.pairs();
  const bool halves = turns.pairing() == rope_pairing::halves;
  for (index_t i = 0; i < pairs; ++i) {
    const index_t first = halves ? i : 2 * i, second = halves ? i + pairs : 2 * i + 1;
    const A u = static_cast<A>(row[first]), v = static_cast<A>(row[second]);
    put(first, scalar_madd(u, cosines[i], scalar_mul(-v, sines[i])));
    put(second, scalar_madd(u, sines[i], scalar_mul(v, cosines[i])));
  }
}

/// to [dim] <- a row, turned.
template <class T, class A>
void turn_row(const T* row, index_t dim, const rope_turns<A>& turns, index_t token, A* to) noexcept {
  turn_pairs(row, turns, token, [to](index_t d, A x) { to[d] = x; });
  for (index_t d = 2 * turns.pairs(); d < dim; ++d) to[d] = static_cast<A>(row[d]);
}

/// Turns of as many tokens as rows [B, S, H, D] have, and of no more pairs than fit them.
template <class T, class A>
[[nodiscard]] fault find_turns_fault(const tensor_view<T, 4>& rows, const rope_turns<A>& turns) noexcept {
  static_assert(std::is_same_v<A, accumulator_t<T>>, "gqa: turns must be of the accumulator of the rows");
  if (turns.tokens() == rows.extent(0) * rows.extent(1) && 2 * turns.pairs() <= rows.extent(3)) return {};
  return make_fault(errc::shape, "turns: expected %lld tokens of up to %lld pairs, got %lld of %lld",
                    printable(rows.extent(0) * rows.extent(1)), printable(rows.extent(3) / 2),
                    printable(turns.tokens()), printable(turns.pairs()));
}

template <class T>
inline constexpr bool is_turned = false;
template <class Rows, class A>
inline constexpr bool is_turned<turned_rows<Rows, A>> = true;

/// What view() takes, or turned() of it; the same of rows [n, H, D].
template <class T>
concept turnable = tensor_like<T> || is_turned<std::remove_cvref_t<T>>;
template <class T>
concept turnable_rows = rows_like<T> || is_turned<std::remove_cvref_t<T>>;

/// A view of const, or turned() of one.
template <turnable X>
[[nodiscard]] auto as_turnable(X&& x) {
  if constexpr (is_turned<std::remove_cvref_t<X>>) {
    return turned(as_turnable(x.rows), x.turns);
  } else {
    using element = std::remove_const_t<element_of<X>>;
    return tensor_view<const element, 4>(as_view(std::forward<X>(x)));
  }
}
template <turnable_rows X>
[[nodiscard]] auto as_turnable_rows(X&& x) {
  if constexpr (is_turned<std::remove_cvref_t<X>>) {
    return turned(as_turnable_rows(x.rows), x.turns);
  } else {
    const auto rows = as_rows(std::forward<X>(x));
    return tensor_view<const typename decltype(rows)::value_type, 4>(rows);
  }
}

/// The rows of either, and what is wrong with their turns.
template <class T>
[[nodiscard]] const tensor_view<const T, 4>& rows_of(const tensor_view<const T, 4>& x) noexcept {
  return x;
}
template <class Rows, class A>
[[nodiscard]] const auto& rows_of(const turned_rows<Rows, A>& x) noexcept {
  return x.rows;
}
template <class T>
[[nodiscard]] fault find_turns_fault(const tensor_view<const T, 4>&) noexcept {
  return {};
}
template <class Rows, class A>
[[nodiscard]] fault find_turns_fault(const turned_rows<Rows, A>& x) noexcept {
  return find_turns_fault(x.rows, x.turns);
}

/// Some rows of a head.
template <class T>
struct head_rows {
  const T* first;
  index_t stride;
};

/// Keys on their way into a cache, a panel's at most: rows [t, t + count) of head g of sequence b, as they lie.
template <class K>
class plain_keys {
 public:
  using element = K;
  explicit plain_keys(const tensor_view<const K, 4>& k) noexcept : k_(without_idle_strides(k)) {}
  [[nodiscard]] static constexpr bool is_ready() noexcept { return true; }
  [[nodiscard]] head_rows<K> operator()(index_t b, index_t t, index_t g, index_t) const noexcept {
    return {&k_(b, t, g, 0), k_.stride(1)};
  }

 private:
  tensor_view<const K, 4> k_;
};

/// The same turned, there until the next ones are asked for.
template <class K, class A>
class turned_keys {
 public:
  using element = K;
  turned_keys(const tensor_view<const K, 4>& k, const rope_turns<A>& turns)
      : k_(without_idle_strides(k)),
        turns_(turns),
        is_ready_(rows_.resize(static_cast<std::size_t>(panel_tokens * k.extent(3)))) {}
  /// Whether there was memory for a panel's.
  [[nodiscard]] bool is_ready() const noexcept { return is_ready_; }
  [[nodiscard]] head_rows<A> operator()(index_t b, index_t t, index_t g, index_t count) noexcept {
    const index_t dim = k_.extent(3);
    for (index_t i = 0; i < count; ++i)
      turn_row(&k_(b, t + i, g, 0), dim, turns_, b * k_.extent(1) + t + i, rows_.data() + i * dim);
    return {rows_.data(), dim};
  }

 private:
  tensor_view<const K, 4> k_;
  const rope_turns<A>& turns_;
  reporting_vector<A> rows_;
  bool is_ready_;
};

template <class K>
[[nodiscard]] plain_keys<K> keys_of(const tensor_view<const K, 4>& k) noexcept {
  return plain_keys<K>(k);
}
template <class K, class A>
[[nodiscard]] turned_keys<K, A> keys_of(const turned_rows<tensor_view<const K, 4>, A>& k) {
  return {k.rows, k.turns};
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
