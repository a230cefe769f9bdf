// SPDX-License-Identifier: Apache-2.0
/// \file
/// Distances between rows and centres, by the engine's own kernel: centres are packed as keys are, 64 a tile, and their
/// products with rows are scores.
///
///     |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2)
///
/// so the nearest centre has the largest x.c - |c|^2 / 2, which |x| does not enter. Reads each tile of centres from L2
/// once per 6 rows, and does D multiply-adds a pair: the speed of a matrix product of the same shapes. Rounding errors
/// of the products, eps |x| |c|, decide between centres that are equally far within them.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include <gqa/config.hpp>
#include <gqa/detail/kernel/score_tile.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Rows [count, dim] of accumulators, `stride` elements apart.
template <class A>
struct point_rows {
  const A* at;
  index_t count, dim, stride;

  [[nodiscard]] const A* row(index_t i) const noexcept { return at + i * stride; }
};

/// |x - y|^2: sums over lanes, then over the lanes of a packet. Its relative error is at most (dim + 2) eps,
/// as far as squares stay within the range of A.
template <class A>
[[nodiscard]] A squared_distance(const A* x, const A* y, index_t dim) noexcept {
  constexpr index_t width = packet_size<A>;
  const auto add_square = [&](packet<A>& sum, index_t d) {
    const packet<A> difference = sub(load(x + d), load(y + d));
    sum = madd(difference, difference, sum);
  };
  packet<A> even = zeros<A>(), odd = zeros<A>();  // two, for one would wait for itself
  index_t d = 0;
  for (; d + 2 * width <= dim; d += 2 * width) add_square(even, d), add_square(odd, d + width);
  if (d + width <= dim) add_square(even, d), d += width;
  A sum = lane_sum<A>(add(even, odd));
  for (; d < dim; ++d) sum = scalar_madd(x[d] - y[d], x[d] - y[d], sum);
  return sum;
}

/// Centres [count, dim] in panels.
template <class A>
class packed_centres {
 public:
  [[nodiscard]] static index_t elements(index_t count, index_t dim) noexcept {
    return ceil_div(count, tile_tokens) * (tile_keys(dim) + tile_tokens);
  }

  /// Packs them into `memory`, which holds elements(count, dim).
  packed_centres(const point_rows<A>& centres, A* memory) noexcept
      : panels_(memory),
        halves_(memory + tiles(centres) * tile_keys(centres.dim)),
        dim_(centres.dim),
        count_(centres.count) {
    for (index_t first = 0; first < tiles(centres) * tile_tokens; first += panel_tokens) {
      const panel_range range{0, std::clamp<index_t>(centres.count - first, 0, panel_tokens)};
      pack_key_panel(centres.row(range.end > 0 ? first : 0), centres.stride, range, dim_,
                     memory + first / panel_tokens * key_panel_elements<A>(dim_));
    }
    for (index_t c = 0; c < tiles(centres) * tile_tokens; ++c) {
      double sum = 0;
      for (index_t d = 0; d < dim_ && c < centres.count; ++d) {
        const auto x = static_cast<double>(centres.row(c)[d]);
        sum += x * x;
      }
      halves_[c] = c < centres.count ? static_cast<A>(sum / 2) : std::numeric_limits<A>::infinity();
    }
    tiles_ = tiles(centres);
  }

  /// Products s [rows, 64] of up to 6 rows with the centres of tile i.
  void multiply(const A* rows, index_t stride, index_t count, index_t i, A* s) const noexcept {
    kv_tile<A> tile;
    for (index_t panel = 0; panel < tile_panels; ++panel)
      tile.k[static_cast<std::size_t>(panel)] = panels_ + i * tile_keys(dim_) + panel * key_panel_elements<A>(dim_);
    score_tile(tile, rows, stride, dim_, count, s);
  }

  /// The nearest centre of each of the rows [begin, end); of several the first.
  void find_nearest(const point_rows<A>& x, index_t begin, index_t end, index_t* nearest) const noexcept {
    constexpr index_t width = packet_size<A>;
    alignas(64) A s[block_rows * tile_tokens];
    for (index_t first = begin; first < end; first += block_rows) {
      const index_t rows = std::min<index_t>(block_rows, end - first);
      A best[block_rows];
      for (index_t i = 0; i < tiles_; ++i) {
        multiply(x.row(first), x.stride, rows, i, s);
        for (index_t r = 0; r < rows; ++r) {
          A* const row = s + r * tile_tokens;
          const A* const halves = halves_ + i * tile_tokens;
          packet<A> top = broadcast(-std::numeric_limits<A>::infinity());
          for (index_t c = 0; c < tile_tokens; c += width) {
            const packet<A> nearness = sub(load(row + c), load(halves + c));
            store(row + c, nearness);
            top = max_or_nan(nearness, top);
          }
          const A largest = max_lane<A>(top);
          if (i > 0 && !(largest > best[r])) continue;
          best[r] = largest;
          // (Rows or centres of NaN may compare equal where there is no centre.)
          nearest[first + r] = (std::min)(i * tile_tokens + first_equal(row, largest), count_ - 1);
        }
      }
    }
  }

 private:
  [[nodiscard]] static index_t tile_keys(index_t dim) noexcept { return tile_panels * key_panel_elements<A>(dim); }
  [[nodiscard]] static index_t tiles(const point_rows<A>& centres) noexcept {
    return ceil_div(centres.count, tile_tokens);
  }
  /// The first of 64 elements that equals x, 0 if none does.
  [[nodiscard]] static index_t first_equal(const A* row, A x) noexcept {
    for (index_t c = 0; c < tile_tokens; c += packet_size<A>) {
      if (const auto bits = equal_bits<A>(load(row + c), broadcast(x))) return c + std::countr_zero(bits);
    }
    return 0;
  }

  A* panels_;
  A* halves_;  // half the squared norms, +inf where there is no centre
  index_t dim_, count_, tiles_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
