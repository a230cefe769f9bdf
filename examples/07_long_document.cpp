// SPDX-License-Identifier: Apache-2.0
// Grouped attention over a long document, as an encoder reads it, in both directions: the five steps one by one, then
// the same in one call.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <cstdio>
#include <span>
#include <vector>

#include "check.hpp"

namespace model {
constexpr gqa::index_t q_heads = 8, kv_heads = 2, group = q_heads / kv_heads, dim = 64;
constexpr gqa::index_t length = 4096, block = 512, window = 256, topics = 24;
}  // namespace model

// Queries about a few topics: what makes groups pay.
std::vector<float> queries_about_topics() {
  const auto topics = example::random(model::topics * model::dim);
  auto q = example::random(model::length * model::q_heads * model::dim);
  for (std::size_t i = 0; i < q.size(); ++i) {
    const std::size_t row = i / model::dim, topic = row * 7 % model::topics;
    q[i] = 2 * topics[topic * model::dim + i % model::dim] + 0.1f * q[i];
  }
  return q;
}

double relative_error(const std::vector<float>& x, const std::vector<float>& exact) {
  const auto rows = [](const std::vector<float>& data) {
    return gqa::view(data.data(), {1, model::length, model::q_heads, model::dim});
  };
  return gqa::compare(rows(x), rows(exact)).relative;
}

int main() {
  using namespace model;
  const std::vector<float> q = queries_about_topics();
  const auto k = example::random(length * kv_heads * dim), v = example::random(length * kv_heads * dim);
  const auto keys = gqa::view(k.data(), {1, length, kv_heads, dim});
  const auto values = gqa::view(v.data(), {1, length, kv_heads, dim});
  std::vector<float> five_steps(q.size()), one_call(q.size()), exact(q.size());
  gqa::context ctx;

  gqa::grouping_options grouping;
  grouping.groups = 64;
  for (gqa::index_t p = 0; p < length; p += block) {
    const auto rows = [&](auto* data) { return gqa::view(data + p * q_heads * dim, {1, block, q_heads, dim}); };
    const gqa::key_range near{std::max<gqa::index_t>(p - window, 0), std::min(p + block + window, length)};

    // 1. Define query groups, of the pooled heads of each KV head.
    std::vector<gqa::query_groups<float>> groups(kv_heads);
    for (gqa::index_t g = 0; g < kv_heads; ++g) {
      const gqa::tensor_view<const float, 4> heads(q.data() + (p * q_heads + g * group) * dim, {1, block, group, dim},
                                                   {0, q_heads * dim, dim, 1});
      gqa::group_queries(heads, grouping, groups[static_cast<std::size_t>(g)], ctx);
    }

    // 2. Group-wise attention to the far keys.
    std::vector<float> far_lse(block * q_heads);
    const gqa::partial_state<float> far{rows(five_steps.data()), {far_lse.data(), {1, block, q_heads}}};
    gqa::groupwise_options groupwise;
    groupwise.without = near;
    gqa::groupwise_attention(rows(q.data()), keys, values, std::span<const gqa::query_groups<float>>(groups), far, {},
                             groupwise, ctx);

    // 3. Local attention to the near ones.
    std::vector<float> near_out(block * q_heads * dim), near_lse(block * q_heads);
    const gqa::partial_state<float> local{gqa::view(near_out.data(), {1, block, q_heads, dim}),
                                          {near_lse.data(), {1, block, q_heads}}};
    const auto of_near = [&](auto* data) {
      return gqa::view(data + near.begin * kv_heads * dim, {1, near.size(), kv_heads, dim});
    };
    gqa::attention(rows(q.data()), of_near(k.data()), of_near(v.data()), local, {}, ctx);

    // 4. Combine the scores of both. 5. Apply: a state's out is the output.
    gqa::merge<float>(far, local, ctx);
  }

  // The same in one call, which would fall back to the exact kernel where that is faster.
  gqa::grouped_options options;
  options.block = block, options.window = window, options.grouping = grouping, options.always_group = true;
  gqa::grouped_report report;
  const auto all_rows = [](auto* data) { return gqa::view(data, {1, length, q_heads, dim}); };
  gqa::grouped_attention(all_rows(q.data()), keys, values, all_rows(one_call.data()), options, ctx, &report);
  gqa::attention(all_rows(q.data()), keys, values, all_rows(exact.data()), {}, ctx);

  double products = 0, exact_products = 0;
  for (const gqa::block_report& b : report.blocks) products += b.products, exact_products += b.exact_products;
  const double error = relative_error(one_call, exact);
  std::printf("relative error %.4f with %.2f of the multiply-adds on far keys\n", error, products / exact_products);
  return example::ended(
      relative_error(five_steps, one_call) < 1e-5 && error < 0.1 && products < 0.25 * exact_products ? 0 : 1);
}
