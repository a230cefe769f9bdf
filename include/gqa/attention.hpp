// SPDX-License-Identifier: Apache-2.0
/// \file
/// attention(): the door. Exact grouped-query attention over plain tensors or any kv_source.
///
///     out[b, s, h] = sum over visible t of softmax_t(score(q[b, s, h] . k[b, t, g(h)])) v[b, t, g(h)]
///
/// MHA (one head a group), GQA and MQA (one group) are the same call: the numbers of heads say which. Prefill, append
/// and decode are the same call: the lengths say which, and query positions default to the last ones of the sequence.
///
/// Shapes: q [B, S, H, D], k [B, T, G, D], v [B, T, G, E], out [B, S, H, E]. Last axes contiguous, other strides free.
/// Types: k and v float, double, Eigen::half or Eigen::bfloat16; q the type of k, or float over 16-bit keys; out float,
/// double or the type of q. Scores, sums and outputs are computed in float (double over double) and rounded once;
/// bfloat16 queries and the weights they give meet bfloat16 keys and values as pairs where the hardware multiplies
/// those.
///
/// Cost: 2 (D + E) operations a visible pair; K and V are read once per group of heads and 96 query rows, never
/// repeated. Scratch, in the context: a few hundred KB a thread and, in prefill, packed keys and values, 64 MiB at most
/// unless one KV head needs more; in decode over several threads, the states of unmerged splits, 64 MiB at most.
///
/// Read on: detail/door/attend.hpp (types end) -> detail/engine/run.hpp (tasks) -> detail/engine/walk.hpp (the key
/// tiles of one split) -> detail/engine/tile_step.hpp (one key tile) -> detail/kernel/tile_kernel.hpp (one row block)
/// -> detail/kernel/online_softmax.hpp (one row) -> detail/engine/row_states.hpp (merged, finished, written).
#pragma once

#include <utility>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/door/attend.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// Attention of q over the keys and values of a source, with a user's variant (variants.hpp).
/// \param q        [B, S, H, D], or turned() (rope_turns.hpp)
/// \param kv       source of B sequences and G KV heads; H a multiple of G, or see attention_options::group_offsets
/// \param out      [B, S, H, E], or a partial_state, whose lse is written too; may share no memory with an input
/// \param options  see options.hpp
/// \throws error   for anything that does not fit, before anything is written
template <detail::turnable Q, kv_source KV, detail::attention_output Out, attention_variant Variant>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options, const Variant& variant, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend(queries, kv, detail::as_output(std::forward<Out>(out)), options, variant, ctx);
}

/// The same without a variant.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend(queries, kv, detail::as_output(std::forward<Out>(out)), options, detail::no_variant{}, ctx);
}

/// On the calling thread.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
void attention(Q&& q, const KV& kv, Out&& out, const attention_options& options = {}) {
  context ctx;
  attention(std::forward<Q>(q), kv, std::forward<Out>(out), options, ctx);
}

/// Attention of q [B, S, H, D] over plain keys k [B, T, G, D] and values v [B, T, G, E].
template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out, attention_variant Variant>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, const Variant& variant, context& ctx) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options,
            variant, ctx);
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, context& ctx) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options, ctx);
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void attention(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options = {}) {
  attention(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options);
}

/// The checks of attention(), and nothing else: errc::ok if the call would run. The other calls have one each, which
/// takes what the call does but the context and the report, and stands beside it in its header.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const attention_options& options = {}) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  const auto to = detail::as_output(std::forward<Out>(out));
  return detail::find_attention_fault(queries, kv, to, options, detail::no_variant{}).code;
}

/// The same with a variant, which is asked about keys that are gone.
template <detail::turnable Q, kv_source KV, detail::attention_output Out, attention_variant Variant>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const attention_options& options, const Variant& variant) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_attention_fault(queries, kv, detail::as_output(std::forward<Out>(out)), options, variant).code;
}

template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options = {}) noexcept {
  return check(std::forward<Q>(q), kv_view(std::forward<K>(k), std::forward<V>(v)), std::forward<Out>(out), options);
}

/// Makes room in a context for attention(q, k, v, out, options, ctx), and plans it, so that calls of this shape
/// allocate nothing. Elements of q, k, v and out are neither read nor written; their pointers may be anything but null.
/// Calls of another shape are divided in another way, and may need more even where they are smaller: reserve each shape
/// there is.
/// \throws error  as attention() does, and errc::capacity if the memory cannot be had
template <detail::turnable Q, tensor_like K, tensor_like V, detail::attention_output Out>
void reserve(Q&& q, K&& k, V&& v, Out&& out, const attention_options& options, context& ctx) {
  const context::detail_dry_run dry(ctx);
  attention(std::forward<Q>(q), std::forward<K>(k), std::forward<V>(v), std::forward<Out>(out), options, ctx);
}

}  // namespace GQA_ISA
}  // namespace gqa
