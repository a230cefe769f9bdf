// SPDX-License-Identifier: Apache-2.0
// gqa_tuner: which options of grouped attention a model's queries, keys and values are served best by. Times and errors
// of a grid of options beside the exact kernel, what the model of the cost foresaw, and those that no other beats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <gqa/gqa.hpp>

#include "../bench/support/stopwatch.hpp"
#include "arguments.hpp"
#include "capture.hpp"
#include "files.hpp"
#include "program.hpp"
#include "progress.hpp"

namespace {

using example::number, example::numbers;
using gqa::index_t;

constexpr const char* usage =
    R"(usage: gqa_tuner [--capture FILE] [options]

Sweeps groups, top keys, window and tolerance of grouped attention over captured queries, keys and values.
A line a choice goes to stdout: how many times as fast as exact attention the model of the cost says it is, how many
times it is, and the error of its outputs (norm of the difference over that of the exact ones). Choices that no other
beats in both are marked.

  --capture FILE      as gqa_llama --capture writes it; without it a document of 64 topics is made up
  --layer N           only this one, from 0 (default: all)
  --tokens N          only so many (default: all that were captured; 4096 made up)
  --groups LIST       groups of a block's queries of a KV head (default 16,64); empty: none
  --tolerance LIST    instead of a number of groups (default 0.5,1.5); empty: none
  --top-keys LIST     keys that every query meets by itself (default 0,64)
  --window LIST       near keys before a block (default 256)
  --block N           positions a block (default 512)
  --always 0|1        also where the model says that the exact kernel is faster (default 0)
  --rounds N          of which the median is taken (default 3)
  --threads T         (default 1)
  --svg FILE          plot of time against error
  --help              this text

Exit code: 0, or 2 for bad options and files.
)";

struct options {
  std::string capture, svg;
  std::optional<index_t> layer, tokens;
  std::vector<index_t> groups{16, 64}, top_keys{0, 64}, windows{256};
  std::vector<double> tolerances{0.5, 1.5};
  index_t block = 512;
  bool always = false;
  int rounds = 3, threads = 1;
};

// Nothing if help was asked for.
std::optional<options> parse(int argc, char** argv) {
  constexpr index_t most = 1 << 30;
  options o;
  const auto set = [&o](std::string_view name, std::string_view value) {
    if (name == "--capture") {
      o.capture = value;
    } else if (name == "--svg") {
      o.svg = value;
    } else if (name == "--layer") {
      o.layer = number(name, value, index_t{0}, most);
    } else if (name == "--tokens") {
      o.tokens = number(name, value, index_t{1}, most);
    } else if (name == "--groups") {
      o.groups = numbers(name, value, index_t{1}, most);
    } else if (name == "--tolerance") {
      o.tolerances = numbers(name, value, 0.0, 2.0);
    } else if (name == "--top-keys") {
      o.top_keys = numbers(name, value, index_t{0}, most);
    } else if (name == "--window") {
      o.windows = numbers(name, value, index_t{0}, most);
    } else if (name == "--block") {
      o.block = number(name, value, index_t{1}, most);
    } else if (name == "--always") {
      o.always = number(name, value, 0, 1) == 1;
    } else if (name == "--rounds") {
      o.rounds = number(name, value, 1, 1000);
    } else if (name == "--threads") {
      o.threads = number(name, value, 1, 1024);
    } else {
      return false;
    }
    return true;
  };
  if (!example::read_options(argc, argv, set)) return std::nullopt;
  return o;
}

// Queries about 64 topics a KV head, each a little off.
example::capture made_up(index_t tokens) {
  constexpr index_t q_heads = 8, kv_heads = 2, dim = 64, topics = 64;
  std::mt19937 bits(1);
  std::normal_distribution<float> normal;
  std::vector<float> directions(kv_heads * topics * dim), q(q_heads * dim), k(kv_heads * dim), v(k.size());
  for (float& x : directions) x = normal(bits);
  example::capture c(1, q_heads, kv_heads, dim);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t h = 0; h < q_heads; ++h) {
      const index_t topic = h / (q_heads / kv_heads) * topics + static_cast<index_t>(bits() % topics);
      for (index_t d = 0; d < dim; ++d)
        q[static_cast<std::size_t>(h * dim + d)] =
            directions[static_cast<std::size_t>(topic * dim + d)] + 0.04f * normal(bits);
    }
    for (float& x : k) x = normal(bits);
    for (float& x : v) x = normal(bits);
    c.append(0, q.data(), k.data(), v.data(), 1);
  }
  return c;
}

// A choice of options, and how it fared.
struct choice {
  gqa::grouped_options options;
  double seconds = 0, exact_seconds = 0;  // sums over layers of medians
  double cost = 0, exact_cost = 0;        // by the model
  double off = 0, all = 0;                // squared norms
  bool is_best = false;

  [[nodiscard]] double time() const { return seconds / exact_seconds; }
  [[nodiscard]] double error() const { return off == 0 ? 0 : std::sqrt(off / all); }
  [[nodiscard]] std::string name() const {
    char text[120];
    const int used = options.tolerance ? std::snprintf(text, sizeof text, "tolerance %g", *options.tolerance)
                                       : std::snprintf(text, sizeof text, "%td groups", options.grouping.groups);
    std::snprintf(text + used, sizeof text - static_cast<std::size_t>(used), ", %td top keys, window %td",
                  options.groupwise.top_keys, options.window);
    return text;
  }
};

std::vector<choice> choices_of(const options& o) {
  std::vector<choice> all;
  gqa::grouped_options one;
  one.attention.causal = true;
  one.block = o.block, one.always_group = o.always;
  for (const index_t window : o.windows) {
    for (const index_t top_keys : o.top_keys) {
      one.window = window, one.groupwise.top_keys = top_keys;
      one.tolerance.reset();
      for (const index_t groups : o.groups) one.grouping.groups = groups, all.push_back({one});
      one.grouping.groups = 0;
      for (const double tolerance : o.tolerances) one.tolerance = tolerance, all.push_back({one});
    }
  }
  if (all.empty()) throw std::invalid_argument("nothing to try: give --groups or --tolerance, --top-keys and --window");
  return all;
}

// One layer's part of a choice's account: rounds of both kernels in turn, then errors and costs.
void measure(choice& c, const example::capture& in, index_t layer, index_t tokens, int rounds,
             const std::vector<float>& exact, gqa::context& ctx) {
  const auto q = in.queries(layer, tokens), k = in.keys(layer, tokens), v = in.values(layer, tokens);
  std::vector<float> out(exact.size());
  const auto to = gqa::view(out.data(), {1, tokens, in.q_heads(), in.dim()});
  gqa::bench::samples ours, theirs;
  for (int round = 0; round < rounds; ++round) {
    theirs.add(gqa::bench::seconds_of([&] { gqa::attention(q, k, v, to, {.causal = true}, ctx); }));
    ours.add(gqa::bench::seconds_of([&] { gqa::grouped_attention(q, k, v, to, c.options, ctx); }));
  }
  c.seconds += ours.median(), c.exact_seconds += theirs.median();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double x = static_cast<double>(exact[i]), off = static_cast<double>(out[i]) - x;
    c.off += off * off, c.all += x * x;
  }
  gqa::grouped_report report;
  gqa::grouped_attention(q, k, v, to, c.options, ctx, &report);
  for (const gqa::block_report& b : report.blocks) c.cost += b.cost, c.exact_cost += b.exact_cost;
}

// Marks the choices that no other is both as fast and as exact as, and in one better; fastest first.
std::vector<const choice*> pareto_front(std::vector<choice>& all) {
  std::vector<choice*> order;
  for (choice& c : all) order.push_back(&c);
  std::sort(order.begin(), order.end(), [](const choice* x, const choice* y) {
    if (x->time() != y->time()) return x->time() < y->time();
    return x->error() != y->error() ? x->error() < y->error() : x < y;
  });
  std::vector<const choice*> front;
  for (choice* const c : order) {
    if (!front.empty() && c->error() >= front.back()->error()) continue;
    c->is_best = true;
    front.push_back(c);
  }
  return front;
}

// Time as a share of the exact kernel's to the right, error upwards by powers of ten, the front as a line.
void plot(const std::string& path, const std::vector<choice>& all, const std::vector<const choice*>& front) {
  constexpr double left = 80, top = 40, width = 560, height = 340;
  double slowest = 1, largest = -3, least = -3;  // log10 of errors
  for (const choice& c : all) {
    slowest = std::max(slowest, c.time());
    if (c.error() > 0)
      largest = std::max(largest, std::log10(c.error())), least = std::min(least, std::log10(c.error()));
  }
  slowest = std::ceil(slowest * 5) / 5, largest = std::ceil(largest + 0.01);
  least = std::max(std::floor(least), -8.0);
  const auto x_of = [&](double time) { return left + width * time / slowest; };
  const auto y_of = [&](double error) {
    const double at = error > 0 ? std::max(std::log10(error), least) : least;
    return top + height * (largest - at) / (largest - least);
  };
  std::string svg =
      R"(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 450" width="720" height="450" )"
      R"(font-family="system-ui, sans-serif" font-size="12" fill="#24292f">)"
      R"(<rect width="100%" height="100%" fill="#ffffff"/>)"
      R"(<text x="20" y="24" font-size="15" font-weight="600">Grouped attention: error of the outputs against time</text>)"
      "\n";
  const auto add = [&](const char* form, const auto& first, const auto&... rest) {
    char text[512];
    std::snprintf(text, sizeof text, form, first, rest...);
    svg += text;
    svg += '\n';
  };
  for (double error = largest; error >= least - 0.5; --error) {
    const double y = y_of(std::pow(10, error));
    add(R"(<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#d0d7de"/>)", left, y, left + width, y);
    add(R"(<text x="%.1f" y="%.1f" text-anchor="end">%g%s</text>)", left - 8, y + 4, std::pow(10, error),
        error > least ? "" : " or less");
  }
  for (double time = 0; time < slowest + 0.1; time += 0.2) {
    add(R"(<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>)", x_of(time), top, x_of(time), top + height,
        std::abs(time - 1) < 0.1 ? "#57606a" : "#d0d7de");
    add(R"(<text x="%.1f" y="%.1f" text-anchor="middle">%.1f</text>)", x_of(time), top + height + 18, time);
  }
  add(R"(<text x="%.1f" y="%.1f" text-anchor="middle">time over that of exact attention</text>)", left + width / 2,
      top + height + 40);
  std::string line;
  for (const choice* c : front) {
    char point[64];
    std::snprintf(point, sizeof point, "%.1f,%.1f ", x_of(c->time()), y_of(c->error()));
    line += point;
  }
  svg += R"(<polyline fill="none" stroke="#0969da" stroke-width="2" points=")" + line + "\"/>\n";
  for (const choice& c : all) {
    add(R"(<circle cx="%.1f" cy="%.1f" r="4" fill="%s"><title>%s</title></circle>)", x_of(c.time()), y_of(c.error()),
        c.is_best ? "#0969da" : "#8c959f", c.name().c_str());
  }
  std::ofstream file(path);
  file << svg << "</svg>\n";
  example::require_written(file, path);
}

void run(const options& o) {
  std::vector<choice> all = choices_of(o);
  if (!o.svg.empty()) example::require_writable(o.svg);
  const example::capture in = o.capture.empty() ? made_up(o.tokens.value_or(4096)) : example::capture::read(o.capture);
  const index_t tokens = std::min(o.tokens.value_or(in.tokens()), in.tokens());
  if (o.layer && *o.layer >= in.layers())
    throw std::invalid_argument("--layer: expected one below " + std::to_string(in.layers()));
  example::workers workers(o.threads);

  const index_t first = o.layer.value_or(0), end = o.layer ? first + 1 : in.layers();
  const example::progress tell(stderr);
  std::vector<float> exact(static_cast<std::size_t>(tokens * in.q_heads() * in.dim()));
  for (index_t layer = first; layer < end; ++layer) {
    gqa::attention(in.queries(layer, tokens), in.keys(layer, tokens), in.values(layer, tokens),
                   gqa::view(exact.data(), {1, tokens, in.q_heads(), in.dim()}), {.causal = true}, workers.ctx());
    if (!std::all_of(exact.begin(), exact.end(), [](float x) { return std::isfinite(x); }))
      throw std::runtime_error(o.capture + ": layer " + std::to_string(layer) + " gives NaN or infinity");
    for (std::size_t i = 0; i < all.size(); ++i) {
      tell.show("layer " + std::to_string(layer) + ", " + std::to_string(i + 1) + " of " + std::to_string(all.size()) +
                ": " + all[i].name() + " ...");
      measure(all[i], in, layer, tokens, o.rounds, exact, workers.ctx());
    }
  }
  tell.done();
  const auto front = pareto_front(all);

  std::printf("%td tokens, %td query heads on %td of dim %td, %td layers, %d thread%s\n\n", tokens, in.q_heads(),
              in.kv_heads(), in.dim(), end - first, o.threads, o.threads == 1 ? "" : "s");
  std::printf("%-44s %9s %9s %9s\n", "", "foreseen", "measured", "error");
  for (const choice& c : all) {
    std::printf("%-44s %8.2fx %8.2fx %9.2g%s\n", c.name().c_str(), c.exact_cost / c.cost, 1 / c.time(), c.error(),
                c.is_best ? "  *" : "");
  }
  if (!o.svg.empty()) plot(o.svg, all, front);
}

}  // namespace

int main(int argc, char** argv) {
  return example::run_program("gqa_tuner", usage, argc, argv, parse, run);
}
