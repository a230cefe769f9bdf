// SPDX-License-Identifier: Apache-2.0
// From logits to text: a sampler, and the loop that feeds tokens back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "model.hpp"
#include "tokenizer.hpp"

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

// Mean loss, in nats a token, of foretelling each token of a text from those before it, all in one prefill.
inline double mean_loss(model& m, std::span<const int> tokens) {
  if (tokens.size() < 2) return 0;
  const auto fed = tokens.first(tokens.size() - 1);
  const Eigen::MatrixXd logits = m.forward(fed, static_cast<int>(fed.size())).cast<double>();
  double loss = 0;
  for (Eigen::Index i = 0; i < logits.rows(); ++i) {
    const auto row = logits.row(i).array();
    const double top = row.maxCoeff();
    loss += top + std::log((row - top).exp().sum()) - row[tokens[static_cast<std::size_t>(i) + 1]];
  }
  return loss / static_cast<double>(fed.size());
}

// Fills `steps` positions: the tokens of `prompt` (BOS first) in one prefill, then one new token after another until
// the model ends the text. `emit(previous, token)` hears of every token after BOS. Returns the positions run.
template <class Emit>
int generate(model& m, sampler& sample, std::span<const int> prompt, int steps, const Emit& emit) {
  const auto positions = static_cast<std::size_t>(steps);
  for (std::size_t i = 1; i < prompt.size() && i <= positions; ++i) emit(prompt[i - 1], prompt[i]);
  const auto fed = prompt.first(std::min(prompt.size(), positions));
  if (fed.empty()) return 0;
  const matrix* logits = &m.forward(fed);
  if (fed.size() < prompt.size()) return m.length();  // the prompt alone fills the positions
  for (int token = fed.back();;) {
    const int next = sample({logits->data(), static_cast<std::size_t>(logits->cols())});
    if (next == tokenizer::bos) break;
    emit(token, next);
    if (m.length() == steps) break;
    token = next;
    logits = &m.forward(std::span(&token, 1));
  }
  return m.length();
}

}  // namespace llama
