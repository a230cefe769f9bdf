// SPDX-License-Identifier: Apache-2.0
// Numbers of command lines.
#pragma once

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace example {

// A number within [least, most].
template <class T>
T number(std::string_view name, std::string_view text, T least, T most) {
  T value{};
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size() || !(value >= least && value <= most))
    throw std::invalid_argument(std::string(name) + ": not a number in its range: '" + std::string(text) + "'");
  return value;
}

// Such numbers, with commas between them; none of an empty text.
template <class T>
std::vector<T> numbers(std::string_view name, std::string_view text, T least, T most) {
  std::vector<T> values;
  while (!text.empty()) {
    const std::size_t comma = text.find(',');
    values.push_back(number(name, text.substr(0, comma), least, most));
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
    if (text.empty()) throw std::invalid_argument(std::string(name) + ": a number is missing after the last comma");
  }
  return values;
}

}  // namespace example
