// SPDX-License-Identifier: Apache-2.0
// Group-wise attention as its definitions say it, in double, one row at a time; nothing of it is the library's.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <gqa/groupwise_options.hpp>

namespace gqa::test {

using row = std::vector<double>;

inline double dot(const row& x, const row& y) {
  double sum = 0;
  for (std::size_t d = 0; d < x.size(); ++d) sum += x[d] * y[d];
  return sum;
}
inline double log_sum_exp(const row& scores) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double s : scores) top = std::max(top, s);
  if (top == -std::numeric_limits<double>::infinity()) return top;
  for (const double s : scores) sum += std::exp(s - top);
  return top + std::log(sum);
}

// A row's attention weights [T], and the log-sum-exp that it claims.
struct weights {
  row of;
  double lse;
};

struct naive_groupwise {
  std::vector<row> keys;  // [T, D]
  double scale;
  double slope = 0;     // ALiBi's
  double position = 0;  // of the query for which scores, its own and its representative's, are asked

  row scores(const row& q) const {
    row s;
    for (const row& k : keys) s.push_back(scale * dot(q, k) + slope * (static_cast<double>(s.size()) - position));
    return s;
  }
  // Of the terms that a score of q is summed from, at most.
  double magnitude(const row& q) const {
    double most = 0;
    for (std::size_t t = 0; t < keys.size(); ++t) {
      double sum = 0;
      for (std::size_t d = 0; d < q.size(); ++d) sum += std::abs(q[d] * keys[t][d]);
      most = std::max(most, scale * sum + std::abs(slope * (static_cast<double>(t) - position)));
    }
    return most;
  }
  weights exact(const row& q) const {
    const row s = scores(q);
    const double lse = log_sum_exp(s);
    row a;
    for (const double x : s) a.push_back(std::exp(x - lse));
    return {a, lse};
  }
  // The k keys of the highest scores of c, of equal ones the lowest.
  std::vector<bool> top(const row& c, std::size_t k) const {
    const row s = scores(c);
    std::vector<std::size_t> order(s.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t i, std::size_t j) { return s[i] != s[j] ? s[i] > s[j] : i < j; });
    std::vector<bool> is_top(s.size());
    for (std::size_t n = 0; n < std::min(k, order.size()); ++n) is_top[order[n]] = true;
    return is_top;
  }
  static row where(const row& x, const std::vector<bool>& taken, bool as) {
    row some;
    for (std::size_t t = 0; t < x.size(); ++t) {
      if (taken[t] == as) some.push_back(x[t]);
    }
    return some;
  }
  // The log-sum-exp of the other keys that improved_lse gives member q of representative c.
  double corrected_rest(const row& q, const row& c, const std::vector<bool>& is_top) const {
    const row of_c = scores(c);
    const double rest = log_sum_exp(where(of_c, is_top, false));
    row mean(q.size());
    for (std::size_t t = 0; t < keys.size(); ++t) {
      for (std::size_t d = 0; d < q.size() && !is_top[t]; ++d) mean[d] += std::exp(of_c[t] - rest) * keys[t][d];
    }
    double shift = 0;
    for (std::size_t d = 0; d < q.size(); ++d) shift += scale * (q[d] - c[d]) * mean[d];
    return rest == -std::numeric_limits<double>::infinity() ? rest : rest + shift;
  }

  // The weights that member q of the group of representative c is given.
  weights shared(const row& q, const row& c, groupwise_form form, std::size_t k) const {
    if (form == groupwise_form::dense) return exact(q);
    const weights of_c = exact(c);
    if (form == groupwise_form::clustered) return of_c;
    const std::vector<bool> is_top = top(c, k);
    const row s = scores(q), s_c = scores(c);
    const double top_lse = log_sum_exp(where(s, is_top, true)), rest_of_c = log_sum_exp(where(s_c, is_top, false));
    if (form == groupwise_form::improved) {
      const double mass = std::exp(log_sum_exp(where(s_c, is_top, true)) - of_c.lse);
      weights w = of_c;
      for (std::size_t t = 0; t < s.size(); ++t) {
        if (is_top[t]) w.of[t] = mass * std::exp(s[t] - top_lse);
      }
      return w;
    }
    const double rest = corrected_rest(q, c, is_top);
    const double lse = log_sum_exp({top_lse, rest});
    row w;
    for (std::size_t t = 0; t < s.size(); ++t)
      w.push_back(is_top[t] ? std::exp(s[t] - lse) : std::exp(s_c[t] - rest_of_c + rest - lse));
    return {w, lse};
  }
};

inline double l1(const row& x, const row& y) {
  double sum = 0;
  for (std::size_t t = 0; t < x.size(); ++t) sum += std::abs(x[t] - y[t]);
  return sum;
}

}  // namespace gqa::test
