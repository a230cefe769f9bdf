// SPDX-License-Identifier: Apache-2.0
/// \file
/// kv_cache: the keys and values of a batch of sequences, of fixed capacity, in the order the kernels read them.
///
/// Tokens are appended once and read in place by every call after that: nothing is packed in prefill, decode streams
/// each (sequence, KV head) from front to back, and a token's attention has the same bits however it and the tokens
/// before it were appended or asked for: prefill, chunks, one by one.
///
/// Memory: [batch][kv head][tile of 64 tokens][keys, then values] (detail/cache/tiled_cache.hpp), from one allocation
/// at construction.
#pragma once

#include <memory_resource>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/cache/tiled_cache.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// A kv_source of up to `capacity` tokens a sequence. Movable; one writer at a time, and no reader meanwhile.
/// \tparam T  float, double, Eigen::half, Eigen::bfloat16, q8 or kv_types: what is stored. Computed in float, double
/// over double.
template <class T>
class kv_cache : public detail::tiled_cache<T> {
 public:
  /// \param head_dim, value_dim  D and E, at least 1; -1: E is D
  /// \param memory  where the tiles come from, to be kept until the cache is gone: huge_pages, a NUMA node, an arena;
  ///                null: operator new
  /// \throws error               errc::shape for extents below 0 (dims below 1), errc::capacity if there is no memory
  kv_cache(index_t batch, index_t kv_heads, index_t capacity, index_t head_dim, index_t value_dim = -1,
           std::pmr::memory_resource* memory = nullptr) {
    detail::fault f = detail::find_least_fault("kv_cache", "capacity", 0, capacity);
    const detail::cache_slots slots{detail::tiles_for(capacity), 0, capacity};
    if (!f)
      f = this->build("kv_cache", batch, kv_heads, slots, head_dim, value_dim == -1 ? head_dim : value_dim, memory);
    if (f) detail::raise(f);
  }

  [[nodiscard]] index_t capacity() const noexcept { return this->slots().capacity; }
};

}  // namespace GQA_ISA
}  // namespace gqa
