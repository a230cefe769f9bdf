// SPDX-License-Identifier: Apache-2.0
// From logits to a token.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace llama {

// Draws tokens from softmax(logits / temperature); temperature 0 takes the likeliest.
class sampler {
 public:
  sampler(double temperature, std::uint64_t seed) : temperature_(temperature), random_(seed) {}

  int operator()(std::span<const float> logits) {
    const auto top = std::max_element(logits.begin(), logits.end());
    if (temperature_ == 0) return static_cast<int>(top - logits.begin());
    weights_.clear();
    double total = 0;
    for (const float x : logits) {
      weights_.push_back(std::exp((static_cast<double>(x) - static_cast<double>(*top)) / temperature_));
      total += weights_.back();
    }
    double left = static_cast<double>(random_() >> 11) * 0x1p-53 * total;  // the same on every standard library
    std::size_t token = 0;
    while (token + 1 < weights_.size() && left >= weights_[token]) left -= weights_[token++];
    return static_cast<int>(token);
  }

 private:
  double temperature_;
  std::mt19937_64 random_;
  std::vector<double> weights_;
};

}  // namespace llama
