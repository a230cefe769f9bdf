// SPDX-License-Identifier: Apache-2.0
/// \file
/// Rows: how the queries of a call are numbered, sequence by sequence and KV head by KV head.
///
/// The rows of a (sequence, KV head) are its query positions times the heads of the group, position-major: row r is
/// position r / group_size, head r % group_size. All of them read the same keys, so a row tile of up to 96 rows mixes
/// heads and positions, and each key tile is read once for all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <gqa/config.hpp>
#include <gqa/detail/engine/problem.hpp>
#include <gqa/detail/engine/row_rules.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Some rows of a KV head: of one sequence, or all those of each of several that share keys (families.hpp).
struct row_tile {
  std::span<const index_t> members;  // sequences of the batch
  index_t g;
  index_t first, rows;  // rows [first, first + rows); of several members first is 0

  /// The sequence whose keys are read: members share those that they read together.
  [[nodiscard]] index_t b() const noexcept { return members.front(); }
};

/// Queries [first, last] of a sequence.
struct query_range {
  index_t first, last;
};

/// Numbers of the rows of a call. lengths [batch]: valid keys of each sequence. The call and they outlive it.
class row_geometry {
 public:
  row_geometry(const call_geometry& call, const index_t* lengths) noexcept
      : call_(call), lengths_(lengths), largest_group_(call.largest_group()) {}

  [[nodiscard]] const call_geometry& call() const noexcept { return call_; }
  /// Query heads of a KV head at most.
  [[nodiscard]] index_t largest_group() const noexcept { return largest_group_; }
  [[nodiscard]] index_t length(index_t b) const noexcept { return lengths_[b]; }
  /// Absolute position of a sequence's first query.
  [[nodiscard]] index_t offset(index_t b) const noexcept { return call_.query_offset(b, lengths_[b]); }
  /// Valid tokens of a key tile.
  [[nodiscard]] index_t tokens_of(index_t b, index_t tile) const noexcept {
    return (std::min)(tile_tokens, lengths_[b] - tile * tile_tokens);
  }

  [[nodiscard]] index_t rows_of(index_t b, index_t g) const noexcept { return call_.q_len(b) * call_.group_size(g); }
  [[nodiscard]] index_t rows_of(std::span<const index_t> members, index_t g) const noexcept {
    index_t rows = 0;
    for (const index_t b : members) rows += rows_of(b, g);
    return rows;
  }
  /// Rows of a sequence, or of several, for a KV head of the largest group.
  [[nodiscard]] index_t most_rows_of(index_t b) const noexcept { return call_.q_len(b) * largest_group_; }
  [[nodiscard]] index_t most_rows_of(std::span<const index_t> members) const noexcept {
    index_t rows = 0;
    for (const index_t b : members) rows += most_rows_of(b);
    return rows;
  }

  /// Queries of sequence b that have rows in a tile.
  [[nodiscard]] query_range queries_of(const row_tile& t, index_t b) const noexcept {
    if (t.members.size() > 1) return {0, call_.q_len(b) - 1};
    const index_t group = call_.group_size(t.g);
    return {t.first / group, (t.first + t.rows - 1) / group};
  }
  /// A tile's rows of sequence b as a block of no keys.
  [[nodiscard]] key_block block_of(const row_tile& t, index_t b) const noexcept {
    const index_t head = call_.first_head(t.g), first = offset(b);
    const query_range queries = queries_of(t, b);
    return {b, head, head + call_.group_size(t.g), first + queries.first, first + queries.last + 1, 0, 0};
  }

  /// Calls f(r, row_index) for rows [begin, end) of a tile.
  template <class F>
  void for_each_row(const row_tile& t, index_t begin, index_t end, const F& f) const {
    const index_t first_head = call_.first_head(t.g), end_head = first_head + call_.group_size(t.g);
    index_t of_member = 0;  // its first row
    for (std::size_t n = 0; n < t.members.size() && of_member < end; ++n) {
      const index_t b = t.members[n], rows = t.members.size() == 1 ? t.rows : rows_of(b, t.g);
      const index_t from = (std::max)(begin, of_member), to = (std::min)(end, of_member + rows);
      if (from < to) {
        row_index row = index_of(b, t.g, t.first + from - of_member);
        for (index_t r = from; r < to; ++r) {
          f(r, row);
          if (++row.q_head == end_head) row.q_head = first_head, ++row.query, ++row.position;
        }
      }
      of_member += rows;
    }
  }
  template <class F>
  void for_each_row(const row_tile& t, const F& f) const {
    for_each_row(t, 0, t.rows, f);
  }

 private:
  /// Row r of a sequence.
  [[nodiscard]] row_index index_of(index_t b, index_t g, index_t r) const noexcept {
    const index_t group = call_.group_size(g), s = r / group;
    return {b, s, call_.first_head(g) + r % group, offset(b) + s, lengths_[b]};
  }

  const call_geometry& call_;
  const index_t* lengths_;
  index_t largest_group_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
