// SPDX-License-Identifier: Apache-2.0
// What a call takes from the heap. A program of its own: it replaces operator new.
#include <gtest/gtest.h>

#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/count_allocations.hpp"

namespace gqa::test {
namespace {

TEST(Allocations, ASecondIdenticalCallHasNone) {
  Eigen::ThreadPool pool(2);
  for (const shape n :
       {shape{1, 200, 300, 4, 2, 64, 64}, shape{2, 1, 3000, 8, 2, 64, 64}, shape{1, 7, 90, 4, 2, 40, 40}}) {
    operands<float, float> in(attention_case{n, with_causal | with_sinks, layout::bshd});
    std::vector<float> out(static_cast<std::size_t>(n.b * n.s * n.h * n.e));
    const auto to = view(out.data(), {n.b, n.s, n.h, n.e});
    context serial, on_pool(pool);
    for (context* ctx : {&serial, &on_pool}) {
      attention(in.q.view(), in.k.view(), in.v.view(), to, in.options, *ctx);
      const long before = allocations();
      attention(in.q.view(), in.k.view(), in.v.view(), to, in.options, *ctx);
      EXPECT_EQ(allocations() - before, 0);
    }
  }
}

TEST(Allocations, ReservedScratchIsEnough) {
  operands<float, float> in(attention_case{{1, 50, 300, 4, 2, 64, 64}, with_causal, layout::bshd});
  std::vector<float> out(50 * 4 * 64);
  context ctx;
  ctx.reserve(64 << 20);
  const long before = allocations();
  attention(in.q.view(), in.k.view(), in.v.view(), view(out.data(), {1, 50, 4, 64}), in.options, ctx);
  EXPECT_EQ(allocations() - before, 0);
}

}  // namespace
}  // namespace gqa::test
