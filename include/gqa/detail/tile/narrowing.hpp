// SPDX-License-Identifier: Apache-2.0
/// \file
/// Floats on their way into a narrower type, those of turned rows as they are once turned: those that it does not reach
/// are refused, with their place, before anything is stored. (A finite number that became infinite would make its whole
/// row NaN, some steps later.)
///
/// half reaches to 65,504, bfloat16 to 3.39e38; what is below the midpoint between its largest number and the next
/// power of two rounds down to it. Infinities and NaN are stored as they are. Of 8 bits any finite number is within
/// reach, for each block of 32 has a scale of its own.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Bits of the least float that rounds to an infinite T.
template <class T>
inline constexpr std::uint32_t least_infinite_bits = 0x7f800000u;
template <>
inline constexpr std::uint32_t least_infinite_bits<Eigen::half> = std::bit_cast<std::uint32_t>(65520.0f);
template <>
inline constexpr std::uint32_t least_infinite_bits<Eigen::bfloat16> = 0x7f7f8000u;

/// The largest number of T.
template <class T>
[[nodiscard]] double largest_of() noexcept {
  return static_cast<double>(static_cast<T>(std::bit_cast<float>(least_infinite_bits<T> - 1)));
}

/// Whether a finite float of a row [dim] rounds to an infinite T.
template <class T>
[[nodiscard]] bool leaves_range(const float* row, index_t dim) noexcept {
  constexpr std::uint32_t least = least_infinite_bits<T>, finite = 0x7f800000u - least;
  std::uint32_t any = 0;
  for (index_t d = 0; d < dim; ++d)
    any |= (std::bit_cast<std::uint32_t>(row[d]) & 0x7fffffffu) - least < finite ? 1u : 0u;
  return any != 0;
}

/// Rows [count, tokens, heads, dim] on their way into a T, as rows(b, t, g, tokens of a panel at most) gives them.
/// Cost: reads each element once, and turns those that are turned on their way once more; nothing where T is as wide as
/// they are.
template <class T, class Rows>
[[nodiscard]] fault find_narrowing_fault(const char* name, Rows& rows, index_t count, index_t tokens, index_t heads,
                                         index_t dim) noexcept {
  using element = std::remove_cvref_t<decltype(*rows(0, 0, 0, 0).first)>;
  if constexpr (std::is_same_v<element, float> && least_infinite_bits<T> != 0x7f800000u) {
    for (index_t b = 0; b < count; ++b) {
      for (index_t first = 0; first < tokens; first += panel_tokens) {
        const index_t some = (std::min)(panel_tokens, tokens - first);
        for (index_t g = 0; g < heads; ++g) {
          const head_rows<float> own = rows(b, first, g, some);
          for (index_t t = 0; t < some; ++t) {
            const float* const row = own.first + t * own.stride;
            if (!leaves_range<T>(row, dim)) continue;
            index_t d = 0;
            while (!leaves_range<T>(row + d, 1)) ++d;
            return make_fault(errc::range,
                              "%s[%lld, %lld, %lld, %lld]: expected a number that is finite in the cache's type (up to "
                              "%g), got %g",
                              name, printable(b), printable(first + t), printable(g), printable(d), largest_of<T>(),
                              static_cast<double>(row[d]));
          }
        }
      }
    }
  }
  return {};
}

/// The same of keys, as keys_of() gives them, and values on their way into a cache of T; and whether keys that are
/// turned on it have the memory for that.
template <class T, class Keys, class V>
[[nodiscard]] fault find_narrowing_faults(Keys& keys, index_t head_dim, const tensor_view<V, 4>& v) noexcept {
  const index_t count = v.extent(0), tokens = v.extent(1), heads = v.extent(2);
  if (!keys.is_ready()) return make_room_fault("keys that turn");
  if (const auto f = find_narrowing_fault<key_type<T>>("k", keys, count, tokens, heads, head_dim)) return f;
  plain_keys<std::remove_const_t<V>> values{tensor_view<const std::remove_const_t<V>, 4>(v)};
  return find_narrowing_fault<value_type<T>>("v", values, count, tokens, heads, v.extent(3));
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
