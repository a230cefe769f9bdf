// SPDX-License-Identifier: Apache-2.0
/// \file
/// Runs tasks on an Eigen thread pool together with the calling thread.
///
/// The caller takes tasks too and never waits for a helper that has not started. So a call made from one of the pool's
/// own workers finishes even when every other worker is busy or waiting in a call of its own: it just does all the
/// work. A helper that starts too late finds no job and leaves; it may outlive the executor, hence the counted state.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <new>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <gqa/config.hpp>
#include <gqa/detail/base/reporting_vector.hpp>
#include <gqa/detail/base/task.hpp>

namespace gqa::detail {

class pool_executor {
 public:
  explicit pool_executor(Eigen::ThreadPoolInterface& pool) noexcept : pool_(pool), state_(new (std::nothrow) state) {
    const index_t helpers = (std::max)(pool.NumThreads(), 1) - 1;
    if (state_ == nullptr || !state_->free_workers.reserve(static_cast<std::size_t>(helpers))) return;
    for (index_t worker = helpers; worker >= 1; --worker) static_cast<void>(state_->free_workers.push_back(worker));
    concurrency_ = helpers + 1;
  }
  pool_executor(const pool_executor&) = delete;
  pool_executor& operator=(const pool_executor&) = delete;
  ~pool_executor() {
    if (state_ != nullptr) release(state_);
  }

  /// Whether there was memory for it; else it can run nothing.
  [[nodiscard]] bool is_ready() const noexcept { return concurrency_ > 0; }

  [[nodiscard]] index_t concurrency() const noexcept { return concurrency_; }

  /// Returns when all tasks have run. The caller is worker 0.
  void run(index_t tasks, const task_ref& task) {
    state& s = *state_;
    index_t missing = 0;  // helpers to ask for; late ones of an earlier job count
    {
      const std::lock_guard lock(s.mutex);
      s.job = &task;
      s.tasks = tasks;
      s.next.store(0, std::memory_order_relaxed);
      missing = std::max<index_t>((std::min)(concurrency_, tasks) - 1 - s.queued, 0);
      s.queued += missing;
      s.references += missing;
    }
    finisher finish{s, missing};
    // The closure is one pointer: std::function keeps it in place, so scheduling does not allocate.
    for (; finish.unscheduled > 0; --finish.unscheduled) pool_.Schedule([shared = state_] { help(shared); });
    s.drain(task, 0);
  }

 private:
  struct state {
    std::mutex mutex;
    std::condition_variable idle;
    const task_ref* job = nullptr;
    index_t tasks = 0;
    std::atomic<index_t> next{0};
    index_t active = 0;      // helpers running tasks of `job`
    index_t queued = 0;      // helpers scheduled and not yet started
    index_t references = 1;  // the executor and every scheduled helper
    reporting_vector<index_t> free_workers;

    void drain(const task_ref& task, index_t worker) {
      for (index_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(i, worker);
    }
  };

  /// Ends a job, also when the pool or a task has thrown: nobody may see it any more.
  struct finisher {
    state& s;
    index_t unscheduled;  // helpers counted and not handed to the pool

    ~finisher() {
      std::unique_lock lock(s.mutex);
      s.job = nullptr;
      s.queued -= unscheduled;
      s.references -= unscheduled;
      s.idle.wait(lock, [this] { return s.active == 0; });
    }
  };

  static void help(state* s) {
    {
      std::unique_lock lock(s->mutex);
      --s->queued;
      if (s->job != nullptr && !s->free_workers.empty()) {
        const task_ref& task = *s->job;
        const index_t worker = s->free_workers.back();
        s->free_workers.pop_back();
        ++s->active;
        lock.unlock();
        s->drain(task, worker);
        lock.lock();
        static_cast<void>(s->free_workers.push_back(worker));  // which was there before
        if (--s->active == 0) s->idle.notify_one();
      }
    }
    release(s);
  }

  static void release(state* s) {
    bool last = false;
    {
      const std::lock_guard lock(s->mutex);
      last = --s->references == 0;
    }
    if (last) delete s;
  }

  Eigen::ThreadPoolInterface& pool_;
  state* state_;
  index_t concurrency_ = 0;
};

}  // namespace gqa::detail
