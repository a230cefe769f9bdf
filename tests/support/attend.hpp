// SPDX-License-Identifier: Apache-2.0
// Runs a case's operands through attention() and compares with the oracle.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include <gqa/attention.hpp>

#include "cases.hpp"
#include "kernels.hpp"
#include "matchers.hpp"
#include "oracle.hpp"

namespace gqa::test {

// Output [B, S, H, E] and lse [B, S, H], dense.
template <class Out>
struct attended {
  std::vector<Out> out;
  std::vector<accumulator_t<Out>> lse;

  [[nodiscard]] bool same_bits(const attended& other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * sizeof(Out)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(lse[0])) == 0;
  }
};

// attention() of the operands' queries and options over any source that holds their keys and values.
template <class Out = void, class Q, class K, class KV>
auto run_over(const operands<Q, K>& in, const KV& kv, context& ctx) {
  using element = std::conditional_t<std::is_void_v<Out>, Q, Out>;
  const auto& n = in.of.shape;
  const auto size = [](index_t count) { return static_cast<std::size_t>(std::max<index_t>(count, 1)); };
  // Poisoned: what a call does not write shows.
  attended<element> result;
  result.out.assign(size(n.b * n.s * n.h * n.e), static_cast<element>(std::numeric_limits<float>::quiet_NaN()));
  result.lse.assign(size(n.b * n.s * n.h), std::numeric_limits<float>::quiet_NaN());
  const partial_state<element> state{tensor_view<element, 4>(result.out.data(), {n.b, n.s, n.h, n.e}),
                                     tensor_view<accumulator_t<element>, 3>(result.lse.data(), {n.b, n.s, n.h})};
  attention(in.q.view(), kv, state, in.options, ctx);
  return result;
}

template <class Out = void, class Q, class K>
auto run(const operands<Q, K>& in, context& ctx) {
  return run_over<Out>(in, kv_view(in.k.view(), in.v.view()), ctx);
}

// attention() of the operands is what the oracle says, within the bounds of matchers.hpp, and the same to the bit
// whether the lse is asked for or not.
template <class Q, class K, class KV>
::testing::AssertionResult matches_oracle_over(const operands<Q, K>& in, const KV& kv, context& ctx) {
  const auto& n = in.of.shape;
  const oracle_result expected = run_oracle_on(in.q.view(), in.k.view(), in.v.view(), in.options);
  const auto actual = run_over(in, kv, ctx);

  const double rounding = weight_rounding<Q, K>(in.options);
  comparison outs, lses;
  for (index_t i = 0; i < n.b * n.s * n.h; ++i) {
    const auto row = static_cast<std::size_t>(i);
    std::ostringstream where;
    where << "(b " << i / (n.s * n.h) << ", s " << i / n.h % n.s << ", h " << i % n.h << ')';
    lses.add(static_cast<double>(actual.lse[row]), expected.lse[row], expected.lse_bound(row) + rounding,
             "lse" + where.str());
    for (index_t e = 0; e < n.e; ++e) {
      const auto at = static_cast<std::size_t>(i * n.e + e);
      outs.add(static_cast<double>(actual.out[at]), expected.out[at],
               expected.out_bound(at) + rounding * expected.max_value + storing_error<Q>(expected.out[at]),
               "out" + where.str());
    }
  }
  if (!outs.result()) return outs.result() << " in " << in.of.name();
  if (!lses.result()) return lses.result() << " in " << in.of.name();

  tensor<Q> plain({n.b, n.s, n.h, n.e}, layout::bshd);
  plain.data().assign(plain.data().size(), static_cast<Q>(std::numeric_limits<float>::quiet_NaN()));
  attention(in.q.view(), kv, plain.view(), in.options, ctx);
  if (std::memcmp(plain.data().data(), actual.out.data(), plain.data().size() * sizeof(Q)) != 0)
    return ::testing::AssertionFailure() << "state and plain output differ in " << in.of.name();
  return ::testing::AssertionSuccess();
}

template <class Q, class K>
::testing::AssertionResult matches_oracle(const operands<Q, K>& in, context& ctx) {
  return matches_oracle_over(in, kv_view(in.k.view(), in.v.view()), ctx);
}

// The operands of a case with all values 1 and no sinks: every row that sees a key is exactly 1. (Over weights rounded
// to 16 bits, the unrounded output is so within 2^-17: two sums of up to 64 roundings a tile, in different orders.)
template <class Q, class K>
operands<Q, K> with_values_of_one(attention_case c) {
  c.options &= ~with_sinks;
  operands<Q, K> in(c);
  for (auto& x : in.v.data()) x = static_cast<K>(1.0f);
  return in;
}
template <class Q, class K, class KV>
::testing::AssertionResult gives_ones_over(const operands<Q, K>& in, const KV& kv, context& ctx) {
  const auto& n = in.of.shape;
  const auto actual = run_over<accumulator_t<K>>(in, kv, ctx);
  const double tolerance = weight_rounding<Q, K>(in.options) > 0 ? 0x1p-17 : 0;
  for (index_t i = 0; i < n.b * n.s * n.h * n.e; ++i) {
    const auto out = static_cast<double>(actual.out[static_cast<std::size_t>(i)]);
    const auto lse = static_cast<double>(actual.lse[static_cast<std::size_t>(i / n.e)]);
    const double expected = lse == -std::numeric_limits<double>::infinity() ? 0 : 1;
    if (!(std::abs(out - expected) <= tolerance))
      return ::testing::AssertionFailure() << "got 1 + " << out - 1 << " at " << i << " in " << in.of.name();
  }
  return ::testing::AssertionSuccess();
}

}  // namespace gqa::test
