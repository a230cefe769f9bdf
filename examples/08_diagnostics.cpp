// SPDX-License-Identifier: Apache-2.0
// What attention looked at, as files: a head's map of weights in .npy, and in JSON entropies, masses, similarity of
// heads, and what grouped attention says of its groups and of its error.
#include <gqa/gqa.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "check.hpp"
#include "npy.hpp"

namespace model {
constexpr gqa::index_t q_heads = 4, kv_heads = 2, group = q_heads / kv_heads, dim = 32;
constexpr gqa::index_t length = 768, block = 128, window = 64, topics = 12;
}  // namespace model

// "name": [x, x, ...]
template <class Range>
std::string json(const std::string& name, const Range& values) {
  std::string text = "\"" + name + "\": [";
  const char* separator = "";
  for (const auto x : values) {
    char number[32];
    std::snprintf(number, sizeof number, "%s%.6g", separator, static_cast<double>(x));
    text += number, separator = ", ";
  }
  return text + "]";
}

// A mask of one's own.
struct first_keys {
  gqa::index_t count;
  bool visible(const gqa::position& p) const { return p.key < count; }
};

// A mean over positions, head by head.
std::vector<double> mean_of_heads(const std::vector<float>& x) {
  std::vector<double> means(model::q_heads);
  for (std::size_t i = 0; i < x.size(); ++i)
    means[i % model::q_heads] += static_cast<double>(x[i]) / static_cast<double>(model::length);
  return means;
}

int main(int argc, char** argv) {
  using namespace model;
  const std::filesystem::path folder = argc > 1 ? argv[1] : ".";
  std::vector<float> q = example::random(length * q_heads * dim), about = example::random(topics * dim);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = 4 * about[i / dim * 5 % topics * dim + i % dim] + 0.1f * q[i];
  const auto k = example::random(length * kv_heads * dim), v = example::random(length * kv_heads * dim);
  std::vector<float> exact(q.size()), grouped(q.size()), lse(length * q_heads), entropy(lse.size());
  std::vector<float> in_window(lse.size()), on_sinks(lse.size());
  const auto rows = [](auto& data) { return gqa::view(data.data(), {1, length, q_heads, dim}); };
  const auto keys = gqa::view(k.data(), {1, length, kv_heads, dim});
  const auto values = gqa::view(v.data(), {1, length, kv_heads, dim});
  const auto of_rows = [](auto& data) { return gqa::tensor_view<float, 3>(data.data(), {1, length, q_heads}); };
  const gqa::tensor_view<const float, 3> const_lse(lse.data(), {1, length, q_heads});
  const gqa::attention_options options{.causal = true};
  gqa::context ctx;

  // Exact attention, with the log-sum-exps that maps and masses are made from.
  gqa::attention(rows(q), keys, values, gqa::partial_state<float>{rows(exact), of_rows(lse)}, options, ctx);

  // The weights of the last 64 queries of head 1 on all keys.
  std::vector<float> map(64 * length);
  gqa::attention_map(gqa::tensor_view<const float, 4>(rows(q)), keys, const_lse, options,
                     {0, 1, {length - 64, length}, {0, length}}, gqa::tensor_view<float, 2>(map.data(), {64, length}));
  example::write_npy((folder / "attention_map.npy").string(), map, {64, length});

  // Entropies; masses in a window and on the first four keys; how alike the heads of a KV head are.
  gqa::attention_entropy(rows(q), keys, options, of_rows(entropy), ctx);
  const auto source = gqa::kv_view(keys, values);
  gqa::attention_mass(rows(q), source, gqa::sliding_window(window, 0), const_lse, options, of_rows(in_window), ctx);
  gqa::attention_mass(rows(q), source, first_keys{4}, const_lse, options, of_rows(on_sinks), ctx);
  std::vector<double> alike(kv_heads * group * group);
  gqa::head_similarity(gqa::tensor_view<const float, 4>(rows(q)), kv_heads,
                       gqa::tensor_view<double, 3>(alike.data(), {kv_heads, group, group}));

  // Grouped attention: its groups, by its own report, and its error against the exact one.
  gqa::grouped_options by_groups;
  by_groups.attention = options;
  by_groups.block = block, by_groups.window = window, by_groups.always_group = true;
  by_groups.grouping.groups = topics, by_groups.groupwise.top_keys = 16;
  gqa::grouped_report report;
  gqa::grouped_attention(rows(q), keys, values, rows(grouped), by_groups, ctx, &report);
  const gqa::difference error =
      gqa::compare(gqa::tensor_view<const float, 4>(rows(grouped)), gqa::tensor_view<const float, 4>(rows(exact)));

  std::ofstream file(folder / "diagnostics.json");
  file << "{\n  " << json("entropy_of_heads", mean_of_heads(entropy)) << ",\n  "
       << json("mass_in_window_of_heads", mean_of_heads(in_window)) << ",\n  "
       << json("mass_on_sinks_of_heads", mean_of_heads(on_sinks)) << ",\n  " << json("head_similarity", alike)
       << ",\n  " << json("error_largest_mean_relative", std::vector{error.largest, error.mean, error.relative})
       << ",\n  \"blocks\": [";
  const char* separator = "\n    ";
  for (const gqa::block_report& b : report.blocks) {
    std::vector<double> sizes, radii, masses, bounds;
    for (const gqa::group_report& g : b.shared) {
      sizes.push_back(static_cast<double>(g.members)), radii.push_back(g.radius);
      masses.push_back(g.retained_mass), bounds.push_back(g.error_bound);
    }
    file << separator << "{" << json("kv_head_and_queries", std::vector{b.kv_head, b.query_begin, b.query_end}) << ", "
         << json("products_exact_products", std::vector{b.products, b.exact_products}) << ", " << json("members", sizes)
         << ", " << json("radius", radii) << ", " << json("retained_mass", masses) << ", "
         << json("error_bound", bounds) << "}";
    separator = ",\n    ";
  }
  file << "\n  ]\n}\n";
  if (!file.flush()) return 1;
  std::printf("attention_map.npy and diagnostics.json in %s\n", folder.string().c_str());

  // A map's rows are weights: of all keys 1, of those in the window the mass there. Topics are drawn anew for every
  // head, so that two heads are unlike; groups are off by little.
  double worst = 0;
  for (gqa::index_t s = 0; s < 64; ++s) {
    const gqa::index_t position = length - 64 + s;
    double all = 0, near = 0;
    for (gqa::index_t t = 0; t < length; ++t) {
      const double weight = static_cast<double>(map[static_cast<std::size_t>(s * length + t)]);
      all += weight;
      if (t >= position - window) near += weight;
    }
    const double mass = static_cast<double>(in_window[static_cast<std::size_t>(position * q_heads + 1)]);
    worst = std::max({worst, std::abs(all - 1), std::abs(near - mass)});
  }
  std::printf("largest error of a weight's sums %.1e, of grouped outputs %.4f\n", worst, error.relative);
  return example::ended(
      worst < 1e-5 && std::abs(alike[0] - 1) < 1e-6 && std::abs(alike[1]) < 0.5 && error.relative < 0.1 ? 0 : 1);
}
