// SPDX-License-Identifier: Apache-2.0
/// \file
/// tiled_cache: what kv_cache and ring_kv_cache have in common, which is all but how many tokens they keep.
///
/// Memory: [batch][kv head][slot of a tile of 64 tokens][keys, then values], 64 (D' + E') elements a slot, D' = D
/// rounded up to 2 for bfloat16, to 4 for 8 bits, E' = E rounded up to 16 (detail/tile/tile.hpp; 8 bits with their
/// scales behind them); all of it from one allocation at construction. Tiles have the slots of their numbers; those of
/// a ring from some tile on take turns in the last ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/memory_piece.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/tile/key_bounds.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/narrowing.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Tiles of so many tokens, however many.
[[nodiscard]] constexpr index_t tiles_for(index_t tokens) noexcept {
  return tokens / tile_tokens + (tokens % tile_tokens > 0 ? 1 : 0);
}

/// Slots of a (sequence, KV head): of the first `kept` tiles, and of `turning` of those after them, the newest. Tokens
/// in all: at most `capacity`.
struct cache_slots {
  index_t kept = 0, turning = 0;
  index_t capacity = 0;
};

template <class T>
class tiled_cache {
  static_assert(cacheable<T>,
                "gqa: a cache holds float, double, half, bfloat16, q8 or kv_types of two of them but double");

 public:
  using element = T;
  using panel_element = T;

  /// Appends t tokens to every sequence, rounded to nearest even. k may be turned() (rope_turns.hpp).
  /// \param k, v   [B, t, G, D] and [B, t, G, E] in T or float (of q8: half or bfloat16, too); t >= 0, sequences may
  ///               differ in length
  /// \throws error errc::capacity if a sequence has no room for all of them, errc::range for a finite float that T
  ///               would make infinite (half: of 65,520 and more); nothing is written then
  template <turnable K, tensor_like V>
  void append(K&& k, V&& v) {
    append_to(0, batch_, as_turnable(std::forward<K>(k)), as_view(std::forward<V>(v)));
  }
  /// The same to one sequence. k, v: [1, t, G, D] and [1, t, G, E].
  template <turnable K, tensor_like V>
  void append(index_t sequence, K&& k, V&& v) {
    if (const auto f = find_sequence_fault(sequence)) return raise(f);
    append_to(sequence, 1, as_turnable(std::forward<K>(k)), as_view(std::forward<V>(v)));
  }

  /// Tokens of a sequence; 0 for a sequence that there is not.
  [[nodiscard]] index_t length(index_t sequence) const noexcept {
    return has_sequence(sequence) ? lengths_[sequence] : 0;
  }
  /// Forgets all tokens of a sequence from position `length` on.
  /// \throws error (errc::length) unless 0 <= length <= length(sequence), or if a ring has dropped what comes before
  void truncate(index_t sequence, index_t length) {
    if (const auto f = find_sequence_fault(sequence)) return raise(f);
    const index_t own = lengths_[sequence], kept = slots_.kept * tile_tokens;
    if (length < 0 || length > own)
      return raise(make_fault(errc::length, "length: expected 0 to %lld (the tokens there are), got %lld",
                              printable(own), printable(length)));
    const index_t first = find_gone_tiles(sequence).end * tile_tokens;
    if (length > kept && length < first)
      return raise(make_fault(errc::length,
                              "length: expected at most %lld or at least %lld (tokens between are gone), "
                              "got %lld",
                              printable(kept), printable(first), printable(length)));
    lengths_[sequence] = length;
    if (length <= kept) begun_[sequence] = 0;
  }
  /// Forgets all tokens of all sequences. Keeps the memory.
  void clear() noexcept {
    std::fill_n(lengths_, batch_, index_t{0});
    std::fill_n(begun_, batch_, index_t{0});
  }

  /// A key [D] or value [E] as stored, of 8 bits as the floats that they stand for: a copy, for tests and tools.
  /// \throws error (errc::range) for a sequence, position or head that there is not; the row is empty then
  [[nodiscard]] std::vector<read_element<key_type<T>>> key(index_t sequence, index_t position, index_t head) const {
    return row<read_element<key_type<T>>>(sequence, position, head, head_dim_,
                                          [&](const kv_tile<T>& tile, std::size_t panel, index_t d) {
                                            return key_at(tile.k[panel], position % panel_tokens, d, head_dim_);
                                          });
  }
  [[nodiscard]] std::vector<read_element<value_type<T>>> value(index_t sequence, index_t position, index_t head) const {
    return row<read_element<value_type<T>>>(sequence, position, head, value_dim_,
                                            [&](const kv_tile<T>& tile, std::size_t panel, index_t e) {
                                              return value_at(tile.v[panel], position % panel_tokens, e, value_dim_);
                                            });
  }

  /// Keeps, from now on, the largest and smallest element of each channel of the keys of every 16 or 64 tokens, those
  /// that there are included: what page_selection.hpp decides by. 1/16 or 1/64 of the bytes of the cache besides, of
  /// one of 8 bits 1/8 or 1/32.
  /// After truncate() bounds may be wider than what is left, until the next token is appended.
  /// \param memory  as at construction
  /// \throws error  errc::option for other numbers of tokens; errc::capacity if there is no memory, and those that
  ///                there were stay
  void keep_key_bounds(index_t page_tokens = tile_tokens, std::pmr::memory_resource* memory = nullptr) {
    if (const auto f = find_bound_tokens_fault(page_tokens)) return raise(f);
    const index_t slots = batch_ * kv_heads_ * (slots_.kept + slots_.turning);
    key_bounds<T> built;
    if (!built.build(slots * (tile_tokens / page_tokens), page_tokens, head_dim_, memory))
      return raise(make_fault(errc::capacity, "key bounds: expected memory for %lld pages, got none",
                              printable(slots * (tile_tokens / page_tokens))));
    bounds_.swap(built);
    for (index_t b = 0; b < batch_; ++b) {
      const key_range gone = find_gone_tiles(b);
      for (index_t i = 0; i < tiles_for(lengths_[b]); ++i) {
        if (gone.begin <= i && i < gone.end) continue;
        for (index_t g = 0; g < kv_heads_; ++g)
          update_bounds(b, g, i, {0, (std::min)(tile_tokens, lengths_[b] - i * tile_tokens)});
      }
    }
  }

  // What makes it a kv_source (kv_source.hpp).
  [[nodiscard]] index_t bound_tokens() const noexcept { return bounds_.page_tokens(); }
  [[nodiscard]] page_bounds<T> bounds(index_t b, index_t g, index_t page) const noexcept {
    const index_t pages = tile_tokens / bound_tokens();
    return bounds_[tile_index(b, g, page / pages) * pages + page % pages];
  }
  [[nodiscard]] index_t batch() const noexcept { return batch_; }
  [[nodiscard]] index_t kv_heads() const noexcept { return kv_heads_; }
  [[nodiscard]] index_t kv_len() const noexcept {
    return batch_ == 0 ? 0 : *std::max_element(lengths_, lengths_ + batch_);
  }
  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  [[nodiscard]] index_t value_dim() const noexcept { return value_dim_; }
  [[nodiscard]] index_t scratch_elements() const noexcept { return 0; }
  [[nodiscard]] fault find_fault() const noexcept { return {}; }
  [[nodiscard]] kv_tile<T> tile(index_t b, index_t g, index_t i, index_t, T*) const noexcept {
    const index_t at = tile_index(b, g, i);
    return contiguous_tile<T>(tiles_ + at * elements_of_tile(), head_dim_, value_dim_, nonfinite_[at]);
  }

 protected:
  tiled_cache() noexcept = default;
  tiled_cache(tiled_cache&& other) noexcept { swap(other); }
  tiled_cache& operator=(tiled_cache&& other) noexcept {
    tiled_cache(std::move(other)).swap(*this);
    return *this;
  }
  ~tiled_cache() = default;

  void swap(tiled_cache& other) noexcept {
    std::swap(batch_, other.batch_), std::swap(kv_heads_, other.kv_heads_), std::swap(slots_, other.slots_);
    std::swap(head_dim_, other.head_dim_), std::swap(value_dim_, other.value_dim_);
    memory_.swap(other.memory_), std::swap(tiles_, other.tiles_), std::swap(lengths_, other.lengths_);
    std::swap(begun_, other.begun_), std::swap(nonfinite_, other.nonfinite_);
    bounds_.swap(other.bounds_);
  }

  /// Takes the memory of an empty cache, which stays empty where there is a fault. `name` is what an error calls it.
  [[nodiscard]] fault build(const char* name, index_t batch, index_t kv_heads, const cache_slots& slots,
                            index_t head_dim, index_t value_dim, std::pmr::memory_resource* memory) noexcept;

  /// Tiles whose slots newer ones have taken.
  [[nodiscard]] key_range find_gone_tiles(index_t b) const noexcept {
    return {slots_.kept, (std::max)(begun_[b] - slots_.turning, slots_.kept)};
  }
  [[nodiscard]] const cache_slots& slots() const noexcept { return slots_; }

 private:
  template <class Keys, class V>
  void append_to(index_t first, index_t count, const Keys& k, const tensor_view<V, 4>& v);
  template <class K, class V>
  [[nodiscard]] fault find_append_fault(index_t first, index_t count, const tensor_view<K, 4>& k,
                                        const tensor_view<V, 4>& v) const noexcept;
  template <class X, class ElementOf>
  [[nodiscard]] std::vector<X> row(index_t sequence, index_t position, index_t head, index_t dim,
                                   const ElementOf& element_of) const;

  [[nodiscard]] bool has_sequence(index_t sequence) const noexcept { return sequence >= 0 && sequence < batch_; }
  [[nodiscard]] fault find_sequence_fault(index_t sequence) const noexcept {
    if (has_sequence(sequence)) return {};
    return make_fault(errc::range, "sequence: expected 0 to %lld, got %lld", printable(batch_ - 1),
                      printable(sequence));
  }

  [[nodiscard]] index_t slot_of(index_t tile) const noexcept {
    return tile < slots_.kept ? tile : slots_.kept + (tile - slots_.kept) % slots_.turning;
  }
  /// Among all of them.
  [[nodiscard]] index_t slot_index(index_t b, index_t g, index_t slot) const noexcept {
    return (b * kv_heads_ + g) * (slots_.kept + slots_.turning) + slot;
  }
  [[nodiscard]] index_t tile_index(index_t b, index_t g, index_t i) const noexcept {
    return slot_index(b, g, slot_of(i));
  }
  [[nodiscard]] index_t elements_of_tile() const noexcept {
    return tile_elements<T>(head_dim_, value_dim_);  // whole cache lines, for it is a multiple of 64
  }

  /// Tokens of tile i have been stored, behind those before them.
  void update_bounds(index_t b, index_t g, index_t i, key_range tokens) noexcept {
    const index_t page_tokens = bound_tokens();
    if (page_tokens == 0) return;
    const index_t at = tile_index(b, g, i);
    const T* const keys = tiles_ + at * elements_of_tile();
    for (index_t first = tokens.begin / page_tokens * page_tokens; first < tokens.end; first += page_tokens) {
      const key_range written{(std::max)(tokens.begin - first, index_t{0}),
                              (std::min)(tokens.end - first, page_tokens)};
      bounds_.update(at * (tile_tokens / page_tokens) + first / page_tokens, written, written.end,
                     [&](index_t n) { return keys + (first / panel_tokens + n) * key_panel_elements<T>(head_dim_); });
    }
  }

  index_t batch_ = 0, kv_heads_ = 0, head_dim_ = 1, value_dim_ = 1;
  cache_slots slots_;
  memory_piece memory_;  // tiles, lengths, tiles begun, flags
  T* tiles_ = nullptr;
  index_t* lengths_ = nullptr;         // [batch]
  index_t* begun_ = nullptr;           // [batch]: tiles that have taken a slot, whatever was truncated since
  std::uint8_t* nonfinite_ = nullptr;  // [batch][kv head][slot]: bit i, panel i may hold a value that is not finite
  key_bounds<T> bounds_;               // [batch][kv head][slot][pages of a tile], where they are kept
};

template <class T>
fault tiled_cache<T>::build(const char* name, index_t batch, index_t kv_heads, const cache_slots& slots,
                            index_t head_dim, index_t value_dim, std::pmr::memory_resource* memory) noexcept {
  if (const auto f = find_least_fault(name, "batch", 0, batch)) return f;
  if (const auto f = find_least_fault(name, "kv_heads", 0, kv_heads)) return f;
  if (const auto f = find_least_fault(name, "head_dim", 1, head_dim)) return f;
  if (const auto f = find_least_fault(name, "value_dim", 1, value_dim)) return f;

  // At least 1 each: beside an extent of 0 a huge one would pass, and overflow in the products below.
  const auto size = [](index_t n) { return static_cast<double>(std::max<index_t>(n, 1)); };
  const double estimate = size(batch) * (size(kv_heads) * (size(slots.kept) + size(slots.turning)) * tile_tokens *
                                             (size(head_dim) + size(value_dim) + 2 * panel_tokens) * sizeof(T) +
                                         2 * sizeof(index_t));
  if (estimate < size(position_limit / 16)) {  // so that no product below overflows
    const index_t all = batch * kv_heads * (slots.kept + slots.turning);
    const std::size_t bytes_of_tiles =
        static_cast<std::size_t>(all * tile_elements<T>(head_dim, value_dim)) * sizeof(T);
    const std::size_t bytes_of_lengths = static_cast<std::size_t>(batch) * sizeof(index_t);
    if (memory_.allocate(
            bytes_of_tiles + 2 * bytes_of_lengths + static_cast<std::size_t>(all) + memory_piece::alignment, memory)) {
      batch_ = batch, kv_heads_ = kv_heads, slots_ = slots, head_dim_ = head_dim, value_dim_ = value_dim;
      std::byte* const at = memory_.data();
      tiles_ = reinterpret_cast<T*>(at);
      lengths_ = reinterpret_cast<index_t*>(at + bytes_of_tiles);
      begun_ = lengths_ + batch;
      nonfinite_ = reinterpret_cast<std::uint8_t*>(begun_ + batch);
      std::fill_n(nonfinite_, all, std::uint8_t{0});
      clear();
      return {};
    }
  }
  return make_fault(errc::capacity, "%s: expected memory for some %.3g bytes, got none", name, estimate);
}

template <class T>
template <class K, class V>
fault tiled_cache<T>::find_append_fault(index_t first, index_t count, const tensor_view<K, 4>& k,
                                        const tensor_view<V, 4>& v) const noexcept {
  if (const auto f = find_token_rows_fault(describe("k", k), describe("v", v), count, kv_heads_, head_dim_, value_dim_))
    return f;
  for (index_t b = first; b < first + count; ++b) {
    const index_t room = slots_.capacity - lengths_[b];
    if (k.extent(1) > room)
      return make_fault(errc::capacity, "k: expected at most %lld tokens (the room left in sequence %lld), got %lld",
                        printable(room), printable(b), printable(k.extent(1)));
  }
  return {};
}

template <class T>
template <class Keys, class V>
void tiled_cache<T>::append_to(index_t first, index_t count, const Keys& k, const tensor_view<V, 4>& v) {
  using K = typename std::remove_cvref_t<decltype(rows_of(k))>::value_type;
  static_assert(is_taken_by_cache_of<K, key_type<T>> && is_taken_by_cache_of<V, value_type<T>>,
                "gqa: a cache takes what it holds, or float");
  if (const auto f = find_append_fault(first, count, rows_of(k), v)) return raise(f);
  if (const auto f = find_turns_fault(k)) return raise(f);
  auto keys = keys_of(k);
  if (const auto f = find_narrowing_faults<T>(keys, head_dim_, v)) return raise(f);
  const auto values = without_idle_strides(v);
  for (index_t b = first; b < first + count; ++b) {
    const index_t before = lengths_[b], after = before + v.extent(1);
    for (index_t g = 0; g < kv_heads_; ++g) {
      for_each_panel(before, after, [&](index_t panel, panel_range tokens) {
        const index_t row = panel + tokens.begin - before, tile = panel / tile_tokens;
        if (slots_.kept <= tile && tile < tiles_for(after) - slots_.turning)
          return;  // of no use: its slot is another's
        const index_t at = tile_index(b, g, tile);
        const index_t in_tile = panel % tile_tokens / panel_tokens;
        T* const to = tiles_ + at * elements_of_tile();
        T* const to_values = to + tile_panels * key_panel_elements<T>(head_dim_);
        const auto rows = keys(b - first, row, g, tokens.end - tokens.begin);
        pack_key_panel(rows.first, rows.stride, tokens, head_dim_, to + in_tile * key_panel_elements<T>(head_dim_));
        const bool nonfinite = pack_value_panel(&values(b - first, row, g, 0), values.stride(1), tokens, value_dim_,
                                                to_values + in_tile * value_panel_elements<T>(value_dim_));
        const auto bit = static_cast<std::uint8_t>(1u << in_tile);
        std::uint8_t& flags = nonfinite_[at];
        if (tokens.starts) flags = static_cast<std::uint8_t>(flags & ~bit);  // what was there before is gone
        if (nonfinite) flags = static_cast<std::uint8_t>(flags | bit);
        const index_t before_panel = in_tile * panel_tokens;
        update_bounds(b, g, tile, {before_panel + tokens.begin, before_panel + tokens.end});
      });
    }
    lengths_[b] = after;
    begun_[b] = (std::max)(begun_[b], ceil_div(after, tile_tokens));
  }
}

template <class T>
template <class X, class ElementOf>
std::vector<X> tiled_cache<T>::row(index_t sequence, index_t position, index_t head, index_t dim,
                                   const ElementOf& element_of) const {
  const auto find_fault = [&]() -> fault {
    const auto find_within = [](const char* name, index_t count, index_t actual) -> fault {
      if (0 <= actual && actual < count) return {};
      return make_fault(errc::range, "%s: expected 0 to %lld, got %lld", name, printable(count - 1), printable(actual));
    };
    if (const auto f = find_within("sequence", batch_, sequence)) return f;
    if (const auto f = find_within("position", lengths_[sequence], position)) return f;
    if (const auto f = find_within("head", kv_heads_, head)) return f;
    const key_range gone = find_gone_tiles(sequence);
    if (position / tile_tokens < gone.begin || gone.end <= position / tile_tokens) return {};
    return make_fault(errc::range, "position: expected one outside [%lld, %lld), which are gone, got %lld",
                      printable(gone.begin * tile_tokens), printable(gone.end * tile_tokens), printable(position));
  };
  if (const auto f = find_fault()) {
    raise(f);
    return {};
  }
  const kv_tile<T> from = tile(sequence, head, position / tile_tokens, 0, nullptr);
  const auto panel = static_cast<std::size_t>(position % tile_tokens / panel_tokens);
  std::vector<X> elements;
  if (!make_zeros(elements, static_cast<std::size_t>(dim), "elements")) return {};
  for (index_t d = 0; d < dim; ++d) elements[static_cast<std::size_t>(d)] = element_of(from, panel, d);
  return elements;
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
