// SPDX-License-Identifier: Apache-2.0
/// \file
/// view(): Eigen tensors as attention operands, without a copy. The only header that includes Eigen's Tensor module.
///
/// A RowMajor tensor names its axes slowest first: layout::bshd means dimensions (batch, seq, heads, dim). A ColMajor
/// tensor names the same memory fastest first: layout::bshd means dimensions (dim, heads, seq, batch). In rank 3 the
/// batch axis is left out and taken as 1.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include <unsupported/Eigen/CXX11/Tensor>

#include <gqa/config.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {

template <class T>
inline constexpr bool is_owning_tensor = false;
template <class T, int Rank, int Options, class Index>
inline constexpr bool is_owning_tensor<Eigen::Tensor<T, Rank, Options, Index>> = true;
template <class T, class Sizes, int Options, class Index>
inline constexpr bool is_owning_tensor<Eigen::TensorFixedSize<T, Sizes, Options, Index>> = true;

template <class T>
inline constexpr bool is_tensor_map = false;
template <class Plain, int Options, template <class> class Pointer>
inline constexpr bool is_tensor_map<Eigen::TensorMap<Plain, Options, Pointer>> = true;

template <class Tensor>
requires(is_owning_tensor<Tensor> || is_tensor_map<Tensor>) struct view_of<Tensor> {
  static constexpr int rank = Tensor::NumDimensions;
  static_assert(rank == 4 || rank == 3, "gqa::view takes tensors of rank 4, or of rank 3 for a batch of 1");

  /// Of a tensor that outlives the call's full expression: an lvalue, or a map of somebody else's memory.
  template <class T>
  requires(is_tensor_map<Tensor> || std::is_lvalue_reference_v<T>) static auto get(T&& tensor, layout order) noexcept {
    // Extents of the memory's axes, slowest first; batch 1 where there is none.
    std::array<index_t, 4> memory{1, 1, 1, 1};
    const Eigen::DSizes<typename Tensor::Index, rank> extents(tensor.dimensions());
    for (std::size_t axis = 0; axis < rank; ++axis) {
      const std::size_t from_slowest = int{Tensor::Layout} == int{Eigen::RowMajor} ? axis : rank - 1 - axis;
      memory[4 - rank + from_slowest] = static_cast<index_t>(extents[axis]);
    }
    using element = std::remove_pointer_t<decltype(tensor.data())>;
    const tensor_view<element, 4> dense(tensor.data(), memory);
    if (order == layout::bshd) return dense;
    return tensor_view<element, 4>(tensor.data(), {memory[0], memory[2], memory[1], memory[3]},
                                   {dense.stride(0), dense.stride(2), dense.stride(1), dense.stride(3)});
  }
};

}  // namespace detail

/// The [B, S, H, D] view of an Eigen tensor: an Eigen::Tensor or TensorFixedSize (lvalues only, for a view of a dying
/// tensor would dangle) or an Eigen::TensorMap (also a temporary). A const tensor gives a read-only view.
template <class EigenTensor>
requires detail::viewable<EigenTensor>
[[nodiscard]] auto view(EigenTensor&& tensor, layout order = layout::bshd) {
  return detail::view_of<std::remove_cvref_t<EigenTensor>>::get(std::forward<EigenTensor>(tensor), order);
}

}  // namespace gqa
