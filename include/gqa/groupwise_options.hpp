// SPDX-License-Identifier: Apache-2.0
/// \file
/// groupwise_options: how the members of a query group share what its representative finds.
#pragma once

#include <gqa/variants.hpp>

namespace gqa {

/// Vyas, Katharopoulos and Fleuret 2020 define the first two. With A_i the attention weights of member i, A_c those of
/// its representative, T the representative's top keys and m their mass under A_c:
enum class groupwise_form {
  dense,         ///< every row for itself: exact, the far part of a control
  clustered,     ///< A_c for all
  improved,      ///< on T the member's own weights, scaled to sum to m; A_c elsewhere
  improved_lse,  ///< the same, but T and the rest weigh by log-sum-exps: the member's own of T, and for the rest the
                 ///< representative's, corrected to first order; not with a softcap
};

struct groupwise_options {
  groupwise_form form = groupwise_form::improved_lse;
  index_t top_keys = 64;   ///< k = |T|, ties to the lowest key; whole tiles of 64 cost least
  key_range without = {};  ///< keys that are left out, because queries see them otherwise (groupwise_attention() only)
};

}  // namespace gqa
