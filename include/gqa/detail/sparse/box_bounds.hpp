// SPDX-License-Identifier: Apache-2.0
/// \file
/// box_bounds: what rows score at most with the keys of a page, by the largest and smallest element of each channel
/// that a cache keeps (key_bounds.hpp). For page_reader.hpp, which reads pages of 64 keys.
///
/// Cost of R rows over P pages: 2 R P D multiply-adds and P bounds read, once, for bounds of 64 keys; 4 times as much
/// for 16.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/kernel/read_ahead.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/sparse/page_ranker.hpp>
#include <gqa/detail/sparse/score_bound.hpp>
#include <gqa/detail/tile/key_bounds.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// The products of R rows q [R, q_stride] with up to 16 rows of bounds, `length` elements each: u [R, 16].
template <int Rows, class A, class S, class B>
void multiply_bounds(const std::array<const B*, panel_tokens>& bounds, index_t count, const S* q, index_t q_stride,
                     index_t length, A* u) noexcept {
  constexpr index_t width = packet_size<A>;
  alignas(64) A lanes[Rows][panel_tokens * width];
  for (int r = 0; r < Rows; ++r) std::fill_n(lanes[r] + count * width, (panel_tokens - count) * width, A{0});
  for (index_t n = 0; n < count; ++n) {
    const B* const row = bounds[static_cast<std::size_t>(n)];
    for (index_t byte = 0; byte < length * index_t{sizeof(B)}; byte += 64) prefetch<2>(row, read_ahead_bytes<B> + byte);
    dot_lanes<Rows>(row, q, q_stride, length, lanes[0] + n * width, panel_tokens * width);
  }
  for (int r = 0; r < Rows; ++r) {
    for (index_t n = 0; n < panel_tokens; n += width)
      store(u + r * panel_tokens + n, sum_lanes_each(lanes[r] + n * width));
  }
}

template <class L, class Source>
class box_bounds {
  using P = typename Source::panel_element;
  using A = accumulator_t<P>;
  using B = bound_element<P>;
  /// What meets bounds: pairs where queries are held so, else accumulators.
  using S = std::conditional_t<multiplies_pairs<B, queries_of_left<L>>, B, A>;

 public:
  using source = Source;

  box_bounds(const problem<A, L>& p, const score_bound<A, L>& scores, const Source& kv) noexcept
      : scores_(scores), kv_(kv), head_dim_(p.shape.head_dim) {}

  static constexpr bool are_tight = false;  // whether scores are near them
  [[nodiscard]] static constexpr index_t page_tokens() noexcept { return tile_tokens; }
  [[nodiscard]] index_t bounds_of_page() const noexcept { return page_tokens() / keys_of_bound(); }
  /// Keys that a bound is of, each.
  [[nodiscard]] index_t keys_of_bound() const noexcept { return kv_.bound_tokens(); }
  [[nodiscard]] double bytes_of(const bounded_head& head) const noexcept {
    return static_cast<double>(head.tiles.size() * bounds_of_page() * length()) * sizeof(B);
  }

  void carve(carver& take, index_t rows) noexcept { take(split_, rows * length()), take(sums_, rows); }
  /// A row x [D] as the kernel holds it: split in positive and negative parts, [q+ | q-].
  void add_row(index_t row, const bounded_head&, const A* x) noexcept {
    S* const positive = split_ + row * length();
    S* const negative = positive + length() / 2;
    std::fill_n(positive, length(), S(0));
    double sum = 0;
    for (index_t d = 0; d < head_dim_; ++d) {
      if (x[d] > 0 || x[d] != x[d]) positive[d] = static_cast<S>(x[d]);
      if (x[d] < 0) negative[d] = static_cast<S>(x[d]);
      sum += std::abs(static_cast<double>(x[d]));
    }
    sums_[row] = sum;
  }

  /// From bounds to masses; pages with a bound that is no number must be read.
  template <class MustRead>
  void weigh(const bounded_head& head, page_ranker<A>& ranker, const MustRead& must_read) const noexcept {
    const index_t tokens = keys_of_bound(), first = head.tiles.begin * bounds_of_page();
    const index_t last = (std::min)(ceil_div(head.keys, tokens), head.tiles.end * bounds_of_page()) - 1;
    ranker.weigh(tokens, must_read);
    ranker.shrink(last - first, (std::min)(head.keys - last * tokens, tokens), tokens);
    ranker.add_up();
  }
  /// Upper bounds of the scores of all rows of a head, base 2.
  void find(const bounded_head& head, page_ranker<A>& ranker) const noexcept {
    static constexpr auto kernels = by_rows([]<int Rows>() { return &multiply_bounds<Rows, A, S, B>; },
                                            std::make_integer_sequence<int, block_rows>{});
    alignas(64) A u[block_rows * panel_tokens];
    const index_t tokens = keys_of_bound(), bounds = head.tiles.size() * bounds_of_page(),
                  first_bound = head.tiles.begin * bounds_of_page();
    const S* const rows_of_head = split_ + head.first_row * length();
    for (index_t first = 0; first < bounds; first += panel_tokens) {
      const index_t count = (std::min)(panel_tokens, bounds - first);
      std::array<const B*, panel_tokens> at{};
      alignas(64) std::array<A, panel_tokens> largest{};
      for (index_t n = 0; n < count; ++n) {
        const index_t number = first_bound + first + n;
        if (number * tokens >= head.keys) {  // nobody sees it, and anything is multiplied
          at[static_cast<std::size_t>(n)] = reinterpret_cast<const B*>(rows_of_head);
          continue;
        }
        const auto page = kv_.bounds(head.b, head.g, number);
        at[static_cast<std::size_t>(n)] = page.row, largest[static_cast<std::size_t>(n)] = page.largest;
      }
      for (index_t row = 0; row < head.rows; row += block_rows) {
        const index_t block = std::min<index_t>(block_rows, head.rows - row);
        kernels[static_cast<std::size_t>(block - 1)](at, count, rows_of_head + row * length(), length(), length(), u);
        for (index_t r = 0; r < block; ++r)
          store_bounds(head, row + r, {first_bound + first, first_bound + first + count}, u + r * panel_tokens, largest,
                       &ranker.bound(row + r, first));
      }
    }
  }

 private:
  /// Elements of a row of bounds, and of queries that meet it.
  [[nodiscard]] index_t length() const noexcept { return 2 * key_bounds<P>::padded(head_dim_); }
  /// What a product with bounds, and the kernel's with a key, may round off in all, beside the largest element of the
  /// keys: chains of D and 2 D fused multiply-adds and a tree are off by at most n u sum |q| |k|, u the unit roundoff.
  [[nodiscard]] double rounding_of(double sum_of_query) const noexcept {
    const index_t terms = head_dim_ + length() / 4 + 16;
    return static_cast<double>(terms) * score_bound<A, L>::unit * sum_of_query;
  }

  /// Scores of a row from products with bounds [numbers.begin, numbers.end), up to 16 of them.
  void store_bounds(const bounded_head& head, index_t row, key_range numbers, const A* products,
                    const std::array<A, panel_tokens>& largest, A* scores) const noexcept {
    const index_t position = head.position_of(row), tokens = keys_of_bound();
    const key_range seen = scores_.keys_of(position, head.keys);
    const double rounding = rounding_of(sums_[head.first_row + row]);
    const bool all_seen = seen.begin < (numbers.begin + 1) * tokens && (numbers.end - 1) * tokens < seen.end;
    if (all_seen && scores_.is_plain()) {
      const packet<A> off = broadcast(static_cast<A>(rounding));
      for (index_t n = 0; n < panel_tokens; n += packet_size<A>)
        store(scores + n, scores_.of_products(madd(load(largest.data() + n), off, load(products + n))));
      return;
    }
    for (index_t n = 0; n < numbers.size(); ++n) {
      const key_range own{(numbers.begin + n) * tokens, (std::min)((numbers.begin + n + 1) * tokens, head.keys)};
      const bool hidden = own.end <= seen.begin || seen.end <= own.begin;
      const double most =
          static_cast<double>(products[n]) + rounding * static_cast<double>(largest[static_cast<std::size_t>(n)]);
      scores[n] = hidden ? page_ranker<A>::unseen : scores_.of(most, head.q_head_of(row), position, own);
    }
  }

  const score_bound<A, L>& scores_;
  const Source& kv_;
  index_t head_dim_;
  S* split_ = nullptr;      // [rows, length]
  double* sums_ = nullptr;  // [rows], of a row's magnitudes
};

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
