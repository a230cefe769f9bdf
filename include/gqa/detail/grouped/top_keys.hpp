// SPDX-License-Identifier: Apache-2.0
/// \file
/// The keys of the highest scores, for some rows, in one pass over a head's tiles.
///
/// Scores come from the engine's kernel, a row block and a tile at a time, and are compared with a row's threshold, the
/// k-th best so far, 16 at once: of a random order k ln(T / k) pass, the rest cost a comparison. What passes waits in a
/// buffer of 2 k + 64; when a tile may not fit, the best k stay and the last of them is the new threshold. Reads the
/// keys once per 96 rows and does T D multiply-adds a row.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include <gqa/config.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/grouped/alibi_terms.hpp>
#include <gqa/detail/kernel/score_tile.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class A>
struct scored_key {
  A score;
  index_t key;

  /// Higher scores first, of equal ones the lowest key.
  [[nodiscard]] friend bool operator<(const scored_key& x, const scored_key& y) noexcept {
    return x.score != y.score ? x.score > y.score : x.key < y.key;
  }
};

/// The best keys of one row so far.
template <class A>
class best_keys {
 public:
  [[nodiscard]] static constexpr index_t capacity(index_t wanted) noexcept { return 2 * wanted + tile_tokens; }

  best_keys() noexcept = default;
  best_keys(scored_key<A>* memory, index_t wanted) noexcept : keys_(memory), wanted_(wanted) {}

  /// Takes those of 64 scores whose bits are set; `first` is the first one's key.
  void take(const A* s, std::uint64_t visible, index_t first) noexcept {
    for (index_t c = 0; c < tile_tokens; c += packet_size<A>) {
      if (!any_less<A>(broadcast(threshold_), load(s + c))) continue;
      for (index_t i = c; i < c + packet_size<A>; ++i) {
        if ((visible >> i & 1) != 0 && s[i] > threshold_) keys_[count_++] = {s[i], first + i};
      }
    }
    if (count_ > 2 * wanted_) shrink();
  }
  /// Leaves the best keys, ascending, and returns how many they are: fewer than wanted where scores are NaN or -inf.
  [[nodiscard]] index_t finish() noexcept {
    if (count_ > wanted_) shrink();
    std::sort(keys_, keys_ + count_, [](const auto& x, const auto& y) { return x.key < y.key; });
    return count_;
  }

 private:
  void shrink() noexcept {
    if (wanted_ == 0) return void(count_ = 0);
    std::nth_element(keys_, keys_ + wanted_ - 1, keys_ + count_);
    count_ = wanted_;
    threshold_ = keys_[wanted_ - 1].score;
  }

  scored_key<A>* keys_ = nullptr;
  index_t wanted_ = 0, count_ = 0;
  A threshold_ = -std::numeric_limits<A>::infinity();
};

/// The `wanted` best keys of each of `rows` rows q, which carry the scale, among those that `sees` leaves visible, by
/// products and terms: taken [rows, capacity(wanted)], ascending by key; their numbers in counts. The source's tiles
/// lie in memory.
template <class Source, class A, class Sees>
void find_top_keys(const Source& kv, const A* q, index_t q_stride, index_t rows, index_t wanted, const Sees& sees,
                   const alibi_terms& terms, scored_key<A>* taken, index_t* counts) noexcept {
  using P = typename Source::panel_element;
  constexpr index_t most_rows = 96;
  alignas(64) A s[block_rows * tile_tokens];
  std::array<best_keys<A>, most_rows> best;
  const index_t capacity = best_keys<A>::capacity(wanted);
  for (index_t begin = 0; begin < rows; begin += most_rows) {
    const index_t end = (std::min)(begin + most_rows, rows);
    for (index_t r = begin; r < end; ++r)
      best[static_cast<std::size_t>(r - begin)] = best_keys<A>(taken + r * capacity, wanted);
    for (index_t first = 0; first < kv.length(0); first += tile_tokens) {
      const index_t tokens = (std::min)(tile_tokens, kv.length(0) - first);
      const std::uint64_t visible = sees.visible_bits(position{0, 0, 0, first}) & bits_between(0, tokens);
      if (visible == 0) continue;
      const kv_tile<P> tile = kv.tile(0, 0, first / tile_tokens, tokens, nullptr);
      for (index_t row = begin; row < end; row += block_rows) {
        const index_t count = std::min<index_t>(block_rows, end - row);
        score_tile(tile, q + row * q_stride, q_stride, kv.head_dim(), count, s);
        for (index_t r = 0; r < count; ++r) {
          A* const scores = s + r * tile_tokens;
          if (!terms.empty()) {
            for (index_t t = 0; t < tokens; ++t) scores[t] += static_cast<A>(terms[first + t]);
          }
          best[static_cast<std::size_t>(row - begin + r)].take(scores, visible, first);
        }
      }
    }
    for (index_t r = begin; r < end; ++r) counts[r] = best[static_cast<std::size_t>(r - begin)].finish();
  }
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
