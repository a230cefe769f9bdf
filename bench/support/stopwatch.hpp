// SPDX-License-Identifier: Apache-2.0
// Times on a shared machine: medians of interleaved runs.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <numeric>
#include <vector>

namespace gqa::bench {

template <class F>
double seconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A growing set of measurements.
class samples {
 public:
  void add(double x) { values_.push_back(x); }
  [[nodiscard]] bool empty() const { return values_.empty(); }
  [[nodiscard]] std::size_t size() const { return values_.size(); }
  [[nodiscard]] double sum() const { return std::accumulate(values_.begin(), values_.end(), 0.0); }
  [[nodiscard]] double median() const {
    std::vector<double> sorted = values_;
    const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    return *middle;
  }

 private:
  std::vector<double> values_;
};

}  // namespace gqa::bench
