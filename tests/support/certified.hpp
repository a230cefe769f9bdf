// SPDX-License-Identifier: Apache-2.0
// What page_attention() and projected_attention() promise: a certificate no less than the mass really dropped.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include <gqa/kv_cache.hpp>
#include <gqa/page_options.hpp>

#include "attend.hpp"
#include "cases.hpp"

namespace gqa::test {

template <class T>
kv_cache<T> cache_of(const operands<float, float>& in, index_t bound_tokens = 0) {
  const auto& n = in.of.shape;
  kv_cache<T> cache(n.b, n.g, n.t, n.d, n.e);
  if (bound_tokens > 0) cache.keep_key_bounds(bound_tokens);
  cache.append(in.k.view(), in.v.view());
  return cache;
}

struct paged_result : attended<float> {
  page_report report;
};

// call(out, options, report) on poisoned outputs, by the operands' own options.
template <class Call>
paged_result run_paged(const operands<float, float>& in, page_options o, const Call& call) {
  const auto& n = in.of.shape;
  paged_result r;
  r.out.assign(static_cast<std::size_t>(n.b * n.s * n.h * n.e), std::numeric_limits<float>::quiet_NaN());
  r.lse.assign(static_cast<std::size_t>(n.b * n.s * n.h), std::numeric_limits<float>::quiet_NaN());
  o.attention = in.options;
  call(partial_state<float>{tensor_view<float, 4>(r.out.data(), {n.b, n.s, n.h, n.e}),
                            tensor_view<float, 3>(r.lse.data(), {n.b, n.s, n.h})},
       o, &r.report);
  return r;
}

// Keys around `topics` directions, a run of tokens each: pages differ, as those of texts do.
inline operands<float, float> with_topics(const attention_case& c, index_t run, double spread) {
  operands<float, float> in(c);
  rng random(c.seed + 100);
  const auto& n = c.shape;
  for (index_t b = 0; b < n.b; ++b)
    for (index_t g = 0; g < n.g; ++g)
      for (index_t first = 0; first < n.t; first += run) {
        std::vector<double> about(static_cast<std::size_t>(n.d));
        for (double& x : about) x = 1.5 * random.normal();
        for (index_t t = first; t < std::min(first + run, n.t); ++t)
          for (index_t d = 0; d < n.d; ++d)
            in.k.view()(b, t, g, d) = static_cast<float>(about[static_cast<std::size_t>(d)] + spread * random.normal());
      }
  return in;
}

// Queries as the kernel takes them: rounded to what its products are made of, where it has products of those. (A cache
// rounds keys as its kernels round queries: those of 8 bits once they are scaled, to base 2 where no rules follow.)
template <class T>
std::vector<double> kernel_queries(const operands<float, float>& in) {
  const auto& n = in.of.shape;
  std::vector<double> q(in.q.data().begin(), in.q.data().end());
  if (in.options.float_products.value_or(true) || !detail::has_dot<T>) return q;
  double factor = 1;
  if constexpr (std::is_same_v<T, q8>) {
    factor = in.options.scale.value_or(1 / std::sqrt(static_cast<double>(n.d)));
    if (in.options.softcap == 0 && in.options.alibi_slopes.empty()) factor *= std::numbers::log2e;
  }
  std::vector<float> scaled;
  for (const double x : q) scaled.push_back(static_cast<float>(x * factor));
  kv_cache<T> rounded(n.b, n.h, n.s, n.d, 1);
  const std::vector<float> nothing(static_cast<std::size_t>(n.b * n.s * n.h));
  rounded.append(view(scaled.data(), {n.b, n.s, n.h, n.d}), view(nothing.data(), {n.b, n.s, n.h, 1}));
  for (index_t i = 0; i < n.b * n.s * n.h; ++i) {
    const auto row = rounded.key(i / (n.s * n.h), i / n.h % n.s, i % n.h);
    for (index_t d = 0; d < n.d; ++d)
      q[static_cast<std::size_t>(i * n.d + d)] = static_cast<double>(row[static_cast<std::size_t>(d)]) / factor;
  }
  return q;
}

// What exact attention over a cache's keys and values as stored says, in double.
template <class T>
struct exact_attention {
  std::vector<double> q, k, v;
  oracle_result result;
  attention_options options;
  shape n;

  exact_attention(const operands<float, float>& in, const kv_cache<T>& cache)
      : q(kernel_queries<T>(in)), options(in.options), n(in.of.shape) {
    for (index_t b = 0; b < n.b; ++b)
      for (index_t t = 0; t < n.t; ++t)
        for (index_t g = 0; g < n.g; ++g) {
          for (const auto x : cache.key(b, t, g)) k.push_back(static_cast<double>(x));
          for (const auto x : cache.value(b, t, g)) v.push_back(static_cast<double>(x));
        }
    result = run_oracle({q.data(), {n.b, n.s, n.h, n.d}}, {k.data(), {n.b, n.t, n.g, n.d}},
                        {v.data(), {n.b, n.t, n.g, n.e}}, options, arithmetic_of<float>());
  }

  // The mass of row (b, s, h) in pages that were not read: the weights of their keys, which are what values give that
  // are 1 there and 0 elsewhere.
  [[nodiscard]] std::vector<double> dropped(const page_report& report) const {
    std::vector<double> left_out(static_cast<std::size_t>(n.b * n.t * n.g));
    for (index_t i = 0; i < n.b * n.t * n.g; ++i) {
      const index_t b = i / (n.t * n.g), t = i / n.g % n.t, g = i % n.g;
      const auto& read = report.read[static_cast<std::size_t>(b * n.g + g)];
      left_out[static_cast<std::size_t>(i)] =
          std::binary_search(read.begin(), read.end(), t / report.page_tokens) ? 0 : 1;
    }
    return run_oracle({q.data(), {n.b, n.s, n.h, n.d}}, {k.data(), {n.b, n.t, n.g, n.d}},
                      {left_out.data(), {n.b, n.t, n.g, 1}}, options, arithmetic_of<float>())
        .out;
  }
};

// The certificate is no less than the mass really dropped, in double over what is stored, no more than epsilon, and the
// output is a mean that fits: o = (1 - m) o_read + m o_rest with o_rest within the values. No slack but the oracle's
// own rounding. `rounding`: what weights are rounded by, and outputs with them.
template <class T>
void expect_certified(const paged_result& r, const exact_attention<T>& exact, const operands<float, float>& in,
                      double epsilon, double rounding) {
  const auto e = static_cast<std::size_t>(in.of.shape.e);
  const std::vector<double> all_dropped = exact.dropped(r.report);
  for (std::size_t row = 0; row < r.lse.size(); ++row) {
    const page_row& said = r.report.rows[row];
    if (exact.result.lse[row] == -std::numeric_limits<double>::infinity()) {
      EXPECT_EQ(r.lse[row], exact.result.lse[row]);
      continue;
    }
    const double dropped = all_dropped[row];
    ASSERT_LE(dropped, said.dropped * (1 + 1e-9)) << in.of.name() << ", row " << row;
    ASSERT_LE(said.dropped, epsilon);
    ASSERT_GE(said.dropped, 0);
    ASSERT_TRUE(said.read <= said.pages && (said.read < said.pages || said.dropped == 0));
    const double read = exact.result.lse[row] + std::log1p(-dropped);
    ASSERT_NEAR(static_cast<double>(r.lse[row]), read, exact.result.lse_bound(row) + rounding)
        << in.of.name() << ", row " << row;
    for (std::size_t i = row * e; i < (row + 1) * e; ++i)
      ASSERT_LE(std::abs(static_cast<double>(r.out[i]) - exact.result.out[i]),
                2 * exact.result.max_value * (dropped + rounding) + exact.result.out_bound(i))
          << in.of.name() << ", row " << row;
  }
}

}  // namespace gqa::test
