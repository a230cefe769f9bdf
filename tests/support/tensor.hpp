// SPDX-License-Identifier: Apache-2.0
// Tensors that own their memory, and parts of views; the benches and the demo use them, too.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory_resource>
#include <vector>

#include <gqa/tensor_view.hpp>

namespace gqa::test {

// A tensor [B, S, H, D] in either order of memory, which the default memory resource gives.
template <class T>
class tensor {
 public:
  tensor(std::array<index_t, 4> extents, layout order)
      : extents_(extents),
        order_(order),
        data_(static_cast<std::size_t>(std::max<index_t>(extents[0] * extents[1] * extents[2] * extents[3], 1))) {}

  tensor_view<T, 4> view() { return make_view<T>(data_.data()); }
  tensor_view<const T, 4> view() const { return make_view<const T>(data_.data()); }
  std::pmr::vector<T>& data() { return data_; }
  const std::pmr::vector<T>& data() const { return data_; }

 private:
  template <class U>
  tensor_view<U, 4> make_view(U* data) const {
    const auto [b, s, h, d] = extents_;
    if (order_ == layout::bshd) return {data, extents_};
    return {data, extents_, {h * s * d, d, s * d, 1}};
  }

  std::array<index_t, 4> extents_;
  layout order_;
  std::pmr::vector<T> data_;
};

// Indices [begin, begin + count) of one axis of a view.
template <class T>
tensor_view<T, 4> slice(const tensor_view<T, 4>& x, int axis, index_t begin, index_t count) {
  std::array<index_t, 4> first{}, extents{x.extent(0), x.extent(1), x.extent(2), x.extent(3)};
  first[static_cast<std::size_t>(axis)] = begin;
  extents[static_cast<std::size_t>(axis)] = count;
  return {&x(first[0], first[1], first[2], first[3]), extents, {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

}  // namespace gqa::test
