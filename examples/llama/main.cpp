// SPDX-License-Identifier: Apache-2.0
// gqa_llama: text from a llama2.c checkpoint.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

#include <gqa/gqa.hpp>

#include "checkpoint.hpp"
#include "generate.hpp"
#include "model.hpp"
#include "tokenizer.hpp"

namespace {

constexpr const char* usage =
    R"(usage: gqa_llama --model M.bin --tokenizer T.bin [options]

Continues a text with a LLaMA-like model: a llama2.c checkpoint and its tokenizer.
The text alone, prompt included, goes to stdout as it is produced; speed goes to stderr.

  --model FILE        checkpoint (legacy llama2.c layout)
  --tokenizer FILE    tokenizer.bin that belongs to it
  --prompt TEXT       what to continue; without it the model starts a text of its own
  --steps N           positions to fill, prompt included; at most the model's own (default 256)
  --temperature X     0 takes the likeliest token, 1 samples as trained (default 1)
  --seed S            of the sampling (default 0)
  --threads T         of matrix products and attention (default: the machine's)
  --help              this text

Exit code: 0, or 2 for bad options and for files that are missing, truncated or absurd.
)";

struct options {
  std::string model, tokenizer, prompt;
  int steps = 256;
  double temperature = 1;
  std::uint64_t seed = 0;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
};

template <class T>
T number(std::string_view name, std::string_view text, T least, T most) {
  T value{};
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size() || !(value >= least && value <= most))
    throw std::invalid_argument(std::string(name) + ": not a number in its range: '" + std::string(text) + "'");
  return value;
}

// Nothing if help was asked for.
std::optional<options> parse(int argc, char** argv) {
  options o;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--help" || name == "-h") return std::nullopt;
    if (i + 1 == argc) throw std::invalid_argument(std::string(name) + ": unknown option, or its value is missing");
    const std::string_view value = argv[++i];
    if (name == "--model") {
      o.model = value;
    } else if (name == "--tokenizer") {
      o.tokenizer = value;
    } else if (name == "--prompt") {
      o.prompt = value;
    } else if (name == "--steps") {
      o.steps = number(name, value, 0, 1 << 30);
    } else if (name == "--temperature") {
      o.temperature = number(name, value, 0.0, 1e6);
    } else if (name == "--seed") {
      o.seed = number(name, value, std::uint64_t{0}, ~std::uint64_t{0});
    } else if (name == "--threads") {
      o.threads = number(name, value, 1, 1024);
    } else {
      throw std::invalid_argument(std::string(name) + ": unknown option; see --help");
    }
  }
  if (o.model.empty() || o.tokenizer.empty())
    throw std::invalid_argument("--model and --tokenizer are needed; see --help");
  return o;
}

void run(const options& o) {
  const llama::checkpoint weights(o.model);
  const llama::tokenizer pieces(o.tokenizer, weights.sizes().vocab_size);
  const int steps = std::min(o.steps, weights.sizes().max_positions);

  std::unique_ptr<Eigen::ThreadPool> pool;
  if (o.threads > 1) pool = std::make_unique<Eigen::ThreadPool>(o.threads);
  const auto ctx = pool ? std::make_unique<gqa::context>(*pool) : std::make_unique<gqa::context>();
  llama::model model(weights, steps, *ctx);
  llama::sampler sample(o.temperature, o.seed);

  const auto start = std::chrono::steady_clock::now();
  const int positions = llama::generate(model, sample, pieces.encode(o.prompt), steps, [&](int previous, int token) {
    const std::string text = pieces.decode(previous, token);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::fprintf(stderr, "\n%d positions, %.0f tokens/s, attention %.1f %% of the time\n", positions,
               positions / std::max(seconds, 1e-9), 100 * model.attention_seconds() / std::max(seconds, 1e-9));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto o = parse(argc, argv);
    if (!o) {
      std::fputs(usage, stdout);
      return 0;
    }
    run(*o);
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "gqa_llama: %s\n", problem.what());
    return 2;
  }
  return 0;
}
