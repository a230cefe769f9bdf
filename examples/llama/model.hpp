// SPDX-License-Identifier: Apache-2.0
// One sequence of a LLaMA-like model, with its keys and values in gqa's caches, one a layer.
#pragma once

#include <gqa/gqa.hpp>

#include <span>
#include <variant>
#include <vector>

#include "../capture.hpp"
#include "checkpoint.hpp"
#include "transformer.hpp"

namespace llama {

// How queries meet keys. Grouped: near keys exactly, the others by groups (docs/04_grouped_attention.md), where there
// are enough queries at once to make groups. Local: only the `window` newest keys. Pages: few queries at once read the
// pages of keys that matter to them (docs/06_sparse_attention.md), prompts all.
enum class attention_kind { exact, grouped, local, pages };
// What keys and values are stored in.
enum class kv_type { f32, f16, bf16, q8 };
struct attention_choice {
  attention_kind kind = attention_kind::exact;
  kv_type stored = kv_type::f32;
  gqa::grouped_options grouped = {};
  gqa::index_t window = 256;
  gqa::page_options pages = {};
  int exact_layers = 0;            // the first so many read all pages
  gqa::index_t bound_tokens = 16;  // keys that bounds are kept of together
};

// What attention over pages has read of how many, of all layers and heads, and the most that a row may have lost.
struct pages_read {
  gqa::index_t read = 0, pages = 0;
  double dropped = 0;
};

class model {
 public:
  // Room for `positions` tokens of one sequence. The checkpoint and the context must outlive the model.
  model(const checkpoint& from, int positions, gqa::context& ctx, const attention_choice& attention = {});

  // Tokens seen so far.
  [[nodiscard]] int length() const { return length_; }
  void clear();
  // From now on what attention is asked is appended to `to`, which must outlive the model.
  void capture_to(example::capture& to) { capture_ = &to; }
  [[nodiscard]] double attention_seconds() const { return attention_seconds_; }
  [[nodiscard]] const llama::pages_read& pages_read() const { return pages_read_; }

  // Runs the next tokens, all at once. Returns the logits [wanted, vocab] of the last `wanted` of them.
  const matrix& forward(std::span<const int> tokens, int wanted = 1);

 private:
  using rows_of_heads = gqa::tensor_view<float, 4>;
  template <class T>
  using caches_of = std::vector<gqa::kv_cache<T>>;  // a layer each

  template <class T>
  void attend(int layer, gqa::kv_cache<T>& cache, const rows_of_heads& q, const rows_of_heads& k,
              const rows_of_heads& v, const rows_of_heads& out);
  template <class T>
  void attend_pages(const gqa::kv_cache<T>& cache, const rows_of_heads& q, const rows_of_heads& out);

  const config sizes_;
  const int positions_;
  gqa::context& ctx_;
  attention_choice attention_;
  example::capture* capture_ = nullptr;
  transformer transformer_;
  std::variant<caches_of<float>, caches_of<Eigen::half>, caches_of<Eigen::bfloat16>, caches_of<gqa::q8>> caches_;
  int length_ = 0;
  double attention_seconds_ = 0;
  gqa::page_report report_;  // of the last call
  llama::pages_read pages_read_;
};

}  // namespace llama
