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
#include <type_traits>
#include <utility>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/detail/check.hpp>
#include <gqa/detail/mixed.hpp>
#include <gqa/detail/q8.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/options.hpp>
#include <gqa/reference.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {
inline namespace GQA_ISA {

/// The keys and values of one KV head of a sequence, decoded, and what their bounds are made of.
struct decoded_head {
  index_t blocks, value_dim;        // blocks of 32 channels of a key
  std::vector<double> k, v;         // [T, D], [T, E]
  std::vector<double> key_scale;    // [T, blocks]
  std::vector<double> key_sum;      // [T, blocks]: of magnitudes
  std::vector<double> value_scale;  // [T, E]

  template <class KV>
  decoded_head(const KV& kv, index_t b, index_t g, index_t keys)
      : blocks(ceil_div(kv.head_dim(), scale_channels)), value_dim(kv.value_dim()) {
    using P = typename KV::panel_element;
    const index_t dim = kv.head_dim();
    for (index_t t = 0; t < keys; ++t) {
      const index_t first_key = t / tile_tokens * tile_tokens;
      const kv_tile<P> tile = kv.tile(b, g, t / tile_tokens, (std::min)(tile_tokens, keys - first_key), nullptr);
      const auto panel = static_cast<std::size_t>(t % tile_tokens / panel_tokens);
      const index_t at = t % panel_tokens;
      const P *const own_k = tile.k[panel], *const own_v = tile.v[panel];
      for (index_t first = 0; first < dim; first += scale_channels) {
        double sum = 0, largest = 0;
        for (index_t d = first; d < (std::min)(first + scale_channels, dim); ++d) {
          k.push_back(static_cast<double>(key_at(own_k, at, d, dim)));
          sum += std::abs(k.back()), largest = (std::max)(largest, std::abs(k.back()));
        }
        key_scale.push_back(
            step_of(reinterpret_cast<const key_type<P>*>(own_k), key_scale_index(at, first, dim), largest));
        key_sum.push_back(sum);
      }
      for (index_t e = 0; e < value_dim; ++e) {
        v.push_back(static_cast<double>(value_at(own_v, at, e, value_dim)));
        value_scale.push_back(step_of(reinterpret_cast<const value_type<P>*>(own_v),
                                      value_scale_index(at, e, value_dim), std::abs(v.back())));
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
  std::vector<double> row;   // [D]
  std::vector<double> sum;   // [blocks]: of magnitudes
  std::vector<double> step;  // [blocks]: half a scale

  template <class Q>
  explicit bounded_query(const Q* q, index_t dim) {
    for (index_t first = 0; first < dim; first += scale_channels) {
      double of_block = 0, largest = 0;
      for (index_t d = first; d < (std::min)(first + scale_channels, dim); ++d) {
        row.push_back(static_cast<double>(q[d]));
        of_block += std::abs(row.back()), largest = (std::max)(largest, std::abs(row.back()));
      }
      sum.push_back(of_block);
      step.push_back(half_step * (1 + 0x1p-7) * largest / static_cast<double>(most_q8));
    }
  }
};

/// A key that a row sees: its score over the decoded key, how far the kernel's may be from it, and that of the key
/// before it was rounded.
struct bounded_score {
  index_t t;  // -1: the sink
  double score, of_kernel, of_key;
};

/// Of the key at p.key, which query s of the call sees.
[[nodiscard]] inline bounded_score score_of(const bounded_query& q, const decoded_head& head,
                                            const attention_options& options, double scale, const position& p,
                                            index_t s) {
  const auto dim = static_cast<index_t>(q.row.size());
  double product = 0, of_kernel = 0, of_key = 0, magnitude = 0, key_sum = 0, added = 0;
  for (index_t d = 0; d < dim; ++d)
    product += q.row[static_cast<std::size_t>(d)] * head.k[static_cast<std::size_t>(p.key * dim + d)];
  for (index_t n = 0; n < head.blocks; ++n) {
    const auto i = static_cast<std::size_t>(n), at = static_cast<std::size_t>(p.key * head.blocks + n);
    of_kernel += q.step[i] * head.key_sum[at];
    of_key += q.sum[i] * half_step * head.key_scale[at];
    magnitude += q.sum[i] * static_cast<double>(most_q8) * head.key_scale[at];
    key_sum += head.key_sum[at];
  }
  if (options.bias) {
    const auto& bias = *options.bias;
    added += std::abs(
        static_cast<double>(bias(bias.extent(0) == 1 ? 0 : p.batch, bias.extent(1) == 1 ? 0 : p.q_head, s, p.key)));
  }
  if (!options.alibi_slopes.empty())
    added += std::abs(static_cast<double>(options.alibi_slopes[static_cast<std::size_t>(p.q_head)]) *
                      static_cast<double>(p.key - p.query));
  of_kernel += 0x1p-24 * static_cast<double>(dim + 8) * magnitude;  // sums of floats
  const double score = reference::impl::score<float>(options, no_variant{}, product, scale, p, s);
  // And what rounds after them; the least scale that there is, of queries times the factor; what is flushed to zero.
  const double rounding =
      0x1p-20 * (1 + std::abs(scale * product) + added) + 0x1p-134 * key_sum + 0x1p-120 * static_cast<double>(dim);
  return {p.key, score, std::abs(scale) * of_kernel + rounding, std::abs(scale) * of_key};
}

/// The bound of one row from the keys it sees. With weights p of the decoded scores, scores that are off by at most c_t
/// give weights off by at most p_t g_t, g_t = max(e^c_t / L - 1, 1 - e^-c_t / U), L and U the sums of p e^-c and p e^c.
/// Weights that sum to 1 before and after move an output by sums of what they are off by times (value - output).
[[nodiscard]] inline double row_bound(const std::vector<bounded_score>& seen, const decoded_head& head, index_t keys) {
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
  // What weights may be off by.
  const auto gains = [&](double bounded_score::*off) {
    double low = 0, high = 0;
    for (const bounded_score& s : seen) low += weight(s, -(s.*off)), high += weight(s, s.*off);
    std::vector<double> gain;
    for (const bounded_score& s : seen)
      gain.push_back((std::max)(weight(s, s.*off) / low - weight(s), weight(s) - weight(s, -(s.*off)) / high));
    return gain;
  };
  const std::vector<double> kernel = gains(&bounded_score::of_kernel), key = gains(&bounded_score::of_key);
  // 64 weights of a tile are off by half a unit each, a unit is a 32,767th of the largest, times integers up to 127.
  constexpr double weight_rounding = 64 * 127 / (2 * 32767.0);
  // Sums of tiles, splits and states, of values and of weights.
  const double float_rounding = 0x1p-24 * (160 + static_cast<double>(keys) / 32);
  double bound = 0;
  for (index_t e = 0; e < head.value_dim; ++e) {
    const auto value_of = [&](const std::vector<double>& of, const bounded_score& s) {
      return s.t < 0 ? 0 : of[static_cast<std::size_t>(s.t * head.value_dim + e)];
    };
    double out = 0, of_element = 0;
    for (const bounded_score& s : seen) out += weight(s) * value_of(head.v, s);
    for (std::size_t i = 0; i < seen.size(); ++i) {
      const double p = weight(seen[i]), value = value_of(head.v, seen[i]), scale = value_of(head.value_scale, seen[i]);
      of_element += (kernel[i] + key[i]) * std::abs(value - out) + p * float_rounding * std::abs(value) +
                    ((p + key[i]) * half_step + (p + kernel[i]) * weight_rounding) * scale +
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
  if (const auto f = detail::find_operands_fault(q, kv, as_output, options)) return detail::raise(f);
  if (const auto f = detail::find_lse_fault("bound", bound, q)) return detail::raise(f);
  if (const auto f = detail::find_overlap_fault(detail::describe("bound", bound), detail::describe("q", q)))
    return detail::raise(f);
  const auto call = detail::problem_of<float>(q, kv, as_output, options);
  if (const auto f = detail::find_gone_fault(call, kv, detail::no_variant{})) return detail::raise(f);

  for (index_t b = 0; b < call.shape.batch; ++b) {
    const index_t keys = call.length(kv, b), offset = call.query_offset(b, keys);
    for (index_t g = 0; g < call.shape.kv_heads; ++g) {
      const detail::decoded_head head(kv, b, g, keys);
      for (index_t h = call.first_head(g); h < call.first_head(g) + call.group_size(g); ++h) {
        for (index_t s = 0; s < call.shape.q_len; ++s) {
          const detail::bounded_query query(&q(b, s, h, 0), call.shape.head_dim);
          std::vector<detail::bounded_score> seen;
          if (!options.sinks.empty())
            seen.push_back({-1, static_cast<double>(options.sinks[static_cast<std::size_t>(h)]), 0, 0});
          for (index_t t = 0; t < keys; ++t) {
            const position p{b, h, offset + s, t};
            if (!reference::impl::sees(options, detail::no_variant{}, p, s)) continue;
            seen.push_back(detail::score_of(query, head, options, call.scale(), p, s));
            seen.back().of_kernel += detail::weights_off<P>;
            if (options.bias && seen.back().score == -std::numeric_limits<double>::infinity())
              seen.pop_back();  // hidden
          }
          bound(b, s, h) = detail::row_bound(seen, head, keys);
        }
      }
    }
  }
}

}  // namespace GQA_ISA
}  // namespace gqa
