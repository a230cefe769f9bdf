// SPDX-License-Identifier: Apache-2.0
/// \file
/// Calls in which the query heads of a group see different key tiles: each head then is a group of its own, so that it
/// reads and computes what it sees, and not what its neighbours see.
#pragma once

#include <span>
#include <type_traits>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/problem.hpp>
#include <gqa/detail/tile.hpp>
#include <gqa/detail/turned.hpp>
#include <gqa/options.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A source with a KV head for each query head, which outlives it. The KV heads of a group are one in memory.
template <class Source>
class query_head_kv {
 public:
  using element = typename Source::element;
  using panel_element = typename Source::panel_element;
  static constexpr bool scatters_panels = has_scattered_panels<Source>;

  query_head_kv(const Source& kv, index_t q_heads, std::span<const index_t> group_offsets) noexcept
      : kv_(kv), q_heads_(q_heads), group_offsets_(group_offsets) {}

  [[nodiscard]] index_t batch() const noexcept { return kv_.batch(); }
  [[nodiscard]] index_t kv_heads() const noexcept { return q_heads_; }
  [[nodiscard]] index_t kv_len() const noexcept { return kv_.kv_len(); }
  [[nodiscard]] index_t length(index_t b) const noexcept { return kv_.length(b); }
  [[nodiscard]] index_t head_dim() const noexcept { return kv_.head_dim(); }
  [[nodiscard]] index_t value_dim() const noexcept { return kv_.value_dim(); }
  [[nodiscard]] index_t scratch_elements() const noexcept { return kv_.scratch_elements(); }
  [[nodiscard]] fault find_fault() const noexcept { return kv_.find_fault(); }
  [[nodiscard]] kv_tile<panel_element> tile(index_t b, index_t h, index_t i, index_t tokens,
                                            panel_element* scratch) const noexcept {
    return kv_.tile(b, kv_head_of(h, q_heads_, kv_.kv_heads(), group_offsets_), i, tokens, scratch);
  }
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept requires requires(const Source& kv) { kv.gone_tiles(b); }
  { return kv_.gone_tiles(b); }

 private:
  const Source& kv_;
  index_t q_heads_;
  std::span<const index_t> group_offsets_;
};

/// All that is wrong with a call under a mask of lists (block_sparse.hpp).
template <class Queries, class Source, class Out, class Mask>
[[nodiscard]] fault find_lists_fault(const Queries& q, const Source& kv, const Out& out, const Mask& mask,
                                     const attention_options& options) noexcept {
  if (const auto f = find_attention_fault(q, kv, out, options, mask)) return f;
  const auto p = problem_of<accumulator_t<typename Source::panel_element>>(q, kv, out, options);
  const call_shape& shape = p.shape;
  for (index_t b = 0; b < shape.batch; ++b) {
    const index_t keys = p.length(kv, b), first = p.query_offset(b, keys);
    if (const auto f = mask.find_fault(shape.batch, shape.q_heads, {first, first + shape.q_len}, keys)) return f;
  }
  return {};
}

/// attention() under such a mask: by groups where a group's heads have one list, else head by head.
template <class Queries, class Source, class Out, class Mask>
void attend_by_lists(const Queries& q, const Source& kv, const Out& out, const Mask& mask,
                     const attention_options& options, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  require_dtypes<Q, Source, typename decltype(output_view(out))::value_type>();
  if (const auto f = find_lists_fault(q, kv, out, mask, options)) return raise(f);
  const auto p = problem_of<accumulator_t<typename Source::panel_element>>(q, kv, out, options);
  const call_shape& shape = p.shape;
  bool shares_lists = true;
  for (index_t g = 0; g < shape.kv_heads; ++g)
    shares_lists = shares_lists && mask.has_one_list({p.first_head(g), p.first_head(g) + p.group_size(g)});
  if (shares_lists) return attend_checked(q, kv, out, options, {}, mask, ctx);
  attention_options of_heads = options;
  of_heads.group_offsets = {};
  attend_checked(q, query_head_kv<Source>(kv, shape.q_heads, options.group_offsets), out, of_heads, {}, mask, ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
