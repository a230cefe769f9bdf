// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <type_traits>

namespace llama {

model::model(const checkpoint& from, int positions, gqa::context& ctx, const attention_choice& attention)
    : sizes_(from.sizes()),
      positions_(positions),
      ctx_(ctx),
      attention_(attention),
      transformer_(from, ctx, products::at_once) {
  if (attention.kind == attention_kind::grouped && attention.stored != kv_type::f32)
    throw std::invalid_argument("llama::model: grouped attention is of keys and values in f32 here");
  attention_.grouped.attention.causal = attention_.pages.attention.causal = true;
  if (attention_.stored == kv_type::f16) caches_.emplace<caches_of<Eigen::half>>();
  if (attention_.stored == kv_type::bf16) caches_.emplace<caches_of<Eigen::bfloat16>>();
  if (attention_.stored == kv_type::q8) caches_.emplace<caches_of<gqa::q8>>();
  std::visit(
      [&](auto& caches) {
        for (int l = 0; l < sizes_.layers; ++l) {
          caches.emplace_back(1, sizes_.kv_heads, positions, sizes_.head_dim());
          if (attention.kind == attention_kind::pages) caches.back().keep_key_bounds(attention.bound_tokens);
        }
      },
      caches_);
}

void model::clear() {
  length_ = 0;
  std::visit(
      [](auto& caches) {
        for (auto& cache : caches) cache.clear();
      },
      caches_);
}

const matrix& model::forward(std::span<const int> tokens, int wanted) {
  const int n = static_cast<int>(tokens.size());
  if (n > positions_ - length_) throw std::length_error("llama::model: more tokens than positions");
  std::vector<gqa::index_t> positions(tokens.size()), rows(static_cast<std::size_t>(wanted));
  std::iota(positions.begin(), positions.end(), length_);
  std::iota(rows.begin(), rows.end(), n - wanted);
  const matrix& logits = transformer_.forward(
      tokens, positions, rows, [this](int l, const auto& q, const auto& k, const auto& v, const auto& out) {
        if (capture_ != nullptr) capture_->append(l, q.data(), k.data(), v.data(), q.extent(1));
        const auto start = std::chrono::steady_clock::now();
        std::visit([&](auto& caches) { attend(l, caches[static_cast<std::size_t>(l)], q, k, v, out); }, caches_);
        attention_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
  length_ += n;
  return logits;
}

template <class T>
void model::attend(int layer, gqa::kv_cache<T>& cache, const rows_of_heads& q, const rows_of_heads& k,
                   const rows_of_heads& v, const rows_of_heads& out) {
  cache.append(k, v);
  switch (attention_.kind) {
    case attention_kind::exact:
      gqa::attention(q, cache, out, {.causal = true}, ctx_);
      break;
    case attention_kind::grouped:
      if constexpr (std::is_same_v<T, float>) gqa::grouped_attention(q, cache, out, attention_.grouped, ctx_);
      break;
    case attention_kind::local:
      gqa::attention(q, cache, out, {.causal = true, .window = {attention_.window - 1, -1}}, ctx_);
      break;
    case attention_kind::pages:
      if (layer < attention_.exact_layers || q.extent(1) > 8) {
        gqa::attention(q, cache, out, {.causal = true}, ctx_);
      } else {
        attend_pages(cache, q, out);
      }
      break;
  }
}

template <class T>
void model::attend_pages(const gqa::kv_cache<T>& cache, const rows_of_heads& q, const rows_of_heads& out) {
  gqa::page_attention(q, cache, out, attention_.pages, ctx_, &report_);
  for (const gqa::page_row& row : report_.rows) {
    pages_read_.read += row.read, pages_read_.pages += row.pages;
    pages_read_.dropped = std::max(pages_read_.dropped, row.dropped);
  }
}

}  // namespace llama
