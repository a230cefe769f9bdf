// SPDX-License-Identifier: Apache-2.0
/// \file
/// memory_piece: one aligned piece of memory from a resource, or from operator new. What caches keep their tiles in.
#pragma once

#include <cstddef>
#include <memory_resource>
#include <new>
#include <utility>

namespace gqa::detail {

class memory_piece {
 public:
  static constexpr std::size_t alignment = 64;  // panels start on cache lines

  memory_piece() noexcept = default;
  memory_piece(memory_piece&& other) noexcept { swap(other); }
  memory_piece& operator=(memory_piece&& other) noexcept {
    memory_piece(std::move(other)).swap(*this);
    return *this;
  }
  ~memory_piece() { release(); }

  /// False, and nothing held, if there is none. \param from  null: operator new
  [[nodiscard]] bool allocate(std::size_t bytes, std::pmr::memory_resource* from) noexcept {
    release();
    from_ = from, bytes_ = bytes, data_ = take();
    return data_ != nullptr;
  }
  [[nodiscard]] std::byte* data() const noexcept { return data_; }

  void swap(memory_piece& other) noexcept {
    std::swap(from_, other.from_), std::swap(bytes_, other.bytes_), std::swap(data_, other.data_);
  }

 private:
  [[nodiscard]] std::byte* take() const noexcept {
    if (from_ == nullptr)
      return static_cast<std::byte*>(::operator new (bytes_, std::align_val_t{alignment}, std::nothrow));
    // A resource may return null where it cannot throw. The standard library declares that none does, so that a
    // compiler would leave out the question: of what it reads from volatile memory it knows nothing.
    void* volatile taken = nullptr;
#ifdef GQA_NO_EXCEPTIONS
    taken = from_->allocate(bytes_, alignment);
#else
    try {
      taken = from_->allocate(bytes_, alignment);
    } catch (...) {  // told as a capacity error
    }
#endif
    return static_cast<std::byte*>(taken);
  }
  void release() noexcept {
    if (data_ == nullptr) return;
    if (from_ == nullptr) {
      ::operator delete (static_cast<void*>(data_), std::align_val_t{alignment});
    } else {
      from_->deallocate(data_, bytes_, alignment);
    }
    data_ = nullptr;
  }

  std::pmr::memory_resource* from_ = nullptr;
  std::size_t bytes_ = 0;
  std::byte* data_ = nullptr;
};

}  // namespace gqa::detail
