// SPDX-License-Identifier: Apache-2.0
/// \file
/// carver: one piece of memory given out as several.
#pragma once

#include <cstddef>

#include <gqa/config.hpp>
#include <gqa/detail/base/integers.hpp>

namespace gqa::detail {

/// Gives out pieces of memory, each on cache lines of its own, and counts the bytes used; of nullptr, only counts.
class carver {
 public:
  explicit carver(std::byte* memory) noexcept : memory_(memory) {}

  template <class T>
  void operator()(T*& piece, index_t count) noexcept {
    piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(round_up(count * static_cast<index_t>(sizeof(T)), 64));
  }
  [[nodiscard]] std::size_t used() const noexcept { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

}  // namespace gqa::detail
