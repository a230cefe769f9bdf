// SPDX-License-Identifier: Apache-2.0
// Digests of what calls compute, to be compared between two versions of the library (CONTRIBUTING.md): a change that
// moves code, and no arithmetic, changes none of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gqa/gqa.hpp>

namespace gqa::digests {

/// Numbers that are the same everywhere: thirds of small integers, rounded to T.
template <class T>
std::vector<T> numbers(index_t count, std::uint32_t seed) {
  std::vector<T> all(static_cast<std::size_t>(count));
  std::uint32_t state = seed * 2654435761U + 1;
  for (T& x : all) {
    state = state * 1664525U + 1013904223U;
    x = static_cast<T>(static_cast<float>(static_cast<int>(state >> 24) - 128) / 48.0F);
  }
  return all;
}

/// Prints a line: the name of a call and the FNV-1a hash of the bytes of its result.
template <class T>
void print(const std::string& name, const std::vector<T>& result) {
  std::uint64_t hash = 14695981039346656037U;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(result.data());
  for (std::size_t i = 0; i < result.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211U;
  std::printf("%016llx %s\n", static_cast<unsigned long long>(hash), name.c_str());
}

struct shape {
  const char* name;
  index_t batch, heads, kv_heads, keys, head_dim, value_dim;
};
inline constexpr shape shapes[] = {{"h6g2d64", 2, 6, 2, 1100, 64, 64}, {"h8g8d40e24", 1, 8, 8, 1150, 40, 24}};

/// What a result is made of: q [B, S, H, D], written to out, and lse where it is a state.
template <class Q>
struct call {
  const shape& n;
  index_t q_len;
  std::vector<Q> q = numbers<Q>(n.batch * q_len * n.heads * n.head_dim, 7);
  std::vector<float> out = std::vector<float>(static_cast<std::size_t>(n.batch * q_len * n.heads * n.value_dim));
  std::vector<float> lse = std::vector<float>(static_cast<std::size_t>(n.batch * q_len * n.heads));

  [[nodiscard]] auto queries() const { return view(q.data(), {n.batch, q_len, n.heads, n.head_dim}); }
  [[nodiscard]] auto outputs() { return view(out.data(), {n.batch, q_len, n.heads, n.value_dim}); }
  [[nodiscard]] partial_state<float> state() {
    return {outputs(), tensor_view<float, 3>(lse.data(), {n.batch, q_len, n.heads})};
  }
  [[nodiscard]] std::vector<float> result() const {
    std::vector<float> all = out;
    all.insert(all.end(), lse.begin(), lse.end());
    return all;
  }
};

/// Options to call with, by name; what they view lives as long as this.
class options_of {
 public:
  options_of(const shape& n, index_t q_len)
      : slopes_(numbers<float>(n.heads, 3)),
        sinks_(numbers<float>(n.heads, 4)),
        bias_(numbers<float>(q_len * n.keys, 5)),
        mask_(static_cast<std::size_t>(n.heads * q_len * n.keys)),
        lengths_(static_cast<std::size_t>(n.batch), n.keys - 77),
        groups_{0} {
    for (std::size_t i = 0; i < mask_.size(); ++i) mask_[i] = i * i % 7 < 4;
    for (index_t g = 1; g < n.kv_heads; ++g) groups_.push_back(g);
    groups_.push_back(n.heads);
    add("plain", {});
    add("causal", {.causal = true});
    add("lengths", {.causal = true, .kv_lengths = lengths_});
    add("window", {.scale = 0.3, .causal = true, .window = {100, 0}, .sinks = sinks_});
    add("offset", {.causal = true, .query_offset = 400});
    add("softcap", {.causal = true, .softcap = 3.0});
    add("alibi", {.causal = true, .alibi_slopes = slopes_, .sinks = sinks_});
    add("mask",
        {.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(mask_.data()), {1, n.heads, q_len, n.keys})});
    add("bias", {.bias = tensor_view<const float, 4>(bias_.data(), {1, 1, q_len, n.keys})});
    add("groups", {.causal = true, .group_offsets = groups_});
    add("floats", {.causal = true, .float_products = true});
    add("rounded", {.causal = true, .float_products = false});
  }
  struct named {
    const char* name;
    attention_options options;
  };
  [[nodiscard]] const std::vector<named>& all() const noexcept { return all_; }

 private:
  void add(const char* name, const attention_options& options) { all_.push_back({name, options}); }

  std::vector<float> slopes_, sinks_, bias_;
  std::vector<unsigned char> mask_;
  std::vector<index_t> lengths_, groups_;
  std::vector<named> all_;
};

/// attention() over a source, with all options, of one, a few and many queries.
template <class Q, class Source>
void attend_with_options(const std::string& name, const shape& n, const Source& kv) {
  Eigen::ThreadPool pool(2);
  context on_pool(pool);
  for (const index_t q_len : {1, 5, 70}) {
    const options_of options(n, q_len);
    for (const auto& [option, o] : options.all()) {
      call<Q> c{n, q_len};
      attention(c.queries(), kv, c.state(), o, on_pool);
      print(name + '/' + n.name + "/q" + std::to_string(q_len) + '/' + option, c.result());
    }
  }
}

/// A score, a mask by positions.
struct bent {
  template <class A>
  [[nodiscard]] A score(A s, const position& p) const noexcept {
    return s - static_cast<A>(p.key % 5) * static_cast<A>(0.25) + static_cast<A>(p.q_head);
  }
};
struct striped {
  [[nodiscard]] bool visible(const position& p) const noexcept { return (p.query + p.key + p.q_head) % 3 != 0; }
};
/// A mask by blocks alone, of 100 keys.
struct checkered {
  [[nodiscard]] visibility visible(const key_block& b) const noexcept {
    if (b.key_begin / 100 != (b.key_end - 1) / 100) return visibility::some;
    return b.key_begin / 100 % 3 == 1 ? visibility::none : visibility::all;
  }
};

template <class Q, class Source>
void attend_with_variants(const std::string& name, const shape& n, const Source& kv) {
  context ctx;
  for (const index_t q_len : {1, 5, 70}) {
    const auto attend = [&](const char* variant_name, const auto& variant, const attention_options& o) {
      call<Q> c{n, q_len};
      attention(c.queries(), kv, c.state(), o, variant, ctx);
      print(name + '/' + n.name + "/q" + std::to_string(q_len) + '/' + variant_name, c.result());
    };
    attend("bent", bent{}, {.causal = true});
    attend("striped", striped{}, {.causal = true, .window = {600, 0}});
    attend("checkered", checkered{}, {.causal = true});
    attend("sliding_window", sliding_window(130, 0), {.causal = true});
    attend("block_local", block_local(96, 1), {.softcap = 2.0});
  }
}

/// A cache of a shape's keys and values.
template <class T, class Cache>
void fill(Cache& cache, const shape& n) {
  const auto k = numbers<float>(n.batch * n.keys * n.kv_heads * n.head_dim, 1);
  const auto v = numbers<float>(n.batch * n.keys * n.kv_heads * n.value_dim, 2);
  cache.append(view(k.data(), {n.batch, n.keys, n.kv_heads, n.head_dim}),
               view(v.data(), {n.batch, n.keys, n.kv_heads, n.value_dim}));
}

/// A pool whose sequences share 500 tokens.
template <class T>
paged_kv_cache<T> forked_pool(const shape& n, std::vector<sequence_id>& sequences) {
  const auto k = numbers<float>(2 * n.keys * n.kv_heads * n.head_dim, 1);
  const auto v = numbers<float>(2 * n.keys * n.kv_heads * n.value_dim, 2);
  const auto some = [&](index_t first, index_t count) {
    return std::pair(
        tensor_view<const float, 3>(k.data() + first * n.kv_heads * n.head_dim, {count, n.kv_heads, n.head_dim}),
        tensor_view<const float, 3>(v.data() + first * n.kv_heads * n.value_dim, {count, n.kv_heads, n.value_dim}));
  };
  paged_kv_cache<T> pool(1, 600, 16, n.kv_heads, n.head_dim, n.value_dim);
  const sequence_id parent = pool.create();
  pool.append(parent, some(0, 500).first, some(0, 500).second);
  sequences = {parent, pool.fork(parent), pool.fork(parent)};
  index_t first = 500;
  for (const sequence_id id : sequences) {
    pool.append(id, some(first, 90 + first % 7).first, some(first, 90 + first % 7).second);
    first += 101;
  }
  return pool;
}

template <class Q, class Source>
void attend_batches(const std::string& name, const shape& n, const Source& kv,
                    const std::vector<sequence_id>& sequences) {
  Eigen::ThreadPool pool(2);
  context on_pool(pool);
  const std::vector<std::vector<index_t>> all_offsets{{0, 1, 2, 3}, {0, 4, 5, 9}, {0, 70, 71, 140}};
  for (const auto& offsets : all_offsets) {
    const index_t rows = offsets.back();
    const shape flat{n.name, 1, n.heads, n.kv_heads, n.keys, n.head_dim, n.value_dim};
    const auto attend = [&](const char* what, const batch_options& o, const auto&... variant) {
      call<Q> c{flat, rows};
      const tensor_view<const Q, 3> q(c.q.data(), {rows, n.heads, n.head_dim});
      batch_attention(q, offsets, kv, sequences, c.state(), o, variant..., on_pool);
      print(name + '/' + n.name + "/batch" + std::to_string(rows) + '/' + what, c.result());
    };
    std::vector<index_t> positions;
    std::vector<unsigned char> tree(70 * 70);
    for (std::size_t i = 0; i < tree.size(); ++i) tree[i] = i % 70 == i / 70 || i * i % 5 == 1;
    std::vector<tensor_view<const bool, 2>> masks;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const index_t own = offsets[s + 1] - offsets[s];
      masks.push_back({reinterpret_cast<const bool*>(tree.data()), {own, own}, {70, 1}});
      const index_t length = kv.length(static_cast<index_t>(sequences[s]));
      for (index_t i = 0; i < own; ++i) positions.push_back(length - own + i / 2);
    }
    masks[1] = {};
    attend("plain", {.common = {.causal = true}});
    attend("unshared", {.common = {.causal = true}, .share_prefixes = false});
    attend("window", {.common = {.causal = true, .window = {200, 0}}});
    attend("trees", {.common = {.causal = true}, .masks = masks});
    attend("positions", {.common = {.causal = true}, .positions = positions});
    attend("striped", {.common = {.causal = true}, .masks = masks}, striped{});
    attend("bent", {.common = {.causal = true}}, bent{});
  }
}

/// All that takes stored elements of T and queries of Q.
template <class T, class Q>
void digest_caches(const std::string& type) {
  for (const shape& n : shapes) {
    kv_cache<T> cache(n.batch, n.kv_heads, n.keys, n.head_dim, n.value_dim);
    fill<T>(cache, n);
    attend_with_options<Q>("kv_cache/" + type, n, cache);
    attend_with_variants<Q>("kv_cache/" + type, n, cache);
    ring_kv_cache<T> ring(n.batch, n.kv_heads, 20, 1200, n.head_dim, n.value_dim);
    fill<T>(ring, n);
    attend_with_options<Q>("ring_kv_cache/" + type, n, ring);
    std::vector<sequence_id> sequences;
    const paged_kv_cache<T> pool = forked_pool<T>(n, sequences);
    attend_batches<Q>("paged_kv_cache/" + type, n, pool.layer(0), sequences);
    attend_batches<Q>("kv_cache/" + type, n, cache, {sequence_id{0}, sequence_id{n.batch - 1}, sequence_id{0}});
    cache.keep_key_bounds(16);
    for (const index_t q_len : {1, 3}) {
      context ctx;
      call<Q> c{n, q_len};
      page_attention(c.queries(), cache, c.state(), {.attention = {.causal = true}, .epsilon = 0.5, .page_budget = 9},
                     ctx);
      print("page_attention/" + type + '/' + n.name + "/q" + std::to_string(q_len), c.result());
    }
  }
}

/// The same over tensors of T in memory.
template <class T, class Q>
void digest_tensors(const std::string& type) {
  for (const shape& n : shapes) {
    const auto k = numbers<T>(n.batch * n.keys * n.kv_heads * n.head_dim, 1);
    const auto v = numbers<T>(n.batch * n.keys * n.kv_heads * n.value_dim, 2);
    const auto kv = kv_view(view(k.data(), {n.batch, n.keys, n.kv_heads, n.head_dim}),
                            view(v.data(), {n.batch, n.keys, n.kv_heads, n.value_dim}));
    attend_with_options<Q>("dense/" + type, n, kv);
    attend_with_variants<Q>("dense/" + type, n, kv);
    // Heads before tokens.
    const auto heads_apart =
        kv_view(tensor_view<const T, 4>(k.data(), {n.batch, n.keys, n.kv_heads, n.head_dim},
                                        {n.keys * n.kv_heads * n.head_dim, n.head_dim, n.keys * n.head_dim, 1}),
                tensor_view<const T, 4>(v.data(), {n.batch, n.keys, n.kv_heads, n.value_dim},
                                        {n.keys * n.kv_heads * n.value_dim, n.value_dim, n.keys * n.value_dim, 1}));
    attend_with_options<Q>("dense_heads_apart/" + type, n, heads_apart);
    for (const index_t page : {16, 20}) {
      const index_t pages = n.batch * n.keys / page;
      std::vector<std::int32_t> indices, offsets{0};
      std::vector<index_t> lengths;
      for (index_t b = 0; b < n.batch; ++b) {
        for (index_t i = 0; i < n.keys / page; ++i) indices.push_back(static_cast<std::int32_t>(i * 7 % pages));
        offsets.push_back(static_cast<std::int32_t>(indices.size()));
        lengths.push_back(n.keys / page * page - 3 * b);
      }
      const paged_view<T> own(tensor_view<const T, 4>(k.data(), {pages, page, n.kv_heads, n.head_dim}),
                              tensor_view<const T, 4>(v.data(), {pages, page, n.kv_heads, n.value_dim}), indices,
                              offsets, lengths);
      for (const index_t q_len : {1, 5, 70}) {
        context ctx;
        call<Q> c{n, q_len};
        attention(c.queries(), own, c.state(), {.causal = true}, ctx);
        print("paged_view" + std::to_string(page) + '/' + type + '/' + n.name + "/q" + std::to_string(q_len),
              c.result());
      }
      attend_batches<Q>("paged_view" + std::to_string(page) + '/' + type, n, own,
                        {sequence_id{0}, sequence_id{n.batch - 1}, sequence_id{0}});
    }
    const shape latent_shape{n.name, n.batch, n.heads, 1, n.keys, n.head_dim, n.value_dim};
    latent_kv_cache<T> latent(n.batch, n.keys, n.head_dim, n.value_dim);
    latent.append(view(k.data(), {n.batch, n.keys, 1, n.head_dim}));
    attend_with_options<Q>("latent/" + type, latent_shape, latent);
    context ctx;
    for (const index_t q_len : {1, 6, 90}) {
      call<Q> c{n, q_len};
      const std::string end = '/' + type + '/' + n.name + "/q" + std::to_string(q_len);
      const block_sparse_mask one_list = a_shape({.q_len = q_len, .kv_len = n.keys}, 70, 200);
      attention(c.queries(), kv, c.state(), {.causal = true}, one_list, ctx);
      print("a_shape" + end, c.result());
      const auto sees = [](index_t h, index_t query, index_t key) { return (query / 16 + key / 64 + h) % 3 != 0; };
      block_sparse_attention(c.queries(), kv, c.state(),
                             block_sparse_mask::from_pairs({.q_len = q_len, .kv_len = n.keys, .lists = n.heads}, sees),
                             {}, ctx);
      print("lists_by_head" + end, c.result());
    }
  }
}

void digest_float();
void digest_double();
void digest_half();
void digest_bfloat16();
void digest_8_bits();
void digest_groups();

}  // namespace gqa::digests
