// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_pool: pages of equal size in one piece of memory, counted by those who have them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>

#include <gqa/config.hpp>
#include <gqa/detail/base/memory_piece.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/tile/key_bounds.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class T>
class page_pool {
 public:
  /// Pages of so many elements and flags, all zeros. False if there is no memory.
  [[nodiscard]] bool build(index_t pages, index_t elements, index_t flags, std::pmr::memory_resource* memory) {
    const std::size_t bytes = static_cast<std::size_t>(pages * elements) * sizeof(T);
    if (!owners_.resize(static_cast<std::size_t>(pages)) || !free_.resize(static_cast<std::size_t>(pages)) ||
        !memory_.allocate(bytes + static_cast<std::size_t>(pages * flags) + memory_piece::alignment, memory))
      return false;
    elements_ = reinterpret_cast<T*>(memory_.data());
    flags_ = reinterpret_cast<std::uint8_t*>(memory_.data() + bytes);
    page_elements_ = elements, page_flags_ = flags;
    std::fill_n(elements_, pages * elements, T(0));
    std::fill_n(flags_, pages * flags, std::uint8_t{0});
    for (index_t page = 0; page < pages; ++page)  // the first is taken first
      free_[static_cast<std::size_t>(pages - 1 - page)] = static_cast<std::int32_t>(page);
    return true;
  }

  [[nodiscard]] index_t pages() const noexcept { return static_cast<index_t>(owners_.size()); }
  [[nodiscard]] index_t free() const noexcept { return static_cast<index_t>(free_.size()); }
  [[nodiscard]] bool is_shared(std::int32_t page) const noexcept { return owners_[static_cast<std::size_t>(page)] > 1; }
  [[nodiscard]] T* elements() noexcept { return elements_; }
  [[nodiscard]] const T* elements() const noexcept { return elements_; }
  [[nodiscard]] std::uint8_t* flags() noexcept { return flags_; }
  [[nodiscard]] const std::uint8_t* flags() const noexcept { return flags_; }

  /// Keeps bounds of the keys of every `page_tokens` tokens, so many of them a page. False if there is no memory.
  [[nodiscard]] bool keep_bounds(index_t of_page, index_t page_tokens, index_t head_dim,
                                 std::pmr::memory_resource* memory) noexcept {
    key_bounds<T> built;
    if (!built.build(pages() * of_page, page_tokens, head_dim, memory)) return false;
    bounds_.swap(built);
    page_bounds_ = of_page;
    return true;
  }
  [[nodiscard]] key_bounds<T>& bounds() noexcept { return bounds_; }
  [[nodiscard]] const key_bounds<T>& bounds() const noexcept { return bounds_; }

  /// A free page, of which there must be one.
  [[nodiscard]] std::int32_t take() noexcept {
    const std::int32_t page = free_.back();
    free_.pop_back();
    owners_[static_cast<std::size_t>(page)] = 1;
    if (page_bounds_ > 0) bounds_.forget(page * page_bounds_, page_bounds_);
    return page;
  }
  void share(std::int32_t page) noexcept { ++owners_[static_cast<std::size_t>(page)]; }
  void release(std::int32_t page) noexcept {
    if (--owners_[static_cast<std::size_t>(page)] == 0)
      static_cast<void>(free_.push_back(page));  // there was room for all of them
  }
  /// A page of the same content in the place of one that is shared.
  [[nodiscard]] std::int32_t copy(std::int32_t page) noexcept {
    const std::int32_t to = take();
    std::copy_n(elements_ + page * page_elements_, page_elements_, elements_ + to * page_elements_);
    std::copy_n(flags_ + page * page_flags_, page_flags_, flags_ + to * page_flags_);
    if (page_bounds_ > 0) bounds_.copy(page * page_bounds_, to * page_bounds_, page_bounds_);
    release(page);
    return to;
  }

 private:
  memory_piece memory_;
  T* elements_ = nullptr;
  std::uint8_t* flags_ = nullptr;
  index_t page_elements_ = 0, page_flags_ = 0;
  key_bounds<T> bounds_;  // [pages, bounds of a page], where they are kept
  index_t page_bounds_ = 0;
  reporting_vector<std::int32_t> owners_;  // [pages]
  reporting_vector<std::int32_t> free_;    // taken from the back
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
