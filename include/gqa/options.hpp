// SPDX-License-Identifier: Apache-2.0
/// \file
/// attention_options: everything about a call that is known at run time.
///
/// With a = scale, query position p and key position t, a score is
///     variant(softcap(a q.k) + bias + slope (t - p))
/// then causal edge, window and mask hide keys, then padding (kv_lengths) does. Hidden keys weigh exactly nothing, NaN
/// or not. Names follow FlashAttention and the ONNX Attention operator (opset 23).
#pragma once

#include <optional>
#include <span>

#include <gqa/config.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {

/// A query at position p sees keys in [p - left, p + right], both ends included; -1 is unbounded, {0, 0} self only.
struct window_t {
  index_t left = -1;
  index_t right = -1;
};

/// B batch, S q_len, H q_heads, G kv_heads, T kv_len. Spans and views must outlive the call only.
struct attention_options {
  std::optional<double> scale = {};          ///< factor on q.k; default 1/sqrt(head_dim); 0 means 0, negative is legal
  bool causal = {};                          ///< hide keys after the query: key position <= query position
  std::optional<index_t> query_offset = {};  ///< position of query 0, the same for all sequences; may be negative
  std::span<const index_t> query_offsets = {};  ///< [B], per sequence; default (valid keys) - q_len: bottom-right
  window_t window = {};                         ///< positions a query sees
  double softcap = {};                          ///< c in c * tanh(s / c), on scaled products; 0 is off (Gemma 2)
  std::span<const float> alibi_slopes = {};     ///< [H]: adds slope * (key - query position), or see encoder_alibi.hpp
  std::span<const float> sinks = {};  ///< [H] logit of one virtual key of value 0: raw, counted once; -inf is none
  std::optional<tensor_view<const bool, 4>> mask = {};   ///< [B|1, H|1, S, T], true: attend
  std::optional<tensor_view<const float, 4>> bias = {};  ///< [B|1, H|1, S, T], added; -inf hides
  std::span<const index_t> kv_lengths = {};              ///< [B] valid keys, the rest is padding; empty: all
  std::span<const index_t> group_offsets =
      {};  ///< [G+1]: KV head g serves query heads [off[g], off[g+1]); empty: equal
  /// Over bfloat16 and 8-bit keys: whether queries and weights meet them as floats, or rounded for the hardware's dot
  /// products where it has them (docs/01_numerics.md). Default: over bfloat16 as floats if the queries are floats, over
  /// 8 bits rounded.
  std::optional<bool> float_products = {};
};

}  // namespace gqa
