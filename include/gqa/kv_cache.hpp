// SPDX-License-Identifier: Apache-2.0
/// \file
/// kv_cache: the keys and values of a batch of sequences, of fixed capacity, in the order the kernels read them.
///
/// Tokens are appended once and read in place by every call after that: nothing is packed in prefill, decode streams
/// each (sequence, KV head) from front to back, and a token's attention has the same bits however it and the tokens
/// before it were appended or asked for: prefill, chunks, one by one.
///
/// Memory: [batch][kv head][tile of 64 tokens][keys, then values], 64 (D' + E') elements a tile, D' = D rounded up to 2
/// for bfloat16, E' = E rounded up to 16 (see detail/tile.hpp); all of it from one allocation at construction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <utility>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/memory_piece.hpp>
#include <gqa/detail/pack.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// A kv_source of up to `capacity` tokens a sequence. Movable; one writer at a time, and no reader meanwhile.
/// \tparam T  float, double, Eigen::half or Eigen::bfloat16: what is stored. Computed in float, double over double.
template <class T>
class kv_cache {
  static_assert(detail::storable<T>, "gqa: a kv_cache holds float, double, half or bfloat16");

 public:
  using element = T;
  using panel_element = T;

  /// \param head_dim, value_dim  D and E, at least 1; -1: E is D
  /// \param memory  where the tiles come from, to be kept until the cache is gone: huge_pages, a NUMA node, an arena;
  ///                null: operator new
  /// \throws error               errc::shape for extents below 0 (dims below 1), errc::capacity if there is no memory
  kv_cache(index_t batch, index_t kv_heads, index_t capacity, index_t head_dim, index_t value_dim = -1,
           std::pmr::memory_resource* memory = nullptr);

  kv_cache(kv_cache&& other) noexcept { swap(other); }
  kv_cache& operator=(kv_cache&& other) noexcept {
    kv_cache(std::move(other)).swap(*this);
    return *this;
  }
  ~kv_cache() = default;

  /// Appends t tokens to every sequence, rounded to nearest even.
  /// \param k, v   [B, t, G, D] and [B, t, G, E] in T or float; t >= 0, sequences may differ in length
  /// \throws error (errc::capacity) if a sequence has no room for all of them; nothing is written then
  template <tensor_like K, tensor_like V>
  void append(K&& k, V&& v) {
    append_to(0, batch_, detail::as_view(std::forward<K>(k)), detail::as_view(std::forward<V>(v)));
  }
  /// The same to one sequence. k, v: [1, t, G, D] and [1, t, G, E].
  template <tensor_like K, tensor_like V>
  void append(index_t sequence, K&& k, V&& v) {
    if (const auto f = find_sequence_fault(sequence)) return detail::raise(f);
    append_to(sequence, 1, detail::as_view(std::forward<K>(k)), detail::as_view(std::forward<V>(v)));
  }

  /// Tokens of a sequence; 0 for a sequence that there is not.
  [[nodiscard]] index_t length(index_t sequence) const noexcept {
    return has_sequence(sequence) ? lengths_[sequence] : 0;
  }
  /// Forgets all tokens of a sequence from position `length` on.
  /// \throws error (errc::length) unless 0 <= length <= length(sequence)
  void truncate(index_t sequence, index_t length) {
    if (const auto f = find_sequence_fault(sequence)) return detail::raise(f);
    index_t& own = lengths_[sequence];
    if (length < 0 || length > own)
      return detail::raise(detail::make_fault(errc::length,
                                              "length: expected 0 to %lld (the tokens there are), got %lld",
                                              detail::printable(own), detail::printable(length)));
    own = length;
  }
  /// Forgets all tokens of all sequences. Keeps the memory.
  void clear() noexcept { std::fill_n(lengths_, batch_, index_t{0}); }

  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }

  /// A key [D] or value [E] as stored: a copy, for tests and tools.
  /// \throws error (errc::range) for a sequence, position or head that there is not; the row is empty then
  [[nodiscard]] std::vector<T> key(index_t sequence, index_t position, index_t head) const {
    return row(sequence, position, head, head_dim_, [&](const detail::kv_tile<T>& tile, std::size_t panel, index_t d) {
      return tile.k[panel][detail::key_index<T>(position % detail::panel_tokens, d)];
    });
  }
  [[nodiscard]] std::vector<T> value(index_t sequence, index_t position, index_t head) const {
    return row(sequence, position, head, value_dim_, [&](const detail::kv_tile<T>& tile, std::size_t panel, index_t e) {
      return tile.v[panel][detail::value_index<T>(position % detail::panel_tokens, e, value_dim_)];
    });
  }

  // What makes it a kv_source (kv_source.hpp).
  [[nodiscard]] index_t batch() const noexcept { return batch_; }
  [[nodiscard]] index_t kv_heads() const noexcept { return kv_heads_; }
  [[nodiscard]] index_t kv_len() const noexcept {
    return batch_ == 0 ? 0 : *std::max_element(lengths_, lengths_ + batch_);
  }
  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  [[nodiscard]] index_t value_dim() const noexcept { return value_dim_; }
  [[nodiscard]] index_t scratch_elements() const noexcept { return 0; }
  [[nodiscard]] detail::fault find_fault() const noexcept { return {}; }
  [[nodiscard]] detail::kv_tile<T> tile(index_t b, index_t g, index_t i, index_t, T*) const noexcept {
    const index_t at = tile_index(b, g, i);
    return detail::contiguous_tile<T>(tiles_ + at * tile_elements(), head_dim_, value_dim_, nonfinite_[at]);
  }

 private:
  kv_cache() noexcept = default;

  void swap(kv_cache& other) noexcept {
    std::swap(batch_, other.batch_), std::swap(kv_heads_, other.kv_heads_), std::swap(capacity_, other.capacity_);
    std::swap(head_dim_, other.head_dim_), std::swap(value_dim_, other.value_dim_);
    memory_.swap(other.memory_), std::swap(tiles_, other.tiles_);
    std::swap(lengths_, other.lengths_), std::swap(nonfinite_, other.nonfinite_);
  }

  template <class K, class V>
  void append_to(index_t first, index_t count, const tensor_view<K, 4>& k, const tensor_view<V, 4>& v);
  template <class K, class V>
  [[nodiscard]] detail::fault find_append_fault(index_t first, index_t count, const tensor_view<K, 4>& k,
                                                const tensor_view<V, 4>& v) const noexcept;
  template <class ElementOf>
  [[nodiscard]] std::vector<T> row(index_t sequence, index_t position, index_t head, index_t dim,
                                   const ElementOf& element_of) const;

  [[nodiscard]] bool has_sequence(index_t sequence) const noexcept { return sequence >= 0 && sequence < batch_; }
  [[nodiscard]] detail::fault find_sequence_fault(index_t sequence) const noexcept {
    if (has_sequence(sequence)) return {};
    return detail::make_fault(errc::range, "sequence: expected 0 to %lld, got %lld", detail::printable(batch_ - 1),
                              detail::printable(sequence));
  }

  [[nodiscard]] index_t sequence_tiles() const noexcept { return detail::ceil_div(capacity_, detail::tile_tokens); }
  [[nodiscard]] index_t tile_index(index_t b, index_t g, index_t i) const noexcept {
    return (b * kv_heads_ + g) * sequence_tiles() + i;
  }
  [[nodiscard]] index_t tile_elements() const noexcept {
    return detail::tile_elements<T>(head_dim_, value_dim_);  // whole cache lines, for it is a multiple of 64
  }

  // One piece of memory: tiles, lengths, flags.
  [[nodiscard]] std::size_t tiles_bytes() const noexcept {
    return static_cast<std::size_t>(tile_index(batch_, 0, 0) * tile_elements()) * sizeof(T);
  }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return tiles_bytes() + static_cast<std::size_t>(batch_) * sizeof(index_t) +
           static_cast<std::size_t>(tile_index(batch_, 0, 0)) + detail::memory_piece::alignment;
  }
  [[nodiscard]] detail::fault build(index_t batch, index_t kv_heads, index_t capacity, index_t head_dim,
                                    index_t value_dim, std::pmr::memory_resource* memory) noexcept;

  index_t batch_ = 0, kv_heads_ = 0, capacity_ = 0, head_dim_ = 1, value_dim_ = 1;
  detail::memory_piece memory_;
  T* tiles_ = nullptr;
  index_t* lengths_ = nullptr;         // [batch]
  std::uint8_t* nonfinite_ = nullptr;  // [batch][kv head][tile]: bit i, panel i may hold a value that is not finite
};

template <class T>
kv_cache<T>::kv_cache(index_t batch, index_t kv_heads, index_t capacity, index_t head_dim, index_t value_dim,
                      std::pmr::memory_resource* memory) {
  kv_cache built;
  if (const auto f = built.build(batch, kv_heads, capacity, head_dim, value_dim == -1 ? head_dim : value_dim, memory)) {
    detail::raise(f);
  } else {
    swap(built);
  }
}

template <class T>
detail::fault kv_cache<T>::build(index_t batch, index_t kv_heads, index_t capacity, index_t head_dim, index_t value_dim,
                                 std::pmr::memory_resource* memory) noexcept {
  const auto find_least = [](const char* name, index_t least, index_t actual) {
    return detail::find_least_fault("kv_cache", name, least, actual);
  };
  if (const auto f = find_least("batch", 0, batch)) return f;
  if (const auto f = find_least("kv_heads", 0, kv_heads)) return f;
  if (const auto f = find_least("capacity", 0, capacity)) return f;
  if (const auto f = find_least("head_dim", 1, head_dim)) return f;
  if (const auto f = find_least("value_dim", 1, value_dim)) return f;

  // At least 1 each: beside an extent of 0 a huge one would pass, and overflow in the products below.
  const auto size = [](index_t n) { return static_cast<double>(std::max<index_t>(n, 1)); };
  const double estimate = size(batch) * (size(kv_heads) * (size(capacity) + detail::tile_tokens) *
                                             (size(head_dim) + size(value_dim) + 2 * detail::panel_tokens) * sizeof(T) +
                                         sizeof(index_t));
  if (estimate < size(detail::position_limit / 16)) {  // so that no product below overflows
    batch_ = batch, kv_heads_ = kv_heads, capacity_ = capacity;
    head_dim_ = head_dim, value_dim_ = value_dim;
    if (memory_.allocate(bytes(), memory)) tiles_ = reinterpret_cast<T*>(memory_.data());
  }
  if (tiles_ == nullptr)
    return detail::make_fault(errc::capacity, "kv_cache: expected memory for some %.3g bytes, got none", estimate);
  lengths_ = reinterpret_cast<index_t*>(reinterpret_cast<std::byte*>(tiles_) + tiles_bytes());
  nonfinite_ = reinterpret_cast<std::uint8_t*>(lengths_ + batch);
  clear();
  std::fill_n(nonfinite_, tile_index(batch, 0, 0), std::uint8_t{0});
  return {};
}

template <class T>
template <class K, class V>
detail::fault kv_cache<T>::find_append_fault(index_t first, index_t count, const tensor_view<K, 4>& k,
                                             const tensor_view<V, 4>& v) const noexcept {
  if (const auto f = detail::find_token_rows_fault(detail::describe("k", k), detail::describe("v", v), count, kv_heads_,
                                                   head_dim_, value_dim_))
    return f;
  for (index_t b = first; b < first + count; ++b) {
    const index_t room = capacity_ - lengths_[b];
    if (k.extent(1) > room)
      return detail::make_fault(errc::capacity,
                                "k: expected at most %lld tokens (the room left in sequence %lld), got %lld",
                                detail::printable(room), detail::printable(b), detail::printable(k.extent(1)));
  }
  return {};
}

template <class T>
template <class K, class V>
void kv_cache<T>::append_to(index_t first, index_t count, const tensor_view<K, 4>& k, const tensor_view<V, 4>& v) {
  static_assert(detail::is_taken_by_cache_of<K, T> && detail::is_taken_by_cache_of<V, T>,
                "gqa: a kv_cache takes what it holds, or float");
  if (const auto f = find_append_fault(first, count, k, v)) return detail::raise(f);
  const auto keys = detail::without_idle_strides(k);
  const auto values = detail::without_idle_strides(v);
  for (index_t b = first; b < first + count; ++b) {
    const index_t before = lengths_[b], after = before + k.extent(1);
    for (index_t g = 0; g < kv_heads_; ++g) {
      detail::for_each_panel(before, after, [&](index_t panel, detail::panel_range tokens) {
        const index_t row = panel + tokens.begin - before;
        const index_t at = tile_index(b, g, panel / detail::tile_tokens);
        const index_t in_tile = panel % detail::tile_tokens / detail::panel_tokens;
        T* const to = tiles_ + at * tile_elements();
        T* const to_values = to + detail::tile_panels * detail::key_panel_elements<T>(head_dim_);
        detail::pack_key_panel(&keys(b - first, row, g, 0), keys.stride(1), tokens, head_dim_,
                               to + in_tile * detail::key_panel_elements<T>(head_dim_));
        const bool nonfinite =
            detail::pack_value_panel(&values(b - first, row, g, 0), values.stride(1), tokens, value_dim_,
                                     to_values + in_tile * detail::value_panel_elements(value_dim_));
        const auto bit = static_cast<std::uint8_t>(1u << in_tile);
        std::uint8_t& flags = nonfinite_[at];
        if (tokens.starts) flags = static_cast<std::uint8_t>(flags & ~bit);  // what was there before is gone
        if (nonfinite) flags = static_cast<std::uint8_t>(flags | bit);
      });
    }
    lengths_[b] = after;
  }
}

template <class T>
template <class ElementOf>
std::vector<T> kv_cache<T>::row(index_t sequence, index_t position, index_t head, index_t dim,
                                const ElementOf& element_of) const {
  const auto refuse = [](const char* name, index_t count, index_t actual) {
    detail::raise(detail::make_fault(errc::range, "%s: expected 0 to %lld, got %lld", name,
                                     detail::printable(count - 1), detail::printable(actual)));
    return std::vector<T>{};
  };
  if (!has_sequence(sequence)) return refuse("sequence", batch_, sequence);
  if (position < 0 || position >= lengths_[sequence]) return refuse("position", lengths_[sequence], position);
  if (head < 0 || head >= kv_heads_) return refuse("head", kv_heads_, head);
  const detail::kv_tile<T> from = tile(sequence, head, position / detail::tile_tokens, 0, nullptr);
  const auto panel = static_cast<std::size_t>(position % detail::tile_tokens / detail::panel_tokens);
  std::vector<T> elements(static_cast<std::size_t>(dim));
  for (index_t d = 0; d < dim; ++d) elements[static_cast<std::size_t>(d)] = element_of(from, panel, d);
  return elements;
}

}  // namespace GQA_ISA
}  // namespace gqa
