// SPDX-License-Identifier: Apache-2.0
/// \file
/// A checked call, element types of queries and output erased: what the tile engine works from.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/options.hpp>
#include <gqa/rope_turns.hpp>
#include <gqa/tensor_view.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows of queries, [B, S, H, D]: loading converts, scales in double and rounds once, to L, or encodes (q8.hpp).
template <class A, class L>
struct query_rows {
  const void* data = nullptr;
  std::array<index_t, 3> strides{};
  void (*load_row)(const void*, index_t offset, index_t dim, double factor, L* to) noexcept = nullptr;
  // Rows to be turned first, into accumulators.
  const rope_turns<A>* turns = nullptr;
  index_t tokens = 0;  // of a sequence
  void (*turn)(const query_rows&, index_t offset, index_t dim, index_t token, A* to) noexcept = nullptr;

  template <class Q>
  static query_rows of(const tensor_view<const Q, 4>& q) noexcept {
    return {q.data(),
            {q.stride(0), q.stride(1), q.stride(2)},
            [](const void* base, index_t offset, index_t dim, double factor, L* to) noexcept {
              const Q* const row = static_cast<const Q*>(base) + offset;
              if constexpr (std::is_same_v<L, q8>) {
                encode_query(row, dim, factor, to);
                return;
              } else {
                if constexpr (std::is_same_v<Q, L>) {
                  if (factor == 1) {
                    std::copy_n(row, dim, to);
                    return;
                  }
                }
                index_t d = 0;
                for (; d + packet_size<A> <= dim; d += packet_size<A>) {
                  const packet<A> x = load_as<A>(row + d);
                  store_as<A>(to + d, in_range_of_left(factor == 1 ? x : scaled<A>(x, factor)));
                }
                for (; d < dim; ++d) {
                  const double x = static_cast<double>(static_cast<A>(row[d])) * factor;
                  to[d] = static_cast<L>(in_range_of_left(static_cast<A>(x)));
                }
              }
            }};
  }

  /// What rounding to L may take.
  template <class X>
  [[nodiscard]] static X in_range_of_left(const X& x) noexcept {
    if constexpr (std::is_same_v<L, Eigen::bfloat16>) {
      return held_in_bfloat16(x);
    } else {
      return x;
    }
  }

  template <class Q>
  static query_rows of(const turned_rows<tensor_view<const Q, 4>, A>& q) noexcept {
    query_rows rows = of(q.rows);
    rows.load_row = of(tensor_view<const A, 4>()).load_row;  // of those that have been turned
    rows.turns = &q.turns;
    rows.tokens = q.rows.extent(0) == 1 ? 0 : q.rows.extent(1);
    rows.turn = [](const query_rows& self, index_t offset, index_t dim, index_t token, A* to) noexcept {
      turn_row(static_cast<const Q*>(self.data) + offset, dim, *self.turns, token, to);
    };
    return rows;
  }

  /// turned [dim]: scratch, where there are turns.
  void load(index_t b, index_t s, index_t h, index_t dim, double factor, L* to, A* turned = nullptr) const noexcept {
    const index_t offset = b * strides[0] + s * strides[1] + h * strides[2];
    if (turns == nullptr) return load_row(data, offset, dim, factor, to);
    turn(*this, offset, dim, b * tokens + s, turned);
    load_row(turned, 0, dim, factor, to);
  }
};

/// Rows of the output, [B, S, H, E], and of the log-sum-exp, [B, S, H], where it is wanted.
template <class A>
struct output_rows {
  void* data = nullptr;
  std::array<index_t, 3> strides{};
  void (*store_row)(void*, index_t offset, index_t dim, const A* out, A scale, A sum) noexcept = nullptr;
  void* lse = nullptr;
  std::array<index_t, 3> lse_strides{};
  void (*store_lse)(void*, index_t offset, A lse) noexcept = nullptr;

  template <class Out>
  static output_rows of(const tensor_view<Out, 4>& out) noexcept {
    output_rows rows;
    rows.data = out.data();
    rows.strides = {out.stride(0), out.stride(1), out.stride(2)};
    rows.store_row = [](void* base, index_t offset, index_t dim, const A* from, A scale, A sum) noexcept {
      Out* const row = static_cast<Out*>(base) + offset;
      if (sum == A{0}) {
        std::fill_n(row, dim, Out(0));
        return;
      }
      index_t e = 0;
      for (; e + packet_size<A> <= dim; e += packet_size<A>)
        store_result<Out, A>(row + e, div(mul<A>(load(from + e), broadcast(scale)), broadcast(sum)));
      for (; e < dim; ++e) row[e] = stored<Out>(scalar_mul(from[e], scale) / sum);
    };
    return rows;
  }

  template <class Out, class L>
  static output_rows of(const tensor_view<Out, 4>& out, const tensor_view<L, 3>& lse) noexcept {
    output_rows rows = of(out);
    rows.lse = lse.data();
    rows.lse_strides = {lse.stride(0), lse.stride(1), lse.stride(2)};
    rows.store_lse = [](void* base, index_t offset, A value) noexcept {
      static_cast<L*>(base)[offset] = stored<L>(value);
    };
    return rows;
  }

  void store(index_t b, index_t s, index_t h, index_t dim, const A* from, A scale, A sum) const noexcept {
    store_row(data, b * strides[0] + s * strides[1] + h * strides[2], dim, from, scale, sum);
  }
  void store_log_sum_exp(index_t b, index_t s, index_t h, A value) const noexcept {
    store_lse(lse, b * lse_strides[0] + s * lse_strides[1] + h * lse_strides[2], value);
  }
  /// A row that is normalised already, and its log-sum-exp: -inf if it saw nothing.
  void store_finished(index_t b, index_t s, index_t h, index_t dim, const A* from, A log_sum_exp) const noexcept {
    const bool empty = log_sum_exp == -std::numeric_limits<A>::infinity();
    store(b, s, h, dim, from, A{1}, empty ? A{0} : A{1});
    if (lse != nullptr) store_log_sum_exp(b, s, h, log_sum_exp);
  }
};

/// Queries of a ragged batch: its n-th sequence has rows [q_offsets[n], q_offsets[n + 1]) of all of them and reads
/// sequences[n] of the source. Without offsets a batch is even: q_len rows of batch n, and sequence n.
struct ragged_rows {
  std::span<const index_t> q_offsets = {};
  std::span<const sequence_id> sequences = {};
  bool shares_prefixes = true;
  /// Of all rows, where distances are not those of slots: of a query its own; of its sequence's last q_len keys, which
  /// are those of its queries' tokens, theirs; of keys before them their slots.
  std::span<const index_t> positions = {};

  [[nodiscard]] index_t position_of_query(index_t b, index_t s) const noexcept {
    return positions[static_cast<std::size_t>(q_offsets[static_cast<std::size_t>(b)] + s)];
  }
  /// Of so many keys of sequence b.
  [[nodiscard]] index_t position_of_key(index_t b, index_t key, index_t keys) const noexcept {
    const index_t q_len = q_offsets[static_cast<std::size_t>(b) + 1] - q_offsets[static_cast<std::size_t>(b)];
    const index_t s = key - (keys - q_len);
    return s < 0 ? key : position_of_query(b, s);
  }
};

/// The KV head that serves a query head.
[[nodiscard]] inline index_t kv_head_of(index_t q_head, index_t q_heads, index_t kv_heads,
                                        std::span<const index_t> group_offsets) noexcept {
  if (group_offsets.empty()) return q_head / (q_heads / kv_heads);
  return std::upper_bound(group_offsets.begin(), group_offsets.end(), q_head) - group_offsets.begin() - 1;
}

/// Absolute position of the first of q_len queries of sequence b, given its number of valid keys.
[[nodiscard]] inline index_t first_position(const attention_options& options, index_t b, index_t keys,
                                            index_t q_len) noexcept {
  if (options.query_offset) return *options.query_offset;
  if (!options.query_offsets.empty()) return options.query_offsets[static_cast<std::size_t>(b)];
  return keys - q_len;
}

/// What is known of a call whatever its types are: which rows there are, and where.
struct call_geometry {
  call_shape shape;
  attention_options options;
  ragged_rows ragged = {};

  [[nodiscard]] double scale() const noexcept {
    return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
  }
  [[nodiscard]] interval_rule interval() const noexcept { return {options.causal, options.window}; }

  /// Query heads of a KV head: [first_head(g), first_head(g) + group_size(g)).
  [[nodiscard]] index_t first_head(index_t g) const noexcept {
    return options.group_offsets.empty() ? g * (shape.q_heads / shape.kv_heads)
                                         : options.group_offsets[static_cast<std::size_t>(g)];
  }
  [[nodiscard]] index_t group_size(index_t g) const noexcept { return first_head_after(g) - first_head(g); }
  [[nodiscard]] index_t largest_group() const noexcept {
    index_t largest = 0;
    for (index_t g = 0; g < shape.kv_heads; ++g) largest = (std::max)(largest, group_size(g));
    return largest;
  }

  /// Of sequence b of the batch: its queries, how many they are at most, the sequence of the source, its valid keys.
  [[nodiscard]] index_t q_len(index_t b) const noexcept {
    if (ragged.q_offsets.empty()) return shape.q_len;
    return ragged.q_offsets[static_cast<std::size_t>(b) + 1] - ragged.q_offsets[static_cast<std::size_t>(b)];
  }
  [[nodiscard]] index_t kv_sequence(index_t b) const noexcept {
    return ragged.sequences.empty() ? b : static_cast<index_t>(ragged.sequences[static_cast<std::size_t>(b)]);
  }
  template <class Source>
  [[nodiscard]] index_t length(const Source& kv, index_t b) const noexcept {
    return options.kv_lengths.empty() ? kv.length(kv_sequence(b)) : options.kv_lengths[static_cast<std::size_t>(b)];
  }
  /// Where its query s lies on the second axis of q and out.
  [[nodiscard]] index_t row_of(index_t b, index_t s) const noexcept {
    return ragged.q_offsets.empty() ? s : ragged.q_offsets[static_cast<std::size_t>(b)] + s;
  }

  [[nodiscard]] index_t query_offset(index_t b, index_t length) const noexcept {
    return first_position(options, b, length, q_len(b));
  }

 private:
  [[nodiscard]] index_t first_head_after(index_t g) const noexcept {
    return options.group_offsets.empty() ? first_head(g + 1) : options.group_offsets[static_cast<std::size_t>(g) + 1];
  }
};

/// A: what scores and outputs are accumulated in; L: what queries and weights are held in.
template <class A, class L>
struct problem : call_geometry {
  query_rows<A, queries_of_left<L>> q = {};
  output_rows<A> out = {};
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
