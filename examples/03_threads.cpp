// SPDX-License-Identifier: Apache-2.0
// The calling thread, an Eigen pool, OpenMP, an executor of your own: the same bits.
#include <gqa/gqa.hpp>

#include <atomic>
#include <thread>

#include "check.hpp"

// Anything with concurrency() and run() is an executor.
struct three_threads {
  gqa::index_t concurrency() const { return 3; }
  template <class F>
  void run(gqa::index_t tasks, const F& f) const {
    std::atomic<gqa::index_t> next{0};
    const auto work = [&](gqa::index_t worker) {
      for (gqa::index_t task; (task = next++) < tasks;) f(task, worker);
    };
    std::thread a(work, 1), b(work, 2);
    work(0);
    a.join(), b.join();
  }
};

int main() {
  using tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;  // batch, position, head, dim
  tensor q(1, 300, 8, 64), k(1, 300, 2, 64), v(1, 300, 2, 64), one(1, 300, 8, 64), other(1, 300, 8, 64);
  q.setRandom(), k.setRandom(), v.setRandom();

  gqa::attention(q, k, v, one, {.causal = true});  // the calling thread

  Eigen::ThreadPool pool(4);
  gqa::openmp_executor openmp;
  three_threads own;
  gqa::context on_pool(pool), on_openmp(openmp), on_own(own);
  for (gqa::context* ctx : {&on_pool, &on_openmp, &on_own}) {
    other.setZero();
    gqa::attention(q, k, v, other, {.causal = true}, *ctx);
    if (!example::same_bits(one.data(), other.data(), one.size())) return 1;
  }
  return example::ended(0);
}
