// SPDX-License-Identifier: Apache-2.0
/// \file
/// The oracle of selectors: which keys the rows of a head, or of a KV group, lean on most, and how much of that a
/// selection has found.
///
/// Weights come from attention_map() (diagnostics.hpp), a row a query head; keys of the largest sum over the rows are
/// what a selection for all of them should hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/error.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {
inline namespace GQA_ISA {

/// The k keys of the largest weights summed over the rows, in double, ascending; of equal ones the lowest, NaN
/// last.
/// \param weights  [rows, T]: of one row of queries, or of those of a group
/// \param k        at least 0; all T keys if it is more
/// \throws error   errc::shape for a negative k, or weights that are not there; errc::stride for offsets beyond 2^56
template <class W>
[[nodiscard]] std::vector<index_t> top_keys(tensor_view<W, 2> weights, index_t k) {
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_least_fault("top_keys", "k", 0, k)) return f;
    return detail::find_extents_fault(detail::describe("weights", weights));
  };
  if (const auto f = find_fault()) {
    detail::raise(f);
    return {};
  }
  const auto count = static_cast<std::size_t>(weights.extent(1));
  detail::reporting_vector<double> sums;
  std::vector<index_t> keys;
  if (!detail::make_zeros(sums, count, "sums of keys") || !detail::make_zeros(keys, count, "keys")) return {};
  for (index_t r = 0; r < weights.extent(0); ++r) {
    for (index_t t = 0; t < weights.extent(1); ++t)
      sums[static_cast<std::size_t>(t)] += static_cast<double>(weights(r, t));
  }
  for (double& sum : sums) {
    if (std::isnan(sum)) sum = -std::numeric_limits<double>::infinity();  // no order has a place for it
  }
  std::iota(keys.begin(), keys.end(), index_t{0});
  const auto end = keys.begin() + std::min<index_t>(k, weights.extent(1));
  std::partial_sort(keys.begin(), end, keys.end(), [&](index_t a, index_t b) {
    const double x = sums[static_cast<std::size_t>(a)], y = sums[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  keys.erase(end, keys.end());
  std::sort(keys.begin(), keys.end());
  return keys;
}

/// The share of the wanted keys that were selected (recall@k); 1 if none were wanted. Both ascending.
[[nodiscard]] inline double recall(std::span<const index_t> selected, std::span<const index_t> wanted) {
  index_t found = 0;
  for (const index_t key : wanted) found += std::binary_search(selected.begin(), selected.end(), key) ? 1 : 0;
  return wanted.empty() ? 1 : static_cast<double>(found) / static_cast<double>(wanted.size());
}

/// What the selected keys weigh for one row of weights [T] (mass@k).
/// \throws error  errc::range for keys that there are not
template <class W>
[[nodiscard]] double mass(std::span<const W> weights, std::span<const index_t> selected) {
  double sum = 0;
  for (const index_t key : selected) {
    if (key < 0 || key >= static_cast<index_t>(weights.size())) {
      detail::raise(detail::make_fault(errc::range, "selected: expected keys of [0, %zu), got %lld", weights.size(),
                                       detail::printable(key)));
      return 0;
    }
    sum += static_cast<double>(weights[static_cast<std::size_t>(key)]);
  }
  return sum;
}

}  // namespace GQA_ISA
}  // namespace gqa
