// SPDX-License-Identifier: Apache-2.0
/// \file
/// kv_source: what the tile engine reads keys and values through. Plain tensors become one by kv_view().
///
/// A source hands out tiles of 64 tokens at multiples of 64 (detail/tile/tile.hpp) of any (sequence, KV head). One that
/// stores its memory as tiles returns pointers into it; one that does not packs a tile into the scratch it is given.
#pragma once

#include <concepts>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {

/// Keys and values of a batch, readable tile by tile.
///   element           the stored element type; queries have it too, or are float where it is narrower
///   panel_element     what tiles hold; scores are computed in its accumulator
///   kv_len()          extent T of masks and biases, at least every length
///   length(b)         valid keys of sequence b
///   scratch_elements()  panel elements that tile() may need as scratch, 0 if tiles are read in place
///   tile(b, g, i, tokens, scratch)
///                     tokens [64 i, 64 i + 64) of KV head g, of which the first `tokens` will be looked at (the rest
///                     may be anything, but a panel with NaN or infinite values says so)
///   find_fault()      what is wrong with the source itself; checked at the door
/// and, where it has them:
///   keys(), values(), tables()  views of its memory, which no output may overlap
///   rows(b, g, t), ahead(g, visit)
///                     rows from t on as they lie, of which those of valid keys are read, 16 by the kernel of few rows
///                     (detail/kernel/row_kernel.hpp); and the rows that it asks for meanwhile. Tiles of such a source
///                     are packed, so they are not streamed from memory
///   has_whole_groups()  whether those 16 always lie a stride apart; without it they do
///   scatters_panels   a constant, true where what follows a panel in memory may not be what is read next
///   makes_tiles_in_cache  a constant, true where tile() is cheap enough to be called again by each row tile
///   bound_tokens(), bounds(b, g, n)
///                     keys that have bounds together, 0 if there are none, and the n-th of them (page_selection.hpp)
///   pages_of(b), page_size(), has_shared_pages(b)
///                     a sequence's pages of so many tokens, by number, where sequences may share them: those of one
///                     number at one place hold the same keys; and whether others may have some of them
///   gone_tiles(b)     key tiles that are no longer there: the door refuses queries that would see some of their keys
///   has_sequence(b)   whether there is one of that number, where some may be gone
///   sequences_share_keys()  whether all sequences read the same keys and values
///   heads_lie_together()  whether a token's heads are nearer to each other than a head's tokens
template <class S>
concept kv_source = !tensor_like<S> && requires(const std::remove_cvref_t<S>& kv,
                                                typename std::remove_cvref_t<S>::panel_element* scratch) {
  typename std::remove_cvref_t<S>::element;
  { kv.batch() } -> std::same_as<index_t>;
  { kv.kv_heads() } -> std::same_as<index_t>;
  { kv.kv_len() } -> std::same_as<index_t>;
  { kv.head_dim() } -> std::same_as<index_t>;
  { kv.value_dim() } -> std::same_as<index_t>;
  { kv.length(index_t{}) } -> std::same_as<index_t>;
  { kv.scratch_elements() } -> std::same_as<index_t>;
  {
    kv.tile(index_t{}, index_t{}, index_t{}, index_t{}, scratch)
    } -> std::same_as<detail::kv_tile<typename std::remove_cvref_t<S>::panel_element>>;
  { kv.find_fault() } -> std::same_as<detail::fault>;
};

inline namespace GQA_ISA {

/// Plain strided keys [B, T, G, D] and values [B, T, G, E] as a source. Their element types may differ; the wider of
/// their accumulators is used. Tiles are packed on demand: each costs one pass over its rows.
template <class K, class V>
class dense_kv {
  static_assert(detail::storable<K> && detail::storable<V>,
                "gqa: keys and values must be float, double, half or bfloat16");

 public:
  using element = K;
  using panel_element = detail::packed_element<K, V>;

  dense_kv(tensor_view<const K, 4> k, tensor_view<const V, 4> v) noexcept
      : k_(detail::without_idle_strides(k)), v_(detail::without_idle_strides(v)) {}

  [[nodiscard]] index_t batch() const noexcept { return k_.extent(0); }
  [[nodiscard]] index_t kv_len() const noexcept { return k_.extent(1); }
  [[nodiscard]] index_t kv_heads() const noexcept { return k_.extent(2); }
  [[nodiscard]] index_t head_dim() const noexcept { return k_.extent(3); }
  [[nodiscard]] index_t value_dim() const noexcept { return v_.extent(3); }
  [[nodiscard]] index_t length(index_t) const noexcept { return kv_len(); }
  [[nodiscard]] const tensor_view<const K, 4>& keys() const noexcept { return k_; }
  [[nodiscard]] const tensor_view<const V, 4>& values() const noexcept { return v_; }

  [[nodiscard]] detail::fault find_fault() const noexcept {
    return detail::find_kv_fault(detail::describe("k", k_), detail::describe("v", v_));
  }
  [[nodiscard]] index_t scratch_elements() const noexcept {
    return detail::tile_elements<panel_element>(head_dim(), value_dim());
  }
  [[nodiscard]] detail::kv_tile<panel_element> tile(index_t b, index_t g, index_t i, index_t tokens,
                                                    panel_element* scratch) const noexcept {
    const index_t first = i * detail::tile_tokens;
    return detail::pack_tile(&k_(b, first, g, 0), k_.stride(1), head_dim(), &v_(b, first, g, 0), v_.stride(1),
                             value_dim(), tokens, scratch);
  }
  [[nodiscard]] bool sequences_share_keys() const noexcept {
    return batch() <= 1 || (k_.stride(0) == 0 && v_.stride(0) == 0);
  }
  /// Whether a token's heads are nearer to each other than a head's tokens: then all heads of a tile are read together.
  [[nodiscard]] bool heads_lie_together() const noexcept { return detail::heads_lie_together(k_); }
  /// The rows themselves, tokens [first, first + 16), all of which there must be: what decode reads in place.
  [[nodiscard]] detail::kv_rows<K, V> rows(index_t b, index_t g, index_t first) const noexcept {
    return {{&k_(b, first, g, 0), k_.stride(1)}, {&v_(b, first, g, 0), v_.stride(1)}};
  }
  /// What to ask for while rows of KV head g are read, of views that have passed the checks of a call.
  [[nodiscard]] detail::kv_ahead ahead(index_t g, const detail::group_visit& visit) const noexcept {
    return {ahead_of(k_, g, visit), ahead_of(v_, g, visit)};
  }

 private:
  /// Where all heads of a group are visited before the next group: a share of the next group for each, in the order of
  /// memory, because prefetchers of hardware do not follow sixteen streams (a bare loop in the order of the visits
  /// reads at half the rate). Else the rows that are visited read_ahead_bytes later.
  template <class T>
  [[nodiscard]] detail::rows_ahead ahead_of(const tensor_view<const T, 4>& rows, index_t g,
                                            const detail::group_visit& visit) const noexcept {
    constexpr index_t size = sizeof(T), group = detail::group_tokens;
    const index_t token = rows.stride(1), head = rows.stride(2), dim = rows.extent(3);
    if (visit.heads > 1 && visit.heads == kv_heads() && head == dim && token == kv_heads() * dim)
      return {(group * token + (group - 1) * g * dim) * size, dim * size};
    if (visit.query_rows < detail::rows_that_read_ahead) return {};
    const index_t groups = detail::ceil_div(detail::read_ahead_bytes<T>, visit.heads * group * dim * size);
    return {groups * group * token * size, token * size};
  }

  tensor_view<const K, 4> k_;
  tensor_view<const V, 4> v_;
};

/// k [B, T, G, D] and v [B, T, G, E], a tensor_view or whatever view() takes each, as a kv_source. No copy.
template <tensor_like K, tensor_like V>
[[nodiscard]] auto kv_view(K&& k, V&& v) {
  using k_element = std::remove_const_t<detail::element_of<K>>;
  using v_element = std::remove_const_t<detail::element_of<V>>;
  return dense_kv<k_element, v_element>(detail::as_view(std::forward<K>(k)), detail::as_view(std::forward<V>(v)));
}

}  // namespace GQA_ISA
}  // namespace gqa
