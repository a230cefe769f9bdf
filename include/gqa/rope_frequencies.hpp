// SPDX-License-Identifier: Apache-2.0
/// \file
/// rope_frequencies: what rope (rope.hpp) turns pairs by, by each published rule, or by a list of your own.
///
/// Pair i of a row at position p turns by p f_i, and rotated elements grow by a magnitude m. With d rotated elements
/// and a base b, stretched by a factor s over a trained length L:
///     own       f_i = b^(-2 i / d), m = 1                                  (RoFormer, Su et al. 2021)
///     linear    f_i / s                                                    (position interpolation, Chen et al. 2023)
///     ntk       own, of the base b s^(d / (d - 2)): the lowest as linear, the highest as they are      (bloc97 2023)
///     dynamic   the same, s growing with the length n of the text: s n / L - (s - 1) for n > L         (emozilla 2023)
///     yarn      f_i / s for pairs of less than beta_slow turns within L, f_i for those of more than beta_fast, between
///               them a ramp; m = 0.1 ln s + 1                              (Peng et al. 2023, and its published code)
///     llama3    f_i / s for wavelengths above L / low, f_i for those below L / high, between them a ramp in
///               1 / wavelength                                             (the released code of Llama 3.1)
///     longrope  f_i / r_i, r one of two lists found by search, for texts up to L and for longer ones;
///               m = sqrt(1 + ln s / ln L)                                  (Ding et al. 2024, Phi-3's published code)
/// Each returns [d / 2] frequencies in radians a position.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <optional>
#include <span>
#include <vector>

#include <gqa/config.hpp>
#include <gqa/detail/base/check.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/error.hpp>

namespace gqa {

/// Frequencies [pairs], radians a position, and what rotated elements grow by.
struct rope_frequencies {
  std::vector<double> radians = {};
  double magnitude = 1;
};

struct yarn_options {
  double base = 10000;
  double factor = 1;                     ///< s, at least 1
  index_t trained_length = 0;            ///< L
  double beta_fast = 32, beta_slow = 1;  ///< turns within L
  /// Whether the ends of the ramp are rounded to whole pairs, as YaRN's own code does (gpt-oss: false).
  bool truncate = true;
  /// m = (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1). DeepSeek has the two alike, so that m is 1, and a
  /// factor on the softmax's scale instead: yarn_score_factor().
  double mscale = 1, mscale_all_dim = 0;
};

struct llama3_options {
  double base = 500000;
  double factor = 8;
  index_t trained_length = 8192;
  double low_factor = 1, high_factor = 4;  ///< parts of L
};

struct longrope_options {
  double base = 10000;
  std::span<const double> short_factors = {}, long_factors = {};  ///< r [pairs], of texts up to L and of longer ones
  index_t trained_length = 0;                                     ///< L, the original one
  double factor = 1;                                              ///< s, of the longest text over L
  /// m of the two, where the model has numbers of its own (Phi-3.5-MoE).
  std::optional<double> short_magnitude = {}, long_magnitude = {};
};

namespace detail {

/// What is common to all rules.
[[nodiscard]] inline fault find_frequencies_fault(index_t dims, double base, double factor) noexcept {
  if (dims < 2 || dims % 2 != 0)
    return make_fault(errc::option, "rope dims: expected an even number of at least 2, got %lld", printable(dims));
  if (!(base > 1 && std::isfinite(base)))
    return make_fault(errc::option, "rope base: expected a finite number above 1, got %g", base);
  if (!(factor >= 1 && std::isfinite(factor)))
    return make_fault(errc::option, "rope factor: expected a finite number of at least 1, got %g", factor);
  return {};
}
[[nodiscard]] inline fault find_trained_length_fault(index_t length) noexcept {
  if (length >= 1) return {};
  return make_fault(errc::option, "rope trained_length: expected 1 or more, got %lld", printable(length));
}
[[nodiscard]] inline fault find_order_fault(const char* names, double high, double low) noexcept {
  if (low > 0 && high > low && std::isfinite(high)) return {};
  return make_fault(errc::option, "rope %s: expected the first above the other above 0, got %g, %g", names, high, low);
}

/// f_i times what change(i, f_i) says.
template <class Change>
[[nodiscard]] rope_frequencies changed_frequencies(index_t dims, double base, const Change& change) {
  rope_frequencies made;
  if (!make_room(made.radians, static_cast<std::size_t>(dims / 2), "rope frequencies")) return made;
  for (index_t i = 0; i < dims / 2; ++i) {
    const double own = std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(dims));
    made.radians.push_back(own * change(static_cast<double>(i), own));
  }
  return made;
}

[[nodiscard]] inline double ntk_base(double base, double factor, index_t dims) noexcept {
  const auto d = static_cast<double>(dims);
  return dims > 2 ? base * std::pow(factor, d / (d - 2)) : base;
}

[[nodiscard]] inline double yarn_magnitude(double factor, double mscale) noexcept {
  return 0.1 * mscale * std::log(factor) + 1;
}

}  // namespace detail

/// \throws error  errc::option for dims that are odd or below 2, and for numbers out of their ranges; here and below
[[nodiscard]] inline rope_frequencies own_frequencies(index_t dims, double base = 10000) {
  if (const auto f = detail::find_frequencies_fault(dims, base, 1)) return detail::raise(f), rope_frequencies{};
  return detail::changed_frequencies(dims, base, [](double, double) { return 1.0; });
}

[[nodiscard]] inline rope_frequencies linear_frequencies(index_t dims, double base, double factor) {
  if (const auto f = detail::find_frequencies_fault(dims, base, factor)) return detail::raise(f), rope_frequencies{};
  return detail::changed_frequencies(dims, base, [factor](double, double) { return 1 / factor; });
}

[[nodiscard]] inline rope_frequencies ntk_frequencies(index_t dims, double base, double factor) {
  if (const auto f = detail::find_frequencies_fault(dims, base, factor)) return detail::raise(f), rope_frequencies{};
  return own_frequencies(dims, detail::ntk_base(base, factor, dims));
}

/// Of a text of `length` tokens; up to the trained length own frequencies.
[[nodiscard]] inline rope_frequencies dynamic_ntk_frequencies(index_t dims, double base, double factor,
                                                              index_t trained_length, index_t length) {
  if (const auto f = detail::find_frequencies_fault(dims, base, factor)) return detail::raise(f), rope_frequencies{};
  if (const auto f = detail::find_trained_length_fault(trained_length)) return detail::raise(f), rope_frequencies{};
  const double times = static_cast<double>((std::max)(length, trained_length)) / static_cast<double>(trained_length);
  return own_frequencies(dims, detail::ntk_base(base, factor * times - (factor - 1), dims));
}

[[nodiscard]] inline rope_frequencies yarn_frequencies(index_t dims, const yarn_options& o) {
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_frequencies_fault(dims, o.base, o.factor)) return f;
    if (const auto f = detail::find_trained_length_fault(o.trained_length)) return f;
    if (!(o.mscale >= 0 && o.mscale_all_dim >= 0 && std::isfinite(o.mscale) && std::isfinite(o.mscale_all_dim)))
      return detail::make_fault(errc::option, "rope mscale, mscale_all_dim: expected numbers of at least 0, got %g, %g",
                                o.mscale, o.mscale_all_dim);
    return detail::find_order_fault("beta_fast, beta_slow", o.beta_fast, o.beta_slow);
  };
  if (const auto f = find_fault()) return detail::raise(f), rope_frequencies{};
  const auto d = static_cast<double>(dims);
  // Where on the scale of pairs a pair lies that makes so many turns within the trained length.
  const auto pair_of = [&](double turns) {
    return d * std::log(static_cast<double>(o.trained_length) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(o.base));
  };
  double low = pair_of(o.beta_fast), high = pair_of(o.beta_slow);
  if (o.truncate) low = std::floor(low), high = std::ceil(high);
  low = (std::max)(low, 0.0), high = (std::min)(high, d - 1);
  rope_frequencies made = detail::changed_frequencies(dims, o.base, [&](double i, double) {
    const double kept = 1 - std::clamp((i - low) / (std::max)(high - low, 0.001), 0.0, 1.0);
    return kept + (1 - kept) / o.factor;
  });
  made.magnitude = detail::yarn_magnitude(o.factor, o.mscale) / detail::yarn_magnitude(o.factor, o.mscale_all_dim);
  return made;
}
/// What DeepSeek multiplies the softmax's scale by: (0.1 mscale_all_dim ln s + 1)^2. Into attention_options::scale,
/// times 1 / sqrt(head_dim).
[[nodiscard]] inline double yarn_score_factor(const yarn_options& o) noexcept {
  const double m = detail::yarn_magnitude(o.factor, o.mscale_all_dim);
  return m * m;
}

[[nodiscard]] inline rope_frequencies llama3_frequencies(index_t dims, const llama3_options& o) {
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_frequencies_fault(dims, o.base, o.factor)) return f;
    if (const auto f = detail::find_trained_length_fault(o.trained_length)) return f;
    return detail::find_order_fault("high_factor, low_factor", o.high_factor, o.low_factor);
  };
  if (const auto f = find_fault()) return detail::raise(f), rope_frequencies{};
  return detail::changed_frequencies(dims, o.base, [&](double, double own) {
    const double turns = static_cast<double>(o.trained_length) * own / (2 * std::numbers::pi);
    const double kept = std::clamp((turns - o.low_factor) / (o.high_factor - o.low_factor), 0.0, 1.0);
    return kept + (1 - kept) / o.factor;
  });
}

/// Of a text of `length` tokens. (All of a cache's keys have to be turned by one of the two lists: a text that grows
/// beyond L is turned anew.)
[[nodiscard]] inline rope_frequencies longrope_frequencies(index_t dims, const longrope_options& o, index_t length) {
  const bool is_long = length > o.trained_length;
  const std::span<const double> factors = is_long ? o.long_factors : o.short_factors;
  const auto find_fault = [&]() -> detail::fault {
    if (const auto f = detail::find_frequencies_fault(dims, o.base, o.factor)) return f;
    if (const auto f = detail::find_trained_length_fault(o.trained_length)) return f;
    if (static_cast<index_t>(factors.size()) != dims / 2)
      return detail::make_fault(errc::shape, "rope %s_factors: expected %lld entries, got %zu",
                                is_long ? "long" : "short", detail::printable(dims / 2), factors.size());
    for (const double x : factors) {
      if (!(x > 0 && std::isfinite(x)))
        return detail::make_fault(errc::option, "rope factors: expected finite numbers above 0, got %g", x);
    }
    return {};
  };
  if (const auto f = find_fault()) return detail::raise(f), rope_frequencies{};
  rope_frequencies made = detail::changed_frequencies(
      dims, o.base, [&](double i, double) { return 1 / factors[static_cast<std::size_t>(i)]; });
  const double rule = o.factor > 1 && o.trained_length > 1
                          ? std::sqrt(1 + std::log(o.factor) / std::log(static_cast<double>(o.trained_length)))
                          : 1;
  made.magnitude = (is_long ? o.long_magnitude : o.short_magnitude).value_or(rule);
  return made;
}

/// Which axis of its token's position each pair turns by, of sections of pairs: {16, 24, 24} of Qwen2-VL are 16 pairs
/// of time, 24 of height, 24 of width. For rope::turns_of_axes().
[[nodiscard]] inline std::vector<index_t> axes_of_sections(std::span<const index_t> sections) {
  std::vector<index_t> axes;
  for (std::size_t axis = 0; axis < sections.size(); ++axis) {
    if (sections[axis] < 0) {
      detail::raise(detail::make_fault(errc::option, "sections[%zu]: expected 0 pairs or more, got %lld", axis,
                                       detail::printable(sections[axis])));
      return {};
    }
    if (!detail::make_room(axes, axes.size() + static_cast<std::size_t>(sections[axis]), "axes of pairs")) return {};
    axes.insert(axes.end(), static_cast<std::size_t>(sections[axis]), static_cast<index_t>(axis));
  }
  return axes;
}

}  // namespace gqa
