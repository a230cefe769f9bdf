// SPDX-License-Identifier: Apache-2.0
// Activations of a trained model, layer by layer: for tests and benches.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <gqa/config.hpp>

namespace gqa::test {

// Queries [positions, q_heads, dim], keys and values [positions, kv_heads, dim] after RoPE, and causal attention over
// them in double.
struct real_layer {
  index_t positions, q_heads, kv_heads, dim;
  std::vector<float> q, k, v;
  std::vector<double> out;
};

// None if the file cannot be read to its end.
inline std::vector<real_layer> read_real_layers(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[8];
  std::int32_t header[5]{};  // layers, positions, query heads, KV heads, head dim
  file.read(magic, sizeof magic);
  file.read(reinterpret_cast<char*>(header), sizeof header);
  std::vector<real_layer> layers;
  if (!file || std::memcmp(magic, "ATTNREF1", 8) != 0) return layers;
  for (int i = 0; i < header[0]; ++i) {
    real_layer layer{header[1], header[2], header[3], header[4], {}, {}, {}, {}};
    const auto read = [&](auto& values, index_t heads) {
      values.resize(static_cast<std::size_t>(layer.positions * heads * layer.dim));
      file.read(reinterpret_cast<char*>(values.data()),
                static_cast<std::streamsize>(values.size() * sizeof(values[0])));
    };
    read(layer.q, layer.q_heads), read(layer.k, layer.kv_heads), read(layer.v, layer.kv_heads);
    read(layer.out, layer.q_heads);
    layers.push_back(std::move(layer));
  }
  if (!file) layers.clear();
  return layers;
}

}  // namespace gqa::test
