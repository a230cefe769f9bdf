// SPDX-License-Identifier: Apache-2.0
// From logits to text: the loop that feeds tokens back, and the loss over a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "model.hpp"
#include "sampler.hpp"
#include "tokenizer.hpp"

namespace llama {

// Mean loss, in nats a token, of foretelling each token of a text from those before it, so many of them at a time: all
// in one prefill, if there are as many.
inline double mean_loss(model& m, std::span<const int> tokens, int at_once) {
  if (tokens.size() < 2) return 0;
  const auto fed = tokens.first(tokens.size() - 1);
  double loss = 0;
  for (std::size_t first = 0; first < fed.size(); first += static_cast<std::size_t>(at_once)) {
    const auto some = fed.subspan(first, std::min(static_cast<std::size_t>(at_once), fed.size() - first));
    const Eigen::MatrixXd logits = m.forward(some, static_cast<int>(some.size())).cast<double>();
    for (Eigen::Index i = 0; i < logits.rows(); ++i) {
      const auto row = logits.row(i).array();
      const double top = row.maxCoeff();
      loss += top + std::log((row - top).exp().sum()) - row[tokens[first + static_cast<std::size_t>(i) + 1]];
    }
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
