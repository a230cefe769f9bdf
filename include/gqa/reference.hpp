// SPDX-License-Identifier: Apache-2.0
/// \file
/// Naive attention in double: the oracle of the tests and the baseline of the benches, readable in one minute.
///
/// One row at a time, one score at a time, the textbook formula with the row's maximum subtracted. Shares nothing with
/// the kernels but the argument checks of the door. Needs no Eigen tensor and no context; O(T) memory on the heap.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::reference {
inline namespace GQA_ISA {

namespace impl {

/// A sum whose rounding errors are carried along (Kahan 1965): an oracle may not drift over thousands of keys.
struct careful_sum {
  double value = 0, carry = 0;
  void add(double x) {
    const double corrected = x - carry, next = value + corrected;
    carry = std::isfinite(next) ? (next - value) - corrected : 0;
    value = next;
  }
};

/// KV head of a query head.
inline index_t kv_head_of(const attention_options& o, index_t h, index_t q_heads, index_t kv_heads) {
  if (o.group_offsets.empty()) return h / (q_heads / kv_heads);
  index_t g = 0;
  while (h >= o.group_offsets[static_cast<std::size_t>(g) + 1]) ++g;
  return g;
}

/// Valid keys of sequence b, and the absolute position of its first query.
inline index_t keys_of(const attention_options& o, index_t b, index_t kv_len) {
  return o.kv_lengths.empty() ? kv_len : o.kv_lengths[static_cast<std::size_t>(b)];
}
inline index_t first_position(const attention_options& o, index_t b, index_t keys, index_t q_len) {
  if (o.query_offset) return *o.query_offset;
  return o.query_offsets.empty() ? keys - q_len : o.query_offsets[static_cast<std::size_t>(b)];
}

/// True if causal edge, window, mask and variant let the query at p.query see key p.key (s: its index in the call).
template <class Variant>
bool sees(const attention_options& o, const Variant& variant, const position& p, index_t s) {
  if (o.causal && p.key > p.query) return false;
  if (o.window.left >= 0 && p.query - p.key > o.window.left) return false;
  if (o.window.right >= 0 && p.key - p.query > o.window.right) return false;
  if (o.mask) {
    const index_t b = o.mask->extent(0) == 1 ? 0 : p.batch, h = o.mask->extent(1) == 1 ? 0 : p.q_head;
    if (!(*o.mask)(b, h, s, p.key)) return false;
  }
  if constexpr (detail::hides_bits<Variant>) {
    const index_t first = p.key / 64 * 64;
    return (variant.visible_bits(position{p.batch, p.q_head, p.query, first}) >> (p.key - first) & 1) != 0;
  } else if constexpr (detail::hides_positions<Variant>) {
    return variant.visible(p);
  } else if constexpr (detail::hides_blocks<Variant>) {  // a block of one pair
    return variant.visible(key_block{p.batch, p.q_head, p.q_head + 1, p.query, p.query + 1, p.key, p.key + 1}) !=
           visibility::none;
  } else {
    return true;
  }
}

/// variant(softcap(scale * q.k) + bias + alibi); the variant is asked in the accumulator type A of the inputs.
template <class A, class Variant>
double score(const attention_options& o, const Variant& variant, double product, double scale, const position& p,
             index_t s) {
  double x = scale * product;
  if (o.softcap != 0) x = o.softcap * std::tanh(x / o.softcap);
  if (o.bias) {
    const index_t b = o.bias->extent(0) == 1 ? 0 : p.batch, h = o.bias->extent(1) == 1 ? 0 : p.q_head;
    x += static_cast<double>((*o.bias)(b, h, s, p.key));
  }
  if (!o.alibi_slopes.empty())
    x += static_cast<double>(o.alibi_slopes[static_cast<std::size_t>(p.q_head)]) * static_cast<double>(p.key - p.query);
  if constexpr (requires { variant.score(A{}, p); }) x = static_cast<double>(variant.score(static_cast<A>(x), p));
  return x;
}

}  // namespace impl

/// The same attention as gqa::attention(), in double.
/// \param q, k, v       [B, S, H, D], [B, T, G, D], [B, T, G, E]; any element types of the door
/// \param out_or_state  [B, S, H, E] or a partial_state; rounded on writing
/// \param variant       asked pair by pair, its score() with s rounded to the accumulator type it is written for
/// Cost: O(B S H T (D + E)), every key visited for every query head.
template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out, class Variant>
requires(attention_variant<Variant> || std::same_as<Variant, detail::no_variant>) void attention(
    Q&& q_in, K&& k_in, V&& v_in, Out&& out_or_state, const attention_options& options, const Variant& variant) {
  const auto q = detail::as_view(q_in);
  const auto k = detail::as_view(k_in);
  const auto v = detail::as_view(v_in);
  const auto out = detail::output_view(out_or_state);
  using Element = typename decltype(out)::value_type;
  const auto kv = kv_view(k, v);
  using A = accumulator_t<typename decltype(kv)::panel_element>;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto queries = tensor_view<const typename decltype(q)::value_type, 4>(q);
  if constexpr (detail::output_state<Out>) {
    if (const auto f = detail::find_call_fault(queries, kv, out_or_state, options)) return detail::raise(f);
  } else {
    if (const auto f = detail::find_call_fault(queries, kv, out, options)) return detail::raise(f);
  }

  const index_t q_len = q.extent(1), q_heads = q.extent(2), head_dim = q.extent(3), value_dim = v.extent(3);
  const bool may_hide = options.bias || detail::scores<Variant, A>;  // by a score of -inf
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)));
  for (index_t b = 0; b < q.extent(0); ++b) {
    const index_t keys = impl::keys_of(options, b, k.extent(1)), offset = impl::first_position(options, b, keys, q_len);
    for (index_t s = 0; s < q_len; ++s) {
      for (index_t h = 0; h < q_heads; ++h) {
        const index_t g = impl::kv_head_of(options, h, q_heads, k.extent(2));
        const double sink =
            options.sinks.empty() ? -infinity : static_cast<double>(options.sinks[static_cast<std::size_t>(h)]);

        std::vector<double> scores(static_cast<std::size_t>(keys));
        std::vector<bool> seen(static_cast<std::size_t>(keys));
        double top = sink;
        bool has_nan = false;
        for (index_t t = 0; t < keys; ++t) {
          const position p{b, h, offset + s, t};
          seen[static_cast<std::size_t>(t)] = impl::sees(options, variant, p, s);
          if (!seen[static_cast<std::size_t>(t)]) continue;
          double product = 0;
          for (index_t d = 0; d < head_dim; ++d)
            product += static_cast<double>(q(b, s, h, d)) * static_cast<double>(k(b, t, g, d));
          const double x = impl::score<A>(options, variant, product, scale, p, s);
          scores[static_cast<std::size_t>(t)] = x;
          top = (std::max)(top, x);
          has_nan = has_nan || std::isnan(x);
        }

        const bool saw_nothing = top == -infinity && !has_nan;
        impl::careful_sum sum;
        if (!saw_nothing) sum.add(std::exp(sink - top));
        std::vector<impl::careful_sum> row(static_cast<std::size_t>(value_dim));
        for (index_t t = 0; t < keys; ++t) {
          const double x = scores[static_cast<std::size_t>(t)];
          if (!seen[static_cast<std::size_t>(t)] || (may_hide && x == -infinity)) continue;
          const double weight = std::exp(x - top);
          sum.add(weight);
          for (index_t e = 0; e < value_dim; ++e)
            row[static_cast<std::size_t>(e)].add(weight * static_cast<double>(v(b, t, g, e)));
        }
        for (index_t e = 0; e < value_dim; ++e)
          out(b, s, h, e) =
              static_cast<Element>(saw_nothing ? 0.0 : row[static_cast<std::size_t>(e)].value / sum.value);
        if constexpr (detail::output_state<Out>)
          out_or_state.lse(b, s, h) =
              static_cast<accumulator_t<Element>>(saw_nothing ? -infinity : top + std::log(sum.value));
      }
    }
  }
}

template <tensor_like Q, tensor_like K, tensor_like V, detail::attention_output Out>
void attention(Q&& q, K&& k, V&& v, Out&& out_or_state, const attention_options& options = {}) {
  attention(q, k, v, out_or_state, options, detail::no_variant{});
}

}  // namespace GQA_ISA
}  // namespace gqa::reference

GQA_END_PACKET_CODE
