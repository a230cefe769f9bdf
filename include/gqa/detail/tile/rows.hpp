// SPDX-License-Identifier: Apache-2.0
/// \file
/// Rows of tokens, [tokens, heads, dim], in the forms that users have them.
#pragma once

#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class T>
inline constexpr bool is_view_3d = false;
template <class T>
inline constexpr bool is_view_3d<tensor_view<T, 3>> = true;

/// A tensor_view of rank 3, or what view() takes, of batch 1.
template <class T>
concept rows_like = is_view_3d<std::remove_cvref_t<T>> || tensor_like<T>;

/// The same as a rank-4 view of one batch, which has no stride.
template <rows_like T>
[[nodiscard]] constexpr auto as_rows(T&& rows) {
  if constexpr (is_view_3d<std::remove_cvref_t<T>>) {
    using element = typename std::remove_cvref_t<T>::element_type;
    return without_idle_strides(tensor_view<element, 4>(rows.data(),
                                                        {1, rows.extent(0), rows.extent(1), rows.extent(2)},
                                                        {0, rows.stride(0), rows.stride(1), rows.stride(2)}));
  } else {
    return without_idle_strides(as_view(std::forward<T>(rows)));
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
