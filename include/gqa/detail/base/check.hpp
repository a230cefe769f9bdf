// SPDX-License-Identifier: Apache-2.0
/// \file
/// The checks of the doors: every argument, before anything is written. Not templates over element types, no heap.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <type_traits>

#include <gqa/config.hpp>
#include <gqa/error.hpp>
#include <gqa/options.hpp>
#include <gqa/tensor_view.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// Positions and offsets stay within this, so that their sums and differences do not overflow.
inline constexpr index_t position_limit = index_t{1} << 60;

/// The same view with stride 0 along axes of one index: such a stride may be anything, and means nothing.
template <class T>
[[nodiscard]] tensor_view<T, 4> without_idle_strides(const tensor_view<T, 4>& v) noexcept {
  const auto stride = [&v](int axis) { return v.extent(axis) <= 1 ? 0 : v.stride(axis); };
  return {v.data(), {v.extent(0), v.extent(1), v.extent(2), v.extent(3)}, {stride(0), stride(1), stride(2), stride(3)}};
}

/// Whether a token's heads are nearer to each other than a head's tokens.
template <class T>
[[nodiscard]] bool heads_lie_together(const tensor_view<T, 4>& rows) noexcept {
  return std::abs(rows.stride(2)) < std::abs(rows.stride(1)) && rows.extent(2) > 1;
}

/// An operand of up to 4 axes as the checks see it; axes that it has not come first, of extent 1.
struct operand {
  const char* name;
  const void* data;
  std::array<index_t, 4> extents;
  std::array<index_t, 4> strides;  // in elements
  index_t element_size;
  int rank = 4;

  /// The axis as the caller counts it.
  [[nodiscard]] int own_axis(std::size_t axis) const noexcept { return static_cast<int>(axis) - (4 - rank); }

  [[nodiscard]] bool is_empty() const noexcept {
    for (const index_t extent : extents) {
      if (extent == 0) return true;
    }
    return false;
  }
};

/// Strides of axes with a single index count as 0: they are never stepped over, and may be anything.
template <class T, int Rank>
[[nodiscard]] operand describe(const char* name, const tensor_view<T, Rank>& v) noexcept {
  static_assert(Rank <= 4);
  operand o{name, v.data(), {1, 1, 1, 1}, {}, static_cast<index_t>(sizeof(T)), Rank};
  for (int axis = 0; axis < Rank; ++axis) {
    const std::size_t at = std::size_t{4 - Rank} + static_cast<std::size_t>(axis);
    o.extents[at] = v.extent(axis);
    o.strides[at] = v.extent(axis) <= 1 ? 0 : v.stride(axis);
  }
  return o;
}

/// A span, as a row.
template <class T>
[[nodiscard]] operand describe(const char* name, std::span<const T> x) noexcept {
  const auto size = static_cast<index_t>(x.size());
  return {name, x.data(), {1, 1, 1, size}, {0, 0, 0, 1}, static_cast<index_t>(sizeof(T)), 1};
}

[[nodiscard]] inline long long printable(index_t n) noexcept {
  return static_cast<long long>(n);
}

/// Extents that are not negative, memory that is there, offsets that fit 64 bits.
[[nodiscard]] GQA_ONCE inline fault find_extents_fault(const operand& o) noexcept {
  constexpr index_t limit = position_limit / 16;  // in elements of at most 8 bytes
  index_t reach = 0, size = 1;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    const index_t extent = o.extents[axis], stride = o.strides[axis];
    if (extent < 0)
      return make_fault(errc::shape, "%s: expected extents >= 0, got %lld on axis %d", o.name, printable(extent),
                        o.own_axis(axis));
    if (extent > limit || (size != 0 && extent > limit / size))
      return make_fault(errc::shape, "%s: expected at most 2^56 elements, got more", o.name);
    size *= extent;
    if (extent <= 1) continue;
    if (stride > limit / extent || stride < -(limit / extent) || (reach += std::abs(stride) * (extent - 1)) > limit)
      return make_fault(errc::stride, "%s: expected offsets within 2^56 elements, got stride %lld on axis %d", o.name,
                        printable(stride), o.own_axis(axis));
  }
  if (size > 0 && o.data == nullptr) return make_fault(errc::shape, "%s: expected data, got a null pointer", o.name);
  return {};
}

/// The same, and a contiguous last axis.
[[nodiscard]] GQA_ONCE inline fault find_layout_fault(const operand& o) noexcept {
  if (const auto f = find_extents_fault(o)) return f;
  if (o.extents[3] > 1 && o.strides[3] != 1)
    return make_fault(errc::stride, "%s: expected stride 1 on the last axis, got %lld", o.name,
                      printable(o.strides[3]));
  return {};
}

/// A view's memory as runs of `length` contiguous elements whose starts are `base` plus multiples of the strides left.
struct memory_runs {
  std::intptr_t begin, end;                // all of it, in bytes
  std::intptr_t run;                       // bytes of a run
  std::array<std::intptr_t, 4> strides{};  // bytes between runs, of axes with more than one index
  int axes = 0;

  explicit memory_runs(const operand& o) noexcept
      : begin(reinterpret_cast<std::intptr_t>(o.data)), end(begin + o.element_size), run(o.element_size) {
    std::array<bool, 4> used{};
    for (bool grown = true; grown;) {  // swallow each axis that continues the run
      grown = false;
      for (std::size_t axis = 0; axis < 4; ++axis) {
        if (used[axis] || o.extents[axis] <= 1) continue;
        if (o.strides[axis] * o.element_size != run) continue;
        run *= o.extents[axis];
        used[axis] = grown = true;
      }
    }
    for (std::size_t axis = 0; axis < 4; ++axis) {
      const std::intptr_t stride = o.strides[axis] * o.element_size;
      if (o.extents[axis] > 1) (stride < 0 ? begin : end) += stride * (o.extents[axis] - 1);
      if (!used[axis] && o.extents[axis] > 1) strides[static_cast<std::size_t>(axes++)] = stride;
    }
  }
};

/// True only if the two views certainly share no byte: apart in memory, or interleaved with a common period (as the
/// slices of one fused projection are).
[[nodiscard]] GQA_ONCE inline bool are_disjoint(const operand& a, const operand& b) noexcept {
  if (a.is_empty() || b.is_empty()) return true;
  const memory_runs x(a), y(b);
  if (x.end <= y.begin || y.end <= x.begin) return true;
  std::intptr_t period = 0;
  for (const memory_runs* m : {&x, &y}) {
    for (int i = 0; i < m->axes; ++i) period = std::gcd(period, m->strides[static_cast<std::size_t>(i)]);
  }
  if (period == 0) return false;
  const auto origin = [](const operand& o) { return reinterpret_cast<std::intptr_t>(o.data); };
  const std::intptr_t shift = ((origin(b) - origin(a)) % period + period) % period;  // of b's runs behind a's
  return x.run <= shift && shift + y.run <= period;
}

/// True only if no two indices of the view certainly meet: sorted by stride, each axis steps over all smaller ones.
[[nodiscard]] GQA_ONCE inline bool is_injective(const operand& o) noexcept {
  if (o.is_empty()) return true;
  std::array<bool, 4> used{};
  index_t span = 1;  // elements covered by the axes so far
  for (int step = 0; step < 4; ++step) {
    std::size_t next = 4;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      if (used[axis] || o.extents[axis] <= 1) continue;
      if (next == 4 || std::abs(o.strides[axis]) < std::abs(o.strides[next])) next = axis;
    }
    if (next == 4) return true;
    if (std::abs(o.strides[next]) < span) return false;
    span += std::abs(o.strides[next]) * (o.extents[next] - 1);
    used[next] = true;
  }
  return true;
}

/// What is written: memory that is there, and no two of its elements at one place; any strides.
[[nodiscard]] GQA_ONCE inline fault find_written_fault(const operand& out) noexcept {
  if (const auto f = find_extents_fault(out)) return f;
  if (!is_injective(out))
    return make_fault(errc::stride, "%s: expected elements apart, got overlapping strides", out.name);
  return {};
}
/// An output: the same, and a contiguous last axis.
[[nodiscard]] inline fault find_output_fault(const operand& out) noexcept {
  if (const auto f = find_layout_fault(out)) return f;
  return find_written_fault(out);
}

[[nodiscard]] inline fault find_extent_fault(const operand& o, int axis, index_t expected, const char* why) noexcept {
  const index_t actual = o.extents[static_cast<std::size_t>(axis)];
  if (actual == expected) return {};
  return make_fault(errc::shape, "%s: expected extent %lld (%s) on axis %d, got %lld", o.name, printable(expected), why,
                    axis, printable(actual));
}

/// The log-sum-exp of a state, or another number a row: [B, S, H] of out's.
[[nodiscard]] inline fault find_lse_fault(const operand& lse, const operand& out) noexcept {
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (lse.extents[axis + 1] != out.extents[axis])
      return make_fault(errc::shape, "%s: expected lse extent %lld (that of out) on axis %zu, got %lld", lse.name,
                        printable(out.extents[axis]), axis, printable(lse.extents[axis + 1]));
  }
  return {};
}
/// The same, and memory that is there; any strides.
template <class L, class T>
[[nodiscard]] fault find_lse_fault(const char* name, const tensor_view<L, 3>& lse,
                                   const tensor_view<T, 4>& out) noexcept {
  const operand o = describe(name, lse);
  if (const auto f = find_lse_fault(o, describe("out", out))) return f;
  return std::is_const_v<L> ? find_extents_fault(o) : find_written_fault(o);
}

/// Extents of a call, once its operands fit together.
struct call_shape {
  index_t batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim;
};

/// q [B, S, H, D] against the keys' and values' extents, and out [B, S, H, E] against both.
[[nodiscard]] GQA_ONCE inline fault find_shape_fault(const operand& q, const operand& out,
                                                     const call_shape& kv) noexcept {
  if (const auto f = find_layout_fault(q)) return f;
  if (const auto f = find_output_fault(out)) return f;
  if (const auto f = find_extent_fault(q, 0, kv.batch, "the batch of the keys")) return f;
  if (const auto f = find_extent_fault(q, 3, kv.head_dim, "the head dim of the keys")) return f;
  if (const auto f = find_extent_fault(out, 0, q.extents[0], "the batch of q")) return f;
  if (const auto f = find_extent_fault(out, 1, q.extents[1], "the length of q")) return f;
  if (const auto f = find_extent_fault(out, 2, q.extents[2], "the heads of q")) return f;
  if (const auto f = find_extent_fault(out, 3, kv.value_dim, "the value dim")) return f;
  if (kv.head_dim < 1 || kv.value_dim < 1)
    return make_fault(errc::shape, "k, v: expected head dims >= 1, got %lld and %lld", printable(kv.head_dim),
                      printable(kv.value_dim));
  if (kv.kv_heads < 1 || q.extents[2] < 1)
    return make_fault(errc::shape, "q, k: expected heads >= 1, got %lld and %lld", printable(q.extents[2]),
                      printable(kv.kv_heads));
  return {};
}

/// k [B, T, G, D] and v [B, T, G, E] against each other.
[[nodiscard]] GQA_ONCE inline fault find_kv_fault(const operand& k, const operand& v) noexcept {
  if (const auto f = find_layout_fault(k)) return f;
  if (const auto f = find_layout_fault(v)) return f;
  if (const auto f = find_extent_fault(v, 0, k.extents[0], "the batch of k")) return f;
  if (const auto f = find_extent_fault(v, 1, k.extents[1], "the length of k")) return f;
  return find_extent_fault(v, 2, k.extents[2], "the heads of k");
}

/// Rows of tokens that a cache takes: k [sequences, t, G, D] and v [sequences, t, G, E].
[[nodiscard]] GQA_ONCE inline fault find_token_rows_fault(const operand& k, const operand& v, index_t sequences,
                                                          index_t kv_heads, index_t head_dim,
                                                          index_t value_dim) noexcept {
  if (const auto f = find_kv_fault(k, v)) return f;
  if (const auto f = find_extent_fault(k, 0, sequences, "the sequences written to")) return f;
  if (const auto f = find_extent_fault(k, 2, kv_heads, "the cache's heads")) return f;
  if (const auto f = find_extent_fault(k, 3, head_dim, "the cache's head dim")) return f;
  return find_extent_fault(v, 3, value_dim, "the cache's value dim");
}

/// An extent of something to be made.
[[nodiscard]] inline fault find_least_fault(const char* what, const char* name, index_t least,
                                            index_t actual) noexcept {
  if (actual >= least) return {};
  return make_fault(errc::shape, "%s: expected %s >= %lld, got %lld", what, name, printable(least), printable(actual));
}

template <class T>
[[nodiscard]] fault find_count_fault(const char* name, std::span<T> values, index_t expected) noexcept {
  if (values.empty() || values.size() == static_cast<std::size_t>(expected)) return {};
  return make_fault(errc::shape, "%s: expected %lld entries, got %zu", name, printable(expected), values.size());
}

/// Offsets of parts of a whole: 0 first, the whole last.
[[nodiscard]] GQA_ONCE inline fault find_offsets_fault(const char* name, std::span<const index_t> offsets,
                                                       index_t whole) noexcept {
  index_t before = 0;
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    const bool last = i + 1 == offsets.size();
    if (offsets[i] < before || offsets[i] > whole || (i == 0 && offsets[i] != 0) || (last && offsets[i] != whole))
      return make_fault(errc::range, "%s[%zu]: expected 0 ascending to %lld, got %lld", name, i, printable(whole),
                        printable(offsets[i]));
    before = offsets[i];
  }
  return {};
}

[[nodiscard]] GQA_ONCE inline fault find_groups_fault(std::span<const index_t> offsets, index_t q_heads,
                                                      index_t kv_heads) noexcept {
  if (offsets.empty()) {
    if (q_heads % kv_heads == 0) return {};
    return make_fault(errc::shape, "q: expected a multiple of %lld heads (those of k), got %lld", printable(kv_heads),
                      printable(q_heads));
  }
  if (const auto f = find_count_fault("options.group_offsets", offsets, kv_heads + 1)) return f;
  return find_offsets_fault("options.group_offsets", offsets, q_heads);
}

/// A mask or bias: [B|1, H|1, S, T], any strides.
template <class T>
[[nodiscard]] GQA_ONCE fault find_mask_fault(const char* name, const std::optional<tensor_view<const T, 4>>& mask,
                                             const call_shape& shape) noexcept {
  if (!mask) return {};
  const operand o = describe(name, *mask);
  if (const auto f = find_extents_fault(o)) return f;
  if (o.extents[0] != 1) {
    if (const auto f = find_extent_fault(o, 0, shape.batch, "the batch, or 1")) return f;
  }
  if (o.extents[1] != 1) {
    if (const auto f = find_extent_fault(o, 1, shape.q_heads, "the query heads, or 1")) return f;
  }
  if (const auto f = find_extent_fault(o, 2, shape.q_len, "the query length")) return f;
  return find_extent_fault(o, 3, shape.kv_len, "the key length");
}

[[nodiscard]] inline fault find_position_fault(const char* name, std::size_t i, index_t position) noexcept {
  if (position >= -position_limit && position <= position_limit) return {};
  return make_fault(errc::range, "%s[%zu]: expected a position within 2^60, got %lld", name, i, printable(position));
}

/// Valid keys that the n-th sequence is said to have, against those that there are.
[[nodiscard]] inline fault find_kv_length_fault(const char* name, index_t n, index_t said, index_t there) noexcept {
  if (said <= there) return {};
  return make_fault(errc::length, "%s[%lld]: expected at most %lld, got %lld", name, printable(n), printable(there),
                    printable(said));
}

/// Every option against the call's extents.
[[nodiscard]] GQA_ONCE inline fault find_options_fault(const attention_options& o, const call_shape& shape) noexcept {
  if (o.scale && !std::isfinite(*o.scale))
    return make_fault(errc::option, "options.scale: expected a finite number, got %g", *o.scale);
  if (o.softcap != 0 && !(o.softcap >= 1e-30 && o.softcap <= 1e30))  // within float, as is its inverse
    return make_fault(errc::option, "options.softcap: expected 0 or a number within [1e-30, 1e30], got %g", o.softcap);
  if (o.window.left < -1 || o.window.right < -1)
    return make_fault(errc::option, "options.window: expected distances >= 0, or -1, got {%lld, %lld}",
                      printable(o.window.left), printable(o.window.right));
  if (o.query_offset && !o.query_offsets.empty())
    return make_fault(errc::option, "options: expected query_offset or query_offsets, got both");
  if (o.query_offset) {
    if (const auto f = find_position_fault("options.query_offset", 0, *o.query_offset)) return f;
  }
  if (const auto f = find_count_fault("options.query_offsets", o.query_offsets, shape.batch)) return f;
  for (std::size_t b = 0; b < o.query_offsets.size(); ++b) {
    if (const auto f = find_position_fault("options.query_offsets", b, o.query_offsets[b])) return f;
  }
  if (const auto f = find_count_fault("options.alibi_slopes", o.alibi_slopes, shape.q_heads)) return f;
  if (const auto f = find_count_fault("options.sinks", o.sinks, shape.q_heads)) return f;
  for (std::size_t h = 0; h < o.alibi_slopes.size(); ++h) {
    if (!std::isfinite(o.alibi_slopes[h]))
      return make_fault(errc::option, "options.alibi_slopes[%zu]: expected a finite number, got %g", h,
                        static_cast<double>(o.alibi_slopes[h]));
  }
  for (std::size_t h = 0; h < o.sinks.size(); ++h) {
    if (!(o.sinks[h] < std::numeric_limits<float>::infinity()))
      return make_fault(errc::option, "options.sinks[%zu]: expected a finite number or -inf, got %g", h,
                        static_cast<double>(o.sinks[h]));
  }
  if (const auto f = find_count_fault("options.kv_lengths", o.kv_lengths, shape.batch)) return f;
  for (std::size_t b = 0; b < o.kv_lengths.size(); ++b) {
    if (o.kv_lengths[b] < 0 || o.kv_lengths[b] > shape.kv_len)
      return make_fault(errc::length, "options.kv_lengths[%zu]: expected 0 to %lld (the keys there are), got %lld", b,
                        printable(shape.kv_len), printable(o.kv_lengths[b]));
  }
  if (const auto f = find_groups_fault(o.group_offsets, shape.q_heads, shape.kv_heads)) return f;
  if (const auto f = find_mask_fault("options.mask", o.mask, shape)) return f;
  return find_mask_fault("options.bias", o.bias, shape);
}

/// Calls find(operand) for all memory that the options name, and returns the first fault that it finds.
template <class Find>
[[nodiscard]] fault find_in_options(const attention_options& o, const Find& find) noexcept {
  if (o.mask) {
    if (const auto f = find(describe("options.mask", *o.mask))) return f;
  }
  if (o.bias) {
    if (const auto f = find(describe("options.bias", *o.bias))) return f;
  }
  for (const operand& x :
       {describe("options.query_offsets", o.query_offsets), describe("options.alibi_slopes", o.alibi_slopes),
        describe("options.sinks", o.sinks), describe("options.kv_lengths", o.kv_lengths),
        describe("options.group_offsets", o.group_offsets)}) {
    if (const auto f = find(x)) return f;
  }
  return {};
}

/// Two names for one tensor.
[[nodiscard]] inline bool is_same_memory(const operand& a, const operand& b) noexcept {
  return a.data == b.data && a.extents == b.extents && a.strides == b.strides && a.element_size == b.element_size;
}

[[nodiscard]] GQA_ONCE inline fault find_overlap_fault(const operand& out, const operand& input) noexcept {
  if (are_disjoint(out, input)) return {};
  return make_fault(errc::stride, "%s: expected memory apart from %s, got an overlap", out.name, input.name);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
