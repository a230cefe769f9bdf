// SPDX-License-Identifier: Apache-2.0
// What a model's attention was asked: queries, keys and values of every layer and token, as a file that numpy.load()
// reads, too. Its elements are records of a token: `q` [H, D], `k` [G, D], `v` [G, D]; its shape is [layers, tokens].
#pragma once

#include <gqa/gqa.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "files.hpp"
#include "npy.hpp"

namespace example {

class capture {
 public:
  capture(gqa::index_t layers, gqa::index_t q_heads, gqa::index_t kv_heads, gqa::index_t dim)
      : q_heads_(q_heads), kv_heads_(kv_heads), dim_(dim), layers_(static_cast<std::size_t>(layers)) {}

  [[nodiscard]] gqa::index_t layers() const { return static_cast<gqa::index_t>(layers_.size()); }
  [[nodiscard]] gqa::index_t q_heads() const { return q_heads_; }
  [[nodiscard]] gqa::index_t kv_heads() const { return kv_heads_; }
  [[nodiscard]] gqa::index_t dim() const { return dim_; }
  [[nodiscard]] gqa::index_t tokens() const {
    return layers_.empty() ? 0 : static_cast<gqa::index_t>(layers_[0].size()) / record();
  }

  // Queries, keys and values of further tokens, dense [tokens, heads, D] each.
  void append(gqa::index_t layer, const float* q, const float* k, const float* v, gqa::index_t tokens) {
    std::vector<float>& to = layers_[static_cast<std::size_t>(layer)];
    const gqa::index_t of_q = q_heads_ * dim_, of_kv = kv_heads_ * dim_;
    for (gqa::index_t t = 0; t < tokens; ++t) {
      to.insert(to.end(), q + t * of_q, q + (t + 1) * of_q);
      to.insert(to.end(), k + t * of_kv, k + (t + 1) * of_kv);
      to.insert(to.end(), v + t * of_kv, v + (t + 1) * of_kv);
    }
  }

  // Of a layer's first `count` tokens: [1, count, heads, D].
  [[nodiscard]] auto queries(gqa::index_t layer, gqa::index_t count) const { return part(layer, count, 0, q_heads_); }
  [[nodiscard]] auto keys(gqa::index_t layer, gqa::index_t count) const {
    return part(layer, count, q_heads_, kv_heads_);
  }
  [[nodiscard]] auto values(gqa::index_t layer, gqa::index_t count) const {
    return part(layer, count, q_heads_ + kv_heads_, kv_heads_);
  }

  void write(const std::string& path) const {
    const auto field = [&](const char* name, gqa::index_t heads) {
      return std::string("('") + name + "', '<f4', (" + std::to_string(heads) + ", " + std::to_string(dim_) + "))";
    };
    const std::string element =
        "[" + field("q", q_heads_) + ", " + field("k", kv_heads_) + ", " + field("v", kv_heads_) + "]";
    std::ofstream file(path, std::ios::binary);
    file << npy_header(element, std::vector<std::int64_t>{layers(), tokens()});
    for (const std::vector<float>& layer : layers_)
      file.write(reinterpret_cast<const char*>(layer.data()),
                 static_cast<std::streamsize>(layer.size() * sizeof(float)));
    require_written(file, path);
  }

  [[nodiscard]] static capture read(const std::string& path) {
    // A device may have no end.
    std::error_code problem;
    if (!std::filesystem::is_regular_file(path, problem)) throw std::runtime_error(path + ": expected a regular file");
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file && !file.eof()) throw std::runtime_error(path + ": cannot be read");
    const auto refuse = [&](const char* why) { throw std::runtime_error(path + ": " + why); };
    constexpr std::size_t preamble = 10;
    if (bytes.size() < preamble || bytes.compare(0, 8, std::string("\x93NUMPY\x01\x00", 8)) != 0)
      refuse("expected a .npy file of version 1.0");
    const std::size_t length = static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
    if (bytes.size() < preamble + length) refuse("ends within its header");
    const std::string header = bytes.substr(preamble, length);
    const std::string heads = R"('<f4', \((\d{1,6}), (\d{1,6})\)\))";
    const std::regex fields(R"('descr': \[\('q', )" + heads + R"(, \('k', )" + heads + R"(, \('v', )" + heads +
                            R"(\], 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9}),? ?\))");
    std::smatch found;
    if (!std::regex_search(header, found, fields)) refuse("expected records of q, k and v, of floats");
    const auto at = [&](std::size_t i) { return static_cast<gqa::index_t>(std::stoll(found[i])); };
    const gqa::index_t q_heads = at(1), kv_heads = at(3), dim = at(2), layers = at(7), tokens = at(8);
    if (at(4) != dim || at(6) != dim || at(5) != kv_heads) refuse("expected k and v of one shape, q of their dim");
    if (dim == 0 || kv_heads == 0 || q_heads == 0 || q_heads % kv_heads != 0)
      refuse("expected query heads that are a multiple of the KV heads");
    // By division: the product of absurd extents overflows.
    auto floats = static_cast<gqa::index_t>((bytes.size() - preamble - length) / sizeof(float));
    for (const gqa::index_t extent : {dim, q_heads + 2 * kv_heads, layers, tokens})
      floats = extent == 0 ? 0 : floats / extent;
    if (layers == 0 || tokens == 0) refuse("holds no tokens");
    if (floats == 0) refuse("ends before its last token");
    capture c(layers, q_heads, kv_heads, dim);
    const auto of_layer = static_cast<std::size_t>(tokens * c.record());
    const char* from = bytes.data() + preamble + length;
    for (std::vector<float>& layer : c.layers_) {
      layer.resize(of_layer);
      std::copy_n(from, of_layer * sizeof(float), reinterpret_cast<char*>(layer.data()));
      from += of_layer * sizeof(float);
    }
    return c;
  }

 private:
  [[nodiscard]] gqa::index_t record() const { return (q_heads_ + 2 * kv_heads_) * dim_; }
  [[nodiscard]] gqa::tensor_view<const float, 4> part(gqa::index_t layer, gqa::index_t count, gqa::index_t first,
                                                      gqa::index_t heads) const {
    return {layers_[static_cast<std::size_t>(layer)].data() + first * dim_,
            {1, count, heads, dim_},
            {0, record(), dim_, 1}};
  }

  gqa::index_t q_heads_, kv_heads_, dim_;
  std::vector<std::vector<float>> layers_;  // [layers][tokens, record]
};

}  // namespace example
