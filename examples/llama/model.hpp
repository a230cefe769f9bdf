// SPDX-License-Identifier: Apache-2.0
// A LLaMA-like transformer in about a hundred lines: RMSNorm, RoPE, grouped-query attention, SwiGLU. Matrix products
// are Eigen's, attention and rotary embedding are gqa's, and keys and values lie in its caches, one a layer.
#pragma once

#include <gqa/gqa.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../capture.hpp"
#include "checkpoint.hpp"

namespace llama {

// How queries meet keys. Grouped: near keys exactly, the others by groups (docs/04_grouped_attention.md), where there
// are enough queries at once to make groups. Local: only the `window` newest keys.
enum class attention_kind { exact, grouped, local };
struct attention_choice {
  attention_kind kind = attention_kind::exact;
  gqa::grouped_options grouped = {};
  gqa::index_t window = 256;
};

class model {
 public:
  // Room for `positions` tokens of one sequence. The checkpoint and the context must outlive the model.
  model(const checkpoint& from, int positions, gqa::context& ctx, const attention_choice& attention = {})
      : from_(from),
        sizes_(from.sizes()),
        positions_(positions),
        ctx_(ctx),
        attention_(attention),
        rope_(sizes_.head_dim()) {
    attention_.grouped.attention.causal = true;
    for (int l = 0; l < sizes_.layers; ++l) caches_.emplace_back(1, sizes_.kv_heads, positions, sizes_.head_dim());
  }

  // Tokens seen so far.
  [[nodiscard]] int length() const { return length_; }
  void clear() {
    length_ = 0;
    for (auto& cache : caches_) cache.clear();
  }
  // From now on what attention is asked is appended to `to`, which must outlive the model.
  void capture_to(example::capture& to) { capture_ = &to; }
  [[nodiscard]] double attention_seconds() const { return attention_seconds_; }

  // Runs the next tokens, all at once. Returns the logits [wanted, vocab] of the last `wanted` of them.
  const matrix& forward(std::span<const int> tokens, int wanted = 1) {
    const int n = static_cast<int>(tokens.size());
    if (n > positions_ - length_) throw std::length_error("llama::model: more tokens than positions");
    x_.resize(n, sizes_.dim);
    for (int i = 0; i < n; ++i) x_.row(i) = from_.embedding().row(tokens[static_cast<std::size_t>(i)]);
    std::vector<gqa::index_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), length_);
    const auto turns = rope_.turns<float>(positions, ctx_);  // the same in every layer
    for (int l = 0; l < sizes_.layers; ++l) {
      const checkpoint::layer w = from_.at(l);
      attend(l, w, turns);
      feed_forward(w);
    }
    length_ += n;
    normalise(x_.bottomRows(wanted), from_.final_norm());
    logits_.resize(wanted, sizes_.vocab_size);
    multiply(normal_, from_.classifier(), logits_);
    return logits_;
  }

 private:
  // x += attention(norm(x)) Wo, with the new keys and values stored first.
  void attend(int l, const checkpoint::layer& w, const gqa::rope_turns<float>& turns) {
    const Eigen::Index n = x_.rows();
    normalise(x_, w.attention_norm);
    queries_.resize(n, sizes_.dim);
    keys_.resize(n, sizes_.kv_dim());
    values_.resize(n, sizes_.kv_dim());
    multiply(normal_, w.q, queries_);
    multiply(normal_, w.k, keys_);
    multiply(normal_, w.v, values_);
    const gqa::index_t heads = sizes_.q_heads, kv_heads = sizes_.kv_heads, d = sizes_.head_dim();
    rope_.rotate(gqa::view(queries_.data(), {1, n, heads, d}), turns, ctx_);
    rope_.rotate(gqa::view(keys_.data(), {1, n, kv_heads, d}), turns, ctx_);
    if (capture_ != nullptr) capture_->append(l, queries_.data(), keys_.data(), values_.data(), n);

    const auto start = std::chrono::steady_clock::now();
    mixed_.resize(n, sizes_.dim);
    gqa::kv_cache<float>& cache = caches_[static_cast<std::size_t>(l)];
    cache.append(gqa::view(keys_.data(), {1, n, kv_heads, d}), gqa::view(values_.data(), {1, n, kv_heads, d}));
    const auto q = gqa::view(queries_.data(), {1, n, heads, d}), out = gqa::view(mixed_.data(), {1, n, heads, d});
    switch (attention_.kind) {
      case attention_kind::exact:
        gqa::attention(q, cache, out, {.causal = true}, ctx_);
        break;
      case attention_kind::grouped:
        gqa::grouped_attention(q, cache, out, attention_.grouped, ctx_);
        break;
      case attention_kind::local:
        gqa::attention(q, cache, out, {.causal = true, .window = {attention_.window - 1, -1}}, ctx_);
        break;
    }
    attention_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

    branch_.resize(n, sizes_.dim);
    multiply(mixed_, w.o, branch_);
    x_ += branch_;
  }

  // x += (silu(norm(x) Wgate) * norm(x) Wup) Wdown
  void feed_forward(const checkpoint::layer& w) {
    normalise(x_, w.ffn_norm);
    gate_.resize(x_.rows(), sizes_.hidden_dim);
    up_.resize(x_.rows(), sizes_.hidden_dim);
    multiply(normal_, w.gate, gate_);
    multiply(normal_, w.up, up_);
    up_.array() *= gate_.array() / (1 + (-gate_.array()).exp());
    multiply(up_, w.down, branch_);
    x_ += branch_;
  }

  // normal_ = x / rms(x) * gain, row by row.
  template <class Rows>
  void normalise(const Rows& x, const gains& gain) {
    normal_.resize(x.rows(), x.cols());
    for (Eigen::Index i = 0; i < x.rows(); ++i) {
      const float rms = std::sqrt(x.row(i).squaredNorm() / static_cast<float>(x.cols()) + 1e-5f);
      normal_.row(i) = x.row(i).cwiseProduct(gain) / rms;
    }
  }

  // y [n, out] = x [n, in] * w [out, in]^T, divided among the context's workers by blocks of outputs.
  template <class Result>
  void multiply(const matrix& x, const weights& w, Result& y) {
    constexpr Eigen::Index block = 256;
    ctx_.for_each((w.rows() + block - 1) / block, [&](gqa::index_t task, gqa::index_t) {
      const Eigen::Index first = task * block, size = std::min(block, w.rows() - first);
      if (x.rows() == 1) {  // a matrix-vector product, for which Eigen has better loops
        y.row(0).segment(first, size).transpose().noalias() = w.middleRows(first, size) * x.row(0).transpose();
      } else {
        y.middleCols(first, size).noalias() = x * w.middleRows(first, size).transpose();
      }
    });
  }

  const checkpoint& from_;
  const config sizes_;
  const int positions_;
  gqa::context& ctx_;
  attention_choice attention_;
  example::capture* capture_ = nullptr;
  gqa::rope rope_;
  std::vector<gqa::kv_cache<float>> caches_;  // a layer each
  matrix x_, normal_, queries_, keys_, values_, mixed_, branch_, gate_, up_, logits_;
  int length_ = 0;
  double attention_seconds_ = 0;
};

}  // namespace llama
