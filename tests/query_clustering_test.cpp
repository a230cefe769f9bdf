// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/rng.hpp"

namespace gqa::test {
namespace {

constexpr grouping_method methods[] = {grouping_method::kmeans, grouping_method::hashed, grouping_method::balanced,
                                       grouping_method::cover, grouping_method::random};

template <class A>
struct point_set {
  index_t n, dim;
  std::vector<A> data;

  tensor_view<const A, 2> view() const { return {data.data(), {n, dim}}; }
  const A* row(index_t i) const { return data.data() + i * dim; }
};

// Rows about `centres` random points, row i about point i % centres, `spread` apart from it in each direction.
template <class A>
point_set<A> planted(index_t n, index_t dim, index_t centres, double spread, std::uint64_t seed) {
  rng random(seed);
  std::vector<double> points(static_cast<std::size_t>(centres * dim));
  for (double& x : points) x = random.normal();
  point_set<A> rows{n, dim, {}};
  for (index_t i = 0; i < n; ++i)
    for (index_t d = 0; d < dim; ++d)
      rows.data.push_back(
          static_cast<A>(points[static_cast<std::size_t>(i % centres * dim + d)] + spread * random.normal()));
  return rows;
}

double distance(const double* x, const double* y, index_t dim) {
  double sum = 0;
  for (index_t d = 0; d < dim; ++d) sum += (x[d] - y[d]) * (x[d] - y[d]);
  return std::sqrt(sum);
}
template <class A>
double distance_of(const A* x, const A* y, index_t dim) {
  const std::vector<double> a(x, x + dim), b(y, y + dim);
  return distance(a.data(), b.data(), dim);
}

template <class A>
query_groups<A> grouped(const point_set<A>& rows, const grouping_options& options) {
  context ctx;
  query_groups<A> groups;
  group_queries(rows.view(), options, groups, ctx);
  return groups;
}

// Which rows are together, whatever the groups' numbers.
template <class A>
std::set<std::set<index_t>> partition_of(const query_groups<A>& groups) {
  std::set<std::set<index_t>> parts;
  for (index_t j = 0; j < groups.size(); ++j) {
    const auto members = groups.members(j);
    parts.emplace(members.begin(), members.end());
  }
  return parts;
}
std::set<std::set<index_t>> planted_partition(index_t n, index_t centres) {
  std::map<index_t, std::set<index_t>> parts;
  for (index_t i = 0; i < n; ++i) parts[i % centres].insert(i);
  std::set<std::set<index_t>> all;
  for (const auto& [_, part] : parts) all.insert(part);
  return all;
}

// Every row is in one group, and lies within its radius, which some member needs.
template <class A>
void expect_sound(const point_set<A>& rows, const query_groups<A>& groups, const std::string& what) {
  SCOPED_TRACE(what);
  ASSERT_EQ(groups.rows(), rows.n);
  ASSERT_EQ(groups.dim, rows.dim);
  auto sorted = groups.order;
  std::sort(sorted.begin(), sorted.end());
  for (index_t i = 0; i < rows.n; ++i) ASSERT_EQ(sorted[static_cast<std::size_t>(i)], i);
  ASSERT_EQ(groups.offsets.front(), 0);
  ASSERT_EQ(groups.offsets.back(), rows.n);
  for (index_t j = 0; j < groups.size(); ++j) {
    const auto members = groups.members(j);
    ASSERT_FALSE(members.empty());
    ASSERT_TRUE(std::is_sorted(members.begin(), members.end()));
    double farthest = 0;
    for (const index_t i : members)
      farthest = std::max(farthest, distance_of(rows.row(i), groups.representative(j).data(), rows.dim));
    const auto radius = static_cast<double>(groups.radius(j));
    ASSERT_GE(radius, farthest * (1 - 0x1p-50));
    ASSERT_LE(radius, farthest * (1 + 2 * static_cast<double>(std::numeric_limits<A>::epsilon()) + 0x1p-40));
  }
}

template <class A>
void expect_sound_groups() {
  rng random(7);
  for (const index_t n : {1, 2, 5, 63, 64, 65, 192, 193, 500}) {
    const index_t dim = random.pick({1, 2, 3, 8, 15, 16, 17, 40, 64, 80, 128});
    const auto rows = planted<A>(n, dim, std::max<index_t>(n / 7, 1), 0.3, static_cast<std::uint64_t>(n));
    for (const grouping_method method : methods) {
      for (const index_t wanted : {index_t{1}, std::max<index_t>(n / 10, 1), n, 2 * n}) {
        grouping_options o;
        o.method = method, o.groups = wanted, o.seed = 3, o.means = random.chance(0.5);
        const auto groups = grouped(rows, o);
        expect_sound(rows, groups,
                     "method " + std::to_string(static_cast<int>(method)) + ", n " + std::to_string(n) + ", dim " +
                         std::to_string(dim) + ", groups " + std::to_string(wanted));
        EXPECT_LE(groups.size(), std::min(wanted, n));
        EXPECT_EQ(groups, grouped(rows, o));
      }
    }
  }
}
TEST(QueryClustering, GroupsArePartitionsWithinTheirRadii) {
  expect_sound_groups<float>();
  expect_sound_groups<double>();
}

TEST(QueryClustering, FindsPlantedClusters) {
  const index_t n = 700, centres = 50;
  const auto rows = planted<float>(n, 64, centres, 0.02, 11);
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    grouping_options o;
    o.groups = centres, o.seed = seed;
    for (const auto method : {grouping_method::kmeans, grouping_method::cover}) {
      o.method = method;
      EXPECT_EQ(partition_of(grouped(rows, o)), planted_partition(n, centres)) << static_cast<int>(method);
    }
    o.method = grouping_method::random;
    EXPECT_NE(partition_of(grouped(rows, o)), planted_partition(n, centres));
    // Hashes keep clusters of a random direction together, and may give two the same code.
    o.method = grouping_method::hashed;
    o.groups = n;
    std::map<index_t, std::set<index_t>> codes_of;
    const auto hashed = grouped(rows, o);
    for (index_t j = 0; j < hashed.size(); ++j)
      for (const index_t i : hashed.members(j)) codes_of[i % centres].insert(j);
    std::size_t pure = 0;
    for (const auto& [_, groups] : codes_of) pure += groups.size() <= 3;
    EXPECT_GE(pure, centres / 2);
  }
}

TEST(QueryClustering, LloydLowersTheSumOfSquares) {
  const auto rows = planted<double>(600, 24, 200, 0.8, 5);
  const auto sum_of_squares = [&](index_t iterations) {
    grouping_options o;
    o.groups = 40, o.iterations = iterations;
    const auto groups = grouped(rows, o);
    double sum = 0;
    for (index_t j = 0; j < groups.size(); ++j)
      for (const index_t i : groups.members(j)) {
        const double d = distance(rows.row(i), groups.representative(j).data(), rows.dim);
        sum += d * d;
      }
    return sum;
  };
  double before = sum_of_squares(0);
  for (index_t iterations = 1; iterations < 12; ++iterations) {
    const double now = sum_of_squares(iterations);
    EXPECT_LE(now, before * (1 + 1e-12));
    before = now;
  }
  EXPECT_LT(before, 0.97 * sum_of_squares(0));
}

// Rows go to the nearest centre, or to one as near within the errors of the products that compare them:
// |x - c|^2 is off by 2 (dim + 2) eps |x| |c| at most, on either side.
template <class A>
void expect_nearest() {
  rng random(3);
  for (int round = 0; round < 60; ++round) {
    const index_t n = random.between(1, 40), centres = random.between(1, 200), dim = random.between(1, 70);
    const auto x = planted<A>(n, dim, n, 0.0, random.bits()), c = planted<A>(centres, dim, centres, 0.0, random.bits());
    std::vector<A> memory(static_cast<std::size_t>(detail::packed_centres<A>::elements(centres, dim)));
    const detail::packed_centres<A> packed({c.data.data(), centres, dim, dim}, memory.data());
    std::vector<index_t> nearest(static_cast<std::size_t>(n));
    packed.find_nearest({x.data.data(), n, dim, dim}, 0, n, nearest.data());
    for (index_t i = 0; i < n; ++i) {
      const index_t found = nearest[static_cast<std::size_t>(i)];
      ASSERT_TRUE(found >= 0 && found < centres);
      const std::vector<double> zero(static_cast<std::size_t>(dim));
      const std::vector<A> origin(static_cast<std::size_t>(dim));
      double least = 1e300, longest = 0;
      for (index_t j = 0; j < centres; ++j) {
        least = std::min(least, std::pow(distance_of(x.row(i), c.row(j), dim), 2));
        longest = std::max(longest, distance_of(c.row(j), origin.data(), dim));
      }
      const double length = distance_of(x.row(i), origin.data(), dim);
      const double bound = 4 * static_cast<double>(dim + 2) * static_cast<double>(std::numeric_limits<A>::epsilon()) *
                           (length + longest) * longest;
      ASSERT_LE(std::pow(distance_of(x.row(i), c.row(found), dim), 2), least + bound);
    }
  }
}
TEST(QueryClustering, RowsGoToTheNearestCentre) {
  expect_nearest<float>();
  expect_nearest<double>();
}

TEST(QueryClustering, OfEqualCentresTheFirstIsNearest) {
  const auto x = planted<float>(7, 20, 7, 0.0, 1);
  std::vector<float> centres;
  for (int copy = 0; copy < 12; ++copy) centres.insert(centres.end(), x.data.begin(), x.data.end());  // 84: two tiles
  std::vector<float> memory(static_cast<std::size_t>(detail::packed_centres<float>::elements(84, 20)));
  const detail::packed_centres<float> packed({centres.data(), 84, 20, 20}, memory.data());
  std::vector<index_t> nearest(7);
  packed.find_nearest({x.data.data(), 7, 20, 20}, 0, 7, nearest.data());
  for (index_t i = 0; i < 7; ++i) EXPECT_EQ(nearest[static_cast<std::size_t>(i)], i);
}

// Once nothing changes every row is in the group whose mean is nearest to it.
TEST(QueryClustering, LloydStopsWhereNoRowIsNearerToAnotherMean) {
  const auto rows = planted<double>(600, 8, 200, 0.8, 6);
  grouping_options o;
  o.groups = 25, o.iterations = 1000;
  const auto groups = grouped(rows, o);
  for (index_t j = 0; j < groups.size(); ++j) {
    for (const index_t i : groups.members(j)) {
      const double own = distance(rows.row(i), groups.representative(j).data(), rows.dim);
      for (index_t other = 0; other < groups.size(); ++other)
        EXPECT_LE(own, distance(rows.row(i), groups.representative(other).data(), rows.dim) + 1e-12);
    }
  }
}

TEST(QueryClustering, OfCentresEquallyFarARowGoesToTheFirst) {
  const point_set<float> rows{4, 1, {-2, 0, 2, 0}};
  grouping_options o;
  o.method = grouping_method::cover, o.groups = 2;
  EXPECT_EQ(partition_of(grouped(rows, o)), (std::set<std::set<index_t>>{{0, 1, 3}, {2}}));
}

TEST(QueryClustering, CoverKeepsItsRadiusWithCentresThatFarApart) {
  const auto rows = planted<float>(400, 32, 60, 0.4, 2);
  for (const double radius : {0.0, 1.0, 2.5, 4.0, 7.0, 100.0}) {
    for (const bool means : {false, true}) {
      grouping_options o;
      o.method = grouping_method::cover, o.radius = radius, o.means = means;
      const auto groups = grouped(rows, o);
      expect_sound(rows, groups, "radius " + std::to_string(radius));
      for (index_t j = 0; j < groups.size(); ++j) {
        EXPECT_LE(groups.radius(j), radius);
        for (index_t i = 0; i < j && !means; ++i) {
          EXPECT_GT(distance_of(groups.representative(i).data(), groups.representative(j).data(), rows.dim),
                    radius * (1 - 1e-5));
        }
      }
      if (radius == 0) {
        EXPECT_EQ(groups.size(), rows.n);
      }
      if (radius == 100) {
        EXPECT_EQ(groups.size(), 1);
      }
    }
  }
}

TEST(QueryClustering, MeansOfACoverAreTakenWhereTheyAreNearer) {
  const auto rows = planted<float>(300, 16, 10, 0.3, 4);
  grouping_options o;
  o.method = grouping_method::cover, o.groups = 10;
  const auto about_centres = grouped(rows, o);
  o.means = true;
  const auto about_means = grouped(rows, o);
  ASSERT_EQ(about_means.size(), about_centres.size());
  bool any_less = false;
  for (index_t j = 0; j < about_means.size(); ++j) {
    EXPECT_LE(about_means.radius(j), about_centres.radius(j));
    any_less = any_less || about_means.radius(j) < about_centres.radius(j);
  }
  EXPECT_TRUE(any_less);
}

TEST(QueryClustering, CentresOfACoverStayWhereTheMeanIsFarther) {
  const point_set<float> rows{5, 1, {0, 3, 3, 3, -3}};  // their mean, 1.2, is 4.2 from the last
  grouping_options o;
  o.radius = 3, o.means = true;
  context ctx;
  query_groups<float> groups;
  group_by_distance(
      rows.view(), [&](index_t i, index_t j) { return std::abs(*rows.row(i) - *rows.row(j)); }, o, groups, ctx);
  ASSERT_EQ(groups.size(), 1);
  EXPECT_EQ(groups.representative(0)[0], 0);
  EXPECT_FLOAT_EQ(groups.radius(0), 3);  // rounded up
}

TEST(QueryClustering, EqualRowsAreOneGroup) {
  point_set<float> rows{100, 24, {}};
  const auto one = planted<float>(1, 24, 1, 0.0, 9);
  for (index_t i = 0; i < rows.n; ++i) rows.data.insert(rows.data.end(), one.data.begin(), one.data.end());
  for (const auto method : {grouping_method::kmeans, grouping_method::hashed, grouping_method::cover}) {
    grouping_options o;
    o.method = method, o.groups = 20;
    const auto groups = grouped(rows, o);
    EXPECT_EQ(groups.size(), 1) << static_cast<int>(method);
    EXPECT_EQ(groups.radius(0), 0);
    EXPECT_TRUE(std::equal(one.data.begin(), one.data.end(), groups.representatives.begin()));
  }
}

TEST(QueryClustering, AsManyGroupsAsRowsLeaveEachByItself) {
  const auto rows = planted<float>(130, 20, 130, 0.0, 8);
  for (const auto method : {grouping_method::kmeans, grouping_method::balanced, grouping_method::cover}) {
    grouping_options o;
    o.method = method, o.groups = rows.n;
    const auto groups = grouped(rows, o);
    ASSERT_EQ(groups.size(), rows.n) << static_cast<int>(method);
    for (index_t j = 0; j < rows.n; ++j) {
      EXPECT_EQ(groups.radius(j), 0);
      EXPECT_TRUE(std::equal(rows.row(groups.members(j)[0]), rows.row(groups.members(j)[0]) + rows.dim,
                             groups.representative(j).begin()));
    }
  }
}

TEST(QueryClustering, DoesNotDependOnTheOrderOfRows) {
  const auto rows = planted<float>(500, 32, 40, 0.3, 21);
  std::vector<index_t> shuffled(static_cast<std::size_t>(rows.n));
  std::iota(shuffled.begin(), shuffled.end(), index_t{0});
  rng random(5);
  for (std::size_t i = shuffled.size() - 1; i > 0; --i)
    std::swap(shuffled[i], shuffled[static_cast<std::size_t>(random.between(0, static_cast<index_t>(i)))]);
  point_set<float> moved{rows.n, rows.dim, {}};
  for (const index_t i : shuffled) moved.data.insert(moved.data.end(), rows.row(i), rows.row(i) + rows.dim);
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 40, o.seed = 77;
    std::set<std::set<index_t>> back;
    for (const auto& part : partition_of(grouped(moved, o))) {
      std::set<index_t> rows_of;
      for (const index_t i : part) rows_of.insert(shuffled[static_cast<std::size_t>(i)]);
      back.insert(rows_of);
    }
    EXPECT_EQ(back, partition_of(grouped(rows, o))) << static_cast<int>(method);
  }
}

TEST(QueryClustering, DoesNotDependOnThreads) {
  const auto rows = planted<float>(3000, 64, 90, 0.6, 31);
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 70;
    const auto expected = grouped(rows, o);
    for (const int threads : {2, 5}) {
      Eigen::ThreadPool pool(threads);
      context ctx(pool);
      query_groups<float> groups;
      group_queries(rows.view(), o, groups, ctx);
      EXPECT_EQ(groups, expected) << static_cast<int>(method);
    }
  }
}

TEST(QueryClustering, DependsOnTheSeedWhereSomethingIsRandom) {
  const auto rows = planted<float>(300, 32, 300, 0.0, 12);
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 20, o.hash_bits = 24;
    const auto first = grouped(rows, o);
    o.seed = 1;
    EXPECT_EQ(first == grouped(rows, o), method == grouping_method::cover) << static_cast<int>(method);
  }
}

TEST(QueryClustering, BalancedAndRandomGroupsDifferByOneRow) {
  const auto rows = planted<float>(205, 16, 30, 0.5, 14);
  for (const auto method : {grouping_method::balanced, grouping_method::random}) {
    grouping_options o;
    o.method = method, o.groups = 10;
    const auto groups = grouped(rows, o);
    ASSERT_EQ(groups.size(), 10);
    for (index_t j = 0; j < groups.size(); ++j) {
      EXPECT_GE(groups.members(j).size(), 20u);
      EXPECT_LE(groups.members(j).size(), 21u);
    }
  }
}

// The Hamming distance of two codes grows with the angle between the rows: pairs of directions 4 degrees apart stay
// together, whichever three codes come first, once their bits have moved to those of most members.
TEST(QueryClustering, HashedGroupsAreThoseOfDirections) {
  point_set<float> rows{6, 2, {}};
  for (const double degrees : {0.0, 4.0, 60.0, 64.0, 150.0, 154.0}) {
    const double angle = degrees * std::numbers::pi / 180;
    rows.data.push_back(static_cast<float>(std::cos(angle))), rows.data.push_back(static_cast<float>(std::sin(angle)));
  }
  const std::set<std::set<index_t>> pairs{{0, 1}, {2, 3}, {4, 5}};
  int found = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    grouping_options o;
    o.method = grouping_method::hashed, o.groups = 3, o.hash_bits = 64, o.seed = seed, o.iterations = 10;
    found += partition_of(grouped(rows, o)) == pairs ? 1 : 0;
  }
  EXPECT_GE(found, 16);  // two of the first codes fall into one pair in 3 of 5 draws
}

// A centre's bits follow most of its members: from a bad start, groups come nearer to their directions.
TEST(QueryClustering, HashedCentresMoveToTheirMembers) {
  const auto rows = planted<float>(400, 32, 8, 0.5, 41);
  const auto sum_of_radii = [&](index_t iterations) {
    double sum = 0;
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      grouping_options o;
      o.method = grouping_method::hashed, o.groups = 8, o.iterations = iterations, o.seed = seed;
      const auto groups = grouped(rows, o);
      for (index_t j = 0; j < groups.size(); ++j)
        for (const index_t i : groups.members(j))
          sum += std::pow(distance_of(rows.row(i), groups.representative(j).data(), rows.dim), 2);
    }
    return sum;
  };
  EXPECT_LT(sum_of_radii(10), 0.9 * sum_of_radii(0));
}

TEST(QueryClustering, RowsThatAreNotFiniteAreByThemselves) {
  auto rows = planted<float>(100, 16, 10, 0.1, 17);
  rows.data[5 * 16 + 3] = std::numeric_limits<float>::quiet_NaN();
  rows.data[50 * 16] = std::numeric_limits<float>::infinity();
  rows.data[99 * 16 + 15] = 3e38f;  // its squared norm is not a float
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 10;
    const auto groups = grouped(rows, o);
    const index_t last = groups.size() - 1;
    ASSERT_EQ(std::vector<index_t>(groups.members(last).begin(), groups.members(last).end()),
              (std::vector<index_t>{5, 50, 99}))
        << static_cast<int>(method);
    EXPECT_EQ(groups.radius(last), std::numeric_limits<float>::infinity());
    for (index_t j = 0; j < last; ++j) {
      EXPECT_TRUE(std::isfinite(groups.radius(j)));
      for (const float x : groups.representative(j)) EXPECT_TRUE(std::isfinite(x));
    }
  }
}

TEST(QueryClustering, OnlyRowsThatAreNotFinite) {
  point_set<float> rows{3, 2, std::vector<float>(6, std::numeric_limits<float>::quiet_NaN())};
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 2;
    EXPECT_EQ(grouped(rows, o).size(), 1) << static_cast<int>(method);
  }
}

TEST(QueryClustering, NoRowsAreNoGroups) {
  const point_set<float> rows{0, 8, {}};
  for (const grouping_method method : methods) {
    grouping_options o;
    o.method = method, o.groups = 4;
    const auto groups = grouped(rows, o);
    EXPECT_EQ(groups.size(), 0);
    EXPECT_EQ(groups.offsets, std::vector<index_t>{0});
  }
}

TEST(QueryClustering, TakesSixteenBitRowsWithAnyStride) {
  const auto rows = planted<float>(60, 24, 6, 0.05, 19);
  std::vector<Eigen::bfloat16> stored(60 * 32);
  point_set<float> rounded{60, 24, {}};
  for (index_t i = 0; i < 60; ++i) {
    for (index_t d = 0; d < 24; ++d) {
      const auto x = static_cast<Eigen::bfloat16>(rows.row(i)[d]);
      stored[static_cast<std::size_t>(i * 32 + d)] = x;
      rounded.data.push_back(static_cast<float>(x));
    }
  }
  grouping_options o;
  o.groups = 6;
  context ctx;
  query_groups<float> groups;
  group_queries(tensor_view<const Eigen::bfloat16, 2>(stored.data(), {60, 24}, {32, 1}), o, groups, ctx);
  EXPECT_EQ(groups, grouped(rounded, o));
}

TEST(QueryClustering, PoolsTheHeadsOfAKvHead) {
  const auto rows = planted<float>(60, 16, 6, 0.05, 19);  // 5 positions of 12 heads
  context ctx;
  query_groups<float> groups;
  grouping_options o;
  o.groups = 5;
  group_queries(tensor_view<const float, 4>(rows.row(4), {1, 5, 4, 16}, {0, 12 * 16, 16, 1}), o, groups, ctx);
  point_set<float> pooled{20, 16, {}};
  for (index_t s = 0; s < 5; ++s)
    pooled.data.insert(pooled.data.end(), rows.row(12 * s + 4), rows.row(12 * s + 4) + 64);
  EXPECT_EQ(groups, grouped(pooled, o));
}

TEST(QueryClustering, SendsRowsToRepresentativesThatAreGiven) {
  const auto rows = planted<float>(50, 16, 5, 0.05, 43);
  grouping_options o;
  o.groups = 5;
  const auto first = grouped(point_set<float>{20, 16, {rows.data.begin(), rows.data.begin() + 20 * 16}}, o);
  point_set<float> others{30, 16, {rows.data.begin() + 20 * 16, rows.data.end()}};
  for (float& x : std::span(others.data).subspan(7 * 16, 16)) x += 3;  // far from all
  context ctx;
  query_groups<float> groups;
  const tensor_view<const float, 2> given(first.representatives.data(), {5, 16});
  group_by_representatives(others.view(), given, 2, groups, ctx);
  ASSERT_EQ(groups.size(), 6);
  EXPECT_EQ(groups.members(5).size(), 1u);
  EXPECT_EQ(groups.members(5)[0], 7);
  EXPECT_EQ(groups.radius(5), std::numeric_limits<float>::infinity());
  for (index_t j = 0; j < 5; ++j) {
    EXPECT_TRUE(
        std::equal(first.representative(j).begin(), first.representative(j).end(), groups.representative(j).begin()));
    for (const index_t i : groups.members(j)) EXPECT_EQ(i % 5, groups.members(j)[0] % 5);
  }
  // Representatives that are not finite still make a partition.
  const std::vector<float> nan(2 * 16, std::numeric_limits<float>::quiet_NaN());
  group_by_representatives(others.view(), tensor_view<const float, 2>(nan.data(), {2, 16}), 2, groups, ctx);
  EXPECT_EQ(groups.rows(), 30);
  for (const index_t i : groups.order) EXPECT_LT(i, 30);
  // Those that nobody comes to are left out.
  group_by_representatives(tensor_view<const float, 2>(others.row(0), {1, 16}), given,
                           std::numeric_limits<double>::infinity(), groups, ctx);
  EXPECT_EQ(groups.size(), 1);
  expect_sound(point_set<float>{1, 16, {others.data.begin(), others.data.begin() + 16}}, groups, "one");
}

TEST(QueryClustering, ByLabels) {
  const auto rows = planted<float>(8, 4, 8, 0.0, 23);
  const std::vector<index_t> labels{5, 2, 5, 0, 2, 5, 0, 7};
  context ctx;
  query_groups<float> groups;
  group_by_labels(rows.view(), std::span<const index_t>(labels), groups, ctx);
  expect_sound(rows, groups, "labels");
  EXPECT_EQ(groups.order, (std::vector<index_t>{3, 6, 1, 4, 0, 2, 5, 7}));
  EXPECT_EQ(groups.offsets, (std::vector<index_t>{0, 2, 4, 7, 8}));
  EXPECT_FLOAT_EQ(groups.representative(0)[1], (rows.row(3)[1] + rows.row(6)[1]) / 2);
}

TEST(QueryClustering, ByTheCallersDistance) {
  const auto rows = planted<float>(90, 8, 9, 0.01, 25);
  grouping_options o;
  o.radius = 0.5;
  context ctx;
  query_groups<float> groups;
  index_t asked = 0;
  group_by_distance(
      rows.view(),
      [&](index_t i, index_t j) {
        ++asked;
        return i % 9 == j % 9 ? 0.1 : 3.0;
      },
      o, groups, ctx);
  EXPECT_EQ(partition_of(groups), planted_partition(90, 9));
  EXPECT_EQ(asked, 90 * 9 - 9);  // not of a centre from itself
  expect_sound(rows, groups, "distance");
  auto with_nan = rows;
  with_nan.data[0] = std::numeric_limits<float>::quiet_NaN();
  group_by_distance(
      with_nan.view(), [](index_t, index_t) { return 0.0; }, o, groups, ctx);
  EXPECT_EQ(groups.order.back(), 0);
  EXPECT_EQ(groups.size(), 2);
  // One that makes no sense still ends, in a partition.
  group_by_distance(
      rows.view(), [](index_t, index_t) { return std::numeric_limits<double>::quiet_NaN(); }, o, groups, ctx);
  expect_sound(rows, groups, "NaN");
  EXPECT_EQ(groups.size(), 90);
}

#ifndef GQA_NO_EXCEPTIONS
TEST(QueryClustering, RefusesWhatHasNoMeaning) {
  const auto rows = planted<float>(10, 4, 2, 0.1, 1);
  context ctx;
  query_groups<float> groups;
  const auto code_of = [&](const auto& call) {
    try {
      call();
    } catch (const error& e) {
      EXPECT_TRUE(groups == query_groups<float>{}) << e.what();
      return e.code();
    }
    return errc::ok;
  };
  const auto with = [&](const auto& change) {
    grouping_options o;
    o.groups = 2;
    change(o);
    return code_of([&] { group_queries(rows.view(), o, groups, ctx); });
  };
  EXPECT_EQ(with([](auto& o) { o.groups = 0; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.method = static_cast<grouping_method>(-1); }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.method = grouping_method::cover, o.groups = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.radius = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.radius = std::numeric_limits<double>::quiet_NaN(); }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.iterations = -1; }), errc::option);
  EXPECT_EQ(with([](auto& o) { o.method = grouping_method::hashed, o.hash_bits = 65; }), errc::option);
  const grouping_options two{.groups = 2};
  const auto rows_with = [&](tensor_view<const float, 2> bad) {
    return code_of([&] { group_queries(bad, two, groups, ctx); });
  };
  EXPECT_EQ(rows_with({rows.data.data(), {10, 0}}), errc::shape);
  EXPECT_EQ(rows_with({rows.data.data(), {10, 2}, {4, 2}}), errc::stride);
  EXPECT_EQ(rows_with({nullptr, {10, 4}}), errc::shape);
  for (const index_t label : {-1, 10}) {
    std::vector<index_t> labels(10, 0);
    labels[3] = label;
    EXPECT_EQ(code_of([&] { group_by_labels(rows.view(), std::span<const index_t>(labels), groups, ctx); }),
              errc::range);
  }
  const std::vector<index_t> few(9, 0);
  EXPECT_EQ(code_of([&] { group_by_labels(rows.view(), std::span<const index_t>(few), groups, ctx); }), errc::shape);
}
#endif

}  // namespace
}  // namespace gqa::test
