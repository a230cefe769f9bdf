// SPDX-License-Identifier: Apache-2.0
/// \file
/// tile_source: keys and values as the engine reads them, whatever holds them: one of the two interfaces of the waist
/// (row_rules.hpp is the other).
///
/// This file lists every ability that a source may have, each with the default of a source that lacks it.
/// adapted_source (cache/) makes a tile_source of any kv_source. wrapped_source forwards every ability to another
/// source, so that a wrapper states only what it changes. The engine asks once per key tile of 64 tokens, or less
/// often.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/kernel/mixed_kernel.hpp>
#include <gqa/detail/kernel/row_kernel.hpp>
#include <gqa/detail/kernel/stream_kernel.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/convert.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// The rows of a key tile's keys and values where they lie in memory: strips of 16 tokens, whose rows are a stride
/// apart.
struct tile_strips {
  std::array<row_strip, tile_panels> k, v;
};

/// What the engine must know of a source before it reads.
struct source_facts {
  index_t batch = 0, kv_heads = 0;
  index_t kv_len = 0;  ///< extent T of masks and biases: at least every length
  index_t head_dim = 0, value_dim = 0;
  index_t scratch_elements = 0;       ///< panel elements that tile() may need; 0: tiles are read where they are
  index_t page_size = 0;              ///< tokens of the pages that sequences may share; 0: they share none
  bool has_strips = false;            ///< rows lie in memory, 16 tokens at multiples of 16 a stride apart
  bool has_gaps = false;              ///< some tiles may be gone
  bool heads_lie_together = false;    ///< a token's heads are nearer to each other than a head's tokens
  bool scatters_panels = false;       ///< what follows a panel in memory may not be what is read next
  bool makes_tiles_in_cache = false;  ///< tile() is cheap enough to be called again by each row tile
};

/// A source, but for its tiles, whose type depends on what panels hold.
class key_source {
 public:
  [[nodiscard]] const source_facts& about() const noexcept { return facts_; }
  [[nodiscard]] index_t batch() const noexcept { return facts_.batch; }
  [[nodiscard]] index_t kv_heads() const noexcept { return facts_.kv_heads; }
  [[nodiscard]] index_t kv_len() const noexcept { return facts_.kv_len; }
  [[nodiscard]] index_t head_dim() const noexcept { return facts_.head_dim; }
  [[nodiscard]] index_t value_dim() const noexcept { return facts_.value_dim; }
  [[nodiscard]] index_t scratch_elements() const noexcept { return facts_.scratch_elements; }

  /// What is wrong with the source itself; where there is something, nothing else may be asked.
  [[nodiscard]] virtual fault find_fault() const noexcept = 0;
  /// A fault where an output shares memory with the source.
  [[nodiscard]] virtual fault find_overlap(const operand& out) const noexcept = 0;
  /// Whether there is a sequence of that number in [0, batch).
  [[nodiscard]] virtual bool has_sequence(index_t b) const noexcept = 0;
  /// Valid keys of a sequence.
  [[nodiscard]] virtual index_t length(index_t b) const noexcept = 0;
  /// Of a source with gaps: key tiles of a sequence that are no longer there.
  [[nodiscard]] virtual key_range gone_tiles([[maybe_unused]] index_t b) const noexcept { return {0, 0}; }
  /// Of a source with pages: those of a sequence by number, in the order of its tokens, and whether other sequences may
  /// have some of them.
  [[nodiscard]] virtual std::span<const std::int32_t> pages_of([[maybe_unused]] index_t b) const noexcept { return {}; }
  [[nodiscard]] virtual bool has_shared_pages([[maybe_unused]] index_t b) const noexcept { return false; }
  /// Of a source with strips: those of key tile i, all of whose tokens are there; and what to ask for while its KV head
  /// is read.
  virtual void find_strips([[maybe_unused]] index_t b, [[maybe_unused]] index_t g, [[maybe_unused]] index_t i,
                           [[maybe_unused]] tile_strips& strips) const noexcept {}
  [[nodiscard]] virtual kv_ahead ahead([[maybe_unused]] index_t g,
                                       [[maybe_unused]] const group_visit& visit) const noexcept {
    return {};
  }

 protected:
  key_source() noexcept = default;
  explicit key_source(const source_facts& about) noexcept : facts_(about) {}
  key_source(const key_source&) = default;
  key_source& operator=(const key_source&) = default;
  ~key_source() = default;

  source_facts facts_;
};

/// What queries and weights are held in where panels of P are multiplied as they lie.
template <class P>
using dot_left = std::conditional_t<is_mixed<P>, lefts_of<P>, P>;

/// The ways of reading that a source's memory allows beside row blocks: their kernels, or null. The adaptor of the
/// source names them, so that a program compiles only those of its own sources.
template <class P, class L>
struct source_kernels {
  const stream_table<P, L>* tiles = nullptr;   // whole tiles as one stream
  const stream_table<P, L>* panels = nullptr;  // some panels of tiles
  const strip_table<accumulator_t<P>, L>* strips = nullptr;
};

/// A source with its tiles. P: what panels hold.
template <class P>
class tile_source : public key_source {
 public:
  using element = P;  // what makes it a kv_source
  using panel_element = P;

  /// Tokens [64 i, 64 i + 64) of KV head g, of which the first `tokens` will be looked at: where the source has them,
  /// or packed into scratch [scratch_elements].
  [[nodiscard]] virtual kv_tile<P> tile(index_t b, index_t g, index_t i, index_t tokens, P* scratch) const noexcept = 0;

  /// For queries and weights in L: accumulators, or dot_left<P>.
  template <class L>
  [[nodiscard]] const source_kernels<P, L>& kernels() const noexcept {
    if constexpr (std::is_same_v<L, accumulator_t<P>>) {
      return kernels_;
    } else {
      return dot_kernels_;
    }
  }

 protected:
  using key_source::key_source;
  tile_source(const tile_source&) = default;
  tile_source& operator=(const tile_source&) = default;
  ~tile_source() = default;

  source_kernels<P, accumulator_t<P>> kernels_;
  source_kernels<P, dot_left<P>> dot_kernels_;
};

/// A source made of another, which outlives it: every question that a wrapper does not answer itself goes there.
template <class P>
class wrapped_source : public tile_source<P> {
 public:
  [[nodiscard]] fault find_fault() const noexcept override { return inner_.find_fault(); }
  [[nodiscard]] fault find_overlap(const operand& out) const noexcept override { return inner_.find_overlap(out); }
  [[nodiscard]] bool has_sequence(index_t b) const noexcept override { return inner_.has_sequence(b); }
  [[nodiscard]] index_t length(index_t b) const noexcept override { return inner_.length(b); }
  [[nodiscard]] key_range gone_tiles(index_t b) const noexcept override { return inner_.gone_tiles(b); }
  [[nodiscard]] std::span<const std::int32_t> pages_of(index_t b) const noexcept override { return inner_.pages_of(b); }
  [[nodiscard]] bool has_shared_pages(index_t b) const noexcept override { return inner_.has_shared_pages(b); }
  void find_strips(index_t b, index_t g, index_t i, tile_strips& strips) const noexcept override {
    inner_.find_strips(b, g, i, strips);
  }
  [[nodiscard]] kv_ahead ahead(index_t g, const group_visit& visit) const noexcept override {
    return inner_.ahead(g, visit);
  }

 protected:
  /// Over a source of other panels, whose kernels do not fit ours; and over one of the same panels.
  explicit wrapped_source(const key_source& inner) noexcept : tile_source<P>(inner.about()), inner_(inner) {}
  explicit wrapped_source(const tile_source<P>& inner) noexcept : tile_source<P>(inner), inner_(inner) {}
  wrapped_source(const wrapped_source&) = default;
  wrapped_source& operator=(const wrapped_source&) = delete;
  ~wrapped_source() = default;

 private:
  const key_source& inner_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
