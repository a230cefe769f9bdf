// SPDX-License-Identifier: Apache-2.0
// Threads of a bench.
#pragma once

#include <memory>

#include <gqa/context.hpp>

namespace gqa::bench {

// The calling thread, or a pool.
class workers {
 public:
  explicit workers(int threads) {
    if (threads > 1) pool_ = std::make_unique<Eigen::ThreadPool>(threads);
    context_ = pool_ ? std::make_unique<context>(*pool_) : std::make_unique<context>();
  }
  context& operator*() const { return *context_; }

 private:
  std::unique_ptr<Eigen::ThreadPool> pool_;
  std::unique_ptr<context> context_;
};

}  // namespace gqa::bench
