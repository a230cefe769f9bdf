// SPDX-License-Identifier: Apache-2.0
/// \file
/// Query groups: a partition of rows of queries that are alike, what stands for each part, and how to ask for one.
///
/// Rows are pooled queries that see the same keys: some positions of all heads of a KV head, or of one, [n, D]. A group
/// has a representative and a radius, the largest distance of a member from it. The radius bounds what grouping costs:
/// if all keys lie within R of a point, scores of two rows that are r apart differ by at most delta = |scale| r R, but
/// for what a softmax does not see, and their attention weights by 2 tanh(delta / 2) in all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/base/reporting_vector.hpp>

namespace gqa {
namespace detail {

/// Groups where they lie: a caller's, or those of a block at work.
template <class A>
struct groups_view {
  index_t dim;
  std::span<const index_t> order, offsets;
  std::span<const A> representatives, radii;

  template <class Groups>
  [[nodiscard]] static groups_view of(const Groups& g) noexcept {
    return {g.dim, g.order, g.offsets, g.representatives, g.radii};
  }
  [[nodiscard]] index_t rows() const noexcept { return static_cast<index_t>(order.size()); }
  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(radii.size()); }
  [[nodiscard]] std::span<const index_t> members(index_t j) const noexcept {
    const auto at = static_cast<std::size_t>(j);
    return order.subspan(static_cast<std::size_t>(offsets[at]),
                         static_cast<std::size_t>(offsets[at + 1] - offsets[at]));
  }
  [[nodiscard]] std::span<const A> representative(index_t j) const noexcept {
    return representatives.subspan(static_cast<std::size_t>(j * dim), static_cast<std::size_t>(dim));
  }
  [[nodiscard]] A radius(index_t j) const noexcept { return radii[static_cast<std::size_t>(j)]; }
};

}  // namespace detail

/// Groups of n rows: a partition, and what stands for each part.
/// \tparam A  float or double
template <class A>
struct query_groups {
  index_t dim = 0;
  std::vector<index_t> order;      // [n], the rows, group after group, ascending within a group
  std::vector<index_t> offsets;    // [groups + 1] into order
  std::vector<A> representatives;  // [groups, D]
  std::vector<A> radii;            // [groups], rounded up; inf where a row is not finite

  [[nodiscard]] index_t rows() const noexcept { return static_cast<index_t>(order.size()); }
  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(radii.size()); }
  /// Rows of group j.
  [[nodiscard]] std::span<const index_t> members(index_t j) const noexcept {
    return detail::groups_view<A>::of(*this).members(j);
  }
  [[nodiscard]] std::span<const A> representative(index_t j) const noexcept {
    return detail::groups_view<A>::of(*this).representative(j);
  }
  [[nodiscard]] A radius(index_t j) const noexcept { return radii[static_cast<std::size_t>(j)]; }

  [[nodiscard]] friend bool operator==(const query_groups&, const query_groups&) = default;
};

namespace detail {

/// What the library keeps groups of its own in.
template <class A>
struct groups_memory {
  index_t dim = 0;
  reporting_vector<index_t> order, offsets;
  reporting_vector<A> representatives, radii;
};

/// Whether order and offsets are those of a partition, ascending within a group, and the rest has its size. `seen`: a
/// bit a row at least, all 0, as they are again where it is one.
template <class A>
[[nodiscard]] bool is_partition(const groups_view<A>& g, std::span<std::uint64_t> seen) noexcept {
  const auto groups = static_cast<std::size_t>(g.size());
  if (g.offsets.size() != groups + 1 || g.offsets.front() != 0 || g.offsets.back() != g.rows() ||
      g.representatives.size() != groups * static_cast<std::size_t>(g.dim))
    return false;
  for (std::size_t j = 0; j < groups; ++j) {
    if (g.offsets[j + 1] <= g.offsets[j] || g.offsets[j + 1] > g.rows()) return false;
    const auto members = g.members(static_cast<index_t>(j));
    if (!std::is_sorted(members.begin(), members.end())) return false;
  }
  for (const index_t i : g.order) {
    if (i < 0 || i >= g.rows()) return false;
    std::uint64_t& word = seen[static_cast<std::size_t>(i / 64)];
    const std::uint64_t bit = std::uint64_t{1} << i % 64;
    if ((word & bit) != 0) return false;
    word |= bit;
  }
  std::fill(seen.begin(), seen.end(), std::uint64_t{0});
  return true;
}

}  // namespace detail

enum class grouping_method {
  kmeans,    ///< Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007)
  hashed,    ///< signs of random projections, k-means among them in Hamming distance (Vyas et al. 2020)
  balanced,  ///< equal parts of the rows in the order of one random projection (SMYRF, Daras et al. 2020)
  cover,     ///< farthest points (Gonzalez 1985): as many groups as the radius asks for, by content
  random,    ///< equal parts in random order: the control that every other method has to beat
};

struct grouping_options {
  grouping_method method = grouping_method::kmeans;
  index_t groups = {};     ///< how many, fewer where rows are equal; of cover at most, 0: as many as it takes
  double radius = {};      ///< cover: until no row is farther than this from its representative
  index_t iterations = 4;  ///< kmeans, hashed: at most; fewer where nothing changes
  index_t hash_bits = 63;  ///< hashed: projections, 1 to 64
  bool means = {};         ///< cover: a group's mean instead of its centre, where that is nearer to the farthest member
  std::uint64_t seed = {};  ///< of everything random

  [[nodiscard]] friend bool operator==(const grouping_options&, const grouping_options&) = default;
};

}  // namespace gqa
