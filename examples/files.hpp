// SPDX-License-Identifier: Apache-2.0
// Files that are written.
#pragma once

#include <fstream>
#include <stdexcept>
#include <string>

namespace example {

// Better known before hours of work than after them.
inline void require_writable(const std::string& path) {
  if (!std::ofstream(path, std::ios::app)) throw std::runtime_error(path + ": cannot be written");
}
// After the last of it.
inline void require_written(std::ofstream& file, const std::string& path) {
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

}  // namespace example
