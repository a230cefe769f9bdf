// SPDX-License-Identifier: Apache-2.0
/// \file
/// ring_kv_cache: the first tokens of each sequence and its newest ones, in memory that does not grow.
///
/// For layers with sliding windows, and for streams without end whose first tokens are attention sinks (StreamingLLM,
/// Xiao et al. 2024). Positions stay absolute: a token's key is that of its place in the whole sequence. What is asked
/// for must still be there: attention refuses a query that would see a key that is gone, so windows (attention_options)
/// and sinks_and_window (local_masks.hpp) go with it. Rows have the bits that they have over a kv_cache of all tokens.
///
/// Memory: tiles of 64 tokens (detail/cache/tiled_cache.hpp), in slots by their number: the sinks' for good, and as
/// many as a window may touch, and one to spare, in turns. So up to 65 tokens may be appended, and then be queries, at
/// a time.
#pragma once

#include <algorithm>
#include <memory_resource>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/cache/tiled_cache.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// A kv_source of as many tokens as one likes, of which the first `sink_tokens` and the newest `window` are readable,
/// and those that share their tiles. Movable; one writer at a time, and no reader meanwhile.
/// \tparam T  float, double, Eigen::half, Eigen::bfloat16, q8 or kv_types: what is stored. Computed in float, double
/// over double.
template <class T>
class ring_kv_cache : public detail::tiled_cache<T> {
 public:
  /// \param sink_tokens  at least 0
  /// \param window       at least 1: a query's own token, and those before it that it sees
  /// \param head_dim, value_dim  D and E, at least 1; -1: E is D
  /// \param memory  where the tiles come from, to be kept until the cache is gone; null: operator new
  /// \throws error  errc::shape for extents that cannot be, errc::capacity if there is no memory
  ring_kv_cache(index_t batch, index_t kv_heads, index_t sink_tokens, index_t window, index_t head_dim,
                index_t value_dim = -1, std::pmr::memory_resource* memory = nullptr) {
    detail::fault f = detail::find_least_fault("ring_kv_cache", "sink_tokens", 0, sink_tokens);
    if (!f) f = detail::find_least_fault("ring_kv_cache", "window", 1, window);
    // A window of n tokens that ends with the first token of a tile touches (n - 1) / 64 more, rounded up.
    const detail::cache_slots slots{detail::tiles_for(sink_tokens),
                                    detail::tiles_for(std::max<index_t>(window, 1) - 1) + 2, detail::position_limit};
    if (!f)
      f = this->build("ring_kv_cache", batch, kv_heads, slots, head_dim, value_dim == -1 ? head_dim : value_dim,
                      memory);
    if (f) detail::raise(f);
    sink_tokens_ = sink_tokens, window_ = window;
  }

  /// Of a kv_source (kv_source.hpp).
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept { return this->find_gone_tiles(b); }

  [[nodiscard]] index_t sink_tokens() const noexcept { return sink_tokens_; }
  [[nodiscard]] index_t window() const noexcept { return window_; }
  /// Positions of a sequence that are no longer there.
  [[nodiscard]] key_range gone(index_t sequence) const noexcept {
    if (sequence < 0 || sequence >= this->batch()) return {0, 0};
    const key_range tiles = gone_tiles(sequence);
    return {tiles.begin * detail::tile_tokens, tiles.end * detail::tile_tokens};
  }

 private:
  index_t sink_tokens_ = 0, window_ = 0;
};

}  // namespace GQA_ISA
}  // namespace gqa
