// SPDX-License-Identifier: Apache-2.0
/// \file
/// projected_keys: what the keys of a source are along the few directions in which they vary most, and how far they are
/// from that. What projected_attention() (projected_attention.hpp) ranks keys by.
///
/// Keys of trained models lie near subspaces of few dimensions (Loki, Singhania et al. 2024). With m the mean of a KV
/// head's keys and P [r, D] the r principal directions of its own,
///
///     k = m + P^T a + e,    a = P (k - m) rounded to S
///
/// and for any query q, with y = P q and w = q - P^T y, whatever P and a are,
///
///     q . k = q . m + y . a + y . (P e) + w . e  <=  q . m + [y | |w| | |y|] . [a | |e| | |P e|]
///
/// (up to the rounding of y): a product of length r + 2 bounds the score, and is the score where keys lie in the
/// subspace. Of full rank it is the score but for rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/cache/adapted_source.hpp>
#include <gqa/detail/sparse/principal_directions.hpp>
#include <gqa/detail/tile/mixed.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>
#include <gqa/error.hpp>
#include <gqa/kv_source.hpp>
#include <gqa/variants.hpp>

namespace gqa {

struct projection_options {
  std::optional<index_t> rank = {};  ///< directions of every head, at most D; else as many as leave `residual`
  double residual = 0.1;             ///< the largest share of the keys' variance that may lie outside of them
  index_t sample = 4096;             ///< the directions are of so many keys, evenly spaced; residuals are of all
};

namespace detail {
inline namespace GQA_ISA {

/// The keys of one KV head of a sequence, projected.
template <class S>
struct projected_head : principal_directions<double> {
  reporting_vector<S> panels;  // [tile][panel of 16: r + 2 channels], as panels of keys (tile.hpp)

  [[nodiscard]] index_t channels() const noexcept { return rank() + 2; }
};

/// What all products with a key of D elements, the kernel's and those of r + 2 channels, may round off in floats,
/// beside |q| (|k| + |m|): chains of no more terms, each off by at most the unit roundoff of all that it has added up.
[[nodiscard]] inline double rounding_of(index_t head_dim, index_t rank) noexcept {
  return 4 * static_cast<double>(head_dim + rank + 34) * static_cast<double>(std::numeric_limits<float>::epsilon());
}

}  // namespace GQA_ISA
}  // namespace detail

inline namespace GQA_ISA {

/// \tparam S  float or bfloat16: what projections are held in, (r + 2) elements a key
template <class S>
class projected_keys {
  static_assert(std::is_same_v<S, float> || std::is_same_v<S, Eigen::bfloat16>,
                "gqa: projected_keys hold float or bfloat16");
  using head = detail::projected_head<S>;
  using matrix = typename head::matrix;

 public:
  /// Finds the principal directions of the keys that the source has, each sequence's and KV head's own, and projects
  /// all of them. Keys that are not finite have no part in the directions, and are always read.
  /// \throws error  errc::option for a rank that is negative or above D, for a residual that is not of [0, 1], for a
  ///                sample below 1; errc::shape for keys of no elements; what the source's own check finds;
  ///                errc::capacity without memory: where that returns, there are no sequences
  /// Cost of a head: n D^2 + 10 D^3 for directions of a sample of n keys, 3 T r D for T projections, in double.
  template <kv_source KV>
  explicit projected_keys(const KV& kv, const projection_options& options = {}) {
    if (const auto f = find_fault(kv, options)) {
      detail::raise(f);
      return;
    }
    batch_ = kv.batch(), kv_heads_ = kv.kv_heads(), head_dim_ = kv.head_dim();
    detail::reporting_vector<typename KV::panel_element> scratch;
    const bool done = detail::make_zeros(scratch, static_cast<std::size_t>(kv.scratch_elements()), what) &&
                      detail::make_zeros(lengths_, static_cast<std::size_t>(batch_), what) &&
                      detail::make_zeros(heads_, static_cast<std::size_t>(batch_ * kv_heads_), what) &&
                      with_memory_of_eigen((std::min)(options.sample, kv.kv_len()), [&] {
                        for (index_t b = 0; b < batch_; ++b)
                          for (index_t g = 0; g < kv_heads_; ++g) find_directions(kv, b, g, options, scratch.data());
                      });
    if (done) {
      update(kv);
    } else {
      batch_ = 0;  // fits no call
    }
  }

  /// Projects the tokens that have been appended to the source since. Directions stay as they are: of keys unlike those
  /// that they were found for, more lies outside, and more of them are read. Tokens that are projected are taken to
  /// stay what they are: where the source forgets some (truncate(); an erased sequence, whose place a new one may
  /// take), so must this, by truncate(), before others are appended.
  /// \throws error  errc::shape for a source of other extents, errc::length for one that has fewer tokens of a
  ///                sequence, what the source's own check finds, and errc::capacity without memory: what was projected
  ///                stays
  template <kv_source KV>
  void update(const KV& kv) {
    if (const auto f = kv.find_fault()) return detail::raise(f);
    if (const auto f = find_source_fault(kv, kv.batch())) return detail::raise(f);
    for (index_t b = 0; b < batch_; ++b) {
      if (kv.length(b) < length(b))
        return detail::raise(detail::make_fault(
            errc::length, "kv: expected at least %lld tokens (those projected) in sequence %lld, got %lld",
            detail::printable(length(b)), detail::printable(b), detail::printable(kv.length(b))));
    }
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t g = 0; g < kv_heads_; ++g) {
        head& to = heads_[static_cast<std::size_t>(b * kv_heads_ + g)];
        if (!detail::make_room(to.panels, panel_elements(to) * panels_of(kv.length(b)), what)) return;
      }
    }
    detail::reporting_vector<typename KV::panel_element> scratch;
    if (!detail::make_zeros(scratch, static_cast<std::size_t>(kv.scratch_elements()), what)) return;
    with_memory_of_eigen(0, [&] {
      for (index_t b = 0; b < batch_; ++b) {
        for (index_t g = 0; g < kv_heads_; ++g) project(kv, b, g, scratch.data());
        lengths_[static_cast<std::size_t>(b)] = kv.length(b);
      }
    });
  }
  /// Forgets all tokens of a sequence from position `length` on: to be called with the source's own.
  /// \throws error  errc::range, errc::length
  void truncate(index_t sequence, index_t length) {
    if (sequence < 0 || sequence >= batch_)
      return detail::raise(detail::make_fault(errc::range, "sequence: expected 0 to %lld, got %lld",
                                              detail::printable(batch_ - 1), detail::printable(sequence)));
    index_t& own = lengths_[static_cast<std::size_t>(sequence)];
    if (length < 0 || length > own)
      return detail::raise(detail::make_fault(errc::length,
                                              "length: expected 0 to %lld (the tokens there are), got %lld",
                                              detail::printable(own), detail::printable(length)));
    own = length;
  }

  [[nodiscard]] index_t batch() const noexcept { return batch_; }
  [[nodiscard]] index_t kv_heads() const noexcept { return kv_heads_; }
  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  /// Projected tokens of a sequence; 0 for one that there is not.
  [[nodiscard]] index_t length(index_t sequence) const noexcept {
    return sequence < 0 || sequence >= batch_ ? 0 : lengths_[static_cast<std::size_t>(sequence)];
  }
  /// Directions of a head, and the share of its sample's variance that lies outside of them; 0 for one that there is
  /// not.
  [[nodiscard]] index_t rank(index_t sequence, index_t kv_head) const noexcept {
    return has(sequence, kv_head) ? of(sequence, kv_head).rank() : 0;
  }
  [[nodiscard]] double residual(index_t sequence, index_t kv_head) const noexcept {
    return has(sequence, kv_head) ? of(sequence, kv_head).residual : 0;
  }
  /// Why a source is not that of these keys, as far as extents tell, in a call of so many sequences.
  template <class KV>
  [[nodiscard]] detail::fault find_source_fault(const KV& kv, index_t batch) const noexcept {
    static_assert(!detail::may_have_gaps<KV>,
                  "gqa: projected_keys are of all keys of a sequence, of which a ring_kv_cache has dropped some");
    static_assert(std::is_same_v<accumulator_t<typename KV::panel_element>, float>,
                  "gqa: projected_keys are of keys of no more than 32 bits");
    if (batch == batch_ && kv.kv_heads() == kv_heads_ && kv.head_dim() == head_dim_) return {};
    return detail::make_fault(
        errc::shape, "kv: expected [%lld, T, %lld, %lld], as projected, got [%lld, T, %lld, %lld]",
        detail::printable(batch_), detail::printable(kv_heads_), detail::printable(head_dim_), detail::printable(batch),
        detail::printable(kv.kv_heads()), detail::printable(kv.head_dim()));
  }
  /// For projected_attention(), of a head that there is.
  [[nodiscard]] const detail::projected_head<S>& of(index_t sequence, index_t kv_head) const noexcept {
    return heads_[static_cast<std::size_t>(sequence * kv_heads_ + kv_head)];
  }

 private:
  [[nodiscard]] bool has(index_t sequence, index_t kv_head) const noexcept {
    return 0 <= sequence && sequence < batch_ && 0 <= kv_head && kv_head < kv_heads_;
  }
  template <class KV>
  [[nodiscard]] static detail::fault find_fault(const KV& kv, const projection_options& options) noexcept {
    if (const auto f = kv.find_fault()) return f;
    if (const auto f = detail::find_least_fault("projected_keys", "kv.head_dim", 1, kv.head_dim())) return f;
    if (options.rank && (*options.rank < 0 || *options.rank > kv.head_dim()))
      return detail::make_fault(errc::option, "options.rank: expected 0 to %lld (the head dim), got %lld",
                                detail::printable(kv.head_dim()), detail::printable(*options.rank));
    if (!(options.residual >= 0 && options.residual <= 1))
      return detail::make_fault(errc::option, "options.residual: expected 0 to 1, got %g", options.residual);
    if (options.sample < 1)
      return detail::make_fault(errc::option, "options.sample: expected at least 1, got %lld",
                                detail::printable(options.sample));
    return {};
  }

  /// Calls f(first token, keys [count, D] in double) for tokens [begin, end) of a head, up to 64 at a time.
  template <class KV, class F>
  static void for_each_tile(const KV& kv, index_t b, index_t g, key_range tokens, typename KV::panel_element* scratch,
                            const F& f) {
    using P = typename KV::panel_element;
    const index_t dim = kv.head_dim();
    matrix keys;
    for (index_t begin = tokens.begin; begin < tokens.end;) {
      const index_t first = begin / detail::tile_tokens * detail::tile_tokens;
      const index_t end = (std::min)(first + detail::tile_tokens, tokens.end);
      const auto tile = kv.tile(b, g, first / detail::tile_tokens, end - first, scratch);
      keys.resize(end - begin, dim);
      for (index_t t = begin; t < end; ++t) {
        const P* const panel = tile.k[static_cast<std::size_t>((t - first) / detail::panel_tokens)];
        for (index_t d = 0; d < dim; ++d)
          keys(t - begin, d) = static_cast<double>(detail::key_at(panel, t % detail::panel_tokens, d, dim));
      }
      f(begin, keys);
      begin = end;
    }
  }

  static constexpr const char* what = "projected_keys";

  [[nodiscard]] static std::size_t panel_elements(const head& of) noexcept {
    return static_cast<std::size_t>(detail::key_panel_elements<S>(of.channels()));
  }
  [[nodiscard]] static std::size_t panels_of(index_t tokens) noexcept {
    return static_cast<std::size_t>(detail::ceil_div(tokens, detail::tile_tokens) * detail::tile_panels);
  }
  /// Calls f(), which takes memory from Eigen, for a sample of so many keys. False after a capacity error where that
  /// returns. Eigen itself throws, and without exceptions ends the program: so as much is asked for before.
  template <class F>
  bool with_memory_of_eigen(index_t sample, const F& f) const {
    bool is_there = false;
#ifdef GQA_NO_EXCEPTIONS
    detail::reporting_vector<double> asked;
    is_there =
        asked.reserve(static_cast<std::size_t>(2 * (sample + 2 * head_dim_ + 3 * detail::tile_tokens) * head_dim_));
    asked = {};
    if (is_there) f();
#else
    static_cast<void>(sample);
    try {
      f();
      is_there = true;
    } catch (const std::bad_alloc&) {  // told as a capacity error
    }
#endif
    if (!is_there) detail::raise(detail::make_room_fault(what));
    return is_there;
  }

  template <class KV>
  void find_directions(const KV& kv, index_t b, index_t g, const projection_options& options,
                       typename KV::panel_element* scratch) {
    head& to = heads_[static_cast<std::size_t>(b * kv_heads_ + g)];
    const index_t tokens = kv.length(b), wanted = (std::min)(options.sample, tokens);
    matrix sample(wanted, head_dim_);
    index_t count = 0, n = 0;  // of finite keys, and of those that have been looked at
    for_each_tile(kv, b, g, {0, tokens}, scratch, [&](index_t first, const matrix& keys) {
      for (index_t t; n < wanted && (t = n * tokens / wanted) < first + keys.rows(); ++n) {
        if (keys.row(t - first).allFinite()) sample.row(count++) = keys.row(t - first);
      }
    });
    to.find(sample.topRows(count), options.rank, options.residual);
  }

  template <class KV>
  void project(const KV& kv, index_t b, index_t g, typename KV::panel_element* scratch) {
    head& to = heads_[static_cast<std::size_t>(b * kv_heads_ + g)];
    const auto elements = static_cast<index_t>(panel_elements(to));
    const index_t rank = to.rank();
    static_cast<void>(to.panels.resize(panel_elements(to) * panels_of(kv.length(b))));
    // In both norms, for |y| + |w| is no less than |q|.
    const double rounding = detail::rounding_of(head_dim_, rank), mean_size = to.mean.norm();
    matrix coordinates, rest, along;
    for_each_tile(kv, b, g, {lengths_[static_cast<std::size_t>(b)], kv.length(b)}, scratch,
                  [&](index_t first, const matrix& keys) {
                    to.project(keys, coordinates, rest);
                    coordinates = coordinates.unaryExpr(
                        [](double x) { return static_cast<double>(static_cast<S>(static_cast<float>(x))); });
                    to.leave_out(coordinates, rest, along);
                    for (index_t t = 0; t < keys.rows(); ++t) {
                      const bool finite = keys.row(t).allFinite();
                      const double off = rounding * (keys.row(t).norm() + mean_size);
                      const double nothing = std::numeric_limits<double>::quiet_NaN();
                      S* const panel = to.panels.data() + (first + t) / detail::panel_tokens * elements;
                      const auto put = [&](index_t d, double x) {
                        panel[detail::key_index<S>((first + t) % detail::panel_tokens, d)] =
                            static_cast<S>(static_cast<float>(x));
                      };
                      for (index_t d = 0; d < rank; ++d) put(d, finite ? coordinates(t, d) : 0);
                      put(rank, finite ? rounded_up(rest.row(t).norm() + off) : nothing);
                      put(rank + 1, finite ? rounded_up(along.row(t).norm() + off) : nothing);
                    }
                  });
  }
  /// A number that is no less than x >= 0 once it is an S: relative errors of rounding to it are at most 2^-24, 2^-9.
  [[nodiscard]] static double rounded_up(double x) noexcept {
    return x * (1 + (std::is_same_v<S, float> ? 0x1p-22 : 0x1p-7)) +
           static_cast<double>((std::numeric_limits<float>::min)());
  }

  index_t batch_ = 0, kv_heads_ = 0, head_dim_ = 0;
  detail::reporting_vector<index_t> lengths_;  // [batch]
  detail::reporting_vector<head> heads_;       // [batch, kv_heads]
};

}  // namespace GQA_ISA
}  // namespace gqa
