// SPDX-License-Identifier: Apache-2.0
/// \file
/// projected_bounds: what rows weigh at most with the keys of a panel of 16, by the projections of those keys
/// (projected_keys.hpp). For page_reader.hpp, which reads panels then.
///
/// Each key has a bound U of its own, a product of length r + 2; a panel's is log2 sum 2^U, so that it is the panel's
/// true log-sum-exp where keys lie in their subspace. Cost: for each row and key r + 2 multiply-adds and a power, and r
/// + 2 elements of each key read, once for up to 6 rows.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/kernel/score_tile.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/exp2.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/sparse/page_ranker.hpp>
#include <gqa/detail/sparse/score_bound.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/projected_keys.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// log2 x rounded up, of any x that has all its bits, by the chord of each power of two: 0.0861 above it at most.
template <class A>
[[nodiscard]] inline A log2_above(A x) noexcept {
  using bits = std::conditional_t<sizeof(A) == sizeof(float), std::int32_t, std::int64_t>;
  constexpr int fraction_bits = std::numeric_limits<A>::digits - 1;
  constexpr bits one = std::bit_cast<bits>(A{1});
  const auto steps = static_cast<A>(std::bit_cast<bits>(x) - one);  // of 2^-fraction_bits
  return steps / static_cast<A>(bits{1} << fraction_bits) + static_cast<A>(0.0861);
}

template <class L, class Keys>
class projected_bounds;

template <class L, class S>
class projected_bounds<L, projected_keys<S>> {
  using A = accumulator_t<L>;
  static constexpr index_t width = packet_size<A>;

 public:
  using source = projected_keys<S>;

  projected_bounds(const problem<A, L>& p, const score_bound<A, L>& scores, const source& keys) noexcept
      : scores_(scores), keys_(keys), head_dim_(p.shape.head_dim) {
    for (index_t b = 0; b < p.shape.batch; ++b)
      for (index_t g = 0; g < p.shape.kv_heads; ++g) channels_ = (std::max)(channels_, keys.of(b, g).channels());
  }

  static constexpr bool are_tight = true;  // whether scores are near them
  [[nodiscard]] static constexpr index_t page_tokens() noexcept { return panel_tokens; }
  [[nodiscard]] static constexpr index_t bounds_of_page() noexcept { return 1; }
  /// A panel's bound is of all its keys together. Panels with one that is no number must be read.
  template <class MustRead>
  static void weigh(const bounded_head&, page_ranker<A>& ranker, const MustRead& must_read) noexcept {
    ranker.weigh(1, must_read);
  }
  [[nodiscard]] double bytes_of(const bounded_head& head) const noexcept {
    const index_t elements = key_panel_elements<S>(keys_.of(head.b, head.g).channels());
    return static_cast<double>(head.tiles.size() * tile_panels * elements) * sizeof(S);
  }

  void carve(carver& take, index_t rows) noexcept {
    take(rows_, rows * stride()), take(rests_, rows * head_dim_), take(bases_, rows);
  }
  /// A row x [D] as the kernel holds it: [y | |w| | |y|], and x . m.
  void add_row(index_t row, const bounded_head& head, const A* x) noexcept {
    const projected_head<S>& of = keys_.of(head.b, head.g);
    A* const to = rows_ + row * stride();
    std::fill_n(to, stride(), A{0});
    Eigen::Map<typename projected_head<S>::row> rest(rests_ + row * head_dim_, head_dim_);
    rest = Eigen::Map<const Eigen::Matrix<A, 1, Eigen::Dynamic>>(x, head_dim_).template cast<double>();
    const double size = rest.norm(), at_mean = rest.dot(of.mean);
    double sum = 0;
    for (index_t i = 0; i < of.rank(); ++i) {
      to[i] = static_cast<A>(rest.dot(of.directions.row(i)));  // those before are orthogonal to it, but for rounding
      const auto y = static_cast<double>(to[i]);
      rest.noalias() -= y * of.directions.row(i);
      sum += y * y;
    }
    const double off = rounding_of(head_dim_, of.rank());
    to[of.rank()] = static_cast<A>(rest.norm() + off * size);
    to[of.rank() + 1] = static_cast<A>(std::sqrt(sum) * (1 + off));
    bases_[row] = static_cast<A>(at_mean + off * size * of.mean.norm());
  }

  /// Upper bounds of what panels weigh for all rows of a head, base 2.
  void find(const bounded_head& head, page_ranker<A>& ranker) const noexcept {
    const projected_head<S>& of = keys_.of(head.b, head.g);
    const index_t panel_elements = key_panel_elements<S>(of.channels());
    alignas(64) A u[block_rows * tile_tokens];
    const A* const rows = rows_ + head.first_row * stride();
    for (index_t i = head.tiles.begin; i < head.tiles.end; ++i) {
      kv_tile<S> tile;
      for (index_t panel = 0; panel < tile_panels; ++panel)
        tile.k[static_cast<std::size_t>(panel)] = of.panels.data() + (i * tile_panels + panel) * panel_elements;
      tile.v = tile.k;  // which nobody reads
      for (index_t row = 0; row < head.rows; row += block_rows) {
        const index_t block = std::min<index_t>(block_rows, head.rows - row);
        score_tile<S, reading::in_order>(tile, rows + row * stride(), stride(), of.channels(), block, u);
        std::array<std::uint64_t, block_rows> seen{};
        for (index_t r = 0; r < block; ++r)
          seen[static_cast<std::size_t>(r)] = bound_scores(head, row + r, i * tile_tokens, u + r * tile_tokens);
        bound_panels(u, block, seen, [&](index_t r, index_t panel) -> A& {
          return ranker.bound(row + r, (i - head.tiles.begin) * tile_panels + panel);
        });
      }
    }
  }

 private:
  [[nodiscard]] index_t stride() const noexcept { return round_up(channels_, 16) + 16; }

  /// From products with 64 keys, u, to bounds of scores; what the row does not see is `unseen`. The bits of what it
  /// sees.
  std::uint64_t bound_scores(const bounded_head& head, index_t row, index_t first, A* u) const noexcept {
    const index_t position = head.position_of(row);
    const key_range seen = scores_.keys_of(position, head.keys);
    const std::uint64_t bits = bits_between(seen.begin - first, seen.end - first);
    const A base = bases_[head.first_row + row];
    if (scores_.is_plain()) {
      for (index_t c = 0; c < tile_tokens; c += width)
        store(u + c, select_bits<A>(bits >> c, scores_.of_products(add(load(u + c), broadcast(base))),
                                    broadcast(page_ranker<A>::unseen)));
      return bits;
    }
    for (index_t c = 0; c < tile_tokens; ++c) {
      const double most = static_cast<double>(u[c]) + static_cast<double>(base);
      u[c] = (bits >> c & 1) == 0 ? page_ranker<A>::unseen
                                  : scores_.of(most, head.q_head_of(row), position, {first + c, first + c + 1});
    }
    return bits;
  }
  /// bound(r, panel) = log2 sum 2^u of each panel of u [rows, 64], rounded up: beside the tile's largest u, and no less
  /// than 2^-120 of that. (Sums of lanes many at a time: one by one they would take as long as products of 30
  /// channels.)
  template <class Bound>
  static void bound_panels(const A* u, index_t rows, const std::array<std::uint64_t, block_rows>& seen,
                           const Bound& bound) noexcept {
    constexpr index_t most_panels = block_rows * tile_panels, all = ceil_div(most_panels, width) * width;
    alignas(64) A lanes[all * width];
    alignas(64) A sums[all];
    std::array<A, block_rows> largest{};
    for (index_t r = 0; r < rows; ++r, u += tile_tokens) {
      packet<A> most = load(u);
      for (index_t c = width; c < tile_tokens; c += width) most = max_or_nan(load(u + c), most);
      largest[static_cast<std::size_t>(r)] = max_lane<A>(most);
      const packet<A> top = broadcast(largest[static_cast<std::size_t>(r)]);
      for (index_t panel = 0; panel < tile_panels; ++panel) {
        packet<A> sum = zeros<A>();
        for (index_t c = panel * panel_tokens; c < (panel + 1) * panel_tokens; c += width)
          sum = add(add(sum, sub(load(u + c), load(u + c))),  // NaN for good where a bound is, or is infinite
                    exp2_packet<A>(max_or_nan(sub(load(u + c), top), broadcast(A{-120}))));
        store(lanes + (r * tile_panels + panel) * width, sum);
      }
    }
    const index_t panels = rows * tile_panels, padded = round_up(panels, width);
    std::fill(lanes + panels * width, lanes + padded * width, A{0});
    for (index_t n = 0; n < padded; n += width) store(sums + n, sum_lanes_each(lanes + n * width));
    for (index_t n = 0; n < panels; ++n) {
      const auto r = static_cast<std::size_t>(n / tile_panels);
      const index_t panel = n % tile_panels;
      const bool hidden = (seen[r] >> panel * panel_tokens & 0xffff) == 0;
      const A sum = sums[n];
      bound(n / tile_panels, panel) = hidden ? page_ranker<A>::unseen : sum == sum ? largest[r] + log2_above(sum) : sum;
    }
  }

  const score_bound<A, L>& scores_;
  const source& keys_;
  index_t head_dim_, channels_ = 0;
  A* rows_ = nullptr;        // [rows, stride]
  double* rests_ = nullptr;  // [rows, D]
  A* bases_ = nullptr;       // [rows]: x . m, rounded up
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
