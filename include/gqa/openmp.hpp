// SPDX-License-Identifier: Apache-2.0
/// \file
/// openmp_executor: a context's tasks on OpenMP threads. Compiled without OpenMP, it runs them on the calling thread.
#pragma once

#include <gqa/config.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gqa {

/// An executor (see context.hpp) over `#pragma omp parallel for`. Inside another parallel region OpenMP gives it one
/// thread unless nesting is on.
class openmp_executor {
 public:
  /// As many threads as OpenMP would use.
  openmp_executor() noexcept : openmp_executor(default_threads()) {}
  explicit openmp_executor(int threads) noexcept : threads_(threads < 1 ? 1 : threads) {}

  [[nodiscard]] index_t concurrency() const noexcept { return threads_; }

  template <class F>
  void run(index_t tasks, const F& f) const {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (index_t task = 0; task < tasks; ++task) f(task, index_t{omp_get_thread_num()});
#else
    for (index_t task = 0; task < tasks; ++task) f(task, index_t{0});
#endif
  }

 private:
  static int default_threads() noexcept {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
  }

  int threads_;
};

}  // namespace gqa
