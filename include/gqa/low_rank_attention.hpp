// SPDX-License-Identifier: Apache-2.0
/// \file
/// latent_attention(): multi-head latent attention (MLA; DeepSeek-V2, 2024) over a latent_kv_cache. (For keys that only
/// lie near few dimensions: projected_attention.hpp.)
///
/// Keys and values of all H heads come from one latent vector c a token, of rank R, and a part of the key, of Dr, that
/// carries the positions and is the same for all:
///
///     k_h = [W_k,h c | k_rope],  v_h = W_v,h c        W_k [H, Dn, R], W_v [H, Dv, R]
///
/// Two forms of the same:
///     absorbed       W_k moves to the query, W_v to the output: q' = [W_k,h^T q_nope | q_rope] attends to the latent
///                    vectors themselves, one KV head of R + Dr for all; each is read once, (2 R + Dr) multiply-adds a
///                    pair and head. For decode.
///     materialised   keys and values of all heads are made first, T R (Dn + Dv) multiply-adds a head, then
///                    Dn + Dr + Dv a pair. For prefill.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>

#include <Eigen/Core>

#include <gqa/attention.hpp>
#include <gqa/config.hpp>
#include <gqa/context.hpp>
#include <gqa/detail/base/carver.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/error.hpp>
#include <gqa/latent_kv_cache.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa {

enum class latent_form {
  automatic,     ///< the one of fewer multiply-adds
  absorbed,      ///< queries meet latent vectors
  materialised,  ///< queries meet keys and values made of them
};

struct latent_options {
  attention_options attention = {};  ///< the default scale is 1 / sqrt(Dn + Dr); no group_offsets
  latent_form form = latent_form::automatic;
};

/// Projections of latent vectors, the last axis contiguous.
struct latent_projections {
  tensor_view<const float, 3> keys;    ///< [H, Dn, R]
  tensor_view<const float, 3> values;  ///< [H, Dv, R]
};

namespace detail {
inline namespace GQA_ISA {

/// Rows [rows, columns] of floats, so far apart, as Eigen has them.
using row_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class M>
using strided_rows = Eigen::Map<M, Eigen::Unaligned, Eigen::OuterStride<>>;
[[nodiscard]] inline strided_rows<const row_matrix> rows_at(const float* data, index_t rows, index_t columns,
                                                            index_t stride) noexcept {
  return {data, rows, columns, Eigen::OuterStride<>(stride)};
}
[[nodiscard]] inline strided_rows<row_matrix> rows_at(float* data, index_t rows, index_t columns,
                                                      index_t stride) noexcept {
  return {data, rows, columns, Eigen::OuterStride<>(stride)};
}

/// One call. T: what latent vectors are stored in.
template <class T>
class latent_attender {
 public:
  latent_attender(const tensor_view<const float, 4>& q_nope, const tensor_view<const float, 4>& q_rope,
                  const latent_kv_cache<T>& kv, const latent_projections& w, const tensor_view<float, 4>& out,
                  const latent_options& options, context& ctx) noexcept
      : q_nope_(without_idle_strides(q_nope)),
        q_rope_(without_idle_strides(q_rope)),
        kv_(kv),
        w_(w),
        out_(out),
        options_(options.attention),
        ctx_(ctx) {
    if (!options_.scale) options_.scale = 1 / std::sqrt(static_cast<double>(nope() + rope()));
  }

  [[nodiscard]] fault find_fault(latent_form form) const noexcept {
    if (form < latent_form::automatic || form > latent_form::materialised)
      return make_fault(errc::option, "options.form: expected an enumerator, got %d", static_cast<int>(form));
    const operand nope_rows = describe("q_nope", q_nope_), rope_rows = describe("q_rope", q_rope_),
                  results = describe("out", out_);
    for (const operand& o : {nope_rows, rope_rows, results}) {
      if (const auto f = find_layout_fault(o)) return f;
    }
    if (const auto f = find_extent_fault(nope_rows, 0, kv_.batch(), "the cache's batch")) return f;
    for (int axis = 0; axis < 3; ++axis) {
      const auto at = static_cast<std::size_t>(axis);
      if (const auto f = find_extent_fault(rope_rows, axis, nope_rows.extents[at], "that of q_nope")) return f;
      if (const auto f = find_extent_fault(results, axis, nope_rows.extents[at], "that of q_nope")) return f;
    }
    if (const auto f = find_extent_fault(rope_rows, 3, rope(), "the cache's head_dim less value_dim")) return f;
    if (heads() < 1 || nope() < 1 || out_.extent(3) < 1)
      return make_fault(errc::shape, "q_nope, out: expected heads and dims >= 1, got %lld heads of %lld and %lld",
                        printable(heads()), printable(nope()), printable(out_.extent(3)));
    for (const auto& [name, w, dim] : {projection{"projections.keys", w_.keys, nope()},
                                       projection{"projections.values", w_.values, out_.extent(3)}}) {
      if (const auto f = find_layout_fault(describe(name, w))) return f;
      if (w.extent(0) != heads() || w.extent(1) != dim || w.extent(2) != rank())
        return make_fault(errc::shape, "%s: expected [%lld, %lld, %lld], got [%lld, %lld, %lld]", name,
                          printable(heads()), printable(dim), printable(rank()), printable(w.extent(0)),
                          printable(w.extent(1)), printable(w.extent(2)));
    }
    if (!options_.group_offsets.empty())
      return make_fault(errc::option, "options.attention.group_offsets: expected none, for all heads share latents");
    const call_shape shape{kv_.batch(), queries(), kv_.kv_len(), heads(), 1, kv_.head_dim(), rank()};
    if (const auto f = find_options_fault(options_, shape)) return f;
    for (index_t b = 0; b < shape.batch && !options_.kv_lengths.empty(); ++b) {
      const index_t said = options_.kv_lengths[static_cast<std::size_t>(b)];
      if (const auto f = find_kv_length_fault("options.kv_lengths", b, said, kv_.length(b))) return f;
    }
    if (const auto f = find_written_fault(results)) return f;
    const auto find_overlap = [&](const operand& read) noexcept { return find_overlap_fault(results, read); };
    for (const operand& read :
         {nope_rows, rope_rows, describe("projections.keys", w_.keys), describe("projections.values", w_.values)}) {
      if (const auto f = find_overlap(read)) return f;
    }
    return find_in_options(options_, find_overlap);
  }

  void run(latent_form form) {
    if (out_.size() == 0) return;
    if (form == latent_form::automatic) form = find_form();
    form == latent_form::absorbed ? attend_absorbed() : attend_materialised();
  }

 private:
  struct projection {
    const char* name;
    tensor_view<const float, 3> w;
    index_t dim;
  };

  [[nodiscard]] index_t queries() const noexcept { return q_nope_.extent(1); }
  [[nodiscard]] index_t heads() const noexcept { return q_nope_.extent(2); }
  [[nodiscard]] index_t nope() const noexcept { return q_nope_.extent(3); }
  [[nodiscard]] index_t rank() const noexcept { return kv_.value_dim(); }
  [[nodiscard]] index_t rope() const noexcept { return kv_.head_dim() - rank(); }

  /// By multiply-adds of a head.
  [[nodiscard]] latent_form find_form() const noexcept {
    const auto size = [](index_t n) { return static_cast<double>(n); };
    const double s = size(queries()), t = size(kv_.kv_len()), r = size(rank()),
                 projected = size(nope() + out_.extent(3));
    const double absorbed = s * t * (2 * r + size(rope())) + s * r * projected;
    const double materialised = s * t * (projected + size(rope())) + t * r * projected;
    return absorbed <= materialised ? latent_form::absorbed : latent_form::materialised;
  }

  /// Scratch that attention() by this context does not use.
  [[nodiscard]] std::byte* scratch(std::size_t bytes) { return ctx_.detail_scratch_aside(bytes); }
  template <class F>
  void for_each_head(const F& f) {
    ctx_.for_each(kv_.batch() * heads(), [&](index_t n, index_t) { f(n / heads(), n % heads()); });
  }

  void attend_absorbed() {
    const index_t rows = kv_.batch() * queries() * heads(), dim = kv_.head_dim(), value_dim = out_.extent(3);
    float *q = nullptr, *latents = nullptr;
    const auto carve = [&](std::byte* memory) {
      carver take(memory);
      take(q, rows * dim), take(latents, rows * rank());
      return take.used();
    };
    std::byte* const memory = scratch(carve(nullptr));
    if (memory == nullptr) return;
    carve(memory);
    const tensor_view<float, 4> q_view(q, {kv_.batch(), queries(), heads(), dim});
    const tensor_view<float, 4> latent_view(latents, {kv_.batch(), queries(), heads(), rank()});
    for_each_head([&](index_t b, index_t h) {
      rows_at(&q_view(b, 0, h, 0), queries(), rank(), q_view.stride(1)).noalias() =
          rows_at(&q_nope_(b, 0, h, 0), queries(), nope(), q_nope_.stride(1)) *
          rows_at(&w_.keys(h, 0, 0), nope(), rank(), w_.keys.stride(1));
      for (index_t s = 0; s < queries() && rope() > 0; ++s)
        std::copy_n(&q_rope_(b, s, h, 0), rope(), &q_view(b, s, h, rank()));
    });
    const error_watch watch;
    attention(q_view, kv_, latent_view, options_, ctx_);
    if (watch.failed()) return;
    for_each_head([&](index_t b, index_t h) {
      rows_at(&out_(b, 0, h, 0), queries(), value_dim, out_.stride(1)).noalias() =
          rows_at(&latent_view(b, 0, h, 0), queries(), rank(), latent_view.stride(1)) *
          rows_at(&w_.values(h, 0, 0), value_dim, rank(), w_.values.stride(1)).transpose();
    });
  }

  void attend_materialised() {
    const index_t batch = kv_.batch(), tokens = kv_.kv_len(), value_dim = out_.extent(3), dim = nope() + rope();
    float *q = nullptr, *c = nullptr, *k = nullptr, *v = nullptr;
    index_t* lengths = nullptr;
    const auto carve = [&](std::byte* memory) {
      carver take(memory);
      take(q, batch * queries() * heads() * dim), take(c, batch * tokens * kv_.head_dim());
      take(k, batch * tokens * heads() * dim), take(v, batch * tokens * heads() * value_dim);
      take(lengths, batch);
      return take.used();
    };
    std::byte* const memory = scratch(carve(nullptr));
    if (memory == nullptr) return;
    carve(memory);
    const tensor_view<float, 4> q_view(q, {batch, queries(), heads(), dim});
    const tensor_view<float, 4> k_view(k, {batch, tokens, heads(), dim});
    const tensor_view<float, 4> v_view(v, {batch, tokens, heads(), value_dim});
    const auto latents_of = [&](index_t b) { return c + b * tokens * kv_.head_dim(); };
    for (index_t b = 0; b < batch; ++b) {
      lengths[b] = options_.kv_lengths.empty() ? kv_.length(b) : options_.kv_lengths[static_cast<std::size_t>(b)];
      kv_.copy_rows(b, 0, lengths[b], latents_of(b), kv_.head_dim());
    }
    for_each_head([&](index_t b, index_t h) {
      for (index_t s = 0; s < queries(); ++s) {
        std::copy_n(&q_nope_(b, s, h, 0), nope(), &q_view(b, s, h, 0));
        if (rope() > 0) std::copy_n(&q_rope_(b, s, h, 0), rope(), &q_view(b, s, h, nope()));
      }
      if (lengths[b] == 0) return;
      const auto latents = rows_at(static_cast<const float*>(latents_of(b)), lengths[b], rank(), kv_.head_dim());
      rows_at(&k_view(b, 0, h, 0), lengths[b], nope(), k_view.stride(1)).noalias() =
          latents * rows_at(&w_.keys(h, 0, 0), nope(), rank(), w_.keys.stride(1)).transpose();
      for (index_t t = 0; t < lengths[b] && rope() > 0; ++t)
        std::copy_n(latents_of(b) + t * kv_.head_dim() + rank(), rope(), &k_view(b, t, h, nope()));
      rows_at(&v_view(b, 0, h, 0), lengths[b], value_dim, v_view.stride(1)).noalias() =
          latents * rows_at(&w_.values(h, 0, 0), value_dim, rank(), w_.values.stride(1)).transpose();
    });
    attention_options options = options_;
    options.kv_lengths = {lengths, static_cast<std::size_t>(batch)};
    attention(q_view, k_view, v_view, out_, options, ctx_);
  }

  tensor_view<const float, 4> q_nope_, q_rope_;
  const latent_kv_cache<T>& kv_;
  const latent_projections& w_;
  tensor_view<float, 4> out_;
  attention_options options_;
  context& ctx_;
};

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// Latent attention. Both forms are the same but for rounding.
/// \param q_nope  [B, S, H, Dn] \param q_rope  [B, S, H, Dr], rotated; Dr = head_dim - value_dim of the cache, maybe 0
/// \param kv      tokens [c | k_rope] of B sequences, k_rope rotated
/// \param out     [B, S, H, Dv]; may share no memory with an input
/// \throws error  errc::shape, errc::stride, errc::option, errc::length for what does not fit, before anything is
/// written Cost: above; scratch of B S H (2 R + Dr) floats absorbed, of B T H (Dn + Dr + Dv) materialised, kept by the
/// context.
template <tensor_like QNope, tensor_like QRope, class T, tensor_like Out>
void latent_attention(QNope&& q_nope, QRope&& q_rope, const latent_kv_cache<T>& kv,
                      const latent_projections& projections, Out&& out, const latent_options& options, context& ctx) {
  detail::latent_attender<T> call(detail::as_view(std::forward<QNope>(q_nope)),
                                  detail::as_view(std::forward<QRope>(q_rope)), kv, projections,
                                  detail::as_view(std::forward<Out>(out)), options, ctx);
  if (const auto f = call.find_fault(options.form)) return detail::raise(f);
  call.run(options.form);
}

/// Its checks, and nothing else: errc::ok if the call would run.
template <tensor_like QNope, tensor_like QRope, class T, tensor_like Out>
[[nodiscard]] errc check(QNope&& q_nope, QRope&& q_rope, const latent_kv_cache<T>& kv,
                         const latent_projections& projections, Out&& out, const latent_options& options) noexcept {
  context unused;
  return detail::latent_attender<T>(detail::as_view(std::forward<QNope>(q_nope)),
                                    detail::as_view(std::forward<QRope>(q_rope)), kv, projections,
                                    detail::as_view(std::forward<Out>(out)), options, unused)
      .find_fault(options.form)
      .code;
}

}  // namespace GQA_ISA
}  // namespace gqa
