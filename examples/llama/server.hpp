// SPDX-License-Identifier: Apache-2.0
// Many requests at once: continuous batching over one pool of pages. Requests join when there is room, with their whole
// prompt as one chunk among the others' single tokens, and leave when they are done; all of them fork the beginning
// that they share, whose keys are kept and read once.
#pragma once

#include <gqa/gqa.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint.hpp"
#include "sampler.hpp"
#include "tokenizer.hpp"
#include "transformer.hpp"

namespace llama {

struct request {
  std::vector<int> prompt;  // after the shared beginning
  int most_tokens;          // that may be produced
};

// What a server may take, and how it samples: the n-th request with seed + n.
struct server_limits {
  gqa::index_t sequences, pages, page_size = 64;
  double temperature = 0;
  std::uint64_t seed = 0;
};

class server {
 public:
  // `beginning`: BOS and whatever all requests begin with. The checkpoint and the context must outlive the server.
  server(const checkpoint& from, std::span<const int> beginning, const server_limits& limits, gqa::context& ctx)
      : sizes_(from.sizes()),
        limits_(limits),
        ctx_(ctx),
        transformer_(from, ctx, products::by_rows),  // so that no request's text depends on the others'
        cache_(sizes_.layers, limits.pages, limits.page_size, sizes_.kv_heads, sizes_.head_dim()),
        beginning_(beginning.begin(), beginning.end()) {
    // All but its last token, which every request runs by itself to have logits.
    const auto shared = std::span(beginning_).first(beginning_.size() - 1);
    root_ = cache_.create();
    if (!shared.empty()) step({{root_, {shared.begin(), shared.end()}}});
  }

  // The tokens of each request after its prompt, until the model ends the text. `heard(running, done, tokens)` is told
  // of every step: requests at work, requests finished, tokens run so far.
  template <class Heard>
  std::vector<std::vector<int>> serve(std::span<const request> requests, const Heard& heard) {
    std::vector<std::vector<int>> produced(requests.size());
    std::vector<running> at_work;
    std::size_t next = 0, done = 0, tokens = 0;
    gqa::index_t promised = 0;  // pages
    while (done < requests.size()) {
      for (; next < requests.size() && static_cast<gqa::index_t>(at_work.size()) < limits_.sequences; ++next) {
        const gqa::index_t pages = most_pages_of(requests[next]);
        if (pages > limits_.pages - pages_of_beginning())
          throw std::runtime_error("request " + std::to_string(next) + ": needs more pages than there are");
        if (promised + pages > limits_.pages - pages_of_beginning()) break;  // until somebody leaves
        promised += pages;
        running r{next, cache_.fork(root_), {beginning_.back()}, sampler(limits_.temperature, limits_.seed + next)};
        r.fed.insert(r.fed.end(), requests[next].prompt.begin(), requests[next].prompt.end());
        at_work.push_back(std::move(r));
      }
      std::vector<chunk> chunks;
      for (const running& r : at_work) chunks.push_back({r.id, r.fed}), tokens += r.fed.size();
      const matrix& logits = step(chunks);
      std::vector<running> staying;
      for (std::size_t i = 0; i < at_work.size(); ++i) {
        running& r = at_work[i];
        const float* const row = logits.data() + static_cast<std::ptrdiff_t>(i) * logits.cols();
        const int token = r.sample({row, static_cast<std::size_t>(logits.cols())});
        std::vector<int>& text = produced[r.request];
        if (token != tokenizer::bos) text.push_back(token);
        if (token == tokenizer::bos || static_cast<int>(text.size()) >= requests[r.request].most_tokens) {
          promised -= most_pages_of(requests[r.request]);
          cache_.erase(r.id);
          ++done;
        } else {
          r.fed.assign(1, token);
          staying.push_back(std::move(r));
        }
      }
      at_work = std::move(staying);
      heard(at_work.size(), done, tokens);
    }
    return produced;
  }

 private:
  struct running {
    std::size_t request;
    gqa::sequence_id id;
    std::vector<int> fed;  // tokens of its next step
    sampler sample;
  };
  struct chunk {
    gqa::sequence_id id;
    std::vector<int> tokens;
  };

  // Runs the next tokens of some sequences together. Returns the logits of the last of each.
  const matrix& step(const std::vector<chunk>& chunks) {
    std::vector<int> tokens;
    std::vector<gqa::index_t> positions, last, offsets{0};
    std::vector<gqa::sequence_id> sequences;
    for (const chunk& c : chunks) {
      for (std::size_t i = 0; i < c.tokens.size(); ++i)
        positions.push_back(cache_.length(c.id) + static_cast<gqa::index_t>(i));
      tokens.insert(tokens.end(), c.tokens.begin(), c.tokens.end());
      cache_.extend(c.id, static_cast<gqa::index_t>(c.tokens.size()));
      sequences.push_back(c.id);
      offsets.push_back(static_cast<gqa::index_t>(tokens.size()));
      last.push_back(offsets.back() - 1);
    }
    gqa::batch_options options;
    options.common.causal = true;
    return transformer_.forward(
        tokens, positions, last, [&](int l, const auto& q, const auto& k, const auto& v, const auto& out) {
          for (std::size_t i = 0; i < sequences.size(); ++i) {
            const auto rows = [&](const auto& x) {
              const gqa::index_t count = offsets[i + 1] - offsets[i];
              return gqa::tensor_view<const float, 3>(&x(0, offsets[i], 0, 0), {count, x.extent(2), x.extent(3)});
            };
            cache_.write(l, sequences[i], positions[static_cast<std::size_t>(offsets[i])], rows(k), rows(v));
          }
          gqa::batch_attention(q, offsets, cache_.layer(l), sequences, out, options, ctx_);
        });
  }

  // Pages that a request may come to have beside those of the beginning, one of which it may copy.
  [[nodiscard]] gqa::index_t most_pages_of(const request& r) const {
    const auto tokens = static_cast<gqa::index_t>(r.prompt.size()) + r.most_tokens + 1;
    return (tokens + limits_.page_size - 1) / limits_.page_size + 1;
  }
  [[nodiscard]] gqa::index_t pages_of_beginning() const {
    return (cache_.length(root_) + limits_.page_size - 1) / limits_.page_size;
  }

  const config sizes_;
  const server_limits limits_;
  gqa::context& ctx_;
  transformer transformer_;
  gqa::paged_kv_cache<float> cache_;
  std::vector<int> beginning_;
  gqa::sequence_id root_;
};

}  // namespace llama
