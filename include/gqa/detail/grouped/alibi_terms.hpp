// SPDX-License-Identifier: Apache-2.0
/// \file
/// ALiBi of one head as terms of the keys alone, so that rows at different positions can share.
///
/// slope (t - p) = slope (t - origin) + slope (origin - p): the first part is a bias of the keys, the same for all rows
/// of the head; the second is one number a row, which its weights do not see and its log-sum-exp takes. The origin is
/// the last key or the first, whichever has the larger term: no term is above 0, and those of large weights are small.
///
/// Terms are floats, as biases are: exact where the slope is a power of two and distances are below 2^24, else within
/// 2^-24 of themselves.
#pragma once

#include <optional>

#include <gqa/config.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

class alibi_terms {
 public:
  /// No ALiBi.
  alibi_terms() noexcept = default;
  /// Of keys [0, keys), written to `memory`; `last` is the last of them that is attended to.
  alibi_terms(float slope, index_t last, index_t keys, float* memory) noexcept
      : slope_(slope), origin_(slope < 0 ? 0 : last), terms_(memory) {
    for (index_t t = 0; t < keys; ++t) memory[t] = static_cast<float>(slope_ * static_cast<double>(t - origin_));
  }

  [[nodiscard]] bool empty() const noexcept { return terms_ == nullptr; }
  [[nodiscard]] float operator[](index_t key) const noexcept { return terms_[key]; }
  /// The bias of a call of `rows` queries over keys [0, keys).
  [[nodiscard]] std::optional<tensor_view<const float, 4>> bias(index_t rows, index_t keys) const noexcept {
    if (empty()) return std::nullopt;
    return bias_of(terms_, rows, keys);
  }
  [[nodiscard]] static tensor_view<const float, 4> bias_of(const float* terms, index_t rows, index_t keys) noexcept {
    return {terms, {1, 1, rows, keys}, {0, 0, 0, 1}};
  }
  /// What the log-sum-exp of a query at `position` lacks.
  template <class A>
  [[nodiscard]] A of_row(index_t position) const noexcept {
    return static_cast<A>(slope_ * static_cast<double>(origin_ - position));
  }

 private:
  double slope_ = 0;
  index_t origin_ = 0;
  const float* terms_ = nullptr;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
