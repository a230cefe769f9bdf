// SPDX-License-Identifier: Apache-2.0
#include "count_allocations.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

std::atomic<long> count{0}, throwing_count{0}, left_until_failure{0};

void* counted(std::size_t bytes, std::size_t alignment) noexcept {
  ++count;
  if (left_until_failure > 0 && --left_until_failure == 0) return nullptr;
  if (bytes > PTRDIFF_MAX - alignment) return nullptr;
  return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void* counted_or_throw(std::size_t bytes, std::size_t alignment) {
  ++throwing_count;
  void* const memory = counted(bytes, alignment);
#ifdef __cpp_exceptions
  if (memory == nullptr) throw std::bad_alloc();
#endif
  return memory;
}

}  // namespace

void gqa::test::fail_allocation(long n) noexcept {
  left_until_failure = n;
}

long gqa::test::allocations() noexcept {
  return count;
}

long gqa::test::throwing_allocations() noexcept {
  return throwing_count;
}

void* operator new(std::size_t n) {
  return counted_or_throw(n, alignof(std::max_align_t));
}
void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
  return counted(n, alignof(std::max_align_t));
}
void* operator new(std::size_t n, std::align_val_t a) {
  return counted_or_throw(n, static_cast<std::size_t>(a));
}
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return counted(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  std::free(p);
}
