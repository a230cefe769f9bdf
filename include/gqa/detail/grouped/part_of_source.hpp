// SPDX-License-Identifier: Apache-2.0
/// \file
/// Some KV heads of one sequence of a source as a source of its own, and masks of its keys: what grouped attention
/// calls attention() with.
#pragma once

#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/cache/decoded_kv.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// The first `length` keys of KV heads [first_head, first_head + heads) of sequence b of a source, which outlives it.
template <class Source>
class part_of_source {
  static_assert(!may_have_gaps<Source>,
                "gqa: grouped attention takes all keys of a sequence, of which a ring_kv_cache has dropped some");

 public:
  using element = typename Source::element;
  using panel_element = typename Source::panel_element;
  static constexpr bool scatters_panels = has_scattered_panels<Source>;

  part_of_source(const Source& kv, index_t b, index_t first_head, index_t heads, index_t length) noexcept
      : kv_(kv), b_(b), first_head_(first_head), heads_(heads), length_(length) {}

  [[nodiscard]] index_t batch() const noexcept { return 1; }
  [[nodiscard]] index_t kv_heads() const noexcept { return heads_; }
  [[nodiscard]] index_t kv_len() const noexcept { return length_; }
  [[nodiscard]] index_t length(index_t) const noexcept { return length_; }
  [[nodiscard]] index_t head_dim() const noexcept { return kv_.head_dim(); }
  [[nodiscard]] index_t value_dim() const noexcept { return kv_.value_dim(); }
  [[nodiscard]] index_t scratch_elements() const noexcept { return kv_.scratch_elements(); }
  [[nodiscard]] fault find_fault() const noexcept { return {}; }
  [[nodiscard]] kv_tile<panel_element> tile(index_t, index_t g, index_t i, index_t tokens,
                                            panel_element* scratch) const noexcept {
    return kv_.tile(b_, first_head_ + g, i, tokens, scratch);
  }
  [[nodiscard]] bool heads_lie_together() const noexcept requires requires(const Source& kv) {
    kv.heads_lie_together();
  }
  { return heads_ > 1 && kv_.heads_lie_together(); }
  [[nodiscard]] auto rows(index_t, index_t g, index_t first) const noexcept requires requires(const Source& kv) {
    kv.rows(first, first, first);
  }
  { return kv_.rows(b_, first_head_ + g, first); }
  [[nodiscard]] bool has_whole_groups() const noexcept requires requires(const Source& kv) { kv.has_whole_groups(); }
  { return kv_.has_whole_groups(); }
  [[nodiscard]] kv_ahead ahead(index_t g, const group_visit& visit) const noexcept requires requires(const Source& kv) {
    kv.ahead(index_t{}, visit);
  }
  { return kv_.ahead(first_head_ + g, visit); }

 private:
  const Source& kv_;
  index_t b_, first_head_, heads_, length_;
};

/// Rows [count, dim], `stride` apart, as the queries of one head, and the state of their results, dense.
template <class A>
[[nodiscard]] tensor_view<const A, 4> queries_of(const A* rows, index_t count, index_t dim, index_t stride) noexcept {
  return {rows, {1, count, 1, dim}, {0, stride, 0, 1}};
}
template <class A>
[[nodiscard]] partial_state<A> state_of(A* out, A* lse, index_t count, index_t dim) noexcept {
  return {tensor_view<A, 4>(out, {1, count, 1, dim}), tensor_view<A, 3>(lse, {1, count, 1})};
}
/// Options of a call of such rows: its scores, and nothing about what is seen, which is all that they are given.
[[nodiscard]] inline attention_options scores_of(const attention_options& options) noexcept {
  attention_options o;
  o.scale = options.scale, o.softcap = options.softcap;
  o.query_offset = 0, o.float_products = true;
  return o;
}

/// A variant: only keys [begin, end) are seen, or only others.
class key_interval {
 public:
  key_interval(key_range keys, bool inside) noexcept : keys_(keys), inside_(inside) {}

  [[nodiscard]] std::uint64_t visible_bits(const position& p) const noexcept {
    const std::uint64_t bits = bits_between(keys_.begin - p.key, keys_.end - p.key);
    return inside_ ? bits : ~bits;
  }
  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    const bool within = keys_.begin <= b.key_begin && b.key_end <= keys_.end;
    const bool apart = keys_.size() == 0 || b.key_end <= keys_.begin || keys_.end <= b.key_begin;
    if (!within && !apart) return visibility::some;
    return within == inside_ ? visibility::all : visibility::none;
  }
  [[nodiscard]] key_range keys(key_range) const noexcept { return inside_ ? keys_ : key_range{0, position_limit}; }

 private:
  key_range keys_;
  bool inside_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
