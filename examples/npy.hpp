// SPDX-License-Identifier: Apache-2.0
// Arrays in .npy files, NumPy's format (version 1.0), which numpy.load() reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "files.hpp"

namespace example {

// What stands before the elements: magic, version, and a Python dictionary that ends on a multiple of 64 bytes.
inline std::string npy_header(const std::string& element, std::span<const std::int64_t> shape) {
  std::string text = "{'descr': " + element + ", 'fortran_order': False, 'shape': (";
  for (const std::int64_t extent : shape) text += std::to_string(extent) + ", ";
  text += "), }";
  constexpr std::size_t preamble = 10;
  while ((preamble + text.size() + 1) % 64 != 0) text += ' ';
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() % 256);
  header += static_cast<char>(text.size() / 256);
  return header + text;
}

// A dense array of floats, rows first.
inline void write_npy(const std::string& path, std::span<const float> values, std::vector<std::int64_t> shape) {
  std::ofstream file(path, std::ios::binary);
  file << npy_header("'<f4'", shape);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
  require_written(file, path);
}

}  // namespace example
