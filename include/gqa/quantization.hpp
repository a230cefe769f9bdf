// SPDX-License-Identifier: Apache-2.0
/// \file
/// Keys and values in 8 bits: q8, what every cache may hold, and how far off attention over it may be.
///
/// kv_cache<q8>, ring_kv_cache<q8>, paged_kv_cache<q8>: 32 neighbouring channels of a token share a scale, so a token
/// takes 8.5 bits an element (bfloat16: 16), has nothing to do with its neighbours, and never changes once stored. It
/// is encoded when it is appended, from float, half or bfloat16.
///
/// kv_types<K, V> holds either in q8 and the other in float, half or bfloat16, which is multiplied as pairs where those
/// are: kv_cache<kv_types<bfloat16, q8>>.
///
///     stored element = scale * integer of [-127, 127], off by scale / 2 at most
///     scale          = the block's largest magnitude / 127, rounded up to a bfloat16
///
/// Where the instruction set multiplies 8-bit integers (AVX-512 VNNI), queries are rounded to blocks like those, too,
/// scores are sums of integers times scales, and the weights of a tile, times the values' scales, are rounded to 16
/// bits. Elsewhere, and where options.float_products asks for it, tiles are decoded to floats, exactly, and meet
/// queries and weights in float. Queries are float, half or bfloat16. A NaN or infinity makes its token's block of 32
/// NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/door/pair_scores.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// The keys and values of one KV head of a sequence, decoded, and what their bounds are made of.
struct decoded_head {
  index_t blocks = 0, value_dim = 0;     // blocks of 32 channels of a key
  reporting_vector<double> k, v;         // [T, D], [T, E]
  reporting_vector<double> key_scale;    // [T, blocks]
  reporting_vector<double> key_sum;      // [T, blocks]: of magnitudes
  reporting_vector<double> value_scale;  // [T, E]

  /// False after a capacity error, where that returns.
  template <class KV>
  [[nodiscard]] bool make_room_for(const KV& kv, index_t keys) {
    blocks = ceil_div(kv.head_dim(), scale_channels), value_dim = kv.value_dim();
    const auto count = [keys](index_t n) { return static_cast<std::size_t>(keys * n); };
    const char* const what = "decoded keys and values";
    return make_room(k, count(kv.head_dim()), what) && make_room(v, count(value_dim), what) &&
           make_room(key_scale, count(blocks), what) && make_room(key_sum, count(blocks), what) &&
           make_room(value_scale, count(value_dim), what);
  }
  /// Of as many keys as there is room for.
  template <class KV>
  void decode(const KV& kv, index_t b, index_t g, index_t keys) noexcept {
    using P = typename KV::panel_element;
    const index_t dim = kv.head_dim();
    for (reporting_vector<double>* const list : {&k, &v, &key_scale, &key_sum, &value_scale}) list->clear();
    const auto put = [](reporting_vector<double>& to, double x) { static_cast<void>(to.push_back(x)); };
    for (index_t t = 0; t < keys; ++t) {
      const index_t first_key = t / tile_tokens * tile_tokens;
      const kv_tile<P> tile = kv.tile(b, g, t / tile_tokens, (std::min)(tile_tokens, keys - first_key), nullptr);
      const auto panel = static_cast<std::size_t>(t % tile_tokens / panel_tokens);
      const index_t at = t % panel_tokens;
      const P *const own_k = tile.k[panel], *const own_v = tile.v[panel];
      for (index_t first = 0; first < dim; first += scale_channels) {
        double sum = 0, largest = 0;
        for (index_t d = first; d < (std::min)(first + scale_channels, dim); ++d) {
          put(k, static_cast<double>(key_at(own_k, at, d, dim)));
          sum += std::abs(k.back()), largest = (std::max)(largest, std::abs(k.back()));
        }
        put(key_scale, step_of(reinterpret_cast<const key_type<P>*>(own_k), key_scale_index(at, first, dim), largest));
        put(key_sum, sum);
      }
      for (index_t e = 0; e < value_dim; ++e) {
        put(v, static_cast<double>(value_at(own_v, at, e, value_dim)));
        put(value_scale, step_of(reinterpret_cast<const value_type<P>*>(own_v), value_scale_index(at, e, value_dim),
                                 std::abs(v.back())));
      }
    }
  }

 private:
  /// Twice what elements of up to `largest`, as stored, may be off by: a scale of 8 bits, or what rounding costs.
  template <class T>
  [[nodiscard]] static double step_of(const T* panel, index_t scale_index, double largest) {
    if constexpr (std::is_same_v<T, q8>) {
      return static_cast<double>(scale_at(panel + scale_index));
    } else if constexpr (std::is_same_v<T, float>) {
      return 0;
    } else {
      const bool is_half = std::is_same_v<T, Eigen::half>;
      return largest * (is_half ? 0x1p-10 : 0x1p-7) + (is_half ? 0x1p-24 : 0x1p-132);
    }
  }
};

/// What weights in bfloat16 may be off by, and their sum: as scores that are.
template <class P>
inline constexpr double weights_off =
    has_dot<P>&& std::is_same_v<value_type<P>, Eigen::bfloat16>&& has_dot<Eigen::bfloat16> ? 0x1p-7 : 0;

/// What rounding to half a step leaves, of quotients rounded to float.
inline constexpr double half_step = 0.5 * (1 + 0x1p-15);

/// A row of queries, and what its blocks of 32 channels may be off by. (Half a scale of 8 bits covers a bfloat16's
/// rounding, too.)
struct bounded_query {
  reporting_vector<double> row;   // [D]
  reporting_vector<double> sum;   // [blocks]: of magnitudes
  reporting_vector<double> step;  // [blocks]: half a scale

  [[nodiscard]] bool make_room_for(index_t dim) {
    const auto blocks = static_cast<std::size_t>(ceil_div(dim, scale_channels));
    return make_room(row, static_cast<std::size_t>(dim), "a query") && make_room(sum, blocks, "a query") &&
           make_room(step, blocks, "a query");
  }
  template <class Q>
  void take(const Q* q, index_t dim) noexcept {
    row.clear(), sum.clear(), step.clear();
    for (index_t first = 0; first < dim; first += scale_channels) {
      double of_block = 0, largest = 0;
      for (index_t d = first; d < (std::min)(first + scale_channels, dim); ++d) {
        static_cast<void>(row.push_back(static_cast<double>(q[d])));
        of_block += std::abs(row.back()), largest = (std::max)(largest, std::abs(row.back()));
      }
      static_cast<void>(sum.push_back(of_block));
      static_cast<void>(step.push_back(half_step * (1 + 0x1p-7) * largest / static_cast<double>(most_q8)));
    }
  }
};

/// A key that a row sees: its score over the decoded key, how far the kernel's may be from it, and that of the key
/// before it was rounded.
struct bounded_score {
  index_t t;  // -1: the sink
  double score, of_kernel, of_key;
  double kernel_gain, key_gain;  // what its weight may be off by, by either: set by row_bound()
};

/// Of a key that a row sees.
[[nodiscard]] inline bounded_score score_of(const bounded_query& q, const decoded_head& head, const pair_scores& scores,
                                            double scale, const row_index& row, index_t key) noexcept {
  const auto dim = static_cast<index_t>(q.row.size());
  double product = 0, of_kernel = 0, of_key = 0, magnitude = 0, key_sum = 0;
  for (index_t d = 0; d < dim; ++d)
    product += q.row[static_cast<std::size_t>(d)] * head.k[static_cast<std::size_t>(key * dim + d)];
  for (index_t n = 0; n < head.blocks; ++n) {
    const auto i = static_cast<std::size_t>(n), at = static_cast<std::size_t>(key * head.blocks + n);
    of_kernel += q.step[i] * head.key_sum[at];
    of_key += q.sum[i] * half_step * head.key_scale[at];
    magnitude += q.sum[i] * static_cast<double>(most_q8) * head.key_scale[at];
    key_sum += head.key_sum[at];
  }
  of_kernel += 0x1p-24 * static_cast<double>(dim + 8) * magnitude;  // sums of floats
  const double score = scores.score(product, row, key), added = scores.magnitude_added(row, key);
  // And what rounds after them; the least scale that there is, of queries times the factor; what is flushed to zero.
  const double rounding =
      0x1p-20 * (1 + std::abs(scale * product) + added) + 0x1p-134 * key_sum + 0x1p-120 * static_cast<double>(dim);
  return {key, score, std::abs(scale) * of_kernel + rounding, std::abs(scale) * of_key, 0, 0};
}

/// The bound of one row from the keys it sees. With weights p of the decoded scores, scores that are off by at most c_t
/// give weights off by at most p_t g_t, g_t = max(e^c_t / L - 1, 1 - e^-c_t / U), L and U the sums of p e^-c and p e^c.
/// Weights that sum to 1 before and after move an output by sums of what they are off by times (value - output).
[[nodiscard]] inline double row_bound(std::span<bounded_score> seen, const decoded_head& head, index_t keys) noexcept {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double top = -infinity, sum = 0;
  for (const bounded_score& s : seen) {
    if (std::isnan(s.score)) return infinity;
    top = (std::max)(top, s.score);
  }
  if (top == -infinity) return 0;  // nothing is seen
  for (const bounded_score& s : seen) sum += std::exp(s.score - top);
  // A weight whose score moves by so much: in one exponential, for it may be 0 times infinity in two.
  const auto weight = [&](const bounded_score& s, double off = 0) { return std::exp(s.score - top + off) / sum; };
  const auto set_gains = [&](double bounded_score::*off, double bounded_score::*gain) {
    double low = 0, high = 0;
    for (const bounded_score& s : seen) low += weight(s, -(s.*off)), high += weight(s, s.*off);
    for (bounded_score& s : seen)
      s.*gain = (std::max)(weight(s, s.*off) / low - weight(s), weight(s) - weight(s, -(s.*off)) / high);
  };
  set_gains(&bounded_score::of_kernel, &bounded_score::kernel_gain);
  set_gains(&bounded_score::of_key, &bounded_score::key_gain);
  // 64 weights of a tile are off by half a unit each, a unit is a 32,767th of the largest, times integers up to 127.
  constexpr double weight_rounding = 64 * 127 / (2 * 32767.0);
  // Sums of tiles, splits and states, of values and of weights.
  const double float_rounding = 0x1p-24 * (160 + static_cast<double>(keys) / 32);
  double bound = 0;
  for (index_t e = 0; e < head.value_dim; ++e) {
    const auto value_of = [&](const reporting_vector<double>& of, const bounded_score& s) {
      return s.t < 0 ? 0 : of[static_cast<std::size_t>(s.t * head.value_dim + e)];
    };
    double out = 0, of_element = 0;
    for (const bounded_score& s : seen) out += weight(s) * value_of(head.v, s);
    for (const bounded_score& s : seen) {
      const double p = weight(s), value = value_of(head.v, s), scale = value_of(head.value_scale, s);
      of_element += (s.kernel_gain + s.key_gain) * std::abs(value - out) + p * float_rounding * std::abs(value) +
                    ((p + s.key_gain) * half_step + (p + s.kernel_gain) * weight_rounding) * scale +
                    0x1p-118 * (1 + std::abs(value));  // what is flushed to zero: weights from 2^-8 down
    }
    of_element += 0x1p-112 * (1 + static_cast<double>(keys) / 64);  // units below the least normal float, a tile each
    if (!std::isfinite(of_element)) return infinity;
    bound = (std::max)(bound, of_element);
  }
  return bound;
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// How far attention over a cache of q8, or of kv_types, may be from exact attention over the keys and values that were
/// appended to it: no element of a row's output, in float, is off by more. Derived from the stored scales; holds with
/// and without float_products. Infinite for rows that see NaN.
/// \param q        [B, S, H, D]: float, half or bfloat16
/// \param kv       a cache of q8 or kv_types
/// \param bound    [B, S, H]
/// \param options  of the call of attention()
/// \throws error   as attention() does
/// Cost: O(B S H T (D + E)) in double, like reference::attention(): for tests and tools.
template <tensor_like Q, kv_source KV>
void error_bound(Q&& q_in, const KV& kv, tensor_view<double, 3> bound, const attention_options& options = {}) {
  using P = typename KV::panel_element;
  static_assert(detail::is_encoded<P>, "gqa: error_bound() is of caches of q8, or of kv_types");
  using element = std::remove_const_t<detail::element_of<Q>>;
  const tensor_view<const element, 4> q = detail::as_view(std::forward<Q>(q_in));
  // What the checks of a call want to see: never read or written.
  const tensor_view<double, 4> as_output(bound.data(),
                                         {bound.extent(0), bound.extent(1), bound.extent(2), kv.value_dim()});
  const auto& source = detail::adapt_keys(kv);
  if (const auto f = detail::find_operands_fault(detail::describe_call(q, as_output), source, options))
    return detail::raise(f);
  if (const auto f = detail::find_lse_fault("bound", bound, q)) return detail::raise(f);
  if (const auto f = detail::find_overlap_fault(detail::describe("bound", bound), detail::describe("q", q)))
    return detail::raise(f);
  const auto call = detail::problem_of<float>(q, kv, as_output, options);
  if (const auto f = detail::find_gone_fault(call, source, detail::no_rules<float>())) return detail::raise(f);

  detail::decoded_head head;
  detail::bounded_query query;
  detail::reporting_vector<detail::bounded_score> seen;
  if (!head.make_room_for(kv, call.shape.kv_len) || !query.make_room_for(call.shape.head_dim) ||
      !detail::make_room(seen, static_cast<std::size_t>(call.shape.kv_len + 1), "scores"))
    return;
  const detail::pair_scores scores(options, call.scale());
  for (index_t b = 0; b < call.shape.batch; ++b) {
    const index_t keys = call.length(kv, b), offset = call.query_offset(b, keys);
    for (index_t g = 0; g < call.shape.kv_heads; ++g) {
      head.decode(kv, b, g, keys);
      for (index_t h = call.first_head(g); h < call.first_head(g) + call.group_size(g); ++h) {
        for (index_t s = 0; s < call.shape.q_len; ++s) {
          query.take(&q(b, s, h, 0), call.shape.head_dim);
          seen.clear();
          if (!options.sinks.empty())
            static_cast<void>(
                seen.push_back({-1, static_cast<double>(options.sinks[static_cast<std::size_t>(h)]), 0, 0, 0, 0}));
          const detail::row_index row{b, s, h, offset + s, keys};
          for (index_t t = 0; t < keys; ++t) {
            if (!scores.sees(row, t)) continue;
            detail::bounded_score own = detail::score_of(query, head, scores, call.scale(), row, t);
            own.of_kernel += detail::weights_off<P>;
            const bool is_hidden = options.bias && own.score == -std::numeric_limits<double>::infinity();
            if (!is_hidden) static_cast<void>(seen.push_back(own));
          }
          bound(b, s, h) = detail::row_bound({seen.data(), seen.size()}, head, keys);
        }
      }
    }
  }
}

}  // namespace GQA_ISA
}  // namespace gqa
