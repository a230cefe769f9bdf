// SPDX-License-Identifier: Apache-2.0
/// \file
/// From products to scores: softcap, bias, ALiBi and a variant's own function.
///
/// Plain attention needs none of it: scale and log2(e) are folded into the queries when they are loaded, and scores are
/// logarithms to base 2. Otherwise the queries carry the scale alone, each row of products takes the passes below, and
/// scores are to base e (score_base in online_softmax.hpp says why). Queries held in 16 bits stay as they
/// are, for a factor would cost them a rounding: their products take it.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <numbers>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/engine/visible_keys.hpp>
#include <gqa/detail/kernel/online_softmax.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

template <class A, class L>
class score_rules {
 public:
  score_rules(const call_geometry& call, const row_rules<A>& rules) noexcept
      : options_(call.options),
        ragged_(call.ragged),
        rules_(rules),
        plain_(!rules.changes_scores() && options_.softcap == 0 && !options_.bias && options_.alibi_slopes.empty()),
        factor_(plain_ ? call.scale() * std::numbers::log2e : call.scale()) {}

  [[nodiscard]] bool is_plain() const noexcept { return plain_; }
  [[nodiscard]] score_base base() const noexcept { return plain_ ? score_base::two : score_base::e; }
  /// Whether a score of -inf may be meant to hide its key.
  [[nodiscard]] bool may_hide() const noexcept { return rules_.changes_scores() || options_.bias; }
  /// What queries are multiplied by, and what their products are. (0 times any product that is not NaN is 0, even of
  /// products that overflow.)
  [[nodiscard]] double query_factor() const noexcept {
    if (carries_factor) return factor_;
    return factor_ == 0 ? 0 : 1;
  }
  [[nodiscard]] A score_factor() const noexcept { return carries_factor ? A{1} : static_cast<A>(factor_); }

  /// Columns [begin, end) of a row's 64 products with the keys from first_key on. Bits: the columns that are visible;
  /// hidden ones within the range may come out as anything.
  void apply(A* s, index_t begin, index_t end, std::uint64_t bits, const row_index& row, index_t first_key) const {
    if (options_.softcap != 0) cap(s, begin, end);
    // Tensors are only read at keys there are: between the first and the last visible one.
    const index_t first = std::countr_zero(bits), last = tile_tokens - std::countl_zero(bits);
    if (options_.bias) {
      const index_t stride = options_.bias->stride(3);
      const float* const bias = mask_row(*options_.bias, row) + first_key * stride;
      for (index_t c = first; c < last; ++c) {
        const A added = static_cast<A>(bias[c * stride]);
        s[c] = held(s[c] + added, s[c], added);
      }
    }
    if (!options_.alibi_slopes.empty()) {
      const A slope = static_cast<A>(options_.alibi_slopes[static_cast<std::size_t>(row.q_head)]);
      for (index_t c = first; c < last; ++c)
        s[c] = held(scalar_madd(slope, static_cast<A>(distance(row, first_key + c)), s[c]), s[c], A{0});
    }
    if (rules_.changes_scores()) rules_.score(s, bits, row, first_key);
  }

 private:
  static constexpr bool carries_factor =
      std::is_same_v<A, queries_of_left<L>> || std::is_same_v<queries_of_left<L>, q8>;  // in scales, there

  /// From a row's position to a key's.
  [[nodiscard]] index_t distance(const row_index& row, index_t key) const noexcept {
    if (ragged_.positions.empty()) return key - row.position;
    return ragged_.position_of_key(row.batch, key, row.keys) - ragged_.position_of_query(row.batch, row.query);
  }

  /// A sum of two terms, at the end of the range of A where it has left it and they have not: only -inf hides a key.
  [[nodiscard]] static A held(A sum, A first, A second) noexcept {
    constexpr A most = (std::numeric_limits<A>::max)();
    constexpr A least = -most;
    if (sum < least && first >= least && second >= least) return least;
    return sum > most && first <= most && second <= most ? most : sum;
  }

  void cap(A* s, index_t begin, index_t end) const noexcept {
    const packet<A> cap = broadcast(static_cast<A>(options_.softcap));
    const packet<A> inverse = broadcast(static_cast<A>(1.0 / options_.softcap));
    for (index_t c = begin; c < end; c += packet_size<A>)
      store(s + c, mul<A>(cap, detail::tanh<A>(mul<A>(load(s + c), inverse))));
  }

  const attention_options& options_;
  const ragged_rows& ragged_;
  const row_rules<A>& rules_;
  bool plain_;
  double factor_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
