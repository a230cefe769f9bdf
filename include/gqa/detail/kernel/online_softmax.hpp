// SPDX-License-Identifier: Apache-2.0
/// \file
/// The softmax of a row, one tile of 64 scores at a time (Milakov and Gimelshein 2018; Dao et al. 2022), and the
/// algebra of its raw states.
///
/// A raw state is (max, sum, out): a reference m of the scores s, sum of the weights 2^(s - m - 8), and sum of the
/// weights times v, not normalised. Scores and m are logarithms to base 2 or, where rules stand between products and
/// scores (engine/score_rules.hpp), to base e: see score_base. It is empty at m = -inf with sum = 0 and out = 0. Steps
/// and merges rescale by the row's own references only, so a row's bits do not depend on its neighbours. m follows the
/// running maximum at a distance: it is the maximum once a score lies 8 above it (as in FlashAttention-4), so that
/// weights are at most 1, but for the rounding of m + 8.
///
/// Weights are summed where they meet the values (tile_kernel.hpp), in the same order: the sum is what a column of ones
/// would have, and values of 1 give exactly 1. Only weights in 16 bits, whose pairs would have to be taken apart for it
/// (3 % of a prefill), are summed here, in lanes: values of 1 give 1 within a few ulps of a float, exactly 1 once
/// rounded.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/simd/exp2.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

template <class A>
inline constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

/// What scores are logarithms to. Base 2, with the factor log2(e) in the queries, costs nothing. But a finite score of
/// more than 2.36e38, which biases of masks and scores of variants may be, is infinite in it, and -inf hides a key:
/// such scores stay as they are, and it is their distance from m that is multiplied.
enum class score_base { two, e };

/// Distance `d` of two scores as a power of 2.
template <class A>
[[nodiscard]] A power_of(A d, score_base base) noexcept {
  return base == score_base::two ? d : scalar_mul(d, std::numbers::log2e_v<A>);
}

/// How far scores may rise above m, as a power of 2. The running maximum of random scores rises in one tile out of five
/// of a split, which no branch predictor foresees; by 8, a factor of 2^8, hardly ever after the first tile.
inline constexpr int headroom = 8;

/// Raw states of the rows of a tile of rows: max [R], sum [R], out [R, padded E].
template <class A>
struct raw_states {
  A* max;
  A* sum;
  A* out;
};

/// `headroom` as a distance of scores, rounded down.
template <class A, score_base Base>
inline constexpr A headroom_of = Base == score_base::two ? A{headroom} : A(headroom * 0.6931);

/// Turns 64 scores of one row, all hidden ones -inf, into weights 2^(s - m - 8), rounded to L; s and weights may
/// be the same memory. Updates the row's m and, where there are any, its lanes; returns the factor alpha <= 1 on
/// everything summed so far.
template <class L, score_base Base = score_base::two, class A>
[[nodiscard]] GQA_INLINE A softmax_step(const A* s /* [64] */, weight_element<L>* weights /* [64] */, A& max,
                                        A* lanes /* [packet_size] */) noexcept {
  constexpr int width = packet_size<A>;
  constexpr int vectors = static_cast<int>(tile_tokens) / width;
  packet<A> top = load(s);
  for (int v = 1; v < vectors; ++v) top = max_or_nan(top, load(s + v * width));
  A alpha{1};
  constexpr A room = headroom_of<A, Base>;
  if (any_less<A>(broadcast(max + room), top)) {
    const A raised = max_lane<A>(top);
    if (raised > max + room) {  // not so if a lane is NaN: the weights will carry it
      alpha = exp2_scalar(power_of(max - raised, Base));
      max = raised;
    }
  }
  // Scores that are all -inf leave m = -inf; shifting by 0 then gives weights 0, and NaN for NaN, without a branch.
  const packet<A> shift = broadcast(max == minus_infinity<A> ? A{0} : max);
  const auto weight = [&](int v) {
    packet<A> distance = sub(load(s + v * width), shift);
    if constexpr (Base == score_base::e) distance = mul<A>(distance, broadcast(std::numbers::log2e_v<A>));
    return exp2_packet<A, weight_element<L>, headroom>(distance);
  };
  if constexpr (std::is_same_v<weights_of_left<L>, q8>) {
    packet<A> sum = zeros<A>();
    for (int v = 0; v < vectors; ++v) {
      const packet<A> some = weight(v);
      store(weights + v * width, some);
      sum = add(sum, some);
    }
    store(lanes, madd(load(lanes), broadcast(alpha), sum));
  } else if constexpr (sums_in_lanes<L>) {
    packet<A> sum = zeros<A>();
    for (int v = 0; v < vectors; v += 2) sum = store_rounded(weights + v * width, weight(v), weight(v + 1), sum);
    store(lanes, madd(load(lanes), broadcast(alpha), sum));
  } else {
    for (int v = 0; v < vectors; ++v) store(weights + v * width, weight(v));
  }
  return alpha;
}

/// The same for several rows of base 2, which keep the constants of the exponential in registers.
template <class L, class A>
void softmax_steps(index_t rows, const A* s, weight_element<L>* weights, A* max, A* lanes, A* alpha) noexcept {
  for (index_t r = 0; r < rows; ++r)
    alpha[r] = softmax_step<L>(s + r * tile_tokens, weights + r * tile_tokens, max[r], lanes + r * packet_size<A>);
}

/// The sum of a row's lanes, as a tree: the one horizontal sum, at the end of a split.
template <class A>
[[nodiscard]] A sum_lanes(const A* lanes) noexcept {
  A tree[packet_size<A>];
  for (int i = 0; i < packet_size<A>; ++i) tree[i] = lanes[i];
  for (int half = packet_size<A> / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) tree[i] += tree[i + half];
  }
  return tree[0];
}

/// self <- self (+) other for one row, over disjoint keys. An empty state changes nothing, or is replaced exactly.
template <class A>
void merge_row(const raw_states<A>& self, const raw_states<A>& other, index_t row, index_t out_stride,
               score_base base) noexcept {
  constexpr index_t width = packet_size<A>;
  A* const out = self.out + row * out_stride;
  const A* const more = other.out + row * out_stride;
  const A top = other.max[row] > self.max[row] ? other.max[row] : self.max[row];
  const A shift = top == minus_infinity<A> ? A{0} : top;
  const A keep = exp2_scalar(power_of(self.max[row] - shift, base)),
          take = exp2_scalar(power_of(other.max[row] - shift, base));
  self.max[row] = top;
  self.sum[row] = scalar_madd(other.sum[row], take, scalar_mul(self.sum[row], keep));
  const packet<A> keep_all = broadcast(keep), take_all = broadcast(take);
  for (index_t e = 0; e < out_stride; e += width)
    store(out + e, madd(load(more + e), take_all, mul<A>(load(out + e), keep_all)));
}

/// A finished row of a state: out [dim], or null for zeros, and its natural log-sum-exp.
template <class A>
struct finished_state {
  const A* out;
  A lse;
};

/// out <- the merge of finished rows over disjoint keys; returns its log-sum-exp. A sink is a row of zeros.
template <class A, std::size_t N>
[[nodiscard]] A merge_finished(const finished_state<A> (&states)[N], index_t dim, A* out) noexcept {
  A top = minus_infinity<A>;
  for (const auto& state : states) top = state.lse > top || state.lse != state.lse ? state.lse : top;
  std::fill_n(out, dim, A{0});
  if (top == minus_infinity<A>) return top;
  A total{0};
  for (const auto& state : states) {
    const A weight = std::exp(state.lse - top);
    total += weight;
    for (index_t e = 0; e < dim && state.out != nullptr && weight != A{0}; ++e)
      out[e] = scalar_madd(weight, state.out[e], out[e]);
  }
  for (index_t e = 0; e < dim; ++e) out[e] /= total;
  return top + std::log(total);
}

/// A row once all its keys and its sink have been seen: out * scale / sum is the attention output.
template <class A>
struct finished_row {
  double max;  // to base e; -inf if the row saw nothing, sink included
  A scale;
  A sum;  // 0 then
};

/// What a key at a row's m weighs.
template <class A>
inline constexpr A unit_weight = A{1} / (1 << headroom);

/// Joins a row's sink logit (to base e, -inf for none), which adds to the sum and has value 0. In double, where neither
/// overflows to the other's base.
template <class A>
[[nodiscard]] finished_row<A> finish_row(A max, A sum, A sink, score_base base) noexcept {
  const double own = static_cast<double>(max) * (base == score_base::two ? std::numbers::ln2 : 1.0);
  // Most rows; what follows comes to the same, by two exponentials.
  if (sink == minus_infinity<A> && max > minus_infinity<A>) return {own, A{1}, sum};
  const auto of_sink = static_cast<double>(sink);
  const double top = of_sink > own ? of_sink : own;
  if (top == minus_infinity<double> && sum == A{0}) return {minus_infinity<double>, A{0}, A{0}};
  const double shift = top == minus_infinity<double> ? 0 : top;
  const auto weight = [shift](double x) { return exp2_scalar(static_cast<A>((x - shift) * std::numbers::log2e)); };
  const A scale = weight(own);
  return {shift, scale, scalar_madd(sum, scale, unit_weight<A> * weight(of_sink))};
}

/// The natural logarithm of the sum of a finished row's exponentials, of which there is one at least.
template <class A>
[[nodiscard]] A log_sum_exp(const finished_row<A>& row) noexcept {
  return static_cast<A>(row.max + std::log(static_cast<double>(row.sum / unit_weight<A>)));
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
