// SPDX-License-Identifier: Apache-2.0
/// \file
/// Non-owning strided views: how every tensor reaches the library.
///
/// The axes of an attention operand are always [B, S, H, D] (batch, position, head, dim), whatever the order in memory:
/// a `bhsd` buffer is the same view with other strides.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>

namespace gqa {

/// Axis order of the memory handed in. Views are [B, S, H, D] either way.
enum class layout {
  bshd,  ///< [batch][seq][heads][dim]: a token's heads lie together
  bhsd,  ///< [batch][heads][seq][dim]: a head's tokens lie together
};

/// A pointer, `Rank` extents and `Rank` strides in elements. Strides may be zero or negative. Trivially copyable; the
/// elements of a const view are as mutable as T.
template <class T, int Rank>
class tensor_view {
  static_assert(Rank >= 1);

 public:
  using element_type = T;
  using value_type = std::remove_const_t<T>;
  static constexpr int rank = Rank;

  /// No elements.
  constexpr tensor_view() noexcept = default;

  /// Dense: the last axis is the fastest.
  constexpr tensor_view(T* data, std::array<index_t, Rank> extents) noexcept : data_(data), extents_(extents) {
    index_t stride = 1;
    for (int axis = Rank - 1; axis >= 0; --axis) {
      strides_[index(axis)] = stride;
      stride = product(stride, extents_[index(axis)]);
    }
  }

  /// Any strides, in elements.
  constexpr tensor_view(T* data, std::array<index_t, Rank> extents, std::array<index_t, Rank> strides) noexcept
      : data_(data), extents_(extents), strides_(strides) {}

  /// A mutable view is also a read-only one.
  template <class U>
  requires(std::same_as<const U, T> &&
           !std::same_as<U, T>) constexpr tensor_view(const tensor_view<U, Rank>& other) noexcept
      : data_(other.data()) {
    for (int axis = 0; axis < Rank; ++axis) {
      extents_[index(axis)] = other.extent(axis);
      strides_[index(axis)] = other.stride(axis);
    }
  }

  [[nodiscard]] constexpr T* data() const noexcept { return data_; }
  [[nodiscard]] constexpr index_t extent(int axis) const noexcept { return extents_[index(axis)]; }
  [[nodiscard]] constexpr index_t stride(int axis) const noexcept { return strides_[index(axis)]; }

  /// Number of elements: the product of the extents.
  [[nodiscard]] constexpr index_t size() const noexcept {
    index_t n = 1;
    for (const index_t extent : extents_) n = product(n, extent);
    return n;
  }

  /// The element at one index per axis. Not range-checked.
  template <class... I>
  requires(sizeof...(I) == Rank && (std::convertible_to<I, index_t> && ...)) [[nodiscard]] constexpr T& operator()(
      I... indices) const noexcept {
    const std::array<index_t, Rank> at{static_cast<index_t>(indices)...};
    index_t offset = 0;
    for (int axis = 0; axis < Rank; ++axis) offset += at[index(axis)] * strides_[index(axis)];
    return data_[offset];
  }

 private:
  static constexpr std::size_t index(int axis) noexcept { return static_cast<std::size_t>(axis); }

  // Extents are anything until a door has checked them: absurd ones wrap around instead of being undefined.
  static constexpr index_t product(index_t a, index_t b) noexcept {
    return static_cast<index_t>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  }

  T* data_ = nullptr;
  std::array<index_t, Rank> extents_{};
  std::array<index_t, Rank> strides_{};
};

/// A dense view of raw memory, [B, S, H, D] with D fastest.
template <class T>
[[nodiscard]] constexpr tensor_view<T, 4> view(T* data, std::array<index_t, 4> extents) noexcept {
  return {data, extents};
}

/// A view of raw memory with any strides, in elements.
template <class T>
[[nodiscard]] constexpr tensor_view<T, 4> view(T* data, std::array<index_t, 4> extents,
                                               std::array<index_t, 4> strides) noexcept {
  return {data, extents, strides};
}

namespace detail {
template <class T>
concept sixteen_bit_float = std::is_class_v<T> && sizeof(T) == 2 && alignof(T) == 2 && std::is_trivially_copyable_v<T>;
}  // namespace detail

/// Raw 16-bit words, as engines hold them, seen as Half: Eigen::half or Eigen::bfloat16. Dense.
template <detail::sixteen_bit_float Half>
[[nodiscard]] auto view_as(std::uint16_t* data, std::array<index_t, 4> extents) noexcept {
  return tensor_view<Half, 4>(reinterpret_cast<Half*>(data), extents);
}
template <detail::sixteen_bit_float Half>
[[nodiscard]] auto view_as(const std::uint16_t* data, std::array<index_t, 4> extents) noexcept {
  return tensor_view<const Half, 4>(reinterpret_cast<const Half*>(data), extents);
}

/// The same with any strides, in elements.
template <detail::sixteen_bit_float Half, class Word>
requires std::same_as<std::remove_const_t<Word>, std::uint16_t>
[[nodiscard]] auto view_as(Word* data, std::array<index_t, 4> extents, std::array<index_t, 4> strides) noexcept {
  using element = std::conditional_t<std::is_const_v<Word>, const Half, Half>;
  return tensor_view<element, 4>(reinterpret_cast<element*>(data), extents, strides);
}

namespace detail {

/// How a foreign tensor type becomes a view. Specialised in eigen_tensor.hpp; `get(tensor, layout)` returns the view.
template <class Tensor>
struct view_of;

template <class T>
inline constexpr bool is_view_4d = false;
template <class T>
inline constexpr bool is_view_4d<tensor_view<T, 4>> = true;

template <class T>
concept viewable = requires(T&& tensor) {
  view_of<std::remove_cvref_t<T>>::get(static_cast<T&&>(tensor), layout::bshd);
};

}  // namespace detail

/// An operand of attention(): a rank-4 tensor_view, or anything view() turns into one.
template <class T>
concept tensor_like = detail::is_view_4d<std::remove_cvref_t<T>> || detail::viewable<T>;

namespace detail {

template <tensor_like T>
[[nodiscard]] constexpr auto as_view(T&& tensor) {
  if constexpr (is_view_4d<std::remove_cvref_t<T>>) {
    return std::remove_cvref_t<T>(tensor);
  } else {
    return view_of<std::remove_cvref_t<T>>::get(static_cast<T&&>(tensor), layout::bshd);
  }
}

/// Element type of an operand, const where it may not be written.
template <tensor_like T>
using element_of = typename decltype(as_view(std::declval<T>()))::element_type;

}  // namespace detail
}  // namespace gqa
