// SPDX-License-Identifier: Apache-2.0
// An engine's pages: rows of tensors dealt out to pages in a random order, among pages of rubbish.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include <gqa/paged_view.hpp>
#include <gqa/tensor_view.hpp>

#include "rng.hpp"

namespace gqa::test {

// Where heads lie within a page: [page, token, head, dim], or [page, head, token, dim].
enum class page_order { tokens_first, heads_first };

template <class T>
struct pages {
  index_t page_size, kv_heads, head_dim, value_dim;
  page_order order;
  index_t count = 0;
  std::vector<T> k, v;
  std::vector<std::int32_t> indices, offsets{0};
  std::vector<index_t> lengths;

  // The first lengths[b] tokens of k [B, T, G, D] and v [B, T, G, E].
  pages(const tensor_view<const T, 4>& from_k, const tensor_view<const T, 4>& from_v,
        const std::vector<index_t>& of_sequences, index_t page, page_order in_page, rng& random)
      : page_size(page),
        kv_heads(from_k.extent(2)),
        head_dim(from_k.extent(3)),
        value_dim(from_v.extent(3)),
        order(in_page),
        lengths(of_sequences) {
    for (const index_t length : lengths) {
      const index_t needed = (length + page - 1) / page;
      offsets.push_back(offsets.back() + static_cast<std::int32_t>(needed));
    }
    count = offsets.back() + 3;  // some that nobody reads
    std::vector<std::int32_t> free(static_cast<std::size_t>(count));
    std::iota(free.begin(), free.end(), 0);
    for (std::size_t i = free.size(); i > 1; --i)
      std::swap(free[i - 1], free[static_cast<std::size_t>(random.between(0, static_cast<index_t>(i) - 1))]);
    indices.assign(free.begin(), free.end() - 3);
    const auto rubbish = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    k.assign(static_cast<std::size_t>(count * page * kv_heads * head_dim), rubbish);
    v.assign(static_cast<std::size_t>(count * page * kv_heads * value_dim), rubbish);
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      for (index_t t = 0; t < lengths[b]; ++t) {
        const index_t at = indices[static_cast<std::size_t>(offsets[b] + t / page)];
        for (index_t g = 0; g < kv_heads; ++g) {
          const auto sequence = static_cast<index_t>(b);
          std::copy_n(&from_k(sequence, t, g, 0), head_dim, &key_pages()(at, t % page, g, 0));
          std::copy_n(&from_v(sequence, t, g, 0), value_dim, &value_pages()(at, t % page, g, 0));
        }
      }
    }
  }

  tensor_view<T, 4> key_pages() { return of(k.data(), head_dim); }
  tensor_view<T, 4> value_pages() { return of(v.data(), value_dim); }
  paged_view<T> view() { return {key_pages(), value_pages(), indices, offsets, lengths}; }

 private:
  tensor_view<T, 4> of(T* data, index_t dim) const {
    if (order == page_order::tokens_first) return {data, {count, page_size, kv_heads, dim}};
    return {data, {count, page_size, kv_heads, dim}, {page_size * kv_heads * dim, dim, page_size * dim, 1}};
  }
};

}  // namespace gqa::test
