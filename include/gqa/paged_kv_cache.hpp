// SPDX-License-Identifier: Apache-2.0
/// \file
/// paged_kv_cache: the keys and values of many sequences in one pool of pages, for all layers of a model.
///
/// A sequence is a table of pages; pages are shared by forks, and copied when one of those that share them writes. A
/// token's rows lie in the order the kernels read them, so a tile of 64 tokens is four panels of 16 in up to four
/// pages, read in place. A row has the bits that a kv_cache gives it, whatever the pages' order and sharing.
///
/// Memory: [page][layer][kv head][64 tokens of a page: keys, then values], page_size (D' + E') elements a page, layer
/// and head (D', E': kv_cache.hpp); all of it from one allocation at construction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <span>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/cache/page_pool.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/narrowing.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/rows.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {
inline namespace GQA_ISA {

template <class T>
class paged_kv_cache;

/// One layer of a paged_kv_cache as a kv_source: sequence id is number id. Valid until the cache is moved or gone.
template <class T>
class paged_layer {
 public:
  using element = T;
  using panel_element = T;
  static constexpr bool scatters_panels = true;

  paged_layer(const paged_kv_cache<T>& cache, index_t layer) noexcept : cache_(&cache), layer_(layer) {}

  [[nodiscard]] index_t batch() const noexcept { return cache_->slots(); }
  [[nodiscard]] index_t kv_heads() const noexcept { return cache_->kv_heads_; }
  [[nodiscard]] index_t kv_len() const noexcept { return cache_->longest(); }
  [[nodiscard]] index_t head_dim() const noexcept { return cache_->head_dim_; }
  [[nodiscard]] index_t value_dim() const noexcept { return cache_->value_dim_; }
  [[nodiscard]] index_t length(index_t b) const noexcept { return cache_->sequence(b).length; }
  [[nodiscard]] bool has_sequence(index_t b) const noexcept { return cache_->has(static_cast<sequence_id>(b)); }
  [[nodiscard]] index_t scratch_elements() const noexcept { return 0; }
  [[nodiscard]] index_t page_size() const noexcept { return cache_->page_size_; }
  [[nodiscard]] index_t bound_tokens() const noexcept { return cache_->pool_.bounds().page_tokens(); }
  [[nodiscard]] detail::page_bounds<T> bounds(index_t b, index_t g, index_t page) const noexcept {
    return cache_->pool_.bounds()[cache_->bounds_at(cache_->sequence(b), layer_, g, page * bound_tokens())];
  }
  [[nodiscard]] std::span<const std::int32_t> pages_of(index_t b) const noexcept { return cache_->sequence(b).pages; }
  [[nodiscard]] bool has_shared_pages(index_t b) const noexcept {
    const auto pages = pages_of(b);
    return !pages.empty() && cache_->pool_.is_shared(pages.front());
  }
  [[nodiscard]] detail::fault find_fault() const noexcept { return cache_->find_layer_fault(layer_); }
  [[nodiscard]] detail::kv_tile<T> tile(index_t b, index_t g, index_t i, index_t tokens, T*) const noexcept {
    return cache_->tile(b, layer_, g, i, tokens);
  }

 private:
  const paged_kv_cache<T>* cache_;
  index_t layer_;
};

/// Movable. Any number of readers at a time; whoever creates, forks, extends, writes, truncates or erases does so
/// alone.
/// \tparam T  float, double, Eigen::half, Eigen::bfloat16, q8 or kv_types
template <class T>
class paged_kv_cache {
  static_assert(detail::cacheable<T>,
                "gqa: a paged_kv_cache holds float, double, half, bfloat16, q8 or kv_types of two of them but double");

 public:
  using element = T;

  /// \param page_size  tokens, a multiple of 16; 64 and its multiples are read fastest
  /// \param head_dim, value_dim  D and E, at least 1; -1: E is D
  /// \param memory  where the pool comes from, to be kept until the cache is gone; null: operator new
  /// \throws error  errc::shape for extents that cannot be, errc::capacity if there is no memory
  paged_kv_cache(index_t layers, index_t pages, index_t page_size, index_t kv_heads, index_t head_dim,
                 index_t value_dim = -1, std::pmr::memory_resource* memory = nullptr);

  /// An empty sequence. Numbers of erased ones are given out again.
  /// \throws error (errc::capacity); where that returns, -1 is no sequence
  [[nodiscard]] sequence_id create();
  /// A sequence of the same tokens, which share pages until one of the two writes. Room that the parent has, but has
  /// not written yet, is shared, too: whoever writes it first needs a page.
  /// \throws error (errc::range) for a sequence that there is not, (errc::capacity) without memory for a list of pages;
  ///               where that returns, -1 is no sequence
  [[nodiscard]] sequence_id fork(sequence_id parent);

  /// Room for more tokens in all layers, all or nothing: what they hold is whatever write() gives them. A page that is
  /// shared and not full is copied.
  /// \throws error (errc::range, errc::length), (errc::capacity) if pages, or memory for their list, are lacking:
  ///               nothing has changed then
  void extend(sequence_id id, index_t tokens);
  /// Keys [t, G, D], which may be turned() (rope_turns.hpp), and values [t, G, E], in T or float (of q8: half or
  /// bfloat16, too), rounded to nearest even, of positions from `position` on, which
  /// there must be. Pages that are shared are copied.
  /// \throws error (errc::range, errc::shape, errc::length), errc::capacity if pages are lacking, errc::range for a
  ///               finite float that T would make infinite (half: of 65,520 and more); nothing is written
  template <detail::turnable_rows K, detail::rows_like V>
  void write(index_t layer, sequence_id id, index_t position, K&& k, V&& v) {
    const auto keys = detail::as_turnable_rows(std::forward<K>(k));
    const auto values = detail::as_rows(std::forward<V>(v));
    if (const auto f = find_write_fault(layer, id, position, detail::rows_of(keys), values)) return detail::raise(f);
    if (const auto f = detail::find_turns_fault(keys)) return detail::raise(f);
    auto source = detail::keys_of(keys);  // whose memory may fail
    if (const auto f = detail::find_narrowing_faults<T>(source, head_dim_, values)) return detail::raise(f);
    if (const auto f = own_pages(sequence(static_cast<index_t>(id)), position, values.extent(1)))
      return detail::raise(f);
    write_rows(layer, sequence(static_cast<index_t>(id)), position, source, values);
  }
  /// Of a model of one layer: extend() and write().
  template <detail::turnable_rows K, detail::rows_like V>
  void append(sequence_id id, K&& k, V&& v) {
    const auto keys = detail::as_turnable_rows(std::forward<K>(k));
    const auto values = detail::as_rows(std::forward<V>(v));
    if (layers_ != 1)
      return detail::raise(detail::make_fault(errc::option, "append: expected a cache of one layer, got %lld",
                                              detail::printable(layers_)));
    if (const auto f = find_rows_fault(id, detail::rows_of(keys), values)) return detail::raise(f);
    if (const auto f = detail::find_turns_fault(keys)) return detail::raise(f);
    auto source = detail::keys_of(keys);
    if (const auto f = detail::find_narrowing_faults<T>(source, head_dim_, values)) return detail::raise(f);
    const index_t position = length(id);
    if (const auto f = find_extend_fault(id, values.extent(1))) return detail::raise(f);
    if (!grow(sequence(static_cast<index_t>(id)), values.extent(1))) return;
    write_rows(0, sequence(static_cast<index_t>(id)), position, source, values);
  }

  /// Forgets tokens from position `length` on; pages that nobody else has are free again.
  /// \throws error (errc::range), (errc::length) unless 0 <= length <= length(id)
  void truncate(sequence_id id, index_t length);
  void erase(sequence_id id);

  /// Keeps, from now on, the largest and smallest element of each channel of the keys of every 16 or 64 tokens, those
  /// that there are included: what page_selection.hpp decides by. 1/16 or 1/64 of the bytes of the cache besides, of
  /// one of 8 bits 1/8 or 1/32.
  /// After truncate() bounds may be wider than what is left, until the next token is written.
  /// \param page_tokens  64 only if page_size is a multiple of it
  /// \param memory  as at construction
  /// \throws error  errc::option for other numbers of tokens; errc::capacity if there is no memory, and those that
  ///                there were stay
  void keep_key_bounds(index_t page_tokens = detail::tile_tokens, std::pmr::memory_resource* memory = nullptr);

  [[nodiscard]] bool has(sequence_id id) const noexcept {
    const auto n = static_cast<index_t>(id);
    return n >= 0 && n < slots() && sequences_[static_cast<std::size_t>(n)].is_there;
  }
  /// Tokens of a sequence; 0 for one that there is not.
  [[nodiscard]] index_t length(sequence_id id) const noexcept {
    return has(id) ? sequence(static_cast<index_t>(id)).length : 0;
  }
  /// Its pages, in the order of its tokens; until it changes.
  [[nodiscard]] std::span<const std::int32_t> pages_of(sequence_id id) const noexcept {
    if (!has(id)) return {};
    const auto& pages = sequence(static_cast<index_t>(id)).pages;
    return {pages.data(), pages.size()};
  }
  [[nodiscard]] index_t free_pages() const noexcept { return pool_.free(); }
  [[nodiscard]] index_t pages() const noexcept { return pool_.pages(); }
  [[nodiscard]] index_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] index_t layers() const noexcept { return layers_; }

  /// What batch_attention() and attention() read. A layer that there is not is refused there (errc::range).
  [[nodiscard]] paged_layer<T> layer(index_t layer) const noexcept { return {*this, layer}; }

 private:
  friend class paged_layer<T>;

  struct paged_sequence {
    detail::reporting_vector<std::int32_t> pages;
    index_t length = 0;
    bool is_there = false;
  };

  [[nodiscard]] index_t slots() const noexcept { return static_cast<index_t>(sequences_.size()); }
  [[nodiscard]] const paged_sequence& sequence(index_t n) const noexcept {
    return sequences_[static_cast<std::size_t>(n)];
  }
  [[nodiscard]] paged_sequence& sequence(index_t n) noexcept { return sequences_[static_cast<std::size_t>(n)]; }
  [[nodiscard]] index_t longest() const noexcept {
    index_t most = 0;
    for (const paged_sequence& s : sequences_) most = (std::max)(most, s.length);
    return most;
  }
  /// The lowest number that is free; -1 after a capacity error, where that returns.
  [[nodiscard]] index_t find_slot();

  // Where things lie in a page.
  [[nodiscard]] index_t panels() const noexcept { return page_size_ / detail::panel_tokens; }
  [[nodiscard]] index_t key_elements() const noexcept { return detail::key_panel_elements<T>(head_dim_); }
  [[nodiscard]] index_t value_elements() const noexcept { return detail::value_panel_elements<T>(value_dim_); }
  [[nodiscard]] index_t head_elements() const noexcept { return panels() * (key_elements() + value_elements()); }
  /// A panel of 16 tokens of one head.
  struct panel {
    index_t key_at, value_at;  // elements from the pool's start
    index_t flag;              // among the pool's
  };
  [[nodiscard]] panel panel_of(index_t page, index_t layer, index_t g, index_t n) const noexcept {
    const index_t head = (page * layers_ + layer) * kv_heads_ + g;
    const index_t first = n / detail::tile_panels * detail::tile_panels;  // of the 64 tokens that it belongs to
    const index_t together = (std::min)(detail::tile_panels, panels() - first);
    const index_t at = head * head_elements() + first * (key_elements() + value_elements());
    return {at + (n - first) * key_elements(), at + together * key_elements() + (n - first) * value_elements(),
            head * panels() + n};
  }
  [[nodiscard]] panel panel_at(const paged_sequence& s, index_t layer, index_t g, index_t token) const noexcept {
    const index_t page = s.pages[static_cast<std::size_t>(token / page_size_)];
    return panel_of(page, layer, g, token % page_size_ / detail::panel_tokens);
  }

  /// Number of the bounds of a token's page of bounds.
  [[nodiscard]] index_t bounds_at(const paged_sequence& s, index_t layer, index_t g, index_t token) const noexcept {
    const index_t page = s.pages[static_cast<std::size_t>(token / page_size_)], tokens = pool_.bounds().page_tokens();
    return ((page * layers_ + layer) * kv_heads_ + g) * (page_size_ / tokens) + token % page_size_ / tokens;
  }
  /// Tokens [begin, end) of a sequence have been stored.
  void update_bounds(index_t layer, const paged_sequence& s, index_t g, index_t begin, index_t end) noexcept;

  [[nodiscard]] detail::kv_tile<T> tile(index_t b, index_t layer, index_t g, index_t i, index_t tokens) const noexcept;

  [[nodiscard]] detail::fault find_sequence_fault(sequence_id id) const noexcept {
    if (has(id)) return {};
    return detail::make_fault(errc::range, "sequence: expected one that there is, got %lld",
                              detail::printable(static_cast<index_t>(id)));
  }
  [[nodiscard]] detail::fault find_layer_fault(index_t layer) const noexcept {
    if (layer >= 0 && layer < layers_) return {};
    return detail::make_fault(errc::range, "layer: expected 0 to %lld, got %lld", detail::printable(layers_ - 1),
                              detail::printable(layer));
  }
  [[nodiscard]] detail::fault find_extend_fault(sequence_id id, index_t tokens) const noexcept;
  template <class K, class V>
  [[nodiscard]] detail::fault find_rows_fault(sequence_id id, const tensor_view<K, 4>& k,
                                              const tensor_view<V, 4>& v) const noexcept;
  template <class K, class V>
  [[nodiscard]] detail::fault find_write_fault(index_t layer, sequence_id id, index_t position,
                                               const tensor_view<K, 4>& k, const tensor_view<V, 4>& v) const noexcept;
  /// extend(), once it has been found possible. False, and nothing done, after a capacity error.
  [[nodiscard]] bool grow(paged_sequence& s, index_t tokens);
  /// Pages that a sequence of `length` tokens has.
  [[nodiscard]] index_t pages_for(index_t length) const noexcept { return detail::ceil_div(length, page_size_); }
  /// Shared pages that tokens [begin, end) of a sequence lie in.
  [[nodiscard]] index_t shared_pages(const paged_sequence& s, index_t begin, index_t end) const noexcept;
  /// Makes them the sequence's own; capacity, and nothing done, if pages are lacking.
  [[nodiscard]] detail::fault own_pages(paged_sequence& s, index_t position, index_t tokens);
  /// Panels that begin within tokens [begin, end) hold no NaN of those who had the page before.
  void clean(const paged_sequence& s, index_t begin, index_t end) noexcept;
  template <class Keys, class V>
  void write_rows(index_t layer, const paged_sequence& s, index_t position, Keys& keys,
                  const tensor_view<V, 4>& v) noexcept;

  index_t layers_ = 0, page_size_ = detail::panel_tokens, kv_heads_ = 0, head_dim_ = 1, value_dim_ = 1;
  detail::page_pool<T> pool_;
  detail::reporting_vector<paged_sequence> sequences_;
};

template <class T>
paged_kv_cache<T>::paged_kv_cache(index_t layers, index_t pages, index_t page_size, index_t kv_heads, index_t head_dim,
                                  index_t value_dim, std::pmr::memory_resource* memory) {
  if (value_dim == -1) value_dim = head_dim;
  const auto find_fault = [&]() -> detail::fault {
    const auto find_least = [](const char* name, index_t least, index_t actual) {
      return detail::find_least_fault("paged_kv_cache", name, least, actual);
    };
    if (const auto f = find_least("layers", 1, layers)) return f;
    if (const auto f = find_least("pages", 0, pages)) return f;
    if (const auto f = find_least("kv_heads", 1, kv_heads)) return f;
    if (const auto f = find_least("head_dim", 1, head_dim)) return f;
    if (const auto f = find_least("value_dim", 1, value_dim)) return f;
    if (page_size < 1 || page_size % detail::panel_tokens != 0)
      return detail::make_fault(errc::shape, "paged_kv_cache: expected a page_size that is a multiple of 16, got %lld",
                                detail::printable(page_size));
    return {};
  };
  if (const auto f = find_fault()) {
    detail::raise(f);
    return;
  }
  const auto size = [](index_t n) { return static_cast<double>(n); };
  const double elements = (std::max)(size(pages), 1.0) * size(layers) * size(kv_heads) * size(page_size) *
                          (size(head_dim) + size(value_dim) + 2 * size(detail::panel_tokens));
  layers_ = layers, page_size_ = page_size, kv_heads_ = kv_heads, head_dim_ = head_dim, value_dim_ = value_dim;
  const bool is_countable = elements < size(detail::position_limit / 16) && pages <= (std::numeric_limits<int>::max)();
  if (is_countable && pool_.build(pages, layers * kv_heads * head_elements(), layers * kv_heads * panels(), memory))
    return;
  layers_ = 0;
  detail::raise(detail::make_fault(errc::capacity, "paged_kv_cache: expected memory for some %.3g bytes, got none",
                                   elements * sizeof(T)));
}

template <class T>
index_t paged_kv_cache<T>::find_slot() {
  for (index_t n = 0; n < slots(); ++n) {
    if (!sequence(n).is_there) return n;
  }
  if (!detail::make_room(sequences_, sequences_.size() + 1, "sequences")) return -1;
  static_cast<void>(sequences_.push_back({}));
  return slots() - 1;
}

template <class T>
sequence_id paged_kv_cache<T>::create() {
  const index_t n = find_slot();
  if (n >= 0) sequence(n).is_there = true;
  return static_cast<sequence_id>(n);
}

template <class T>
sequence_id paged_kv_cache<T>::fork(sequence_id parent) {
  if (const auto f = find_sequence_fault(parent)) {
    detail::raise(f);
    return sequence_id{-1};
  }
  // All that may fail comes first: without memory there is no new sequence, nor room for one.
  const auto& of_parent = sequence(static_cast<index_t>(parent)).pages;
  detail::reporting_vector<std::int32_t> pages;
  if (!detail::make_room(pages, of_parent.size(), "pages")) return sequence_id{-1};
  static_cast<void>(pages.append(of_parent.begin(), of_parent.end()));
  const index_t n = find_slot();
  if (n < 0) return sequence_id{-1};
  paged_sequence& to = sequence(n);
  to.pages = std::move(pages);
  to.length = sequence(static_cast<index_t>(parent)).length;
  to.is_there = true;
  for (const std::int32_t page : to.pages) pool_.share(page);
  return static_cast<sequence_id>(n);
}

template <class T>
detail::fault paged_kv_cache<T>::find_extend_fault(sequence_id id, index_t tokens) const noexcept {
  if (const auto f = find_sequence_fault(id)) return f;
  if (tokens < 0)
    return detail::make_fault(errc::length, "tokens: expected 0 or more, got %lld", detail::printable(tokens));
  const paged_sequence& s = sequence(static_cast<index_t>(id));
  const index_t most = pages() * page_size_;  // that any sequence may have
  const index_t needed =
      tokens > most ? most
                    : pages_for(s.length + tokens) - pages_for(s.length) + shared_pages(s, s.length, s.length + tokens);
  if (tokens > most || needed > free_pages())
    return detail::make_fault(errc::capacity,
                              "tokens: expected what fits %lld free pages of %lld, got %lld more after "
                              "%lld",
                              detail::printable(free_pages()), detail::printable(page_size_), detail::printable(tokens),
                              detail::printable(s.length));
  return {};
}

template <class T>
index_t paged_kv_cache<T>::shared_pages(const paged_sequence& s, index_t begin, index_t end) const noexcept {
  index_t shared = 0;
  for (index_t page = begin / page_size_; page < (std::min)(pages_for(end), static_cast<index_t>(s.pages.size()));
       ++page)
    shared += pool_.is_shared(s.pages[static_cast<std::size_t>(page)]) ? 1 : 0;
  return begin < end ? shared : 0;
}

template <class T>
detail::fault paged_kv_cache<T>::own_pages(paged_sequence& s, index_t position, index_t tokens) {
  const index_t shared = shared_pages(s, position, position + tokens);
  if (shared > free_pages())
    return detail::make_fault(errc::capacity, "pages: expected %lld free ones to copy what is shared, got %lld",
                              detail::printable(shared), detail::printable(free_pages()));
  if (shared == 0) return {};
  for (index_t page = position / page_size_; page < pages_for(position + tokens); ++page) {
    std::int32_t& own = s.pages[static_cast<std::size_t>(page)];
    if (pool_.is_shared(own)) own = pool_.copy(own);
  }
  return {};
}

template <class T>
void paged_kv_cache<T>::extend(sequence_id id, index_t tokens) {
  if (const auto f = find_extend_fault(id, tokens)) return detail::raise(f);
  static_cast<void>(grow(sequence(static_cast<index_t>(id)), tokens));
}

template <class T>
bool paged_kv_cache<T>::grow(paged_sequence& s, index_t tokens) {
  const index_t before = s.length, after = before + tokens;
  if (!detail::make_room(s.pages, static_cast<std::size_t>(pages_for(after)), "pages")) return false;
  if (before % page_size_ != 0 && tokens > 0) {
    std::int32_t& last = s.pages.back();
    if (pool_.is_shared(last)) last = pool_.copy(last);
  }
  while (static_cast<index_t>(s.pages.size()) < pages_for(after)) static_cast<void>(s.pages.push_back(pool_.take()));
  s.length = after;
  clean(s, before, after);
  return true;
}

template <class T>
void paged_kv_cache<T>::clean(const paged_sequence& s, index_t begin, index_t end) noexcept {
  for (index_t token = detail::round_up(begin, detail::panel_tokens); token < end; token += detail::panel_tokens) {
    for (index_t layer = 0; layer < layers_; ++layer) {
      for (index_t g = 0; g < kv_heads_; ++g) {
        const panel at = panel_at(s, layer, g, token);
        if (pool_.flags()[at.flag] == 0) continue;
        std::fill_n(pool_.elements() + at.value_at, value_elements(), T(0));
        pool_.flags()[at.flag] = 0;
      }
    }
  }
}

template <class T>
template <class K, class V>
detail::fault paged_kv_cache<T>::find_rows_fault(sequence_id id, const tensor_view<K, 4>& k,
                                                 const tensor_view<V, 4>& v) const noexcept {
  if (const auto f = find_sequence_fault(id)) return f;
  return detail::find_token_rows_fault(detail::describe("k", k), detail::describe("v", v), 1, kv_heads_, head_dim_,
                                       value_dim_);
}

template <class T>
template <class K, class V>
detail::fault paged_kv_cache<T>::find_write_fault(index_t layer, sequence_id id, index_t position,
                                                  const tensor_view<K, 4>& k,
                                                  const tensor_view<V, 4>& v) const noexcept {
  if (const auto f = find_layer_fault(layer)) return f;
  if (const auto f = find_rows_fault(id, k, v)) return f;
  const index_t there = length(id);
  if (position < 0 || position > there || k.extent(1) > there - position)
    return detail::make_fault(errc::length,
                              "position: expected tokens within the %lld there are, got %lld from %lld on",
                              detail::printable(there), detail::printable(k.extent(1)), detail::printable(position));
  return {};
}

template <class T>
template <class Keys, class V>
void paged_kv_cache<T>::write_rows(index_t layer, const paged_sequence& s, index_t position, Keys& keys,
                                   const tensor_view<V, 4>& v) noexcept {
  static_assert(detail::is_taken_by_cache_of<typename Keys::element, detail::key_type<T>> &&
                    detail::is_taken_by_cache_of<V, detail::value_type<T>>,
                "gqa: a paged_kv_cache takes what it holds, or float");
  for (index_t g = 0; g < kv_heads_; ++g) {
    detail::for_each_panel(position, position + v.extent(1), [&](index_t first, detail::panel_range tokens) {
      tokens.starts = false;  // others may have been written before
      const index_t row = first + tokens.begin - position;
      const panel at = panel_at(s, layer, g, first);
      const auto rows = keys(0, row, g, tokens.end - tokens.begin);
      detail::pack_key_panel(rows.first, rows.stride, tokens, head_dim_, pool_.elements() + at.key_at);
      const bool nonfinite =
          detail::pack_value_panel(&v(0, row, g, 0), v.stride(1), tokens, value_dim_, pool_.elements() + at.value_at);
      std::uint8_t& flag = pool_.flags()[at.flag];
      if (tokens.end - tokens.begin == detail::panel_tokens) flag = 0;
      if (nonfinite) flag = 1;
    });
    update_bounds(layer, s, g, position, position + v.extent(1));
  }
}

template <class T>
void paged_kv_cache<T>::update_bounds(index_t layer, const paged_sequence& s, index_t g, index_t begin,
                                      index_t end) noexcept {
  const index_t tokens = pool_.bounds().page_tokens();
  if (tokens == 0 || begin == end) return;
  for (index_t first = begin / tokens * tokens; first < end; first += tokens) {
    const key_range written{std::max<index_t>(begin - first, 0), (std::min)(end - first, tokens)};
    pool_.bounds().update(bounds_at(s, layer, g, first), written, (std::min)(s.length - first, tokens), [&](index_t n) {
      return pool_.elements() + panel_at(s, layer, g, first + n * detail::panel_tokens).key_at;
    });
  }
}

template <class T>
void paged_kv_cache<T>::keep_key_bounds(index_t page_tokens, std::pmr::memory_resource* memory) {
  if (const auto f = detail::find_bound_tokens_fault(page_tokens)) return detail::raise(f);
  if (page_size_ % page_tokens != 0)
    return detail::raise(detail::make_fault(errc::option,
                                            "page_tokens: expected 16, or 64 in pages of a multiple of it, got %lld in "
                                            "pages of %lld",
                                            detail::printable(page_tokens), detail::printable(page_size_)));
  const index_t of_page = layers_ * kv_heads_ * (page_size_ / page_tokens);
  if (!pool_.keep_bounds(of_page, page_tokens, head_dim_, memory))
    return detail::raise(detail::make_fault(errc::capacity, "key bounds: expected memory for %lld pages, got none",
                                            detail::printable(pages() * of_page)));
  for (const paged_sequence& s : sequences_) {
    for (index_t layer = 0; layer < layers_; ++layer) {
      for (index_t g = 0; g < kv_heads_; ++g) {
        for (index_t first = 0; first < s.length; first += page_tokens) {
          // A sequence that shares a page may have more of it than this one.
          const index_t end = (std::min)(first + page_tokens, s.length);
          if (pool_.bounds().tokens_in(bounds_at(s, layer, g, first)) < end - first)
            update_bounds(layer, s, g, first, end);
        }
      }
    }
  }
}

template <class T>
void paged_kv_cache<T>::truncate(sequence_id id, index_t length) {
  if (const auto f = find_sequence_fault(id)) return detail::raise(f);
  paged_sequence& s = sequence(static_cast<index_t>(id));
  if (length < 0 || length > s.length)
    return detail::raise(detail::make_fault(errc::length, "length: expected 0 to %lld (the tokens there are), got %lld",
                                            detail::printable(s.length), detail::printable(length)));
  for (; static_cast<index_t>(s.pages.size()) > pages_for(length); s.pages.pop_back()) pool_.release(s.pages.back());
  s.length = length;
}

template <class T>
void paged_kv_cache<T>::erase(sequence_id id) {
  if (const auto f = find_sequence_fault(id)) return detail::raise(f);
  truncate(id, 0);
  sequence(static_cast<index_t>(id)).is_there = false;
}

template <class T>
detail::kv_tile<T> paged_kv_cache<T>::tile(index_t b, index_t layer, index_t g, index_t i,
                                           index_t tokens) const noexcept {
  const paged_sequence& s = sequence(b);
  const T* const elements = pool_.elements();
  const index_t first = i * detail::tile_tokens;
  if (page_size_ % detail::tile_tokens == 0) {  // found at once
    const panel at = panel_at(s, layer, g, first);
    std::uint32_t nonfinite = 0;
    for (index_t n = 0; n < detail::tile_panels; ++n) nonfinite |= std::uint32_t{pool_.flags()[at.flag + n]} << n;
    return detail::contiguous_tile<T>(elements + at.key_at, head_dim_, value_dim_, nonfinite);
  }
  detail::kv_tile<T> t;
  for (index_t n = 0; n < detail::tile_panels; ++n) {
    // Nobody looks at panels without tokens.
    const index_t token = first + (n * detail::panel_tokens < tokens ? n * detail::panel_tokens : 0);
    const panel at = panel_at(s, layer, g, token);
    t.k[static_cast<std::size_t>(n)] = elements + at.key_at;
    t.v[static_cast<std::size_t>(n)] = elements + at.value_at;
    if (pool_.flags()[at.flag] != 0) t.nonfinite_values |= std::uint32_t{1} << n;
  }
  return t;
}

}  // namespace GQA_ISA
}  // namespace gqa
