// SPDX-License-Identifier: Apache-2.0
/// \file
/// gqa: grouped-query attention on the CPU. Include this and call gqa::attention(); the rest is an index.
#pragma once

// IWYU pragma: begin_exports
#include <gqa/attention.hpp>              // attention(), check(): exact attention, any grouping, any option
#include <gqa/batch.hpp>                  // batch_attention(): ragged batches of prefills, appends and decode steps
#include <gqa/block_sparse.hpp>           // block_sparse_attention(): each block of queries on its list of key tiles
#include <gqa/block_sparse_patterns.hpp>  // vertical_slash(), a_shape(), strided(), big_bird(): such lists
#include <gqa/combine.hpp>                // merge_disjoint(), exclude(), gated_sum(), mix()
#include <gqa/config.hpp>                 // index_t, accumulator_t, GQA_NO_EXCEPTIONS
#include <gqa/context.hpp>                // context: who runs the tasks, and scratch memory
#include <gqa/diagnostics.hpp>            // attention_map(), entropy, mass, similarity of heads, compare()
#include <gqa/eigen_tensor.hpp>           // view() of Eigen::Tensor and TensorMap
#include <gqa/element_types.hpp>          // q8, kv_types: 8 bits, and two types in one cache
#include <gqa/encoder_alibi.hpp>          // encoder_alibi: ALiBi by the distance to either side
#include <gqa/error.hpp>                  // errc, error, set_error_handler()
#include <gqa/grouped_attention.hpp>      // grouped_attention(): near keys exactly, far keys by query groups
#include <gqa/grouped_options.hpp>        // grouped_options, grouped_report
#include <gqa/groupwise_attention.hpp>    // groupwise_attention(): representatives attend, members share
#include <gqa/groupwise_options.hpp>      // groupwise_form: clustered, improved, improved by log-sum-exps
#include <gqa/huge_pages.hpp>             // huge_pages: memory for caches in pages of 2 MiB
#include <gqa/key_selection.hpp>          // top_keys(), recall(), mass(): the oracle of selectors
#include <gqa/kv_cache.hpp>               // kv_cache: keys and values of fixed capacity in the kernels' own order
#include <gqa/kv_source.hpp>              // kv_view(), the concept kv_source
#include <gqa/latent_kv_cache.hpp>        // latent_kv_cache: latent vectors, whose first channels are values, kept once
#include <gqa/local_masks.hpp>            // block_local, dilated_window, neighbourhood, chunked(), sinks_and_window
#include <gqa/low_rank_attention.hpp>  // latent_attention(): multi-head latent attention (MLA), absorbed or materialised
#include <gqa/openmp.hpp>              // openmp_executor
#include <gqa/options.hpp>         // attention_options: causal, window, softcap, ALiBi, sinks, masks, lengths, groups
#include <gqa/page_options.hpp>    // page_options, page_report
#include <gqa/page_selection.hpp>  // page_attention(): decode that reads the pages which matter, with a certificate
#include <gqa/paged_kv_cache.hpp>  // paged_kv_cache: one pool of pages for all layers, forks that share them
#include <gqa/paged_view.hpp>      // paged_view: an engine's own pages and page tables
#include <gqa/projected_attention.hpp>  // projected_attention(): keys ranked in few dimensions, exact on what matters
#include <gqa/projected_keys.hpp>  // projected_keys: principal directions of the keys of a source, and what is left out
#include <gqa/quantization.hpp>    // q8 for caches: 8 bits an element, and error_bound() of attention over them
#include <gqa/query_clustering.hpp>  // group_queries(): groups of alike queries, by content, labels or distance
#include <gqa/query_groups.hpp>      // query_groups, grouping_options
#include <gqa/reference.hpp>         // reference::attention(): naive, in double; oracle and baseline
#include <gqa/ring_kv_cache.hpp>  // ring_kv_cache: the first tokens and the newest ones, in memory that does not grow
#include <gqa/rope.hpp>           // rope: rotary position embedding
#include <gqa/rope_frequencies.hpp>        // its frequencies by each published rule: YaRN, Llama 3, LongRoPE, ...
#include <gqa/rope_turns.hpp>              // turned(): rows that rope turns on their way into a call or a cache
#include <gqa/state.hpp>                   // partial_state, merge(), merge_many()
#include <gqa/streaming_attention.hpp>     // streaming_attention(): over a ring, with positions of the cache
#include <gqa/tensor_view.hpp>             // tensor_view, view() and view_as() of raw memory
#include <gqa/variants.hpp>                // attention_variant: your own scores and masks
#include <gqa/version.hpp>                 // GQA_VERSION_MAJOR, _MINOR, _PATCH
#include <gqa/within_group_attention.hpp>  // within_group_attention(): each query on the keys of its own group
// IWYU pragma: end_exports
