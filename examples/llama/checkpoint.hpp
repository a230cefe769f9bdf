// SPDX-License-Identifier: Apache-2.0
// Checkpoints of llama2.c (the "legacy" layout): seven 32-bit integers, then float weights, all little-endian.
#pragma once

#include <Eigen/Core>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace llama {

// A file that is missing, cut short, or not what it should be; what() is one line.
class file_error : public std::runtime_error {
 public:
  file_error(const std::string& path, const std::string& problem) : std::runtime_error(path + ": " + problem) {}
};

// The whole of a file.
inline std::vector<char> read_file(const std::string& path) {
  std::error_code problem;
  if (!std::filesystem::is_regular_file(path, problem)) throw file_error(path, "there is no such file");
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes;
  const auto size = std::filesystem::file_size(path, problem);
  if (problem) throw file_error(path, problem.message());
  try {
    bytes.resize(size);
  } catch (const std::exception&) {
    throw file_error(path, "not enough memory for its " + std::to_string(size) + " bytes");
  }
  if (!file || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw file_error(path, "cannot be read");
  return bytes;
}

struct config {
  int dim = 0, hidden_dim = 0, layers = 0, q_heads = 0, kv_heads = 0, vocab_size = 0, max_positions = 0;

  [[nodiscard]] int head_dim() const { return dim / q_heads; }
  [[nodiscard]] int kv_dim() const { return head_dim() * kv_heads; }
};

// Weights are row-major [out, in]: a product is x [n, in] times the transpose.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using weights = Eigen::Map<const matrix>;
using gains = Eigen::Map<const Eigen::RowVectorXf>;

class checkpoint {
 public:
  struct layer {
    gains attention_norm, ffn_norm;  // [dim]
    weights q, k, v, o;              // [dim, dim], [kv_dim, dim] twice, [dim, dim]
    weights gate, down, up;          // [hidden, dim], [dim, hidden], [hidden, dim]
  };

  explicit checkpoint(const std::string& path) {
    const std::vector<char> file = read_file(path);
    const bool shared_classifier = read_header(path, file);
    const config& c = config_;
    const index n = c.layers, d = c.dim, kv = c.kv_dim(), hidden = c.hidden_dim, vocab = c.vocab_size;
    const index rope = index{c.max_positions} * (c.head_dim() / 2);  // each of two tables that nobody reads
    const index layer_size = 2 * d + 2 * d * d + 2 * kv * d + 3 * hidden * d;
    const index count = vocab * d + n * layer_size + d + 2 * rope + (shared_classifier ? 0 : vocab * d);
    const auto expected = header_bytes + static_cast<std::size_t>(count) * sizeof(float);
    if (file.size() != expected)
      throw file_error(path, "expected " + std::to_string(expected) + " bytes for the sizes in its header, got " +
                                 std::to_string(file.size()));
    floats_.resize(static_cast<std::size_t>(count));
    std::memcpy(floats_.data(), file.data() + header_bytes, floats_.size() * sizeof(float));
    for (const float x : floats_) {
      if (!std::isfinite(x)) throw file_error(path, "a weight is not finite");
    }

    const float* at = floats_.data();
    const auto take = [&at](index size) { return std::exchange(at, at + size); };
    embedding_ = take(vocab * d);
    attention_norms_ = take(n * d);
    q_ = take(n * d * d), k_ = take(n * kv * d), v_ = take(n * kv * d), o_ = take(n * d * d);
    ffn_norms_ = take(n * d);
    gate_ = take(n * hidden * d), down_ = take(n * d * hidden), up_ = take(n * hidden * d);
    final_norm_ = take(d);
    take(2 * rope);
    classifier_ = shared_classifier ? embedding_ : take(vocab * d);
  }

  [[nodiscard]] const config& sizes() const { return config_; }
  [[nodiscard]] weights embedding() const { return {embedding_, config_.vocab_size, config_.dim}; }
  [[nodiscard]] weights classifier() const { return {classifier_, config_.vocab_size, config_.dim}; }
  [[nodiscard]] gains final_norm() const { return {final_norm_, config_.dim}; }
  [[nodiscard]] layer at(int l) const {
    const index d = config_.dim, kv = config_.kv_dim(), hidden = config_.hidden_dim;
    const auto rows = [l](const float* all, index out, index in) { return weights(all + l * out * in, out, in); };
    return {gains(attention_norms_ + l * d, d),
            gains(ffn_norms_ + l * d, d),
            rows(q_, d, d),
            rows(k_, kv, d),
            rows(v_, kv, d),
            rows(o_, d, d),
            rows(gate_, hidden, d),
            rows(down_, d, hidden),
            rows(up_, hidden, d)};
  }

 private:
  using index = Eigen::Index;
  static constexpr std::size_t header_bytes = 7 * sizeof(std::int32_t);

  // True if the classifier is the embedding, which the sign of the vocabulary's size tells.
  bool read_header(const std::string& path, const std::vector<char>& file) {
    std::array<std::int32_t, 7> header{};
    if (file.size() < header_bytes) throw file_error(path, "too short for the header of a llama2.c checkpoint");
    std::memcpy(header.data(), file.data(), header_bytes);
    // Beyond any model there is, and small enough that no product of sizes overflows.
    constexpr std::int32_t most = 1 << 19;
    static constexpr std::array names = {"dim",      "hidden_dim", "layers",       "q_heads",
                                         "kv_heads", "vocab_size", "max_positions"};
    const bool shared_classifier = header[5] > 0;
    if (header[5] < 0 && header[5] >= -most) header[5] = -header[5];
    for (std::size_t i = 0; i < header.size(); ++i) {
      if (header[i] < 1 || header[i] > most)
        throw file_error(path,
                         std::string("not a llama2.c checkpoint: ") + names[i] + " is " + std::to_string(header[i]));
    }
    config_ = {header[0], header[1], header[2], header[3], header[4], header[5], header[6]};
    if (config_.dim % config_.q_heads != 0 || config_.head_dim() % 2 != 0 || config_.q_heads % config_.kv_heads != 0)
      throw file_error(path, "not a llama2.c checkpoint: dim " + std::to_string(config_.dim) + ", " +
                                 std::to_string(config_.q_heads) + " query heads and " +
                                 std::to_string(config_.kv_heads) + " KV heads do not fit each other");
    return shared_classifier;
  }

  config config_;
  std::vector<float> floats_;
  const float *embedding_ = nullptr, *classifier_ = nullptr, *final_norm_ = nullptr;
  const float *attention_norms_ = nullptr, *ffn_norms_ = nullptr;
  const float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *o_ = nullptr;
  const float *gate_ = nullptr, *down_ = nullptr, *up_ = nullptr;
};

}  // namespace llama
