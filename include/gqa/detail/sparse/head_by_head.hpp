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
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/options.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A source with a KV head for each query head. The KV heads of a group are one in memory, so they do not lie together:
/// to visit them one after the other would be to read the same keys again.
template <class P>
class query_head_tiles final : public wrapped_source<P> {
 public:
  query_head_tiles(const tile_source<P>& inner, index_t q_heads, std::span<const index_t> group_offsets) noexcept
      : wrapped_source<P>(inner), inner_(inner), group_offsets_(group_offsets) {
    this->facts_.kv_heads = q_heads;
    this->facts_.heads_lie_together = false;
  }
  [[nodiscard]] kv_tile<P> tile(index_t b, index_t h, index_t i, index_t tokens, P* scratch) const noexcept override {
    return inner_.tile(b, kv_head_of_query(h), i, tokens, scratch);
  }
  void find_strips(index_t b, index_t h, index_t i, tile_strips& strips) const noexcept override {
    inner_.find_strips(b, kv_head_of_query(h), i, strips);
  }
  [[nodiscard]] kv_ahead ahead(index_t h, const group_visit& visit) const noexcept override {
    return inner_.ahead(kv_head_of_query(h), visit);
  }

 private:
  [[nodiscard]] index_t kv_head_of_query(index_t h) const noexcept {
    return kv_head_of(h, this->kv_heads(), inner_.kv_heads(), group_offsets_);
  }

  const tile_source<P>& inner_;
  std::span<const index_t> group_offsets_;
};

/// All that is wrong with a call under a mask of lists (block_sparse.hpp).
template <class Queries, class Out, class Mask>
[[nodiscard]] fault find_lists_fault_of(const Queries& q, const key_source& kv, const Out& out, const Mask& mask,
                                        const attention_options& options, const key_rules& rules) noexcept {
  if (const auto f = find_attention_fault_of(q, kv, out, options, rules)) return f;
  const auto& rows = rows_of(q);
  const call_geometry call{shape_of(rows.extent(1), rows.extent(2), kv), options};
  const call_shape& shape = call.shape;
  for (index_t b = 0; b < shape.batch; ++b) {
    const index_t keys = call.length(kv, b), first = call.query_offset(b, keys);
    if (const auto f = mask.find_fault(shape.batch, shape.q_heads, {first, first + shape.q_len}, keys)) return f;
  }
  return {};
}
template <class Queries, class Source, class Out, class Mask>
[[nodiscard]] fault find_lists_fault(const Queries& q, const Source& kv, const Out& out, const Mask& mask,
                                     const attention_options& options) noexcept {
  using A = accumulator_t<typename Source::panel_element>;
  return find_lists_fault_of(q, adapt_keys(kv), out, mask, options, rules_of<A>(mask));
}

/// attention() under such a mask: by groups where a group's heads have one list, else head by head.
template <class Queries, class Source, class Out, class Mask>
void attend_by_lists(const Queries& q, const Source& kv, const Out& out, const Mask& mask,
                     const attention_options& options, context& ctx) {
  using Q = typename std::remove_cvref_t<decltype(rows_of(q))>::value_type;
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;
  require_dtypes<Q, Source, typename decltype(output_view(out))::value_type>();
  const tile_source<P>& source = adapt(kv);
  const auto& rules = rules_of<A>(mask);
  if (const auto f = find_lists_fault_of(q, source, out, mask, options, rules)) return raise(f);
  const auto& rows = rows_of(q);
  const call_geometry call{shape_of(rows.extent(1), rows.extent(2), source), options};
  bool shares_lists = true;
  for (index_t g = 0; g < call.shape.kv_heads; ++g)
    shares_lists = shares_lists && mask.has_one_list({call.first_head(g), call.first_head(g) + call.group_size(g)});
  if (shares_lists) return attend_checked<Queries, P>(q, source, out, options, {}, rules, ctx);
  attention_options of_heads = options;
  of_heads.group_offsets = {};
  const query_head_tiles<P> heads(source, call.shape.q_heads, options.group_offsets);
  attend_checked<Queries, P>(q, heads, out, of_heads, {}, rules, ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
