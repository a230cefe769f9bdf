// SPDX-License-Identifier: Apache-2.0
/// \file
/// batch_attention(): a ragged batch in one call: prefills, appends, drafts of tokens and decode steps of many
/// sequences together, over any kv_source.
///
/// All queries lie in one tensor [total_q, H, D]; the n-th sequence of the batch owns rows [q_offsets[n],
/// q_offsets[n + 1]) and reads the keys of sequences[n]. Tasks of all of them are planned together, by cost, and the
/// plan stays in the context: the layers of a model, and decode steps until a sequence begins a new key tile, reuse it.
/// A row has the bits that it has in a call by itself. Forks that share pages are sorted by their page tables in every
/// call, a comparison of pages where attention reads them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/tile/rows.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {

/// n sequences in the batch.
struct batch_options {
  /// Of all sequences; kv_lengths [n]. No query_offsets, mask or bias: the first and a mask follow, one a sequence.
  attention_options common = {};
  std::span<const index_t> query_offsets = {};  ///< [n]: position of a sequence's first query; default: its last ones
  /// [n]: true where query i sees the j-th of the last q_len keys, beside what the other rules hide: trees of draft
  /// tokens (SpecInfer, Miao et al. 2024). [q_len, q_len] each, any strides; empty: nothing more is hidden.
  std::span<const tensor_view<const bool, 2>> masks = {};
  /// Whether what forks of a paged_kv_cache have in common is read once for all of them. Changes no bit.
  bool share_prefixes = true;
  /// [total_q]: position of each row, where it is not that of its slot: in a tree of drafts its depth, for siblings
  /// have slots one after the other. Distances of causal edge, window and ALiBi are between these, a sequence's last
  /// q_len keys being at the positions of its rows, and keys before them at those of their slots; variants are still
  /// told slots. Default: the positions of slots. (llama.cpp masks by positions that its batch names; vLLM's Triton
  /// kernel and FlashInfer by slots.)
  std::span<const index_t> positions = {};
};

namespace detail {

inline namespace GQA_ISA {

template <class T>
concept rows_output = output_state<T> ||(rows_like<T>&& requires(T&& rows) {
  requires !std::is_const_v<typename decltype(as_rows(std::forward<T>(rows)))::element_type>;
});

/// Offsets of `total` rows, and sequences that there are.
[[nodiscard]] inline fault find_ragged_fault(const ragged_rows& ragged, index_t total, const key_source& kv) noexcept {
  if (ragged.q_offsets.size() != ragged.sequences.size() + 1)
    return make_fault(errc::shape, "q_offsets: expected %zu entries (one more than sequences), got %zu",
                      ragged.sequences.size() + 1, ragged.q_offsets.size());
  if (const auto f = find_offsets_fault("q_offsets", ragged.q_offsets, total)) return f;
  for (std::size_t n = 0; n < ragged.sequences.size(); ++n) {
    const auto id = static_cast<index_t>(ragged.sequences[n]);
    if (id < 0 || id >= kv.batch() || !kv.has_sequence(id))
      return make_fault(errc::range, "sequences[%zu]: expected one of the source's %lld, got %lld", n,
                        printable(kv.batch()), printable(id));
  }
  return {};
}

/// Whether a sequence's draft has a mask.
[[nodiscard]] inline bool is_absent(const tensor_view<const bool, 2>& mask) noexcept {
  return mask.extent(0) == 0 && mask.extent(1) == 0;
}

/// Which of their last q_len keys the queries of a batch's sequences see, as masks and positions say.
class draft_masks {
 public:
  /// Of a sequence: the position of its first query, the first of its last q_len keys, and all of them.
  struct place {
    index_t query, key, keys;
  };
  /// \param places  [n], of batches with masks or positions
  /// \param rule    of distances between positions, where there are some
  draft_masks(std::span<const tensor_view<const bool, 2>> masks, std::span<const place> places,
              const ragged_rows& ragged, const interval_rule& rule) noexcept
      : masks_(masks), places_(places), ragged_(ragged), rule_(rule) {}

  [[nodiscard]] bool hides_in(index_t n) const noexcept { return has_mask(n) || !ragged_.positions.empty(); }
  [[nodiscard]] bool visible(const row_index& row, index_t key) const noexcept {
    const place& first = places_[static_cast<std::size_t>(row.batch)];
    if (key >= first.keys) return false;  // asked with the rest of its tile
    if (!ragged_.positions.empty()) {
      const key_range near = keys_near(row.batch, row.query);
      const index_t position = ragged_.position_of_key(row.batch, key, first.keys);
      if (position < near.begin || near.end <= position) return false;
    }
    if (!has_mask(row.batch)) return true;
    const auto& mask = masks_[static_cast<std::size_t>(row.batch)];
    const index_t of_draft = key - first.key;
    return of_draft < 0 || of_draft >= mask.extent(1) || mask(row.query, of_draft);
  }
  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    if (!hides_in(b.batch)) return visibility::all;
    const place& first = places_[static_cast<std::size_t>(b.batch)];
    if (b.key_end > first.key) return visibility::some;
    if (ragged_.positions.empty()) return visibility::all;
    // Keys at the positions of their slots: those that every row of the block is near, and those that some are.
    key_range all{0, b.key_end}, any{b.key_end, 0};
    for (index_t s = b.query_begin - first.query; s < b.query_end - first.query; ++s) {
      const key_range near = keys_near(b.batch, s);
      all = {(std::max)(all.begin, near.begin), (std::min)(all.end, near.end)};
      any = {(std::min)(any.begin, near.begin), (std::max)(any.end, near.end)};
    }
    if (b.key_end <= any.begin || any.end <= b.key_begin) return visibility::none;
    return all.begin <= b.key_begin && b.key_end <= all.end ? visibility::all : visibility::some;
  }

 private:
  [[nodiscard]] bool has_mask(index_t n) const noexcept {
    return !masks_.empty() && !is_absent(masks_[static_cast<std::size_t>(n)]);
  }
  /// Positions that query s of a sequence may see, by causal edge and window around its own position.
  [[nodiscard]] key_range keys_near(index_t n, index_t s) const noexcept {
    return rule_.keys_of(ragged_.position_of_query(n, s), position_limit * 2);
  }

  std::span<const tensor_view<const bool, 2>> masks_;
  std::span<const place> places_;
  const ragged_rows& ragged_;
  interval_rule rule_;
};

/// A batch's masks beside the rules of its variant.
template <class A>
class draft_rules final : public row_rules<A> {
 public:
  draft_rules(const draft_masks& masks, const row_rules<A>& own) noexcept
      : row_rules<A>({.hides = true, .hides_blocks = true}, own.changes_scores()), masks_(masks), own_(own) {}

  [[nodiscard]] bool hides_in(index_t b) const override { return masks_.hides_in(b) || own_.hides_in(b); }
  [[nodiscard]] visibility visible(const key_block& b) const override {
    const visibility own = own_.visible(b), drafts = masks_.visible(b);
    if (own == visibility::none || drafts == visibility::none) return visibility::none;
    return own == visibility::all ? drafts : visibility::some;
  }
  [[nodiscard]] std::uint64_t visible_bits(std::uint64_t bits, const row_index& row, index_t first_key) const override {
    bits = own_.visible_bits(bits, row, first_key);
    if (!masks_.hides_in(row.batch)) return bits;
    return bits_where(bits, [&](index_t c) { return masks_.visible(row, first_key + c); });
  }
  [[nodiscard]] key_range keys(key_range queries) const override { return own_.keys(queries); }
  void score(A* s, std::uint64_t bits, const row_index& row, index_t first_key) const override {
    own_.score(s, bits, row, first_key);
  }

 private:
  const draft_masks& masks_;
  const row_rules<A>& own_;
};

[[nodiscard]] inline fault find_batch_fault(const call_operands& call, const ragged_rows& ragged, const key_source& kv,
                                            const batch_options& options, const attention_options& common) noexcept {
  if (const auto f = kv.find_fault()) return f;
  const index_t total = call.q.extents[1];
  call_shape of_rows = shape_of(total, call.q.extents[2], kv);
  of_rows.batch = 1;
  if (const auto f = find_shape_fault(call.q, call.out, of_rows)) return f;
  if (const auto f = find_ragged_fault(ragged, total, kv)) return f;
  if (options.common.mask || options.common.bias || !options.common.query_offsets.empty())
    return make_fault(errc::option,
                      "options.common: expected no mask, bias or query_offsets, which a ragged batch has one by one");
  call_shape of_batch = of_rows;
  of_batch.batch = static_cast<index_t>(ragged.sequences.size());
  if (const auto f = find_options_fault(common, of_batch)) return f;
  if (!options.masks.empty() && options.masks.size() != ragged.sequences.size())
    return make_fault(errc::shape, "options.masks: expected %zu entries, got %zu", ragged.sequences.size(),
                      options.masks.size());
  if (const auto f = find_count_fault("options.positions", options.positions, total)) return f;
  for (std::size_t i = 0; i < options.positions.size(); ++i) {
    if (options.positions[i] < 0 || options.positions[i] > position_limit)
      return make_fault(errc::range, "options.positions[%zu]: expected a position within [0, 2^60], got %lld", i,
                        printable(options.positions[i]));
  }
  for (std::size_t n = 0; n < ragged.sequences.size(); ++n) {
    const index_t there = kv.length(static_cast<index_t>(ragged.sequences[n]));
    const index_t length = common.kv_lengths.empty() ? there : common.kv_lengths[n];
    if (const auto f = find_kv_length_fault("options.common.kv_lengths", static_cast<index_t>(n), length, there))
      return f;
    const index_t rows = ragged.q_offsets[n + 1] - ragged.q_offsets[n];
    if (!options.positions.empty() && rows > length)
      return make_fault(
          errc::length,
          "options.positions: expected at least %lld keys (one a row) in the batch's sequence %zu, got %lld",
          printable(rows), n, printable(length));
    if (options.masks.empty() || is_absent(options.masks[n])) continue;
    const auto& mask = options.masks[n];
    if (mask.extent(0) != rows || mask.extent(1) != rows || rows > length)
      return make_fault(errc::shape,
                        "options.masks[%zu]: expected [%lld, %lld] of at least as many keys, got [%lld, "
                        "%lld] of %lld",
                        n, printable(rows), printable(rows), printable(mask.extent(0)), printable(mask.extent(1)),
                        printable(length));
    if (const auto f = find_extents_fault(describe("options.masks", mask))) return f;
    if (const auto f = find_overlap_with(call, describe("options.masks", mask))) return f;
  }
  for (const operand& read : {describe("q_offsets", ragged.q_offsets), describe("sequences", ragged.sequences),
                              describe("options.positions", options.positions)}) {
    if (const auto f = find_overlap_with(call, read)) return f;
  }
  return find_memory_fault(call, kv, common);
}

/// A batch as a call of attention() with options that all sequences have in common, under rules of its masks and
/// positions beside those of its variant: calls f(options, rules) with them. `places`: [sequences], where there are
/// masks or positions; a batch without takes the path of any other call.
template <class A, class F>
void with_drafts(const ragged_rows& ragged, const key_source& kv, const batch_options& options,
                 attention_options common, const row_rules<A>& own, std::span<draft_masks::place> places, const F& f) {
  if (places.empty()) return f(common, own);
  call_geometry call{{}, common, ragged};
  for (std::size_t n = 0; n < places.size(); ++n) {
    const auto b = static_cast<index_t>(n);
    const index_t length = call.length(kv, b);
    places[n] = {call.query_offset(b, length), length - call.q_len(b), length};
  }
  const draft_masks masks(options.masks, places, ragged, call.interval());
  if (!options.positions.empty()) common.causal = false, common.window = {};  // the engine would go by slots
  f(common, draft_rules<A>(masks, own));
}
[[nodiscard]] inline std::size_t places_of(const batch_options& options, const ragged_rows& ragged) noexcept {
  return options.masks.empty() && options.positions.empty() ? 0 : ragged.sequences.size();
}
[[nodiscard]] inline attention_options common_of(const batch_options& options) noexcept {
  attention_options common = options.common;
  if (!options.query_offsets.empty()) common.query_offsets = options.query_offsets;
  return common;
}

template <class Queries, class P, class Out>
void attend_batch(const Queries& q, const ragged_rows& ragged, const tile_source<P>& kv, const Out& out,
                  const batch_options& options, const row_rules<accumulator_t<P>>& rules, context& ctx) {
  const attention_options common = common_of(options);
  if (const auto f = find_batch_fault(describe_call(rows_of(q), out), ragged, kv, options, common)) return raise(f);
  if (const auto f = find_turns_fault(q)) return raise(f);
  using place = draft_masks::place;
  static_assert(sizeof(place) == context::detail_place_bytes);
  const std::size_t count = places_of(options, ragged);
  place* memory = nullptr;
  if (count > 0) {
    memory = reinterpret_cast<place*>(ctx.detail_batch(count * sizeof(place)));
    if (memory == nullptr) return;
  }
  with_drafts<accumulator_t<P>>(ragged, kv, options, common, rules, {memory, count},
                                [&](const attention_options& of_all, const row_rules<accumulator_t<P>>& all_rules) {
                                  attend_checked<Queries, P>(q, kv, out, of_all, ragged, all_rules, ctx);
                                });
}

/// All that is wrong with a batch.
template <class A, class Queries, class Out>
[[nodiscard]] fault find_whole_batch_fault(const Queries& q, const ragged_rows& ragged, const key_source& kv,
                                           const Out& out, const batch_options& options, const row_rules<A>& rules) {
  const attention_options common = common_of(options);
  const call_operands operands = describe_call(rows_of(q), out);
  if (const auto f = find_batch_fault(operands, ragged, kv, options, common)) return f;
  if (const auto f = find_turns_fault(q)) return f;
  reporting_vector<draft_masks::place> places;
  if (!places.resize(places_of(options, ragged))) return make_room_fault("places of sequences");
  fault found;
  with_drafts<A>(ragged, kv, options, common, rules, {places.data(), places.size()},
                 [&](const attention_options& of_all, const row_rules<A>& all_rules) {
                   call_geometry call{shape_of(operands.q.extents[1], operands.q.extents[2], kv), of_all, ragged};
                   call.shape.batch = static_cast<index_t>(ragged.sequences.size());
                   found = find_gone_fault(call, kv, all_rules);
                 });
  return found;
}

/// Calls f(queries, rows of the batch, outputs), with any rows and outputs as the door has them.
template <class Q, class Out, class F>
auto with_batch(Q&& q, std::span<const index_t> q_offsets, std::span<const sequence_id> sequences, Out&& out,
                const batch_options& options, const F& f) {
  const auto queries = as_turnable_rows(std::forward<Q>(q));
  const ragged_rows ragged{q_offsets, sequences, options.share_prefixes, options.positions};
  if constexpr (output_state<Out>) {
    const auto& lse = out.lse;
    using lse_view = std::remove_cvref_t<decltype(lse)>;
    const std::remove_cvref_t<Out> state{
        without_idle_strides(out.out),
        lse_view(lse.data(), {lse.extent(0), lse.extent(1), lse.extent(2)}, {0, lse.stride(1), lse.stride(2)})};
    return f(queries, ragged, state);
  } else {
    return f(queries, ragged, as_rows(std::forward<Out>(out)));
  }
}

template <class Q, class KV, class Out, class Variant>
void open_batch(Q&& q, std::span<const index_t> q_offsets, const KV& kv, std::span<const sequence_id> sequences,
                Out&& out, const batch_options& options, const Variant& variant, context& ctx) {
  using P = typename KV::panel_element;
  with_batch(std::forward<Q>(q), q_offsets, sequences, std::forward<Out>(out), options,
             [&](const auto& queries, const ragged_rows& ragged, const auto& to) {
               using element = typename std::remove_cvref_t<decltype(rows_of(queries))>::value_type;
               require_dtypes<element, KV, typename decltype(output_view(to))::value_type>();
               const tile_source<P>& source = adapt(kv);
               attend_batch<std::remove_cvref_t<decltype(queries)>, P>(queries, ragged, source, to, options,
                                                                       rules_of<accumulator_t<P>>(variant), ctx);
             });
}
template <class Q, class KV, class Out, class Variant>
[[nodiscard]] errc check_batch(Q&& q, std::span<const index_t> q_offsets, const KV& kv,
                               std::span<const sequence_id> sequences, Out&& out, const batch_options& options,
                               const Variant& variant) {
  using A = accumulator_t<typename KV::panel_element>;
  return with_batch(
      std::forward<Q>(q), q_offsets, sequences, std::forward<Out>(out), options,
      [&](const auto& queries, const ragged_rows& ragged, const auto& to) {
        return find_whole_batch_fault<A>(queries, ragged, adapt_keys(kv), to, options, rules_of<A>(variant)).code;
      });
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of a ragged batch of n sequences.
/// \param q          [total_q, H, D]: a tensor_view of rank 3, or what view() takes, of batch 1; or turned() of one
/// \param q_offsets  [n + 1]: 0 ascending to total_q; a sequence may have no queries
/// \param kv         source of the keys; each sequence has a length of its own
/// \param sequences  [n]: of the source, in any order, repeated or not
/// \param out        [total_q, H, E] likewise, or a partial_state of [1, total_q, H, E]
/// \throws error     as attention() does, and (errc::range, errc::shape) for offsets and sequences that do not fit
/// Cost: as the calls one by one, but for what threads wait.
template <detail::turnable_rows Q, kv_source KV, detail::rows_output Out>
void batch_attention(Q&& q, std::span<const index_t> q_offsets, const KV& kv, std::span<const sequence_id> sequences,
                     Out&& out, const batch_options& options, context& ctx) {
  detail::open_batch(std::forward<Q>(q), q_offsets, kv, sequences, std::forward<Out>(out), options,
                     detail::no_variant{}, ctx);
}

/// The same with a user's variant (variants.hpp), whose `batch` is the number of a sequence in the batch.
template <detail::turnable_rows Q, kv_source KV, detail::rows_output Out, attention_variant Variant>
void batch_attention(Q&& q, std::span<const index_t> q_offsets, const KV& kv, std::span<const sequence_id> sequences,
                     Out&& out, const batch_options& options, const Variant& variant, context& ctx) {
  detail::open_batch(std::forward<Q>(q), q_offsets, kv, sequences, std::forward<Out>(out), options, variant, ctx);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <detail::turnable_rows Q, kv_source KV, detail::rows_output Out, attention_variant Variant>
[[nodiscard]] errc check(Q&& q, std::span<const index_t> q_offsets, const KV& kv,
                         std::span<const sequence_id> sequences, Out&& out, const batch_options& options,
                         const Variant& variant) {
  return detail::check_batch(std::forward<Q>(q), q_offsets, kv, sequences, std::forward<Out>(out), options, variant);
}
template <detail::turnable_rows Q, kv_source KV, detail::rows_output Out>
[[nodiscard]] errc check(Q&& q, std::span<const index_t> q_offsets, const KV& kv,
                         std::span<const sequence_id> sequences, Out&& out, const batch_options& options) noexcept {
  return detail::check_batch(std::forward<Q>(q), q_offsets, kv, sequences, std::forward<Out>(out), options,
                             detail::no_variant{});
}

}  // namespace GQA_ISA
}  // namespace gqa
