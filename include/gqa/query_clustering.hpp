// SPDX-License-Identifier: Apache-2.0
/// \file
/// Query clustering: groups of rows (query_groups.hpp) by their contents, by labels or by a distance.
///
/// Groups are functions of the rows, the options and the seed. They do not depend on threads, and those by content do
/// not depend on the order of the rows but for ties and the last bits of means: randomness is drawn from what a row
/// holds.
#pragma once

#include <cstddef>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/grouped/row_grouper.hpp>
#include <gqa/error.hpp>
#include <gqa/query_groups.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
namespace detail {

[[nodiscard]] inline fault find_grouping_fault(const grouping_options& o) noexcept {
  if (o.method < grouping_method::kmeans || o.method > grouping_method::random)
    return make_fault(errc::option, "grouping method: expected one of the enumerators, got %d",
                      static_cast<int>(o.method));
  const bool covers = o.method == grouping_method::cover;
  if (o.groups < (covers ? 0 : 1))
    return make_fault(errc::option, "options.groups: expected %d or more, got %lld", covers ? 0 : 1,
                      printable(o.groups));
  if (!(o.radius >= 0)) return make_fault(errc::option, "options.radius: expected a number >= 0, got %g", o.radius);
  if (o.iterations < 0)
    return make_fault(errc::option, "options.iterations: expected 0 or more, got %lld", printable(o.iterations));
  if (o.method == grouping_method::hashed && (o.hash_bits < 1 || o.hash_bits > 64))
    return make_fault(errc::option, "options.hash_bits: expected 1 to 64, got %lld", printable(o.hash_bits));
  return {};
}

/// Rows [n, D] as one batch of one head, for the checks of a door.
template <class T>
[[nodiscard]] fault find_rows_fault(const tensor_view<const T, 2>& rows) noexcept {
  const tensor_view<const T, 4> as_queries(rows.data(), {1, rows.extent(0), 1, rows.extent(1)},
                                           {0, rows.stride(0), 0, rows.stride(1)});
  if (const auto f = find_layout_fault(describe("rows", as_queries))) return f;
  if (rows.extent(1) < 1)
    return make_fault(errc::shape, "rows: expected at least 1 element each, got %lld", printable(rows.extent(1)));
  return {};
}

inline namespace GQA_ISA {

/// Runs `group(grouper)` over a copy of n rows in accumulators, of which row_at(i) is the i-th; `given`
/// representatives, or as many as it finds.
template <class A, class RowAt, class Group>
void group_rows(index_t n, index_t dim, const RowAt& row_at, const grouping_options& options, query_groups<A>& groups,
                index_t given, context& ctx, const Group& group) {
  const index_t stride = round_up(dim, 16);
  const auto copy_bytes = static_cast<std::size_t>(round_up(n * stride, 64)) * sizeof(A);
  std::byte* const memory = ctx.detail_scratch(copy_bytes + row_grouper<A>::bytes(n, dim, options, given, ctx));
  if (memory == nullptr) return;
  A* const copy = reinterpret_cast<A*>(memory);
  for (index_t i = 0; i < n; ++i) {
    const auto* const row = row_at(i);
    for (index_t d = 0; d < dim; ++d) copy[i * stride + d] = static_cast<A>(row[d]);
  }
  row_grouper<A> grouper({copy, n, dim, stride}, options, given, ctx, memory + copy_bytes);
  group(grouper);
  static_cast<void>(grouper.write(groups));
}
template <class T, class Group>
void group_rows(const tensor_view<const T, 2>& rows, const grouping_options& options,
                query_groups<accumulator_t<T>>& groups, index_t given, context& ctx, const Group& group) {
  const auto row_at = [&](index_t i) { return rows.data() + i * rows.stride(0); };
  group_rows(rows.extent(0), rows.extent(1), row_at, options, groups, given, ctx, group);
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Groups rows [n, D], any stride between rows, by their contents. Rows that are not finite make a group of their own.
/// \throws error (errc::option, errc::shape, errc::stride); groups is untouched then
/// Cost: kmeans n groups D multiply-adds an iteration at the speed of a matrix product, cover and the seeds of kmeans n
/// groups D at that of L2, hashed one product n bits D and n groups popcounts an iteration, balanced and random n D.
/// Scratch, in the context, of some 3 n D elements.
template <class T>
void group_queries(tensor_view<const T, 2> rows, const grouping_options& options,
                   query_groups<accumulator_t<T>>& groups, context& ctx) {
  if (const auto f = detail::find_rows_fault(rows)) return detail::raise(f);
  if (const auto f = detail::find_grouping_fault(options)) return detail::raise(f);
  detail::group_rows(rows, options, groups, 0, ctx, [](auto& grouper) { grouper.by_content(); });
}

/// The same of queries [1, S, H, D] of one sequence and one KV head: the pooled rows s * H + h.
template <class T>
void group_queries(const tensor_view<const T, 4>& q, const grouping_options& options,
                   query_groups<accumulator_t<T>>& groups, context& ctx) {
  const detail::operand queries = detail::describe("q", q);
  if (const auto f = detail::find_layout_fault(queries)) return detail::raise(f);
  if (const auto f = detail::find_extent_fault(queries, 0, 1, "one sequence")) return detail::raise(f);
  if (q.extent(3) < 1)
    return detail::raise(detail::make_fault(errc::shape, "q: expected at least 1 element each, got none"));
  if (const auto f = detail::find_grouping_fault(options)) return detail::raise(f);
  const index_t heads = q.extent(2);
  const auto row_at = [&](index_t i) { return &q(0, i / heads, i % heads, 0); };
  detail::group_rows(q.extent(1) * heads, q.extent(3), row_at, options, groups, 0, ctx,
                     [](auto& grouper) { grouper.by_content(); });
}

/// Groups rows by the caller's labels [n], numbers from 0 on. Groups keep their order; numbers that no row has are left
/// out. Representatives are means.
/// \throws error also (errc::range) for a label outside [0, n)
template <class T>
void group_by_labels(tensor_view<const T, 2> rows, std::span<const index_t> labels,
                     query_groups<accumulator_t<T>>& groups, context& ctx) {
  if (const auto f = detail::find_rows_fault(rows)) return detail::raise(f);
  if (labels.size() != static_cast<std::size_t>(rows.extent(0)))
    return detail::raise(detail::make_fault(errc::shape, "labels: expected %lld (one a row), got %zu",
                                            detail::printable(rows.extent(0)), labels.size()));
  for (std::size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0 || labels[i] >= rows.extent(0))
      return detail::raise(detail::make_fault(errc::range, "labels[%zu]: expected 0 to %lld, got %lld", i,
                                              detail::printable(rows.extent(0) - 1), detail::printable(labels[i])));
  }
  grouping_options options;
  options.groups = rows.extent(0);
  detail::group_rows(rows, options, groups, 0, ctx, [&](auto& grouper) { grouper.by_labels(labels); });
}

/// Sends each row to the nearest of representatives [C, D] that are given, of other rows for example, and stay as they
/// are. Those that no row comes to are left out. Rows farther than `radius` from theirs (infinity: none) are left
/// together in a last group of infinite radius.
/// \throws error also (errc::shape) unless there is a representative and all have D elements
template <class T>
void group_by_representatives(tensor_view<const T, 2> rows, tensor_view<const accumulator_t<T>, 2> representatives,
                              double radius, query_groups<accumulator_t<T>>& groups, context& ctx) {
  if (const auto f = detail::find_rows_fault(rows)) return detail::raise(f);
  if (const auto f = detail::find_rows_fault(representatives)) return detail::raise(f);
  const index_t count = representatives.extent(0), dim = rows.extent(1);
  if (count < 1 || representatives.extent(1) != dim || representatives.stride(0) != dim)
    return detail::raise(detail::make_fault(
        errc::shape, "representatives: expected 1 or more of %lld elements, one after the other, got %lld of %lld",
        detail::printable(dim), detail::printable(count), detail::printable(representatives.extent(1))));
  grouping_options options;
  options.groups = count, options.radius = radius;
  if (const auto f = detail::find_grouping_fault(options)) return detail::raise(f);
  const std::span given(representatives.data(), static_cast<std::size_t>(count * dim));
  detail::group_rows(rows, options, groups, count, ctx, [&](auto& grouper) { grouper.by_representatives(given); });
}

/// Groups rows by the caller's distance(i, j) >= 0 of two of them: a farthest-point cover from row 0 on, until every
/// row lies within options.radius of its centre or there are options.groups. Representatives are the centres; radii are
/// Euclidean all the same, because bounds of errors rest on them.
/// Cost: n groups calls of distance.
template <class T, class Distance>
requires std::is_invocable_r_v<double, const Distance&, index_t, index_t>
void group_by_distance(tensor_view<const T, 2> rows, const Distance& distance, const grouping_options& options,
                       query_groups<accumulator_t<T>>& groups, context& ctx) {
  if (const auto f = detail::find_rows_fault(rows)) return detail::raise(f);
  grouping_options cover = options;
  cover.method = grouping_method::cover;
  if (const auto f = detail::find_grouping_fault(cover)) return detail::raise(f);
  detail::group_rows(rows, cover, groups, 0, ctx, [&](auto& grouper) { grouper.by_distance(distance); });
}

}  // namespace GQA_ISA
}  // namespace gqa
