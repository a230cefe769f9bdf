// SPDX-License-Identifier: Apache-2.0
/// \file
/// page_options and page_report: what page_attention() and projected_attention() may leave unread, and what they left.
#pragma once

#include <optional>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/options.hpp>

namespace gqa {

struct page_options {
  attention_options attention = {};  ///< all but a bias; of a mask hidden keys count as seen ones in the certificate
  /// The largest share of its softmax mass that a row may lose, certified; below 1. 0, without a page_budget:
  /// everything is read, and the result is attention()'s, to the bit.
  double epsilon = 0.01;
  index_t sink_tokens = 64;  ///< the first so many keys are always read,
  index_t window = 64;       ///< and the newest that a query sees
  /// Most pages of a KV head that are read, but for those always read, which count and come first, however many they
  /// are. What it costs a row is in the report.
  std::optional<index_t> page_budget = {};
};

/// What became of one row.
struct page_row {
  double dropped = 0;  ///< no more of its mass than this is in pages that were not read: the certificate
  index_t read = 0;    ///< pages that were read for it and its group,
  index_t pages = 0;   ///< of those in key tiles that some of these rows see

  [[nodiscard]] friend bool operator==(const page_row&, const page_row&) = default;
};

struct page_report {
  index_t page_tokens = 64;                ///< keys of a page: 64, of projected_attention() 16
  std::vector<page_row> rows;              ///< [B, S, H]
  std::vector<std::vector<index_t>> read;  ///< [B, G]: pages of a KV head that were read, ascending; key / page_tokens
  index_t rounds = 0;                      ///< calls of the exact kernel, each on the next best pages
  /// Of keys and values, of their bounds, and of the keys and values that exact attention would read.
  double bytes_read = 0, bytes_of_bounds = 0, bytes_exact = 0;
};

}  // namespace gqa
