// SPDX-License-Identifier: Apache-2.0
// gqa_llama: text from a llama2.c checkpoint.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <gqa/gqa.hpp>

#include "../arguments.hpp"
#include "../capture.hpp"
#include "../files.hpp"
#include "../program.hpp"
#include "checkpoint.hpp"
#include "generate.hpp"
#include "model.hpp"
#include "tokenizer.hpp"

namespace {

using example::number;

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
  --loss FILE         no text: the mean loss over --steps tokens of a file of stories, between which <|endoftext|>
                      stands; repeated if it has fewer, and beyond the positions of the model's training, too
  --capture FILE      queries, keys and values of all layers and tokens, after their rotation, to a .npy file, from
                      which gqa_tuner finds options for grouped attention
  --attention KIND    exact (default), local (the newest --window keys), grouped: near keys exactly, the others by
                      groups of queries, in prefill; or pages: a new token reads the pages of 64 keys that matter
  --kv-type TYPE      what keys and values are stored in: f32 (default), f16, bf16 or q8
  --window N          near keys (default 256)
  --block N           grouped: queries grouped at a time (default 256)
  --groups N          grouped: of a block's queries of a KV head (default: one for 32)
  --top-keys N        grouped: keys that every query of a group meets by itself (default 64)
  --tolerance X       grouped: as many groups as it takes for weights to be off by no more in all, instead of --groups
  --epsilon X         pages: the largest share of its mass that a head may leave unread (default 0.01)
  --exact-layers N    pages: the first so many layers read all (default 0)
  --bound-tokens N    pages: 16 (default) or 64 keys that bounds are kept of together
  --always 0|1        grouped: also where the exact kernel would be faster (default 0)
  --help              this text

Exit code: 0, or 2 for bad options and for files that are missing, truncated or absurd.
)";

struct options {
  std::string model, tokenizer, prompt, loss, capture;
  int steps = 256;
  double temperature = 1;
  std::uint64_t seed = 0;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  llama::attention_choice attention;
};

llama::attention_kind attention_kind(std::string_view text) {
  if (text == "exact") return llama::attention_kind::exact;
  if (text == "grouped") return llama::attention_kind::grouped;
  if (text == "local") return llama::attention_kind::local;
  if (text == "pages") return llama::attention_kind::pages;
  throw std::invalid_argument("--attention: not exact, grouped, local or pages: '" + std::string(text) + "'");
}

llama::kv_type kv_type(std::string_view text) {
  if (text == "f32") return llama::kv_type::f32;
  if (text == "f16") return llama::kv_type::f16;
  if (text == "bf16") return llama::kv_type::bf16;
  if (text == "q8") return llama::kv_type::q8;
  throw std::invalid_argument("--kv-type: not f32, f16, bf16 or q8: '" + std::string(text) + "'");
}

// Nothing if help was asked for.
std::optional<options> parse(int argc, char** argv) {
  constexpr gqa::index_t most = 1 << 30;
  options o;
  const auto set = [&o](std::string_view name, std::string_view value) {
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
    } else if (name == "--loss") {
      o.loss = value;
    } else if (name == "--capture") {
      o.capture = value;
    } else if (name == "--attention") {
      o.attention.kind = attention_kind(value);
    } else if (name == "--kv-type") {
      o.attention.stored = kv_type(value);
    } else if (name == "--window") {
      o.attention.window = o.attention.grouped.window = number(name, value, gqa::index_t{1}, most);
    } else if (name == "--block") {
      o.attention.grouped.block = number(name, value, gqa::index_t{1}, most);
    } else if (name == "--groups") {
      o.attention.grouped.grouping.groups = number(name, value, gqa::index_t{1}, most);
    } else if (name == "--top-keys") {
      o.attention.grouped.groupwise.top_keys = number(name, value, gqa::index_t{0}, most);
    } else if (name == "--tolerance") {
      o.attention.grouped.tolerance = number(name, value, 0.0, 2.0);
    } else if (name == "--epsilon") {
      o.attention.pages.epsilon = number(name, value, 0.0, 0.999);
    } else if (name == "--exact-layers") {
      o.attention.exact_layers = number(name, value, 0, 1 << 20);
    } else if (name == "--bound-tokens") {
      o.attention.bound_tokens = number(name, value, gqa::index_t{16}, gqa::index_t{64});
    } else if (name == "--always") {
      o.attention.grouped.always_group = number(name, value, 0, 1) == 1;
    } else {
      return false;
    }
    return true;
  };
  if (!example::read_options(argc, argv, set)) return std::nullopt;
  if (o.model.empty() || o.tokenizer.empty())
    throw std::invalid_argument("--model and --tokenizer are needed; see --help");
  return o;
}

// The tokens of a file's stories, which <|endoftext|> separates, each after a token that begins a text; the first
// `count` of them, again and again if there are fewer.
std::vector<int> tokens_of_file(const std::string& path, const llama::tokenizer& pieces, std::size_t count) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || text.empty()) throw std::runtime_error(path + ": cannot be read, or is empty");
  constexpr std::string_view separator = "<|endoftext|>", blanks = " \t\r\n";
  std::vector<int> tokens;
  for (std::size_t begin = 0; begin < text.size() && tokens.size() < count;) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    const std::string story = text.substr(begin, std::min(end - begin, 16 * count));  // a token is a few bytes
    const std::size_t first = story.find_first_not_of(blanks);
    if (first != std::string::npos) {
      const auto more = pieces.encode(story.substr(first, story.find_last_not_of(blanks) - first + 1));
      tokens.insert(tokens.end(), more.begin(), more.end());
    }
    begin = end + separator.size();
  }
  if (tokens.empty()) throw std::runtime_error(path + ": holds nothing but blanks");
  const std::vector<int> once = tokens;
  while (tokens.size() < count) tokens.insert(tokens.end(), once.begin(), once.end());
  tokens.resize(count);
  return tokens;
}

void tell_pages(const llama::pages_read& of) {
  if (of.pages > 0)
    std::fprintf(stderr, "pages: %.1f %% read, no head lost more than %.3g of its mass\n",
                 100 * static_cast<double>(of.read) / static_cast<double>(of.pages), of.dropped);
}

void run(const options& o) {
  const llama::checkpoint weights(o.model);
  const llama::tokenizer pieces(o.tokenizer, weights.sizes().vocab_size);
  const int steps = o.loss.empty() ? std::min(o.steps, weights.sizes().max_positions) : o.steps;

  example::workers workers(o.threads);
  const llama::config& sizes = weights.sizes();
  example::capture captured(sizes.layers, sizes.q_heads, sizes.kv_heads, sizes.head_dim());
  llama::model model(weights, steps, workers.ctx(), o.attention);
  llama::sampler sample(o.temperature, o.seed);
  if (!o.capture.empty()) {
    example::require_writable(o.capture);
    model.capture_to(captured);
  }

  const auto start = std::chrono::steady_clock::now();
  const auto seconds_since_start = [&start] {
    return std::max(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 1e-9);
  };
  if (!o.loss.empty()) {
    const std::vector<int> tokens = tokens_of_file(o.loss, pieces, static_cast<std::size_t>(steps));
    const bool by_token = o.attention.kind == llama::attention_kind::pages;  // as it decodes
    const double loss = llama::mean_loss(model, tokens, by_token ? 1 : steps);
    if (!o.capture.empty()) captured.write(o.capture);
    std::printf("%d tokens, loss %.6f, attention %.4f s\n", steps, loss, model.attention_seconds());
    tell_pages(model.pages_read());
    return;
  }
  const int positions = llama::generate(model, sample, pieces.encode(o.prompt), steps, [&](int previous, int token) {
    const std::string text = pieces.decode(previous, token);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  });
  const double seconds = seconds_since_start();
  if (!o.capture.empty()) captured.write(o.capture);
  std::fprintf(stderr, "\n%d positions, %.0f tokens/s, attention %.1f %% of the time\n", positions, positions / seconds,
               100 * model.attention_seconds() / seconds);
  tell_pages(model.pages_read());
}

}  // namespace

int main(int argc, char** argv) {
  return example::run_program("gqa_llama", usage, argc, argv, parse, run);
}
