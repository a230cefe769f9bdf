// SPDX-License-Identifier: Apache-2.0
/// \file
/// streaming_attention(): attention over a ring_kv_cache with positions of the cache, as StreamingLLM has them.
///
/// Let a ring keep n sinks and a window of w. The key of the newest token then stands at position n + w - 1, as if what
/// has left the window had never been: however long the stream, no distance is longer than the model was trained on.
/// What rotary embedding (rope.hpp) makes of a key and a query depends on their distance alone. Within the window those
/// are the true distances, so keys stay as they were turned once, at their absolute positions, and only queries turn
/// twice: at their own position p for keys of the window, at n + w - 1 for the sinks. So a row is the merge of two
/// states, of the sinks and of the window. (StreamingLLM, Xiao et al. 2024, keeps keys as they were before rotation and
/// turns all of them again for every new token: the same products, by rotations of the whole cache a step.)
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/cache/adapted_source.hpp>
#include <gqa/detail/door/attend.hpp>
#include <gqa/detail/door/state_memory.hpp>
#include <gqa/error.hpp>
#include <gqa/local_masks.hpp>
#include <gqa/options.hpp>
#include <gqa/ring_kv_cache.hpp>
#include <gqa/rope.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {
namespace detail {

/// What a query at absolute position p sees by its own position: all there is until something has left the window,
/// which is up to n + w - 1, then the window.
class streamed_window : public band_mask<streamed_window> {
 public:
  streamed_window(index_t last_whole, index_t window) noexcept : last_whole_(last_whole), window_(window) {}
  [[nodiscard]] key_range band(index_t query) const noexcept {
    return {query <= last_whole_ ? 0 : query - window_ + 1, query + 1};
  }

 private:
  index_t last_whole_, window_;
};

/// And what it sees at the position of the cache: from then on the sinks.
class streamed_sinks : public band_mask<streamed_sinks> {
 public:
  streamed_sinks(index_t last_whole, index_t sinks) noexcept : last_whole_(last_whole), sinks_(sinks) {}
  [[nodiscard]] key_range band(index_t query) const noexcept { return {0, query <= last_whole_ ? 0 : sinks_}; }

 private:
  index_t last_whole_, sinks_;
};

inline namespace GQA_ISA {

[[nodiscard]] inline fault find_streaming_options_fault(const attention_options& o) noexcept {
  if (o.mask || o.bias || !o.alibi_slopes.empty() || o.window.left >= 0 || o.window.right >= 0)
    return make_fault(errc::option,
                      "options: expected no mask, bias, ALiBi or window: the ring's sinks and window say what is seen");
  return {};
}

/// Positions of queries, sequence by sequence: their own, and those that the cache gives them.
struct streamed_positions {
  reporting_vector<index_t> own, of_cache;
  bool any_shifted = false;
};
/// False after a capacity error, where that returns.
template <class Problem, class Ring>
[[nodiscard]] bool find_streamed_positions(const Problem& call, const Ring& ring, index_t last_whole,
                                           streamed_positions& at) {
  const auto tokens = static_cast<std::size_t>(call.shape.batch * call.shape.q_len);
  if (!make_room(at.own, tokens, "positions") || !make_room(at.of_cache, tokens, "positions")) return false;
  for (index_t b = 0; b < call.shape.batch; ++b) {
    const index_t first = call.query_offset(b, call.length(ring, b));
    for (index_t p = first; p < first + call.shape.q_len; ++p) {
      static_cast<void>(at.own.push_back(p));
      static_cast<void>(at.of_cache.push_back((std::min)(p, last_whole)));
      at.any_shifted = at.any_shifted || p > last_whole;
    }
  }
  return true;
}

/// The last position whose query sees all that there is up to it.
template <class Ring>
[[nodiscard]] index_t last_whole_position(const Ring& ring) noexcept {
  return ring.sink_tokens() + ring.window() - 1;
}

/// All that is wrong with a call.
template <class Q, class T, class Out>
[[nodiscard]] fault find_streaming_fault(const tensor_view<const Q, 4>& q, const rope& embedding,
                                         const ring_kv_cache<T>& ring, const Out& out,
                                         const attention_options& options) noexcept {
  if (const auto f = find_call_fault(q, ring, out, options)) return f;
  if (const auto f = find_streaming_options_fault(options)) return f;
  if (embedding.head_dim() != ring.head_dim())
    return make_fault(errc::shape, "embedding: expected head_dim %lld, got %lld", printable(ring.head_dim()),
                      printable(embedding.head_dim()));
  attention_options seen = options;
  seen.causal = true;
  const streamed_window window(last_whole_position(ring), ring.window());
  return find_gone_fault(problem_of<accumulator_t<T>>(q, ring, out, seen), adapt_keys(ring),
                         rules_of<accumulator_t<T>>(window));
}

template <class Q, class T, class Out>
void attend_streaming(const tensor_view<const Q, 4>& q, const rope& embedding, const ring_kv_cache<T>& ring,
                      const Out& out, const attention_options& options, context& ctx) {
  using A = accumulator_t<T>;
  require_dtypes<Q, ring_kv_cache<T>, typename decltype(output_view(out))::value_type>();
  if (const auto f = find_streaming_fault(q, embedding, ring, out, options)) return raise(f);
  const index_t last_whole = last_whole_position(ring);
  streamed_positions at;
  if (!find_streamed_positions(problem_of<A>(q, ring, out, options), ring, last_whole, at)) return;
  attention_options seen = options;
  seen.causal = true;
  const error_watch watch;
  state_memory<A> own, of_sinks;
  const auto attend_at = [&](const reporting_vector<index_t>& positions, state_memory<A>& state, const auto& variant) {
    const auto turns = embedding.turns<accumulator_t<Q>>(positions, ctx);
    if (watch.failed() || !state.make(q, ring.value_dim())) return;
    attention(turned(q, turns), ring, *state, seen, variant, ctx);
  };
  attend_at(at.own, own, streamed_window(last_whole, ring.window()));
  if (at.any_shifted && ring.sink_tokens() > 0 && !watch.failed()) {
    seen.sinks = {};  // counted once
    attend_at(at.of_cache, of_sinks, streamed_sinks(last_whole, ring.sink_tokens()));
    if (!watch.failed()) merge(*own, *of_sinks, ctx);
  }
  if (watch.failed()) return;
  const auto to = output_view(out);
  using element = typename decltype(to)::value_type;
  for (index_t b = 0; b < to.extent(0); ++b) {
    for (index_t s = 0; s < to.extent(1); ++s) {
      for (index_t h = 0; h < to.extent(2); ++h) {
        for (index_t e = 0; e < to.extent(3); ++e) to(b, s, h, e) = stored<element>(own->out(b, s, h, e));
        if constexpr (output_state<Out>) out.lse(b, s, h) = static_cast<accumulator_t<element>>(own->lse(b, s, h));
      }
    }
  }
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Attention of queries over the sinks and the window of a ring, with rotary embedding at positions of the cache.
/// \param q          [B, S, H, D], not turned
/// \param embedding  what the ring's keys were turned by, at their absolute positions: ring.append(turned(k, ...), v)
/// \param ring       of which a query at p sees the sinks and [p - window + 1, p]
/// \param out        [B, S, H, E], or a partial_state
/// \param options    scale, softcap, sinks, offsets, kv_lengths, group_offsets; always causal
/// \throws error     as attention() does; (errc::option) for masks, biases, ALiBi and windows
/// Cost: of two calls of attention(), of which that of the sinks reads their tiles only; and B S H (E + 2) elements
/// each.
template <tensor_like Q, class T, detail::attention_output Out>
void streaming_attention(Q&& q, const rope& embedding, const ring_kv_cache<T>& ring, Out&& out,
                         const attention_options& options, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend_streaming(queries, embedding, ring, detail::as_output(std::forward<Out>(out)), options, ctx);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <tensor_like Q, class T, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, const rope& embedding, const ring_kv_cache<T>& ring, Out&& out,
                         const attention_options& options) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_streaming_fault(queries, embedding, ring, detail::as_output(std::forward<Out>(out)), options)
      .code;
}

}  // namespace GQA_ISA
}  // namespace gqa
