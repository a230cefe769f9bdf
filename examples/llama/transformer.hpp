// SPDX-License-Identifier: Apache-2.0
// A LLaMA-like transformer in about a hundred lines: RMSNorm, RoPE, SwiGLU, and attention as whoever runs it has it.
// Matrix products are Eigen's, rotary embedding is gqa's.
#pragma once

#include <gqa/gqa.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "checkpoint.hpp"

namespace llama {

// How matrices are multiplied: all rows at once is fastest; row by row, no row's bits depend on how many there are.
enum class products { at_once, by_rows };

class transformer {
 public:
  // The checkpoint and the context must outlive it.
  transformer(const checkpoint& from, gqa::context& ctx, products how)
      : from_(from), sizes_(from.sizes()), ctx_(ctx), how_(how), rope_(sizes_.head_dim()) {}

  // Runs tokens at absolute positions, of one sequence or of several. Returns the logits [wanted, vocab] of some of
  // them. attend(l, q, k, v, out) is the attention of layer l: all [1, tokens, heads, dim], rotated.
  template <class Attend>
  const matrix& forward(std::span<const int> tokens, std::span<const gqa::index_t> positions,
                        std::span<const gqa::index_t> wanted, const Attend& attend) {
    x_.resize(static_cast<Eigen::Index>(tokens.size()), sizes_.dim);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      x_.row(static_cast<Eigen::Index>(i)) = from_.embedding().row(tokens[i]);
    const auto turns = rope_.turns<float>(positions, ctx_);  // the same in every layer
    for (int l = 0; l < sizes_.layers; ++l) {
      const checkpoint::layer w = from_.at(l);
      mix(l, w, turns, attend);
      feed_forward(w);
    }
    last_.resize(static_cast<Eigen::Index>(wanted.size()), sizes_.dim);
    for (std::size_t i = 0; i < wanted.size(); ++i) last_.row(static_cast<Eigen::Index>(i)) = x_.row(wanted[i]);
    normalise(last_, from_.final_norm());
    logits_.resize(last_.rows(), sizes_.vocab_size);
    multiply(normal_, from_.classifier(), logits_);
    return logits_;
  }

 private:
  // x += attention(norm(x)) Wo
  template <class Attend>
  void mix(int l, const checkpoint::layer& w, const gqa::rope_turns<float>& turns, const Attend& attend) {
    const Eigen::Index n = x_.rows();
    normalise(x_, w.attention_norm);
    queries_.resize(n, sizes_.dim);
    keys_.resize(n, sizes_.kv_dim());
    values_.resize(n, sizes_.kv_dim());
    mixed_.resize(n, sizes_.dim);
    branch_.resize(n, sizes_.dim);
    multiply(normal_, w.q, queries_);
    multiply(normal_, w.k, keys_);
    multiply(normal_, w.v, values_);
    const gqa::index_t heads = sizes_.q_heads, kv_heads = sizes_.kv_heads, d = sizes_.head_dim();
    const auto q = gqa::view(queries_.data(), {1, n, heads, d}), k = gqa::view(keys_.data(), {1, n, kv_heads, d});
    const auto v = gqa::view(values_.data(), {1, n, kv_heads, d});
    rope_.rotate(q, turns, ctx_);
    rope_.rotate(k, turns, ctx_);
    attend(l, q, k, v, gqa::view(mixed_.data(), {1, n, heads, d}));
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
    // One by one: in packets, which elements are left over would depend on how many rows there are.
    for (Eigen::Index i = 0; i < gate_.size(); ++i) {
      const float x = gate_.data()[i];
      up_.data()[i] *= x / (1 + std::exp(-x));
    }
    multiply(up_, w.down, branch_);
    x_ += branch_;
  }

  // normal_ = x / rms(x) * gain, row by row.
  void normalise(const matrix& x, const gains& gain) {
    normal_.resize(x.rows(), x.cols());
    for (Eigen::Index i = 0; i < x.rows(); ++i) {
      double squares = 0;
      for (Eigen::Index d = 0; d < x.cols(); ++d)
        squares += static_cast<double>(x(i, d)) * static_cast<double>(x(i, d));
      const auto rms = static_cast<float>(std::sqrt(squares / static_cast<double>(x.cols()) + 1e-5));
      normal_.row(i) = x.row(i).cwiseProduct(gain) / rms;
    }
  }

  // y [n, out] = x [n, in] * w [out, in]^T, divided among the context's workers by blocks of outputs.
  void multiply(const matrix& x, const weights& w, matrix& y) {
    constexpr Eigen::Index block = 256;
    const bool by_rows = x.rows() == 1 || how_ == products::by_rows;
    ctx_.for_each((w.rows() + block - 1) / block, [&](gqa::index_t task, gqa::index_t) {
      const Eigen::Index first = task * block, size = std::min(block, w.rows() - first);
      for (Eigen::Index i = 0; by_rows && i < x.rows(); ++i)  // matrix-vector products, for which Eigen has other loops
        y.row(i).segment(first, size).transpose().noalias() = w.middleRows(first, size) * x.row(i).transpose();
      if (!by_rows) y.middleCols(first, size).noalias() = x * w.middleRows(first, size).transpose();
    });
  }

  const checkpoint& from_;
  const config sizes_;
  gqa::context& ctx_;
  products how_;
  gqa::rope rope_;
  matrix x_, normal_, queries_, keys_, values_, mixed_, branch_, gate_, up_, last_, logits_;
};

}  // namespace llama
