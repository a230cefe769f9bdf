// SPDX-License-Identifier: Apache-2.0
// Real data for tests: the folder that the environment variable GQA_TEST_DATA names, and readers of what lies in it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include <gqa/config.hpp>

#include "real_layers.hpp"

// Skips the test, saying so, where there is no data.
#define GQA_NEED_TEST_DATA() \
  if (::gqa::test::test_data_folder().empty()) GTEST_SKIP() << "GQA_TEST_DATA is not set"

namespace gqa::test {

inline std::string test_data_folder() {
  const char* const folder = std::getenv("GQA_TEST_DATA");
  return folder == nullptr ? "" : folder;
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) ADD_FAILURE() << "cannot read " << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

// The values of single keys in the data's JSON files, which name each key once: not a JSON parser.
inline std::optional<double> json_number(const std::string& json, const std::string& key) {
  std::smatch found;
  if (!std::regex_search(json, found, std::regex('"' + key + "\"\\s*:\\s*(-?[0-9.eE+-]+)"))) return std::nullopt;
  return std::stod(found[1]);
}

inline std::vector<int> json_integers(const std::string& json, const std::string& key) {
  std::vector<int> numbers;
  const std::size_t name = json.find('"' + key + '"'), begin = json.find('[', name), end = json.find(']', begin);
  if (name == std::string::npos || end == std::string::npos) {
    ADD_FAILURE() << "no list " << key;
    return numbers;
  }
  const std::string list = json.substr(begin, end - begin);
  const std::regex integer("-?[0-9]+");
  for (std::sregex_iterator i(list.begin(), list.end(), integer), none; i != none; ++i)
    numbers.push_back(std::stoi(i->str()));
  return numbers;
}

inline std::string json_string(const std::string& json, const std::string& key) {
  std::size_t at = json.find('"' + key + '"');
  std::string text;
  if (at == std::string::npos) {
    ADD_FAILURE() << "no string " << key;
    return text;
  }
  at = json.find('"', json.find(':', at));
  while (json.at(++at) != '"') {
    if (json[at] != '\\') {
      text += json[at];
    } else {
      const char escaped = json.at(++at);
      text += escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped;
    }
  }
  return text;
}

// The stored activations.
inline std::vector<real_layer> read_real_layers() {
  std::vector<real_layer> layers = read_real_layers(test_data_folder() + "/models/stories260K_attn512.bin");
  if (layers.empty()) ADD_FAILURE() << "no activations in the test data";
  return layers;
}

}  // namespace gqa::test
