// SPDX-License-Identifier: Apache-2.0
/// \file
/// huge_pages: memory for caches that are read from front to back, in pages of 2 MiB where the system has them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <gqa/config.hpp>

namespace gqa {

/// A memory resource for kv_cache. A decode step reads all of a cache once: in pages of 4 KiB it misses the TLB every
/// 64 cache lines, and hardware prefetchers stop at each page's end. Linux is asked for transparent huge pages
/// (madvise(MADV_HUGEPAGE); /sys/kernel/mm/transparent_hugepage/enabled must not say never); elsewhere this is memory
/// aligned to 2 MiB. Where there is no memory it throws std::bad_alloc or, without exceptions, returns null, which
/// caches report. Sizes are rounded up to that, so it is for large pieces. Any number of threads; outlives what is kept
/// in it.
class huge_pages final : public std::pmr::memory_resource {
 private:
  static constexpr std::size_t page = std::size_t{2} << 20;

  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    const std::size_t size = bytes + (page - bytes % page) % page;
    void* const memory = size < bytes ? nullptr : ::operator new(size, aligned_to(alignment), std::nothrow);
    if (memory == nullptr) {
#ifdef GQA_NO_EXCEPTIONS
      return nullptr;  // which caches report as an error; no other user of a resource expects it
#else
      throw std::bad_alloc();
#endif
    }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    static_cast<void>(::madvise(memory, size, MADV_HUGEPAGE));  // a request: where it is refused, pages stay small
#endif
    return memory;
  }
  void do_deallocate(void* memory, std::size_t, std::size_t alignment) override {
    ::operator delete(memory, aligned_to(alignment));
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
    return this == &other;
  }
  [[nodiscard]] static std::align_val_t aligned_to(std::size_t alignment) noexcept {
    return std::align_val_t{(std::max)(alignment, page)};
  }
};

}  // namespace gqa
