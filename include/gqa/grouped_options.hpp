// SPDX-License-Identifier: Apache-2.0
/// \file
/// grouped_options: everything about a call of grouped_attention(), and what it reports of itself.
#pragma once

#include <optional>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/groupwise_options.hpp>
#include <gqa/options.hpp>
#include <gqa/query_groups.hpp>

namespace gqa {

/// Queries are cut into blocks of `block` positions, at multiples of it. Of a block that begins at position p the keys
/// from p - window on (without options.attention.causal: to p + block + window) are near and seen exactly; the others
/// are far and seen by groups.
struct grouped_options {
  /// scale, causal, offsets, softcap or alibi_slopes, sinks, kv_lengths, group_offsets; no others. With alibi_slopes
  /// rows are grouped within each head, else those of all heads of a KV head together; the slopes' terms of far keys
  /// are floats, over double keys, too: off by up to 2^-24 of themselves.
  attention_options attention = {};
  index_t block = 256;               ///< positions a block
  index_t window = 256;              ///< near keys before a block
  grouping_options grouping = {};    ///< of a block's rows; groups 0: one for 32 rows, of cover as many as pay
  groupwise_options groupwise = {};  ///< of the far keys
  /// Rows are grouped by a cover so fine that no row's far attention weights are off by more than this in all (their L1
  /// error, at most 2), and with groupwise_form::improved_lse no row's weights, near ones included. In the place of
  /// grouping.method and grouping.radius.
  std::optional<double> tolerance = {};
  /// With attention.causal: groups are those of the block before, so that a row depends on earlier tokens only, to the
  /// bit. Without it a row's group may follow later queries of its own block, never later keys.
  bool strict_causal = {};
  /// Also rows of different sequences are grouped, which must share their keys: a batch of keys and values with a
  /// stride of 0, equal lengths and offsets. A row then depends on the others of its batch, and a KV head's
  /// block is one worker's task. For decode, where a sequence by itself has few rows.
  bool pool_batch = {};
  bool always_group = {};  ///< also where the cost model says that the exact kernel is faster
};

/// A group that shares.
struct group_report {
  index_t members = 0;
  double radius = 0;
  double retained_mass = 0;  // of the representative's far weights, that of its top keys
  double error_bound = 0;    // on the L1 error of a member's far weights: 2 tanh(|scale| radius spread / 2)

  [[nodiscard]] friend bool operator==(const group_report&, const group_report&) = default;
};

/// A block of one KV head; with ALiBi of one query head.
struct block_report {
  index_t batch = 0, sequences = 1;  // [batch, batch + sequences), several with pool_batch
  index_t kv_head = 0, head_begin = 0, head_end = 0;
  index_t query_begin = 0, query_end = 0;  // indices in the call
  /// By the model of the cost, near keys included, in multiply-adds of the exact kernel: what the block takes, and what
  /// the exact kernel would. The ratio of their sums over blocks predicts that of times.
  double cost = 0, exact_cost = 0;
  bool exact = true;                        // by the exact kernel, because groups would not have paid; the rest is 0
  index_t groups = 0;                       // representatives of several rows
  index_t alone = 0;                        // rows that attended for themselves
  double largest_radius = 0;                // of a group that shares
  double error_bound = 0;                   // likewise
  double retained_mass = 0;                 // mean over the rows that share
  double products = 0, exact_products = 0;  // multiply-adds on far keys: done, and of the exact kernel
  std::vector<group_report> shared;         // groups, one by one

  [[nodiscard]] friend bool operator==(const block_report&, const block_report&) = default;
};

struct grouped_report {
  std::vector<block_report> blocks;  // by sequence, position and head
};

}  // namespace gqa
