// SPDX-License-Identifier: Apache-2.0
// What page_attention() and projected_attention() promise: a certificate no less than the mass really dropped.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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

// What exact attention over the cache's keys as stored says, in double.
template <class T>
oracle_result exact_over(const operands<float, float>& in, const kv_cache<T>& cache) {
  const auto& n = in.of.shape;
  tensor<double> q({n.b, n.s, n.h, n.d}, layout::bshd), k({n.b, n.t, n.g, n.d}, layout::bshd),
      v({n.b, n.t, n.g, n.e}, layout::bshd);
  std::copy(in.q.data().begin(), in.q.data().end(), q.data().begin());
  for (index_t b = 0; b < n.b; ++b)
    for (index_t t = 0; t < n.t; ++t)
      for (index_t g = 0; g < n.g; ++g) {
        const auto key = cache.key(b, t, g);
        const auto value = cache.value(b, t, g);
        for (index_t d = 0; d < n.d; ++d) k.view()(b, t, g, d) = static_cast<double>(key[static_cast<std::size_t>(d)]);
        for (index_t e = 0; e < n.e; ++e)
          v.view()(b, t, g, e) = static_cast<double>(value[static_cast<std::size_t>(e)]);
      }
  return run_oracle_on(q.view(), k.view(), v.view(), in.options);
}

// The certificate is no less than the mass really dropped, 1 - exp(lse_read - lse), no more than epsilon, and the
// output is a mean that fits: o = (1 - m) o_read + m o_rest with o_rest within the values. `off`: what the kernel's lse
// may be off by, and its outputs, in units of the largest value.
inline void expect_certified(const paged_result& r, const oracle_result& exact, const operands<float, float>& in,
                             double epsilon, double off) {
  const auto e = static_cast<std::size_t>(in.of.shape.e);
  for (std::size_t row = 0; row < r.lse.size(); ++row) {
    const page_row& said = r.report.rows[row];
    if (exact.lse[row] == -std::numeric_limits<double>::infinity()) {
      EXPECT_EQ(r.lse[row], exact.lse[row]);
      continue;
    }
    const double dropped = -std::expm1(static_cast<double>(r.lse[row]) - exact.lse[row]);
    ASSERT_LE(dropped, said.dropped + off) << in.of.name() << ", row " << row;
    ASSERT_GE(dropped, -off) << in.of.name() << ", row " << row;
    ASSERT_LE(said.dropped, epsilon);
    ASSERT_GE(said.dropped, 0);
    ASSERT_TRUE(said.read <= said.pages && (said.read < said.pages || said.dropped == 0));
    for (std::size_t i = row * e; i < (row + 1) * e; ++i)
      ASSERT_LE(std::abs(static_cast<double>(r.out[i]) - exact.out[i]),
                2 * exact.max_value * (std::max(dropped, 0.0) + 2 * off))
          << in.of.name() << ", row " << row;
  }
}

}  // namespace gqa::test
