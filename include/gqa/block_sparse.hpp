// SPDX-License-Identifier: Apache-2.0
/// \file
/// Block-sparse attention: the queries of each block of positions see a list of key tiles, exactly; others not at all.
///
///     const auto mask = gqa::a_shape({.q_len = 16384, .kv_len = 16384}, 64, 1024);
///     gqa::block_sparse_attention(q, kv, out, mask, options, ctx);
///
/// A mask is a list of key tiles (64 keys at multiples of 64) for each query block, in compressed rows (CSR); a tile
/// may have bits that hide some of its pairs. Blocks lie at multiples of their length, by absolute positions. The row
/// tiles of a call end where blocks do, so a block computes its listed tiles and nothing else, and of a cache reads
/// nothing else: at density d prefill takes d of the time of exact attention, and some hundred nanoseconds a list. A
/// tile is what a kernel step works on; blocks of other sizes are mapped to whole and partial tiles (from_blocks()).
///
/// It is for prefill of long prompts with patterns that are known beforehand, by measurement of a model's heads
/// (MInference, Jiang et al. 2024) or by training (BigBird, Zaheer et al. 2020; sparse transformers, Child et al.
/// 2019). It promises nothing about what is left out: see page_selection.hpp for what does.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/engine/visibility.hpp>
#include <gqa/detail/sparse/head_by_head.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/detail/tile/turned.hpp>
#include <gqa/error.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>
#include <gqa/variants.hpp>

namespace gqa {

/// What a mask is made for.
struct block_sparse_shape {
  index_t q_len = {}, kv_len = {};
  std::optional<index_t> query_offset = {};  ///< absolute position of query 0; default kv_len - q_len
  index_t query_block = 64;                  ///< positions that share a list
  bool causal = true;                        ///< leaves out tiles that causal attention hides; the call hides keys
  index_t lists = 1;           ///< of each block: 1 for all heads, or one of every `heads_per_list` of them
  index_t heads_per_list = 1;  ///< of neighbouring query heads: the group size, for lists of KV heads
  index_t batch = 1;           ///< 1: the same lists for all sequences

  [[nodiscard]] index_t offset() const noexcept { return query_offset.value_or(kv_len - q_len); }
};

/// Lists in compressed rows: rows are [batch][lists][blocks of the queries].
struct block_sparse_rows {
  std::span<const index_t> offsets;          ///< [rows + 1], from 0 on, not falling
  std::span<const std::int32_t> tiles;       ///< [offsets.back()], ascending in a row; key / 64
  std::span<const std::int32_t> masks = {};  ///< [offsets.back()], of tiles; -1: it is whole; empty: all are
  std::span<const std::uint64_t> bits = {};  ///< [masks][query_block], of a query's 64 keys, a bit each
};

inline namespace GQA_ISA {

/// A variant (variants.hpp), which attention() takes as any other; block_sparse_attention() checks that it fits a call,
/// and keeps heads with lists of their own apart.
class block_sparse_mask {
 public:
  /// \throws error  errc::shape for extents below 0 (blocks below 1), or spans that do not fit them; errc::range for
  ///                tiles that are negative, beyond kv_len, or do not ascend, and for masks that there are not;
  ///                errc::capacity, here and below, without memory: where that returns, the mask is of no queries
  block_sparse_mask(const block_sparse_shape& shape, const block_sparse_rows& rows) : shape_(shape) {
    if (const auto f = find_shape_fault(shape)) {
      forget(f);
      return;
    }
    if (const auto f = find_rows_fault(rows)) {
      forget(f);
      return;
    }
    if (!take(rows)) forget(detail::make_room_fault("lists of a mask"));
  }
  block_sparse_mask(const block_sparse_mask& other) : shape_(other.shape_) {
    if (!take(other.rows())) forget(detail::make_room_fault("lists of a mask"));
  }
  block_sparse_mask(block_sparse_mask&& other) noexcept { swap(other); }
  block_sparse_mask& operator=(block_sparse_mask other) noexcept {
    swap(other);
    return *this;
  }
  ~block_sparse_mask() = default;

  /// Whole tiles: choose(list, queries, tiles) leaves, ascending, those that the positions of a block see, of all that
  /// it is given.
  template <class Choose>
  [[nodiscard]] static block_sparse_mask from_lists(const block_sparse_shape& shape, const Choose& choose) {
    return of_lists<std::vector<index_t>>(
        shape, [&](index_t list, key_range queries, std::vector<index_t>& tiles) { choose(list, queries, tiles); });
  }
  /// Whole tiles: those of which sees(list, queries, tile) says so, for the positions of each block.
  template <class Sees>
  [[nodiscard]] static block_sparse_mask from_tiles(const block_sparse_shape& shape, const Sees& sees) {
    return detail_from_lists(shape, [&](index_t list, key_range queries, detail::reporting_vector<index_t>& tiles) {
      tiles.cut(std::remove_if(tiles.begin(), tiles.end(), [&](index_t tile) { return !sees(list, queries, tile); }));
    });
  }
  /// Any pattern: the pairs of which sees(list, query, key) says so, in tiles with bits where they are not whole.
  template <class Sees>
  [[nodiscard]] static block_sparse_mask from_pairs(const block_sparse_shape& shape, const Sees& sees) {
    block_sparse_mask mask(shape);
    detail::reporting_vector<std::uint64_t> bits;
    const bool done = mask.for_each_row([&](index_t list, key_range queries) {
      for (index_t tile = 0; tile < mask.tiles_seen_by(queries); ++tile) {
        const index_t first = tile * detail::tile_tokens, end = (std::min)(first + detail::tile_tokens, shape.kv_len);
        bits.clear();
        if (!bits.resize(static_cast<std::size_t>(shape.query_block))) return false;
        bool any = false, all = true;
        for (index_t q = queries.begin; q < queries.end; ++q) {
          std::uint64_t& word =
              bits[static_cast<std::size_t>(q - detail::floor_div(q, shape.query_block) * shape.query_block)];
          for (index_t key = first; key < end; ++key) {
            if (sees(list, q, key)) word |= std::uint64_t{1} << (key - first);
          }
          const index_t seen = shape.causal ? (std::min)(end, q + 1) : end;
          const std::uint64_t visible = detail::bits_between(0, seen - first);
          any = any || (word & visible) != 0;
          all = all && (word & visible) == visible;
        }
        if (any && !(all ? mask.add_tile(tile) : mask.add_tile(tile, bits))) return false;
      }
      return true;
    });
    if (!done) mask.forget(detail::make_room_fault("lists of a mask"));
    return mask;
  }
  /// Blocks of any size: of those [lists, ceil(q_len / query_block), ceil(kv_len / key_block)] that are true, all
  /// pairs. Query blocks are those of the shape, from its first query's block on.
  [[nodiscard]] static block_sparse_mask from_blocks(const block_sparse_shape& shape, index_t key_block,
                                                     tensor_view<const bool, 3> blocks) {
    block_sparse_mask mask(shape);
    if (mask.blocks() == 0) return mask;
    if (const auto f = detail::find_extents_fault(detail::describe("blocks", blocks))) {
      mask.forget(f);
      return mask;
    }
    const index_t key_blocks = key_block < 1 ? -1 : detail::ceil_div(shape.kv_len, key_block);
    if (blocks.extent(0) != shape.lists || blocks.extent(1) != mask.blocks() || blocks.extent(2) != key_blocks) {
      mask.forget(detail::make_fault(errc::shape, "blocks: expected [%lld, %lld, %lld], got [%lld, %lld, %lld]",
                                     detail::printable(shape.lists), detail::printable(mask.blocks()),
                                     detail::printable(key_blocks), detail::printable(blocks.extent(0)),
                                     detail::printable(blocks.extent(1)), detail::printable(blocks.extent(2))));
      return mask;
    }
    return from_pairs(shape, [&](index_t list, index_t query, index_t key) {
      return blocks(list, mask.block_of(query), key / key_block);
    });
  }

  [[nodiscard]] const block_sparse_shape& shape() const noexcept { return shape_; }
  /// Query blocks of a list.
  [[nodiscard]] index_t blocks() const noexcept {
    return shape_.q_len == 0 ? 0 : block_at(shape_.offset() + shape_.q_len - 1) - first_block() + 1;
  }
  /// Tiles that the n-th query block sees; none of what there are no lists for.
  [[nodiscard]] std::span<const std::int32_t> tiles(index_t batch, index_t list, index_t block) const noexcept {
    if (batch < 0 || list < 0 || block < 0 || block >= blocks() || !has_list(batch, list)) return {};
    const auto at = static_cast<std::size_t>(row_of(batch, list, block));
    return std::span<const std::int32_t>(tiles_).subspan(static_cast<std::size_t>(offsets_[at]),
                                                         static_cast<std::size_t>(offsets_[at + 1] - offsets_[at]));
  }
  /// Tiles in all lists.
  [[nodiscard]] index_t listed_tiles() const noexcept { return static_cast<index_t>(tiles_.size()); }

  // What makes it a variant.
  [[nodiscard]] visibility visible(const key_block& b) const noexcept;
  [[nodiscard]] std::uint64_t visible_bits(const position& p) const noexcept {
    const index_t block = block_of(p.query), tile = p.key / detail::tile_tokens;
    if (block < 0 || block >= blocks() || !has_list(p.batch, list_of(p.q_head))) return 0;
    const auto row = tiles(p.batch, list_of(p.q_head), block);
    const auto at = std::lower_bound(row.begin(), row.end(), tile);
    if (at == row.end() || *at != tile) return 0;
    const std::int32_t mask = mask_of(&*at);
    if (mask < 0) return ~std::uint64_t{0};
    return bits_[static_cast<std::size_t>(mask * shape_.query_block + p.query -
                                          block_at(p.query) * shape_.query_block)];
  }
  [[nodiscard]] index_t query_block() const noexcept { return shape_.query_block; }

  /// Internal: from_lists() with a list that reports.
  template <class Choose>
  [[nodiscard]] static block_sparse_mask detail_from_lists(const block_sparse_shape& shape, const Choose& choose) {
    return of_lists<detail::reporting_vector<index_t>>(shape, choose);
  }

  /// Whether some query heads have the same lists.
  [[nodiscard]] bool has_one_list(key_range q_heads) const noexcept {
    return q_heads.size() == 0 || list_of(q_heads.begin) == list_of(q_heads.end - 1);
  }

  /// Why a mask does not fit a call with queries at some positions of a sequence of so many keys.
  [[nodiscard]] detail::fault find_fault(index_t batch, index_t q_heads, key_range queries,
                                         index_t keys) const noexcept {
    using detail::printable;
    if (shape_.batch != 1 && shape_.batch != batch)
      return detail::make_fault(errc::shape, "mask: expected lists of 1 or %lld sequences, got %lld", printable(batch),
                                printable(shape_.batch));
    if (shape_.lists != 1 && shape_.lists * shape_.heads_per_list != q_heads)
      return detail::make_fault(errc::shape, "mask: expected lists of %lld query heads, got %lld of %lld",
                                printable(q_heads), printable(shape_.lists), printable(shape_.heads_per_list));
    if (keys > shape_.kv_len)
      return detail::make_fault(errc::range, "mask: expected lists for %lld keys, got %lld", printable(keys),
                                printable(shape_.kv_len));
    const key_range own{shape_.offset(), shape_.offset() + shape_.q_len};
    if (queries.size() > 0 && (queries.begin < own.begin || queries.end > own.end))
      return detail::make_fault(errc::range, "mask: expected lists of queries [%lld, %lld), got [%lld, %lld)",
                                printable(queries.begin), printable(queries.end), printable(own.begin),
                                printable(own.end));
    return {};
  }

 private:
  explicit block_sparse_mask(const block_sparse_shape& shape) : shape_(shape) {
    if (const auto f = find_shape_fault(shape)) {
      forget(f);
      return;
    }
    if (!offsets_.resize(1)) forget(detail::make_room_fault("lists of a mask"));
  }
  template <class Tiles, class Choose>
  [[nodiscard]] static block_sparse_mask of_lists(const block_sparse_shape& shape, const Choose& choose) {
    block_sparse_mask mask(shape);
    Tiles tiles;
    const bool done = mask.for_each_row([&](index_t list, key_range queries) {
      const auto seen = static_cast<std::size_t>(mask.tiles_seen_by(queries));
      if (!detail::has_room(tiles, seen)) return false;
      static_cast<void>(tiles.resize(seen));
      std::iota(tiles.begin(), tiles.end(), index_t{0});
      choose(list, queries, tiles);
      return std::all_of(tiles.begin(), tiles.end(), [&](index_t tile) { return mask.add_tile(tile); });
    });
    if (!done) mask.forget(detail::make_room_fault("lists of a mask"));
    return mask;
  }
  void swap(block_sparse_mask& other) noexcept {
    std::swap(shape_, other.shape_);
    offsets_.swap(other.offsets_), tiles_.swap(other.tiles_), masks_.swap(other.masks_), bits_.swap(other.bits_);
  }
  [[nodiscard]] static detail::fault find_shape_fault(const block_sparse_shape& shape) noexcept;
  [[nodiscard]] detail::fault find_rows_fault(const block_sparse_rows& rows) const noexcept;
  /// Says what is wrong; what is left, where errors are no exceptions, is a mask of no queries.
  void forget(const detail::fault& f) {
    shape_ = {};
    offsets_.clear(), tiles_.clear(), masks_.clear(), bits_.clear();
    detail::raise(f);
  }
  [[nodiscard]] bool take(const block_sparse_rows& rows) noexcept {
    const auto copy = [](auto& to, const auto& from) { return to.assign(from.data(), from.data() + from.size()); };
    return copy(offsets_, rows.offsets) && copy(tiles_, rows.tiles) && copy(masks_, rows.masks) &&
           copy(bits_, rows.bits);
  }
  [[nodiscard]] block_sparse_rows rows() const noexcept { return {offsets_, tiles_, masks_, bits_}; }

  [[nodiscard]] index_t block_at(index_t position) const noexcept {
    return detail::floor_div(position, shape_.query_block);
  }
  [[nodiscard]] index_t first_block() const noexcept { return block_at(shape_.offset()); }
  /// Number of a position's block, from the first query's on.
  [[nodiscard]] index_t block_of(index_t position) const noexcept { return block_at(position) - first_block(); }
  [[nodiscard]] index_t list_of(index_t q_head) const noexcept {
    return shape_.lists == 1 ? 0 : q_head / shape_.heads_per_list;
  }
  /// Of what no lists are for, nothing is seen.
  [[nodiscard]] bool has_list(index_t batch, index_t list) const noexcept {
    return (shape_.batch == 1 || batch < shape_.batch) && list < shape_.lists;
  }
  [[nodiscard]] index_t row_of(index_t batch, index_t list, index_t block) const noexcept {
    return ((shape_.batch == 1 ? 0 : batch) * shape_.lists + list) * blocks() + block;
  }
  [[nodiscard]] std::int32_t mask_of(const std::int32_t* tile) const noexcept {
    return masks_.empty() ? -1 : masks_[static_cast<std::size_t>(tile - tiles_.data())];
  }
  /// Tiles before the end of what the queries of a block can see.
  [[nodiscard]] index_t tiles_seen_by(key_range queries) const noexcept {
    const index_t keys = shape_.causal ? std::clamp<index_t>(queries.end, 0, shape_.kv_len) : shape_.kv_len;
    return detail::ceil_div(keys, detail::tile_tokens);
  }

  /// Calls add(list, positions of the queries) for each row, which adds its tiles; false as soon as one says so, for
  /// there is no memory.
  template <class Add>
  [[nodiscard]] bool for_each_row(const Add& add) {
    const index_t rows = shape_.batch * shape_.lists * blocks(), offset = shape_.offset();
    for (index_t row = 0; row < rows; ++row) {
      const index_t begin = (first_block() + row % blocks()) * shape_.query_block;
      const key_range queries{(std::max)(begin, offset), (std::min)(begin + shape_.query_block, offset + shape_.q_len)};
      if (!add(row / blocks() % shape_.lists, queries) || !offsets_.push_back(static_cast<index_t>(tiles_.size())))
        return false;
    }
    return bits_.empty() || hide_nothing_before(tiles_.size());
  }
  [[nodiscard]] bool add_tile(index_t tile) noexcept { return tiles_.push_back(static_cast<std::int32_t>(tile)); }
  [[nodiscard]] bool add_tile(index_t tile, std::span<const std::uint64_t> bits) noexcept {
    const auto mask = static_cast<std::int32_t>(bits_.size() / bits.size());
    return hide_nothing_before(tiles_.size()) && add_tile(tile) && masks_.push_back(mask) &&
           bits_.append(bits.data(), bits.data() + bits.size());
  }
  /// Tiles up to there that have no masks yet are whole.
  [[nodiscard]] bool hide_nothing_before(std::size_t tile) noexcept {
    while (masks_.size() < tile) {
      if (!masks_.push_back(-1)) return false;
    }
    return true;
  }

  block_sparse_shape shape_;
  detail::reporting_vector<index_t> offsets_;     // [rows + 1]
  detail::reporting_vector<std::int32_t> tiles_;  // ascending in a row
  detail::reporting_vector<std::int32_t> masks_;  // of tiles, -1: whole; empty: all are
  detail::reporting_vector<std::uint64_t> bits_;  // [masks][query_block]
};

inline visibility block_sparse_mask::visible(const key_block& b) const noexcept {
  const index_t first_tile = b.key_begin / detail::tile_tokens,
                last_tile = detail::ceil_div(b.key_end, detail::tile_tokens) - 1;
  const index_t first = block_of(b.query_begin), last = block_of(b.query_end - 1);
  if (last < 0 || first >= blocks() || !has_list(b.batch, list_of(b.q_head_end - 1))) return visibility::none;
  bool any = false, all = first >= 0 && last < blocks();
  for (index_t list = list_of(b.q_head_begin); list <= list_of(b.q_head_end - 1); ++list) {
    for (index_t block = std::max<index_t>(first, 0); block <= (std::min)(last, blocks() - 1); ++block) {
      const auto row = tiles(b.batch, list, block);
      auto at = std::lower_bound(row.begin(), row.end(), first_tile);
      for (index_t tile = first_tile; tile <= last_tile; ++tile) {
        const bool listed = at != row.end() && *at <= last_tile;
        any = any || listed;
        all = all && listed && *at == tile && mask_of(&*at) < 0;
        if (any && !all) return visibility::some;
        if (!listed) break;
        ++at;
      }
    }
  }
  return any ? visibility::all : visibility::none;
}

inline detail::fault block_sparse_mask::find_shape_fault(const block_sparse_shape& shape) noexcept {
  using detail::find_least_fault;
  constexpr const char* name = "block_sparse_shape";
  if (const auto f = find_least_fault(name, "q_len", 0, shape.q_len)) return f;
  if (const auto f = find_least_fault(name, "kv_len", 0, shape.kv_len)) return f;
  if (const auto f = find_least_fault(name, "query_block", 1, shape.query_block)) return f;
  if (const auto f = find_least_fault(name, "lists", 1, shape.lists)) return f;
  if (const auto f = find_least_fault(name, "heads_per_list", 1, shape.heads_per_list)) return f;
  if (const auto f = find_least_fault(name, "batch", 1, shape.batch)) return f;
  // Tiles have numbers of 32 bits, and no product of extents overflows.
  constexpr index_t most = index_t{1} << 36, most_lists = index_t{1} << 20, most_block = index_t{1} << 20;
  for (const index_t length : {shape.q_len, shape.kv_len, shape.query_block, shape.offset()}) {
    if (length > most || length < -most)
      return detail::make_fault(errc::shape, "%s: expected lengths and offsets within 2^36, got %lld", name,
                                detail::printable(length));
  }
  // Bits of a tile are kept for all queries of a block, whether the call has them or not: 8 MiB at the most.
  if (shape.query_block > most_block)
    return detail::make_fault(errc::shape, "%s: expected query_block <= 2^20, got %lld", name,
                              detail::printable(shape.query_block));
  if (shape.lists > most_lists || shape.heads_per_list > most_lists || shape.batch > most_lists / shape.lists)
    return detail::make_fault(errc::shape, "%s: expected at most 2^20 lists, got %lld of %lld heads for %lld sequences",
                              name, detail::printable(shape.lists), detail::printable(shape.heads_per_list),
                              detail::printable(shape.batch));
  return {};
}

inline detail::fault block_sparse_mask::find_rows_fault(const block_sparse_rows& rows) const noexcept {
  using detail::make_fault;
  using detail::printable;
  const index_t count = shape_.batch * shape_.lists * blocks(), all = static_cast<index_t>(rows.tiles.size());
  if (static_cast<index_t>(rows.offsets.size()) != count + 1)
    return make_fault(errc::shape, "rows.offsets: expected %lld (batch x lists x blocks, and 1), got %zu",
                      printable(count + 1), rows.offsets.size());
  if (rows.offsets.front() != 0 || rows.offsets.back() != all)
    return make_fault(errc::shape, "rows.offsets: expected 0 to %lld (the tiles there are), got %lld to %lld",
                      printable(all), printable(rows.offsets.front()), printable(rows.offsets.back()));
  if (!rows.masks.empty() && rows.masks.size() != rows.tiles.size())
    return make_fault(errc::shape, "rows.masks: expected none or %lld (one a tile), got %zu", printable(all),
                      rows.masks.size());
  const auto block = static_cast<std::size_t>(shape_.query_block);
  if (rows.bits.size() % block != 0)
    return make_fault(errc::shape, "rows.bits: expected a multiple of %zu (query_block), got %zu", block,
                      rows.bits.size());
  for (const std::int32_t mask : rows.masks) {
    if (mask < -1 || mask >= static_cast<index_t>(rows.bits.size() / block))
      return make_fault(errc::range, "rows.masks: expected -1 to %lld, got %d",
                        printable(static_cast<index_t>(rows.bits.size() / block) - 1), mask);
  }
  const index_t tiles = detail::ceil_div(shape_.kv_len, detail::tile_tokens);
  for (index_t row = 0; row < count; ++row) {
    const index_t first = rows.offsets[static_cast<std::size_t>(row)],
                  end = rows.offsets[static_cast<std::size_t>(row) + 1];
    if (first > end || end > all)
      return make_fault(errc::shape, "rows.offsets: expected no less than %lld and at most %lld in row %lld, got %lld",
                        printable(first), printable(all), printable(row), printable(end));
    for (index_t n = first; n < end; ++n) {
      const index_t least = n == first ? 0 : index_t{rows.tiles[static_cast<std::size_t>(n) - 1]} + 1;
      const index_t tile = rows.tiles[static_cast<std::size_t>(n)];
      if (tile < least || tile >= tiles)
        return make_fault(errc::range, "rows.tiles: expected %lld to %lld (ascending) in row %lld, got %lld",
                          printable(least), printable(tiles - 1), printable(row), printable(tile));
    }
  }
  return {};
}

/// Attention of q over the key tiles that a mask lists, and within them what the options leave: exact over those, the
/// bits of attention() under the same mask as a tensor.
/// \param q     [B, S, H, D], or turned(); \param out [B, S, H, E] or a partial_state: as attention() has them
/// \param mask  of 1 or B sequences, all the call's query positions, and 1 or H heads' lists. Heads of a group with
///              lists of their own are read and computed one by one, each with its own tiles; with lists of KV heads,
///              or one for all, a group's heads share what is read.
/// \throws error  as attention(), and errc::shape or errc::range where the mask does not fit the call
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
void block_sparse_attention(Q&& q, const KV& kv, Out&& out, const block_sparse_mask& mask,
                            const attention_options& options, context& ctx) {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  detail::attend_by_lists(queries, kv, detail::as_output(std::forward<Out>(out)), mask, options, ctx);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <detail::turnable Q, kv_source KV, detail::attention_output Out>
[[nodiscard]] errc check(Q&& q, const KV& kv, Out&& out, const block_sparse_mask& mask,
                         const attention_options& options) noexcept {
  const auto queries = detail::as_turnable(std::forward<Q>(q));
  return detail::find_lists_fault(queries, kv, detail::as_output(std::forward<Out>(out)), mask, options).code;
}

}  // namespace GQA_ISA
}  // namespace gqa
