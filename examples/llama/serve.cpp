// SPDX-License-Identifier: Apache-2.0
// gqa_serve: many requests to a llama2.c checkpoint at once.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <gqa/gqa.hpp>

#include "../arguments.hpp"
#include "../program.hpp"
#include "../progress.hpp"
#include "checkpoint.hpp"
#include "server.hpp"
#include "tokenizer.hpp"

namespace {

using example::number;

constexpr const char* usage =
    R"(usage: gqa_serve --model M.bin --tokenizer T.bin --prompts FILE [options]

Continues many texts at once with a LLaMA-like model: requests join a batch when there is room and leave when they are
done; their keys lie in pages of one pool, and what all begin with is kept, and read, once. Texts go to stdout in the
order of the requests, a line each; progress and speed to stderr.

  --model FILE        checkpoint (legacy llama2.c layout)
  --tokenizer FILE    tokenizer.bin that belongs to it
  --prompts FILE      a request a line
  --beginning TEXT    what every request begins with
  --steps N           tokens to produce for a request at most; four of five ask for up to half fewer, so that they leave
                      at different times (default 128)
  --batch N           most requests at once (default 8)
  --pages N           of 64 tokens, for all of them (default: as many as they may need)
  --temperature X     0 takes the likeliest token (default 0)
  --seed S            of the sampling (default 0)
  --threads T         (default: the machine's)
  --check 0|1         runs every request by itself, too, and compares: not a byte may differ (default 0)
  --help              this text

Exit code: 0, or 2 for bad options, files that are missing, truncated or absurd, and texts that differ.
)";

struct options {
  std::string model, tokenizer, prompts, beginning;
  int steps = 128;
  gqa::index_t batch = 8, pages = 0;
  double temperature = 0;
  std::uint64_t seed = 0;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  bool check = false;
};

// Nothing if help was asked for.
std::optional<options> parse(int argc, char** argv) {
  options o;
  const auto set = [&o](std::string_view name, std::string_view value) {
    if (name == "--model") {
      o.model = value;
    } else if (name == "--tokenizer") {
      o.tokenizer = value;
    } else if (name == "--prompts") {
      o.prompts = value;
    } else if (name == "--beginning") {
      o.beginning = value;
    } else if (name == "--steps") {
      o.steps = number(name, value, 1, 1 << 20);
    } else if (name == "--batch") {
      o.batch = number(name, value, gqa::index_t{1}, gqa::index_t{1} << 16);
    } else if (name == "--pages") {
      o.pages = number(name, value, gqa::index_t{1}, gqa::index_t{1} << 24);
    } else if (name == "--temperature") {
      o.temperature = number(name, value, 0.0, 1e6);
    } else if (name == "--seed") {
      o.seed = number(name, value, std::uint64_t{0}, ~std::uint64_t{0} >> 1);
    } else if (name == "--threads") {
      o.threads = number(name, value, 1, 1024);
    } else if (name == "--check") {
      o.check = number(name, value, 0, 1) == 1;
    } else {
      return false;
    }
    return true;
  };
  if (!example::read_options(argc, argv, set)) return std::nullopt;
  if (o.model.empty() || o.tokenizer.empty() || o.prompts.empty())
    throw std::invalid_argument("--model, --tokenizer and --prompts are needed; see --help");
  return o;
}

std::vector<std::string> lines_of(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  if (lines.empty()) throw std::runtime_error(path + ": cannot be read, or is empty");
  return lines;
}

void run(const options& o) {
  const llama::checkpoint weights(o.model);
  const llama::config& sizes = weights.sizes();
  const llama::tokenizer pieces(o.tokenizer, sizes.vocab_size);
  const std::vector<int> beginning = pieces.encode(o.beginning);  // BOS first
  std::vector<llama::request> requests;
  gqa::index_t longest = 0;
  for (const std::string& line : lines_of(o.prompts)) {
    std::vector<int> prompt = pieces.encode(line);
    prompt.erase(prompt.begin());
    const auto n = static_cast<int>(requests.size());
    const int room = sizes.max_positions - static_cast<int>(beginning.size() + prompt.size());
    if (room < 1) throw std::runtime_error("request " + std::to_string(n) + ": longer than the model's positions");
    requests.push_back({std::move(prompt), std::min(std::max(o.steps - o.steps / 8 * (n % 5), 1), room)});
    longest = std::max(longest, static_cast<gqa::index_t>(requests.back().prompt.size()) + o.steps);
  }
  // No more of them run at once than there are.
  const auto batch = std::min(o.batch, static_cast<gqa::index_t>(requests.size()));
  llama::server_limits limits{.sequences = batch, .pages = o.pages};
  const auto pages_for = [&](gqa::index_t tokens) { return tokens / limits.page_size + 2; };
  if (limits.pages == 0)
    limits.pages = pages_for(static_cast<gqa::index_t>(beginning.size())) + batch * (pages_for(longest) + 1);
  limits.temperature = o.temperature, limits.seed = o.seed;

  example::workers workers(o.threads);
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&start] {
    return std::max(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 1e-9);
  };
  const example::progress progress(stderr);
  std::size_t ran = 0, steps = 0;
  llama::server server(weights, beginning, limits, workers.ctx());
  const auto texts = server.serve(requests, [&](std::size_t running, std::size_t done, std::size_t tokens) {
    ran = tokens;
    if (++steps % 64 == 0)
      progress.show(std::to_string(done) + " of " + std::to_string(requests.size()) + " requests done, " +
                    std::to_string(running) + " running, " +
                    std::to_string(static_cast<long long>(static_cast<double>(tokens) / seconds())) + " tokens/s");
  });
  const double took = seconds();
  progress.done();
  for (std::size_t n = 0; n < texts.size(); ++n) {
    int previous = requests[n].prompt.empty() ? beginning.back() : requests[n].prompt.back();
    for (const int token : texts[n]) {
      const std::string text = pieces.decode(previous, token);
      for (const char c : text) std::fputc(c == '\n' ? ' ' : c, stdout);
      previous = token;
    }
    std::fputc('\n', stdout);
  }
  std::fprintf(stderr, "%zu requests, %zu tokens in %zu steps, %.0f tokens/s\n", requests.size(), ran, steps,
               static_cast<double>(ran) / took);
  for (std::size_t n = 0; o.check && n < requests.size(); ++n) {
    llama::server_limits one = limits;
    one.sequences = 1, one.seed = o.seed + n;
    llama::server alone(weights, beginning, one, workers.ctx());
    if (alone.serve({&requests[n], 1}, [](auto...) {}).front() != texts[n])
      throw std::runtime_error("request " + std::to_string(n) + ": has another text by itself");
  }
  if (o.check) std::fprintf(stderr, "each request has the same text by itself\n");
}

}  // namespace

int main(int argc, char** argv) {
  return example::run_program("gqa_serve", usage, argc, argv, parse, run);
}
