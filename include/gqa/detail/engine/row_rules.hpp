// SPDX-License-Identifier: Apache-2.0
/// \file
/// row_rules: what a variant, or a batch's masks, say of scores and keys, as the engine asks it: one of the two
/// interfaces of the waist (tile_source.hpp is the other).
///
/// Nothing here is asked per element: score() has a row of 64 scores, visible_bits() answers for 64 keys of a row, and
/// visible(), keys() and find_panels() answer for whole key tiles. adapted_variant makes these of a user's variant, by
/// inlining its functions into the loops over a row.
#pragma once

#include <bit>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/variants.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A query row, as masks, biases and variants index it.
struct row_index {
  index_t batch, query, q_head;  // query: index in the call
  index_t position;              // absolute
  index_t keys;                  // valid ones of its sequence
};

/// What the engine must know of rules before it asks them.
struct rule_facts {
  bool hides = false;         ///< some keys, of some rows
  bool hides_blocks = false;  ///< and says so of whole blocks
  bool shows_panels = false;  ///< all rows of a KV head see the same panels of 16 keys, and all of each
  index_t query_block = 0;    ///< so many neighbouring positions see the same key tiles; 0: nothing is known
};

/// Which keys rows see, beside what the options say.
class key_rules {
 public:
  [[nodiscard]] const rule_facts& about() const noexcept { return facts_; }

  /// Whether any key of sequence b is hidden. Where none is, the sequence's rows take the path of a call without rules,
  /// and have its bits.
  [[nodiscard]] virtual bool hides_in([[maybe_unused]] index_t b) const { return facts_.hides; }
  /// How much of a block is visible; `some` where the rules do not know.
  [[nodiscard]] virtual visibility visible([[maybe_unused]] const key_block& block) const {
    return facts_.hides ? visibility::some : visibility::all;
  }
  /// Of 64 keys from first_key on, those of `bits` that the row sees.
  [[nodiscard]] virtual std::uint64_t visible_bits(std::uint64_t bits, [[maybe_unused]] const row_index& row,
                                                   [[maybe_unused]] index_t first_key) const {
    return bits;
  }
  /// A range of key positions outside which queries at these positions see nothing.
  [[nodiscard]] virtual key_range keys([[maybe_unused]] key_range queries) const { return {0, 2 * position_limit}; }
  /// A key tile, and the panels of it that rows see, a bit each.
  struct seen_panels {
    index_t tile;
    std::uint32_t panels;
  };
  /// Of rules that show panels: the first of some tiles of which the rows of a KV head, whose first query head this is,
  /// see a panel; {tiles.end, 0} if there is none.
  [[nodiscard]] virtual seen_panels find_panels([[maybe_unused]] index_t b, [[maybe_unused]] index_t first_head,
                                                key_range tiles) const {
    return {tiles.begin, tiles.size() == 0 ? 0 : all_panels};
  }

 protected:
  explicit key_rules(const rule_facts& about = {}) noexcept : facts_(about) {}
  key_rules(const key_rules&) = default;
  key_rules& operator=(const key_rules&) = default;
  ~key_rules() = default;

 private:
  rule_facts facts_;
};

/// Rules of keys and of scores. A: what scores are computed in.
template <class A>
class row_rules : public key_rules {
 public:
  [[nodiscard]] bool changes_scores() const noexcept { return changes_scores_; }
  /// Replaces those of a row's scores s [64], of the keys from first_key on, whose bits are set.
  virtual void score([[maybe_unused]] A* s, [[maybe_unused]] std::uint64_t bits, [[maybe_unused]] const row_index& row,
                     [[maybe_unused]] index_t first_key) const {}

 protected:
  explicit row_rules(const rule_facts& about = {}, bool changes_scores = false) noexcept
      : key_rules(about), changes_scores_(changes_scores) {}
  row_rules(const row_rules&) = default;
  row_rules& operator=(const row_rules&) = default;
  ~row_rules() = default;

 private:
  bool changes_scores_ = false;
};

/// Every key is seen, and scores stay as they are.
template <class A>
class no_rules final : public row_rules<A> {};

/// Calls f(c) for each bit c that is set.
template <class F>
void for_each_bit(std::uint64_t bits, const F& f) {
  for (; bits != 0; bits &= bits - 1) f(index_t{std::countr_zero(bits)});
}
/// The bits c for which f(c) holds.
template <class F>
[[nodiscard]] std::uint64_t bits_where(std::uint64_t bits, const F& f) {
  std::uint64_t kept = 0;
  for_each_bit(bits, [&](index_t c) { kept |= std::uint64_t{f(c)} << c; });
  return kept;
}

/// The rules of a user's variant (variants.hpp), which outlives them.
template <class Variant, class A>
class adapted_variant final : public row_rules<A> {
 public:
  explicit adapted_variant(const Variant& variant) noexcept
      : row_rules<A>(facts_of(variant), scores<Variant, A>), variant_(variant) {}

  [[nodiscard]] visibility visible(const key_block& block) const override {
    if constexpr (hides_blocks<Variant>) return variant_.visible(block);
    return key_rules::visible(block);
  }
  [[nodiscard]] std::uint64_t visible_bits(std::uint64_t bits, const row_index& row, index_t first_key) const override {
    if constexpr (hides_bits<Variant>) {
      if (bits == 0) return 0;
      return bits & variant_.visible_bits(position{row.batch, row.q_head, row.position, first_key});
    } else if constexpr (hides_keys<Variant>) {
      return bits_where(bits, [&](index_t c) { return sees(row, first_key + c); });
    } else {
      return bits;
    }
  }
  [[nodiscard]] key_range keys(key_range queries) const override {
    if constexpr (bounds_keys<Variant>) return variant_.keys(queries);
    return key_rules::keys(queries);
  }
  void score([[maybe_unused]] A* s, [[maybe_unused]] std::uint64_t bits, [[maybe_unused]] const row_index& row,
             [[maybe_unused]] index_t first_key) const override {
    if constexpr (scores<Variant, A>) {
      for_each_bit(bits, [&](index_t c) {
        s[c] = static_cast<A>(variant_.score(s[c], position{row.batch, row.q_head, row.position, first_key + c}));
      });
    }
  }

 private:
  [[nodiscard]] static rule_facts facts_of([[maybe_unused]] const Variant& variant) noexcept {
    rule_facts about{hides_keys<Variant>, hides_blocks<Variant>, false, 0};
    if constexpr (has_query_blocks<Variant>) about.query_block = variant.query_block();
    return about;
  }
  [[nodiscard]] bool sees(const row_index& row, index_t key) const {
    if constexpr (hides_positions<Variant>) {
      return variant_.visible(position{row.batch, row.q_head, row.position, key});
    } else {  // a block of one pair
      const key_block pair{row.batch, row.q_head, row.q_head + 1, row.position, row.position + 1, key, key + 1};
      return variant_.visible(pair) != visibility::none;
    }
  }

  const Variant& variant_;
};

}  // namespace GQA_ISA
}  // namespace gqa::detail
