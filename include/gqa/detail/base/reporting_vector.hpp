// SPDX-License-Identifier: Apache-2.0
/// \file
/// reporting_vector: a vector that says where there is no memory, by false, instead of throwing or, without exceptions,
/// ending the program. What the library keeps lists in; and make_room(), for the results that are standard vectors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/error.hpp>

namespace gqa::detail {

/// Functions that return false left everything as it was. Copies are asked for by assign(), which may fail.
template <class T>
class reporting_vector {
  static_assert(std::is_nothrow_move_constructible_v<T>);

 public:
  using value_type = T;

  reporting_vector() noexcept = default;
  reporting_vector(reporting_vector&& other) noexcept { swap(other); }
  reporting_vector& operator=(reporting_vector&& other) noexcept {
    reporting_vector(std::move(other)).swap(*this);
    return *this;
  }
  ~reporting_vector() {
    clear();
    release(data_);
  }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  [[nodiscard]] T* data() noexcept { return data_; }
  [[nodiscard]] const T* data() const noexcept { return data_; }
  [[nodiscard]] T* begin() noexcept { return data_; }
  [[nodiscard]] const T* begin() const noexcept { return data_; }
  [[nodiscard]] T* end() noexcept { return data_ + size_; }
  [[nodiscard]] const T* end() const noexcept { return data_ + size_; }
  [[nodiscard]] T& operator[](std::size_t i) noexcept { return data_[i]; }
  [[nodiscard]] const T& operator[](std::size_t i) const noexcept { return data_[i]; }
  [[nodiscard]] T& back() noexcept { return data_[size_ - 1]; }
  [[nodiscard]] const T& back() const noexcept { return data_[size_ - 1]; }

  /// Room for n elements, so that what follows up to those cannot fail.
  [[nodiscard]] bool reserve(std::size_t n) noexcept {
    if (n <= capacity_) return true;
    constexpr std::size_t element = sizeof(T);  // NOLINT(bugprone-sizeof-expression): T may be a pointer
    constexpr auto most = static_cast<std::size_t>((std::numeric_limits<std::ptrdiff_t>::max)()) / (2 * element);
    if (n > most) return false;
    const std::size_t grown = (std::max)(n, (std::min)(2 * capacity_, most));
    const std::size_t bytes = grown * element;
    auto* const to = static_cast<T*>(::operator new(bytes, alignment, std::nothrow));
    if (to == nullptr) return false;
    std::uninitialized_move(begin(), end(), to);
    std::destroy(begin(), end());
    release(std::exchange(data_, to));
    capacity_ = grown;
    return true;
  }
  /// New elements are T{}.
  [[nodiscard]] bool resize(std::size_t n) noexcept {
    if (!reserve(n)) return false;
    if (n < size_) std::destroy(data_ + n, end());
    for (std::size_t i = size_; i < n; ++i) ::new (static_cast<void*>(data_ + i)) T{};
    size_ = n;
    return true;
  }
  [[nodiscard]] bool push_back(T x) noexcept {
    if (!reserve(size_ + 1)) return false;
    ::new (static_cast<void*>(end())) T(std::move(x));
    ++size_;
    return true;
  }
  [[nodiscard]] bool append(const T* first, const T* last) noexcept {
    const auto count = static_cast<std::size_t>(last - first);
    if (!reserve(size_ + count)) return false;
    std::uninitialized_copy(first, last, end());
    size_ += count;
    return true;
  }
  /// Of elements that are not its own.
  [[nodiscard]] bool assign(const T* first, const T* last) noexcept {
    if (!reserve(static_cast<std::size_t>(last - first))) return false;
    clear();
    return append(first, last);
  }
  [[nodiscard]] bool assign(std::initializer_list<T> some) noexcept { return assign(some.begin(), some.end()); }

  void pop_back() noexcept { std::destroy_at(data_ + --size_); }
  void clear() noexcept {
    std::destroy(begin(), end());
    size_ = 0;
  }
  /// Leaves the elements before one of them.
  void cut(const T* new_end) noexcept {
    const auto n = static_cast<std::size_t>(new_end - data_);
    std::destroy(data_ + n, end());
    size_ = n;
  }
  void swap(reporting_vector& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(capacity_, other.capacity_);
  }

 private:
  static constexpr std::align_val_t alignment{(std::max)(alignof(T), std::size_t{64})};

  static void release(T* data) noexcept { ::operator delete(static_cast<void*>(data), alignment); }

  T* data_ = nullptr;
  std::size_t size_ = 0, capacity_ = 0;
};

[[nodiscard]] inline fault make_room_fault(const char* what) noexcept {
  return make_fault(errc::capacity, "%s: expected memory for them, got none", what);
}

/// Room for n elements; false if there is no memory.
template <class T>
[[nodiscard]] bool has_room(reporting_vector<T>& list, std::size_t n) noexcept {
  return list.reserve(n);
}
/// The same of a result, which is a standard vector. Without exceptions that would end the program where it gets no
/// memory; so as much is asked for before, in a way that reports. (Nobody can promise that it is still there then.)
template <class T>
[[nodiscard]] bool has_room(std::vector<T>& list, std::size_t n) noexcept {
  if (n <= list.capacity()) return true;
#ifdef GQA_NO_EXCEPTIONS
  reporting_vector<T> asked;
  if (n > list.max_size() || !asked.reserve(n)) return false;
  asked = {};
  list.reserve(n);
#else
  try {
    list.reserve(n);
  } catch (const std::exception&) {  // told as a capacity error
    return false;
  }
#endif
  return true;
}

/// Room for n elements, or a capacity error: false where that returns.
template <class List>
[[nodiscard]] bool make_room(List& list, std::size_t n, const char* what) {
  if (has_room(list, n)) return true;
  raise(make_room_fault(what));
  return false;
}
/// n elements of zeros, in the place of what there was.
template <class List>
[[nodiscard]] bool make_zeros(List& list, std::size_t n, const char* what) {
  if (!make_room(list, n, what)) return false;
  list.clear();
  static_cast<void>(list.resize(n));
  return true;
}

}  // namespace gqa::detail
