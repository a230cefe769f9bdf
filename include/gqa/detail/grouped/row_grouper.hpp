// SPDX-License-Identifier: Apache-2.0
/// \file
/// The algorithms behind query_clustering.hpp: labels of rows, then groups from labels.
///
/// What takes long are loops over chunks of rows at fixed places, whose results meet in ascending order, so threads
/// change nothing; what does not is done by one. Rows whose squared norm is not finite take no part: they would make
/// every mean and distance they touch NaN.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/random.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/plan.hpp>
#include <gqa/detail/grouped/nearest.hpp>
#include <gqa/query_groups.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Groups n rows. by_...() sets labels, write() makes groups of them.
template <class A>
class row_grouper {
 public:
  /// Scratch that grouping n rows takes; `given` representatives, or as many as the options say.
  [[nodiscard]] static std::size_t bytes(index_t n, index_t dim, const grouping_options& options, index_t given,
                                         context& ctx) {
    row_grouper measured({nullptr, n, dim, round_up(dim, 16)}, options, given, ctx);
    return measured.carve(nullptr);
  }

  row_grouper(const point_rows<A>& rows, const grouping_options& options, index_t given, context& ctx,
              std::byte* memory)
      : row_grouper(rows, options, given, ctx) {
    carve(memory);
    for_each_chunk(x_.dim, [this](index_t, index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) finite_[i] = std::isfinite(squared_norm(x_.row(i)));
    });
  }

  void by_content() {
    if (x_.count == 0) return;
    switch (options_.method) {
      case grouping_method::kmeans:
        return by_means();
      case grouping_method::hashed:
        return by_hashes();
      case grouping_method::balanced:
        draw_directions(x_.dim + 1);
        return by_order([this](index_t i) { return projection(i); });
      case grouping_method::cover:
        return by_cover();
      case grouping_method::random:
        return by_order([this](index_t i) { return to_uniform(hash_of(i)); });
    }
  }

  void by_labels(std::span<const index_t> labels) {
    std::copy(labels.begin(), labels.end(), labels_);
    count_ = x_.count;
  }

  /// To the nearest of representatives [C, D] that are given; rows farther than options.radius from it are left out
  /// like those that are not finite.
  void by_representatives(std::span<const A> representatives) {
    given_ = representatives.data();
    count_ = given_count_;
    for (index_t j = 0; j < count_; ++j) centres_[j] = j;
    const packed_centres<A> centres({given_, count_, x_.dim, x_.dim}, packed_);
    centres.find_nearest(x_, 0, x_.count, labels_);
    for (index_t i = 0; i < x_.count; ++i)
      finite_[i] = finite_[i] && distance_from(i, given_ + labels_[i] * x_.dim) <= options_.radius;
  }

  template <class Distance>
  void by_distance(const Distance& distance) {
    const std::span<const index_t> rows(order_, static_cast<std::size_t>(list_finite()));
    const auto nearest = luck_;  // [n], distances of the nearest centre
    index_t centre = rows.empty() ? -1 : rows.front();
    for (count_ = 0; count_ < most_ && centre >= 0; ++count_) {
      centres_[count_] = centre;
      for (const index_t i : rows) {
        const double given = i == centre ? 0 : distance(i, centre);
        const double d = given >= 0 ? given : std::numeric_limits<double>::infinity();  // NaN is far
        if (count_ == 0 || d < nearest[i]) nearest[i] = d, labels_[i] = count_;
      }
      const index_t farthest =
          *std::max_element(rows.begin(), rows.end(), [&](index_t i, index_t j) { return nearest[i] < nearest[j]; });
      centre = nearest[farthest] > options_.radius ? farthest : -1;
    }
    represented_by_rows_ = true;
  }

  /// The groups of the labels, into query_groups or groups_memory: in the order of their numbers, without empty ones;
  /// rows that are not finite last. False after a capacity error where that returns; the groups stay what they were.
  template <class Groups>
  [[nodiscard]] bool write(Groups& groups) {
    const index_t left_out = number_groups();
    const auto rows = static_cast<std::size_t>(x_.count), count = static_cast<std::size_t>(count_);
    const auto elements = static_cast<std::size_t>(count_ * x_.dim);
    if (!make_room(groups.order, rows, "groups") || !make_room(groups.offsets, count + 1, "groups") ||
        !make_room(groups.representatives, elements, "groups") || !make_room(groups.radii, count, "groups"))
      return false;
    groups.dim = x_.dim;
    static_cast<void>(groups.order.assign(order_, order_ + rows));
    static_cast<void>(groups.offsets.assign(offsets_, offsets_ + count + 1));
    static_cast<void>(groups.representatives.resize(elements));
    static_cast<void>(groups.radii.resize(count));
    for_each(count_, x_.count / std::max<index_t>(count_, 1) * x_.dim, [&](index_t j, index_t worker) {
      A* const to = groups.representatives.data() + j * x_.dim;
      const bool measurable = j < count_ - left_out;
      groups.radii[static_cast<std::size_t>(j)] =
          measurable ? represent(j, to, worker) : std::numeric_limits<A>::infinity();
      if (!measurable) std::copy_n(x_.row(order_[offsets_[j]]), x_.dim, to);
    });
    return true;
  }

 private:
  static constexpr index_t chunk_rows = 192;      // 96 KB of floats at D = 128: L2 beside 64 centres
  static constexpr index_t seeds_drawn_from = 8;  // rows a seed

  row_grouper(const point_rows<A>& rows, const grouping_options& options, index_t given, context& ctx) noexcept
      : x_(rows), options_(options), ctx_(ctx), given_count_(given) {
    most_ = options.groups == 0 ? rows.count : (std::min)(options.groups, rows.count);
    if (given > 0) most_ = given;
  }

  std::size_t carve(std::byte* memory) {
    carver take(memory);
    const bool has_means = options_.method == grouping_method::kmeans || given_count_ > 0;
    take(labels_, x_.count), take(order_, x_.count);
    take(near_, x_.count), take(apart_, most_), take(luck_, x_.count), take(codes_, x_.count), take(finite_, x_.count);
    take(offsets_, most_ + 2), take(centres_, most_ + 1), take(centre_codes_, most_);
    take(means_, has_means ? most_ * x_.stride : x_.dim);
    take(packed_, packed_centres<A>::elements(std::max<index_t>(has_means ? most_ : 0, tile_tokens), x_.dim));
    take(directions_, options_.method == grouping_method::hashed ? options_.hash_bits * x_.dim : x_.dim + 1);
    take(sums_, ctx_.concurrency() * x_.dim);
    take(found_, chunks());
    return take.used();
  }

  // Loops.

  template <class F>
  void for_each(index_t tasks, index_t work, const F& f) const {
    if (static_cast<double>(tasks) * static_cast<double>(work) < serial_work)
      return context::for_each_serially(tasks, f);
    ctx_.for_each(tasks, f);
  }
  [[nodiscard]] index_t chunks() const noexcept { return ceil_div(x_.count, chunk_rows); }
  /// Calls f(chunk, begin, end) for all rows; `work`: multiply-adds a row.
  template <class F>
  void for_each_chunk(index_t work, const F& f) const {
    for_each(chunks(), chunk_rows * work, [&](index_t chunk, index_t) {
      f(chunk, chunk * chunk_rows, (std::min)((chunk + 1) * chunk_rows, x_.count));
    });
  }

  // Numbers of a row.

  [[nodiscard]] double squared_norm(const A* x) const noexcept {
    const double sum = sum_of_squares([x](index_t d) { return static_cast<double>(x[d]); });
    return static_cast<double>(static_cast<A>(sum));  // infinite where A's distances are
  }
  /// The sum over d of f(d)^2, in lanes that the compiler finds: of one sum each term would wait for the one before.
  template <class F>
  [[nodiscard]] double sum_of_squares(const F& f) const noexcept {
    constexpr index_t width = 16;
    std::array<double, width> lanes{};
    index_t d = 0;
    for (; d + width <= x_.dim; d += width) {
      GQA_UNROLL
      for (index_t i = 0; i < width; ++i) lanes[static_cast<std::size_t>(i)] += f(d + i) * f(d + i);
    }
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    for (; d < x_.dim; ++d) sum += f(d) * f(d);
    return sum;
  }
  /// Of the contents alone, so that the order of rows does not matter.
  [[nodiscard]] std::uint64_t hash_of(index_t i) const noexcept {
    std::uint64_t hash = random_bits(options_.seed, 0);
    const auto* const bytes = reinterpret_cast<const std::byte*>(x_.row(i));
    const auto end = static_cast<std::size_t>(x_.dim) * sizeof(A);
    for (std::size_t at = 0; at < end; at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes + at, std::min<std::size_t>(8, end - at));
      hash = mix_bits(hash + word + 0x9e3779b97f4a7c15u);
    }
    return hash;
  }
  /// Of [x; sqrt(M^2 - |x|^2)], which is equally long for all rows, on a random direction: near rows come near each
  /// other, and rows near each other are near in angle. M: the longest row.
  [[nodiscard]] double projection(index_t i) const noexcept {
    double sum =
        std::sqrt((std::max)(longest_ - squared_norm(x_.row(i)), 0.0)) * static_cast<double>(directions_[x_.dim]);
    for (index_t d = 0; d < x_.dim; ++d) sum += static_cast<double>(x_.row(i)[d]) * static_cast<double>(directions_[d]);
    return sum;
  }

  void draw_directions(index_t elements) noexcept {
    for (index_t d = 0; d < elements; ++d)
      directions_[d] = static_cast<A>(random_normal(options_.seed, static_cast<std::uint64_t>(d)));
  }

  // Farthest points and k-means++ are one loop: the next centre is the row of the largest distance, squared and times
  // its luck. With luck 1 it is the farthest; with luck 1 / an exponential variable it is drawn in proportion to the
  // squared distance (Efraimidis and Spirakis 2006; one draw serves a row for good).

  /// Takes centres from the rows order_[0, rows), until all of those lie within `radius` of one, or there are most_;
  /// labels them with the nearest.
  void take_centres(index_t rows, double radius) {
    const double limit = radius * radius / (1 + distance_error());
    index_t next = farthest(rows, -1);
    for (count_ = 0; count_ < most_ && next >= 0; ++count_) {
      const index_t centre = centres_[count_] = next;
      for (index_t j = 0; j < count_; ++j) apart_[j] = squared_distance(x_.row(centres_[j]), x_.row(centre), x_.dim);
      for_each(ceil_div(rows, chunk_rows), chunk_rows * x_.dim, [&](index_t chunk, index_t) {
        move_to_centre(centre, chunk * chunk_rows, (std::min)((chunk + 1) * chunk_rows, rows));
      });
      near_[centre] = A{0}, labels_[centre] = count_;
      next = farthest(rows, limit);
    }
  }
  /// Labels those of the rows order_[begin, end) that the new centre is nearest to. It is not where it lies twice as
  /// far from a row's centre as the row does (Elkan 2003): among clusters few distances are left to compute.
  void move_to_centre(index_t centre, index_t begin, index_t end) const noexcept {
    const A twice_squared = static_cast<A>(4 * (1 + 4 * distance_error()));
    for (index_t n = begin; n < end; ++n) {
      const index_t i = order_[n];
      if (count_ > 0 && apart_[labels_[i]] > twice_squared * near_[i]) continue;
      const A d = squared_distance(x_.row(i), x_.row(centre), x_.dim);
      if (count_ == 0 || d < near_[i]) near_[i] = d, labels_[i] = count_;
    }
  }
  /// The row of the largest near times luck among those farther than `limit`, of several the first; -1 if there is
  /// none.
  [[nodiscard]] index_t farthest(index_t rows, double limit) const noexcept {
    double most = -1;
    index_t best = -1;
    for (index_t n = 0; n < rows; ++n) {
      const index_t i = order_[n];
      const auto near = static_cast<double>(near_[i]);
      if (near > limit && near * luck_[i] > most) most = near * luck_[i], best = i;
    }
    return best;
  }
  /// Of squared_distance(), relative.
  [[nodiscard]] double distance_error() const noexcept {
    return (static_cast<double>(x_.dim) + 2) * static_cast<double>(std::numeric_limits<A>::epsilon());
  }

  /// Lists the finite rows in order_ and returns how many they are.
  index_t list_finite() noexcept {
    index_t rows = 0;
    for (index_t i = 0; i < x_.count; ++i) {
      if (finite_[i]) order_[rows++] = i;
    }
    return rows;
  }

  void by_cover() {
    const index_t rows = list_finite();
    mean_of(std::span(order_, static_cast<std::size_t>(rows)), means_, sums_);
    for (index_t i = 0; i < x_.count; ++i) {
      luck_[i] = 1;
      near_[i] = squared_distance(x_.row(i), means_, x_.dim);  // so the first is the farthest from the mean
    }
    take_centres(rows, options_.radius);
    represented_by_rows_ = true;
  }

  void by_means() {
    for_each_chunk(x_.dim, [this](index_t, index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) luck_[i] = -1 / std::log(to_uniform(hash_of(i))), near_[i] = A{1};
    });
    // Without luck a row is hardly ever drawn: the luckiest are enough, and save most of the distances.
    const index_t rows = list_finite(), lucky = (std::min)(rows, seeds_drawn_from * most_);
    std::nth_element(order_, order_ + lucky, order_ + rows,
                     [this](index_t i, index_t j) { return luck_[i] > luck_[j]; });
    if (rows == 0) return;
    std::sort(order_, order_ + lucky);
    take_centres(lucky, 0);
    for (index_t j = 0; j < count_; ++j) std::copy_n(x_.row(centres_[j]), x_.dim, means_ + j * x_.stride);
    std::fill_n(labels_, x_.count, index_t{-1});
    for (index_t n = 0; assign_to_means() && n < options_.iterations; ++n) move_means();
  }
  /// Centres of groups that have members become their means.
  void move_means() {
    const index_t groups = count_;
    sort_by_label(groups);
    for_each(groups, x_.count / groups * x_.dim, [this](index_t j, index_t worker) {
      if (offsets_[j] < offsets_[j + 1]) mean_of_group(j, means_ + j * x_.stride, sums_ + worker * x_.dim);
    });
  }
  /// Labels rows with the nearest mean; says whether any label changed.
  [[nodiscard]] bool assign_to_means() {
    const packed_centres<A> centres({means_, count_, x_.dim, x_.stride}, packed_);
    for_each_chunk(count_ * x_.dim, [&](index_t chunk, index_t begin, index_t end) {
      std::array<index_t, chunk_rows> nearest;
      centres.find_nearest({x_.row(begin), end - begin, x_.dim, x_.stride}, 0, end - begin, nearest.data());
      found_[chunk] = !std::equal(labels_ + begin, labels_ + end, nearest.begin());
      std::copy_n(nearest.begin(), end - begin, labels_ + begin);
    });
    return std::any_of(found_, found_ + chunks(), [](index_t changed) { return changed != 0; });
  }

  // Hashes: bit p of a row's code is the sign of its projection on direction p.

  void by_hashes() {
    write_codes();
    choose_codes();
    std::fill_n(labels_, x_.count, index_t{-1});
    for (index_t n = 0;; ++n) {
      bool changed = false;
      for (index_t i = 0; i < x_.count; ++i) {
        const index_t nearest = nearest_code(codes_[i]);
        changed = changed || nearest != labels_[i];
        labels_[i] = nearest;
      }
      if (n == options_.iterations || !changed) return;
      move_codes();
    }
  }
  void write_codes() {
    draw_directions(options_.hash_bits * x_.dim);
    const packed_centres<A> planes({directions_, options_.hash_bits, x_.dim, x_.dim}, packed_);
    for_each_chunk(tile_tokens * x_.dim, [&](index_t, index_t begin, index_t end) {
      alignas(64) A s[block_rows * tile_tokens];
      for (index_t first = begin; first < end; first += block_rows) {
        const index_t rows = std::min<index_t>(block_rows, end - first);
        planes.multiply(x_.row(first), x_.stride, rows, 0, s);
        for (index_t r = 0; r < rows; ++r) {
          std::uint64_t code = 0;
          for (index_t p = 0; p < options_.hash_bits; ++p)
            code |= static_cast<std::uint64_t>(s[r * tile_tokens + p] > A{0}) << p;
          codes_[first + r] = code;
        }
      }
    });
  }
  /// The first centres: different codes of rows, in random order.
  void choose_codes() {
    for (index_t i = 0; i < x_.count; ++i) order_[i] = i;
    const auto luck = [this](index_t i) { return mix_bits(codes_[i] ^ random_bits(options_.seed, 1)); };
    std::sort(order_, order_ + x_.count, [&](index_t i, index_t j) { return luck(i) < luck(j); });
    count_ = 0;
    for (index_t n = 0; n < x_.count && count_ < most_; ++n) {
      const std::uint64_t code = codes_[order_[n]];
      if (finite_[order_[n]] && (count_ == 0 || centre_codes_[count_ - 1] != code)) centre_codes_[count_++] = code;
    }
  }
  [[nodiscard]] index_t nearest_code(std::uint64_t code) const noexcept {
    index_t nearest = 0;
    int least = 65;
    for (index_t j = 0; j < count_; ++j) {
      const int distance = std::popcount(code ^ centre_codes_[j]);
      if (distance < least) least = distance, nearest = j;
    }
    return nearest;
  }
  /// Each bit of a centre becomes that of most of its members, and stays where they are even.
  void move_codes() {
    sort_by_label(count_);
    for (index_t j = 0; j < count_; ++j) {
      std::array<index_t, 64> ones{};
      const index_t members = offsets_[j + 1] - offsets_[j];
      for (index_t m = offsets_[j]; m < offsets_[j + 1]; ++m) {
        for (std::size_t p = 0; p < 64; ++p) ones[p] += static_cast<index_t>(codes_[order_[m]] >> p & 1);
      }
      for (std::size_t p = 0; p < 64; ++p) {
        const std::uint64_t bit = std::uint64_t{1} << p;
        if (2 * ones[p] > members) centre_codes_[j] |= bit;
        if (2 * ones[p] < members) centre_codes_[j] &= ~bit;
      }
    }
  }

  /// Equal parts, but for one row, of the rows in the order of key(i).
  template <class Key>
  void by_order(const Key& key) {
    const index_t rows = list_finite();
    for (index_t n = 0; n < rows; ++n) longest_ = (std::max)(longest_, squared_norm(x_.row(order_[n])));
    for (index_t n = 0; n < rows; ++n) luck_[order_[n]] = key(order_[n]);
    std::sort(order_, order_ + rows,
              [this](index_t i, index_t j) { return luck_[i] != luck_[j] ? luck_[i] < luck_[j] : i < j; });
    count_ = (std::min)(most_, rows);
    for (index_t n = 0; n < rows; ++n) labels_[order_[n]] = n * count_ / rows;
  }

  // Groups from labels.

  /// Rows in the order of their labels, ascending within one; those that are not finite follow as label `groups`.
  void sort_by_label(index_t groups) {
    std::fill_n(offsets_, groups + 2, index_t{0});
    const auto label_of = [&](index_t i) { return finite_[i] ? labels_[i] : groups; };
    for (index_t i = 0; i < x_.count; ++i) ++offsets_[label_of(i) + 1];
    for (index_t j = 0; j <= groups; ++j) offsets_[j + 1] += offsets_[j];
    for (index_t i = 0; i < x_.count; ++i) order_[offsets_[label_of(i)]++] = i;
    for (index_t j = groups + 1; j > 0; --j) offsets_[j] = offsets_[j - 1];
    offsets_[0] = 0;
  }
  /// Drops empty groups; returns how many of the rest, 0 or 1, are of rows that are not finite.
  [[nodiscard]] index_t number_groups() {
    sort_by_label(count_);
    const index_t left_out = offsets_[count_ + 1] > offsets_[count_] ? 1 : 0;
    index_t kept = 0;
    for (index_t j = 0; j <= count_; ++j) {
      if (offsets_[j] == offsets_[j + 1]) continue;
      if (j < count_) centres_[kept] = centres_[j];
      offsets_[kept++] = offsets_[j];
    }
    offsets_[kept] = x_.count;
    count_ = kept;
    return left_out;
  }

  void mean_of(std::span<const index_t> rows, A* mean, double* sums) const noexcept {
    std::fill_n(sums, x_.dim, 0.0);
    for (const index_t i : rows) {
      for (index_t d = 0; d < x_.dim; ++d) sums[d] += static_cast<double>(x_.row(i)[d]);
    }
    for (index_t d = 0; d < x_.dim; ++d) mean[d] = static_cast<A>(sums[d] / static_cast<double>(rows.size()));
  }
  void mean_of_group(index_t j, A* mean, double* sums) const noexcept {
    mean_of({order_ + offsets_[j], static_cast<std::size_t>(offsets_[j + 1] - offsets_[j])}, mean, sums);
  }

  /// Writes the representative of group j and returns its radius.
  [[nodiscard]] A represent(index_t j, A* to, index_t worker) const {
    if (given_ != nullptr) {
      std::copy_n(given_ + centres_[j] * x_.dim, x_.dim, to);
      return radius_about(j, to);
    }
    double* const sums = sums_ + worker * x_.dim;
    if (!represented_by_rows_) {
      mean_of_group(j, to, sums);
      return radius_about(j, to);
    }
    const A* const centre = x_.row(centres_[j]);
    const A about_centre = radius_about(j, centre);
    if (options_.means) {
      mean_of_group(j, to, sums);
      const A about_mean = radius_about(j, to);
      if (about_mean < about_centre) return about_mean;
    }
    std::copy_n(centre, x_.dim, to);
    return about_centre;
  }
  /// The largest distance of a member of group j from a point, rounded up past the errors of its sum.
  [[nodiscard]] A radius_about(index_t j, const A* point) const noexcept {
    double largest = 0;
    for (index_t m = offsets_[j]; m < offsets_[j + 1]; ++m)
      largest = (std::max)(largest, distance_from(order_[m], point));
    const double up = largest * (1 + (static_cast<double>(x_.dim) + 4) * 0x1p-53);
    const A radius = static_cast<A>(up);
    return static_cast<double>(radius) < up ? std::nextafter(radius, std::numeric_limits<A>::infinity()) : radius;
  }
  [[nodiscard]] double distance_from(index_t i, const A* point) const noexcept {
    const A* const x = x_.row(i);
    return std::sqrt(
        sum_of_squares([&](index_t d) { return static_cast<double>(x[d]) - static_cast<double>(point[d]); }));
  }

  point_rows<A> x_;
  const grouping_options& options_;
  context& ctx_;
  index_t most_ = 0, count_ = 0;  // groups there may be, and are
  index_t given_count_ = 0;
  const A* given_ = nullptr;  // [groups, dim], representatives that are not of these rows
  bool represented_by_rows_ = false;
  double longest_ = 0;

  index_t* labels_ = nullptr;              // [n]
  index_t* order_ = nullptr;               // [n], by label
  index_t* offsets_ = nullptr;             // [groups + 2]
  index_t* centres_ = nullptr;             // [groups], rows
  A* near_ = nullptr;                      // [n], squared distance of the nearest centre
  A* apart_ = nullptr;                     // [groups], squared distance of a centre from the new one
  double* luck_ = nullptr;                 // [n]
  bool* finite_ = nullptr;                 // [n]
  std::uint64_t* codes_ = nullptr;         // [n]
  std::uint64_t* centre_codes_ = nullptr;  // [groups]
  A* means_ = nullptr;                     // [groups, stride]
  A* packed_ = nullptr;
  A* directions_ = nullptr;   // normal numbers
  double* sums_ = nullptr;    // [workers, dim]
  index_t* found_ = nullptr;  // [chunks]
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
