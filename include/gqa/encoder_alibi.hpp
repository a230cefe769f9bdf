// SPDX-License-Identifier: Apache-2.0
/// \file
/// encoder_alibi: ALiBi by the distance to either side, a variant for queries that see what follows them.
///
///     score - slope |query position - key position|
///
/// attention_options::alibi_slopes adds slope (key position - query position), which is the same for keys up to the
/// query's own, and grows for those after it: right under a causal edge, as ALiBi was published (Press et al. 2022).
/// Encoders take the distance (FlashAttention's alibi_slopes, and BERT-like models trained with it).
#pragma once

#include <cstddef>
#include <span>

#include <gqa/config.hpp>
#include <gqa/variants.hpp>

namespace gqa {

/// A variant; float over float and 16-bit keys, double over double ones.
struct encoder_alibi {
  std::span<const float> slopes;  ///< [H]

  template <class A>
  [[nodiscard]] A score(A s, const position& p) const noexcept {
    const index_t distance = p.query > p.key ? p.query - p.key : p.key - p.query;
    return s - static_cast<A>(slopes[static_cast<std::size_t>(p.q_head)]) * static_cast<A>(distance);
  }
};

}  // namespace gqa
