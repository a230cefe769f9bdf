// SPDX-License-Identifier: Apache-2.0
/// \file
/// Diagnostics: what attention looked at, and how far an approximation is off. Numbers only; files are the caller's.
///
///     attention_map()      weights of some queries on some keys, rebuilt from their log-sum-exps
///     attention_entropy()  of every query's weights, in one pass over the keys
///     attention_mass()     how much of every query's weight lies on the keys that a mask shows
///     head_similarity()    how alike the heads of a KV group are
///     compare()            an output against another
/// Groups report on themselves: grouped_report (grouped_options.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/door/pair_scores.hpp>
#include <gqa/detail/door/state_memory.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/state.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {

/// Queries (indices in the call) and keys of one head whose weights are wanted.
struct map_range {
  index_t batch = 0, q_head = 0;
  key_range queries = {}, keys = {};
};

/// How far one output is off another.
struct difference {
  double largest = 0;   // absolute, of an element
  double mean = 0;      // absolute
  double relative = 0;  // norm of the difference over that of the expected one; 0 if both are 0

  [[nodiscard]] friend bool operator==(const difference&, const difference&) = default;
};

namespace detail {

inline namespace GQA_ISA {

/// What is wrong with a diagnostic call that writes one number a query, result [B, S, H], from attention of q over kv:
/// the faults that attention() would find in q, kv and options, and those of result. Asked before memory for the
/// outputs of that attention is allocated, whose size rests on extents that nobody has checked yet.
template <class R, class Q, class KV>
[[nodiscard]] fault find_rows_result_fault(const char* name, const tensor_view<R, 3>& result,
                                           const tensor_view<Q, 4>& q_in, const KV& kv,
                                           const attention_options& options) noexcept {
  const tensor_view<const std::remove_const_t<Q>, 4> q(q_in);
  const operand to = describe(name, result);
  if (const auto f = find_written_fault(to)) return f;
  // An output as the checks want to see one: never read or written.
  const tensor_view<R, 4> as_output(result.data(), {q.extent(0), q.extent(1), q.extent(2), kv.value_dim()});
  const auto& source = adapt_keys(kv);
  if (const auto f = find_operands_fault(describe_call(q, as_output), source, options)) return f;
  if (const auto f = find_lse_fault(name, result, q)) return f;
  if (const auto f = find_overlap_fault(to, describe("q", q))) return f;
  if (const auto f = source.find_overlap(to)) return f;
  return find_in_options(options, [&](const operand& read) noexcept { return find_overlap_fault(to, read); });
}

}  // namespace GQA_ISA

/// Views of the same four extents.
[[nodiscard]] inline fault find_same_shape_fault(const operand& a, const operand& b) noexcept {
  for (int axis = 0; axis < 4; ++axis) {
    if (const auto f = find_extent_fault(b, axis, a.extents[static_cast<std::size_t>(axis)], a.name)) return f;
  }
  return {};
}
[[nodiscard]] inline fault find_range_fault(const char* name, key_range range, index_t count) noexcept {
  if (range.begin >= 0 && range.begin <= range.end && range.end <= count) return {};
  return make_fault(errc::range, "%s: expected a range within [0, %lld), got [%lld, %lld)", name, printable(count),
                    printable(range.begin), printable(range.end));
}

}  // namespace detail

inline namespace GQA_ISA {

/// Weights of the queries on the keys of a range: exp(score - lse), 0 where a key is hidden.
/// \param q, k     [B, S, H, D], [B, T, G, D]
/// \param lse      [B, S, H], of the call, sinks included
/// \param options  of the call
/// \param weights  [queries, keys], any strides
/// \throws error   (errc::shape, errc::range, errc::option) before anything is written
/// Cost: D multiply-adds a pair, in double, one after the other: for pictures, not for whole calls.
template <class Q, class K, class L>
void attention_map(tensor_view<const Q, 4> q, tensor_view<const K, 4> k, tensor_view<const L, 3> lse,
                   const attention_options& options, const map_range& range, tensor_view<float, 2> weights) {
  const auto find_fault = [&]() -> detail::fault {
    const detail::operand queries = detail::describe("q", q), keys = detail::describe("k", k);
    if (const auto f = detail::find_layout_fault(queries)) return f;
    if (const auto f = detail::find_layout_fault(keys)) return f;
    if (const auto f = detail::find_lse_fault("lse", lse, q)) return f;
    const detail::call_shape shape{k.extent(0), q.extent(1), k.extent(1), q.extent(2), k.extent(2), k.extent(3), 1};
    if (const auto f = detail::find_extent_fault(queries, 0, shape.batch, "the batch of k")) return f;
    if (const auto f = detail::find_extent_fault(queries, 3, shape.head_dim, "the head dim of k")) return f;
    if (shape.kv_heads < 1 || shape.q_heads < 1 || shape.head_dim < 1)
      return detail::make_fault(errc::shape, "q, k: expected heads and head dims >= 1, got %lld, %lld heads of %lld",
                                detail::printable(shape.q_heads), detail::printable(shape.kv_heads),
                                detail::printable(shape.head_dim));
    if (const auto f = detail::find_options_fault(options, shape)) return f;
    if (range.batch < 0 || range.batch >= shape.batch || range.q_head < 0 || range.q_head >= shape.q_heads)
      return detail::make_fault(errc::range,
                                "range: expected a sequence below %lld and a head below %lld, got %lld, %lld",
                                detail::printable(shape.batch), detail::printable(shape.q_heads),
                                detail::printable(range.batch), detail::printable(range.q_head));
    if (const auto f = detail::find_range_fault("range.queries", range.queries, shape.q_len)) return f;
    if (const auto f = detail::find_range_fault("range.keys", range.keys, shape.kv_len)) return f;
    const detail::operand to = detail::describe("weights", weights);
    if (const auto f = detail::find_written_fault(to)) return f;
    const auto find_overlap = [&](const detail::operand& read) noexcept {
      return detail::find_overlap_fault(to, read);
    };
    for (const detail::operand& read : {queries, keys, detail::describe("lse", lse)}) {
      if (const auto f = find_overlap(read)) return f;
    }
    if (const auto f = detail::find_in_options(options, find_overlap)) return f;
    if (weights.extent(0) != range.queries.size() || weights.extent(1) != range.keys.size())
      return detail::make_fault(errc::shape, "weights: expected [%lld, %lld], got [%lld, %lld]",
                                detail::printable(range.queries.size()), detail::printable(range.keys.size()),
                                detail::printable(weights.extent(0)), detail::printable(weights.extent(1)));
    return {};
  };
  if (const auto fault = find_fault()) return detail::raise(fault);
  const index_t b = range.batch, h = range.q_head;
  const index_t keys = options.kv_lengths.empty() ? k.extent(1) : options.kv_lengths[static_cast<std::size_t>(b)];
  const index_t offset = detail::first_position(options, b, keys, q.extent(1));
  const index_t g = detail::kv_head_of(h, q.extent(2), k.extent(2), options.group_offsets);
  const detail::pair_scores scores(options, options.scale.value_or(1 / std::sqrt(static_cast<double>(q.extent(3)))));
  for (index_t s = range.queries.begin; s < range.queries.end; ++s) {
    const detail::row_index row{b, s, h, offset + s, keys};
    for (index_t t = range.keys.begin; t < range.keys.end; ++t) {
      float& weight = weights(s - range.queries.begin, t - range.keys.begin);
      weight = 0;
      if (!scores.sees(row, t)) continue;
      double product = 0;
      for (index_t d = 0; d < q.extent(3); ++d)
        product += static_cast<double>(q(b, s, h, d)) * static_cast<double>(k(b, t, g, d));
      weight = static_cast<float>(std::exp(scores.score(product, row, t) - static_cast<double>(lse(b, s, h))));
    }
  }
}

/// Entropy of every query's weights, in nats: -sum A ln A = lse - sum A score, of which the sum is the query's product
/// with the mean of keys under its weights: attention whose values are the keys.
/// \param q, k     [B, S, H, D], [B, T, G, D]
/// \param options  of the call; without softcap, bias, ALiBi or sinks, whose scores are more than products
/// \param entropy  [B, S, H]; 0 for a query that sees nothing
/// \throws error   as attention(), and (errc::option) for those; nothing is written then
/// Cost: that of attention with values of D elements, and scratch of B S H D elements.
template <tensor_like Q, tensor_like K, class E>
void attention_entropy(Q&& q_in, K&& k_in, const attention_options& options, tensor_view<E, 3> entropy, context& ctx) {
  const auto q = detail::as_view(std::forward<Q>(q_in));
  const auto k = detail::as_view(std::forward<K>(k_in));
  using A = accumulator_t<typename decltype(k)::value_type>;
  if (options.softcap != 0 || options.bias || !options.alibi_slopes.empty() || !options.sinks.empty())
    return detail::raise(detail::make_fault(
        errc::option, "options: expected no softcap, bias, ALiBi or sinks, whose scores are more than products"));
  const auto source = kv_view(k, k);
  if (const auto f = detail::find_rows_result_fault("entropy", entropy, q, source, options)) return detail::raise(f);
  const index_t batch = q.extent(0), q_len = q.extent(1), heads = q.extent(2), dim = q.extent(3);
  detail::state_memory<A> state;  // of the mean keys
  if (!state.make(q, dim)) return;
  const detail::error_watch watch;
  attention(q, source, *state, options, ctx);
  if (watch.failed()) return;
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
  for (index_t b = 0; b < batch; ++b) {
    for (index_t s = 0; s < q_len; ++s) {
      for (index_t h = 0; h < heads; ++h) {
        double product = 0;
        for (index_t d = 0; d < dim; ++d)
          product += static_cast<double>(q(b, s, h, d)) * static_cast<double>(state->out(b, s, h, d));
        const auto total = static_cast<double>(state->lse(b, s, h));
        entropy(b, s, h) = static_cast<E>(std::isinf(total) && total < 0 ? 0 : total - scale * product);
      }
    }
  }
}

/// How much of every query's weight lies on the keys that `shown` leaves visible: exp(lse of those - lse), and 0 for
/// a query that sees nothing.
/// \param kv       source of the call
/// \param shown    a variant that hides: a window, sinks, blocks (local_masks.hpp), or one of your own
/// \param lse      [B, S, H], of the call, sinks included
/// \param options  of the call
/// \param mass     [B, S, H]
/// \throws error   as attention()
/// Cost: that of attention over those keys, and scratch of B S H E elements.
template <tensor_like Q, kv_source KV, attention_variant Shown, class L, class M>
void attention_mass(Q&& q_in, const KV& kv, const Shown& shown, tensor_view<const L, 3> lse,
                    const attention_options& options, tensor_view<M, 3> mass, context& ctx) {
  using A = accumulator_t<typename KV::panel_element>;
  const auto q = detail::as_view(std::forward<Q>(q_in));
  if (const auto f = detail::find_lse_fault("lse", lse, q)) return detail::raise(f);
  if (const auto f = detail::find_rows_result_fault("mass", mass, q, kv, options)) return detail::raise(f);
  if (const auto f = detail::find_overlap_fault(detail::describe("mass", mass), detail::describe("lse", lse)))
    return detail::raise(f);
  const index_t batch = q.extent(0), q_len = q.extent(1), heads = q.extent(2);
  detail::state_memory<A> state;
  if (!state.make(q, kv.value_dim())) return;
  attention_options without_sinks = options;
  without_sinks.sinks = {};
  const detail::error_watch watch;
  attention(q, kv, *state, without_sinks, shown, ctx);
  if (watch.failed()) return;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t s = 0; s < q_len; ++s) {
      for (index_t h = 0; h < heads; ++h) {
        const auto of_part = static_cast<double>(state->lse(b, s, h));
        const bool nothing = std::isinf(of_part) && of_part < 0;
        mass(b, s, h) = static_cast<M>(nothing ? 0 : std::exp(of_part - static_cast<double>(lse(b, s, h))));
      }
    }
  }
}

/// How alike the heads of each KV group are: the mean cosine of rows of two heads at the same position.
/// \param x           [B, S, H, D]: queries, or outputs; H a multiple of kv_heads
/// \param similarity  [kv_heads, H / kv_heads, H / kv_heads]; 1 on the diagonal. Rows of zeros count as 0
/// \throws error      (errc::shape, errc::stride) before anything is written
template <class T>
void head_similarity(tensor_view<const T, 4> x, index_t kv_heads, tensor_view<double, 3> similarity) {
  const detail::operand rows = detail::describe("x", x);
  if (const auto f = detail::find_layout_fault(rows)) return detail::raise(f);
  const index_t heads = x.extent(2);
  const index_t group = kv_heads > 0 ? heads / kv_heads : 0;
  if (kv_heads < 1 || heads % kv_heads != 0 || similarity.extent(0) != kv_heads || similarity.extent(1) != group ||
      similarity.extent(2) != group)
    return detail::raise(detail::make_fault(
        errc::shape, "similarity: expected [%lld, %lld, %lld] for %lld heads, got [%lld, %lld, %lld]",
        detail::printable(kv_heads), detail::printable(group), detail::printable(group), detail::printable(heads),
        detail::printable(similarity.extent(0)), detail::printable(similarity.extent(1)),
        detail::printable(similarity.extent(2))));
  const detail::operand to = detail::describe("similarity", similarity);
  if (const auto f = detail::find_written_fault(to)) return detail::raise(f);
  if (const auto f = detail::find_overlap_fault(to, rows)) return detail::raise(f);
  const auto positions = static_cast<double>(std::max<index_t>(x.extent(0) * x.extent(1), 1));
  for (index_t g = 0; g < kv_heads; ++g) {
    for (index_t i = 0; i < group; ++i) {
      for (index_t j = 0; j < group; ++j) {
        double sum = 0;
        for (index_t b = 0; b < x.extent(0); ++b) {
          for (index_t s = 0; s < x.extent(1); ++s) {
            double product = 0, of_i = 0, of_j = 0;
            for (index_t d = 0; d < x.extent(3); ++d) {
              const auto xi = static_cast<double>(x(b, s, g * group + i, d));
              const auto xj = static_cast<double>(x(b, s, g * group + j, d));
              product += xi * xj, of_i += xi * xi, of_j += xj * xj;
            }
            const double length = std::sqrt(of_i) * std::sqrt(of_j);
            sum += length > 0 ? product / length : 0;
          }
        }
        similarity(g, i, j) = sum / positions;
      }
    }
  }
}

/// How far `actual` is off `expected`, [B, S, H, E] each, any strides but of the last axis.
/// \throws error  (errc::shape, errc::stride)
template <class T, class U>
[[nodiscard]] difference compare(tensor_view<const T, 4> actual, tensor_view<const U, 4> expected) {
  const detail::operand a = detail::describe("actual", actual), e = detail::describe("expected", expected);
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_layout_fault(a)) return f;
    if (const auto f = detail::find_layout_fault(e)) return f;
    return detail::find_same_shape_fault(a, e);
  };
  if (const auto fault = find_fault()) {
    detail::raise(fault);
    return {};
  }
  difference d;
  double off = 0, all = 0;
  for (index_t b = 0; b < actual.extent(0); ++b) {
    for (index_t s = 0; s < actual.extent(1); ++s) {
      for (index_t h = 0; h < actual.extent(2); ++h) {
        for (index_t i = 0; i < actual.extent(3); ++i) {
          const auto x = static_cast<double>(expected(b, s, h, i));
          const double by = std::abs(static_cast<double>(actual(b, s, h, i)) - x);
          d.largest = by > d.largest || std::isnan(by) ? by : d.largest;  // NaN stays
          d.mean += by;
          off += by * by, all += x * x;
        }
      }
    }
  }
  d.mean /= static_cast<double>(std::max<index_t>(actual.size(), 1));
  d.relative = off == 0 ? 0 : std::sqrt(off / all);
  return d;
}

}  // namespace GQA_ISA
}  // namespace gqa
