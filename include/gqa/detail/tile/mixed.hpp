// SPDX-License-Identifier: Apache-2.0
/// \file
/// Tiles of kv_types<K, V>: keys of one type and values of another, each as it is in a cache of its own.
///
/// Memory is counted in bytes, panels begin at cache lines. Their products: kernel/mixed_kernel.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include <gqa/config.hpp>
#include <gqa/detail/tile/pack.hpp>
#include <gqa/detail/tile/q8.hpp>
#include <gqa/detail/tile/tile.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

template <class K, class V>
[[nodiscard]] const K* keys_in(const kv_types<K, V>* panel) noexcept {
  return reinterpret_cast<const K*>(panel);
}
template <class K, class V>
[[nodiscard]] const V* values_in(const kv_types<K, V>* panel) noexcept {
  return reinterpret_cast<const V*>(panel);
}

template <class T, class K, class V>
void pack_key_panel(const T* rows, index_t stride, panel_range tokens, index_t dim, kv_types<K, V>* panel) noexcept {
  pack_key_panel(rows, stride, tokens, dim, reinterpret_cast<K*>(panel));
}
template <class T, class K, class V>
[[nodiscard]] bool pack_value_panel(const T* rows, index_t stride, panel_range tokens, index_t dim,
                                    kv_types<K, V>* panel) noexcept {
  return pack_value_panel(rows, stride, tokens, dim, reinterpret_cast<V*>(panel));
}
template <class K, class V>
void keep_values(const kv_types<K, V>* panel, std::uint64_t bits, index_t columns, kv_types<K, V>* to) noexcept {
  keep_values(values_in(panel), bits, columns, reinterpret_cast<V*>(to));
}
template <class K, class V>
[[nodiscard]] auto key_at(const kv_types<K, V>* panel, index_t t, index_t d, index_t dim) noexcept {
  return key_at(keys_in(panel), t, d, dim);
}
template <class K, class V>
[[nodiscard]] auto value_at(const kv_types<K, V>* panel, index_t t, index_t e, index_t dim) noexcept {
  return value_at(values_in(panel), t, e, dim);
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
