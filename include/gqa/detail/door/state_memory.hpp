// SPDX-License-Identifier: Apache-2.0
/// \file
/// state_memory: a state of a call's rows with memory of its own.
#pragma once

#include <array>
#include <cstddef>

#include <gqa/config.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class A>
class state_memory {
 public:
  /// Of queries that a call's checks have passed. False after a capacity error, where that returns.
  template <class Q>
  [[nodiscard]] bool make(const tensor_view<Q, 4>& q, index_t value_dim) {
    const std::array<index_t, 3> rows{q.extent(0), q.extent(1), q.extent(2)};
    const auto count = static_cast<std::size_t>(rows[0] * rows[1] * rows[2]);
    if (!make_zeros(out_, count * static_cast<std::size_t>(value_dim), "states") || !make_zeros(lse_, count, "states"))
      return false;
    state_ = {tensor_view<A, 4>(out_.data(), {rows[0], rows[1], rows[2], value_dim}),
              tensor_view<A, 3>(lse_.data(), rows)};
    return true;
  }
  [[nodiscard]] const partial_state<A>& operator*() const noexcept { return state_; }
  [[nodiscard]] const partial_state<A>* operator->() const noexcept { return &state_; }

 private:
  reporting_vector<A> out_, lse_;
  partial_state<A> state_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
