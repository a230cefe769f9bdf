// SPDX-License-Identifier: Apache-2.0
/// \file
/// context: who runs the tasks of a call, and the scratch memory they use. Owned by the caller; nothing is global.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include <gqa/config.hpp>
#include <gqa/detail/base/pool_executor.hpp>
#include <gqa/detail/base/task.hpp>
#include <gqa/error.hpp>

namespace gqa {

/// Anything that runs tasks: `concurrency()` is the number of workers, `run(tasks, f)` calls f(task, worker) for every
/// task in [0, tasks) and returns when all have run. Workers are numbered below concurrency(); no two running tasks
/// share a number. `f` is const, copyable, and takes integers.
template <class E>
concept executor = requires(E& e, const detail::task_ref& f) {
  { e.concurrency() } -> std::convertible_to<index_t>;
  e.run(index_t{1}, f);
};

namespace detail {

/// Memory aligned to a cache line that grows when more of it is wanted, losing its contents.
class growing_memory {
 public:
  growing_memory() noexcept = default;
  growing_memory(const growing_memory&) = delete;
  growing_memory& operator=(const growing_memory&) = delete;
  ~growing_memory() { ::operator delete(data_, alignment); }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// `bytes` at least; nullptr after a capacity error where exceptions are off.
  [[nodiscard]] std::byte* at_least(std::size_t bytes, const char* what) {
    if (bytes <= size_) return data_;
    // Sizes of that order wrap around in the allocator, on their way to a multiple of the alignment.
    constexpr auto most = static_cast<std::size_t>((std::numeric_limits<std::ptrdiff_t>::max)()) / 2;
    void* const grown = bytes > most ? nullptr : ::operator new(bytes, alignment, std::nothrow);
    if (grown == nullptr) {
      raise(make_fault(errc::capacity, "context: expected room for %zu bytes of %s, got none", bytes, what));
      return nullptr;
    }
    ::operator delete(data_, alignment);
    data_ = static_cast<std::byte*>(grown);
    size_ = bytes;
    return data_;
  }

 private:
  static constexpr std::align_val_t alignment{64};

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace detail

/// Executor, scratch memory and the last plan (how a call is divided into tasks) of a caller. Memory grows to what the
/// largest call needed and is reused, so a repeated call allocates nothing, and a call of the last one's shape is not
/// planned anew. One caller at a time; results do not depend on which context runs them.
class context {
 public:
  /// Everything runs on the calling thread.
  context() noexcept = default;

  /// Runs on the caller's pool, kept by reference, and the calling thread: NumThreads() workers in all. A call made
  /// from one of the pool's own workers does not deadlock.
  /// \throws error errc::capacity; where that returns, everything runs on the calling thread
  explicit context(Eigen::ThreadPoolInterface& pool) : pool_(new (std::nothrow) detail::pool_executor(pool)) {
    if (pool_ != nullptr && pool_->is_ready()) {
      bind(*pool_);
      return;
    }
    pool_.reset();
    detail::raise(detail::make_fault(errc::capacity, "context: expected memory for the state of a pool, got none"));
  }

  /// Runs on any executor, kept by reference.
  template <executor E>
  explicit context(E& e) {
    bind(e);
  }

  context(const context&) = delete;
  context& operator=(const context&) = delete;
  ~context() { forget_workers(); }

  /// Makes room for calls of up to `sequences` that need up to `bytes` of scratch, so that they allocate nothing. How
  /// many a call needs scratch_bytes() says after it; gqa::reserve() (attention.hpp) makes room by a call's shape.
  /// \throws error errc::shape for less than 0 sequences or more than 2^40, errc::capacity if the memory cannot be had;
  ///               what was there before stays
  void reserve(std::size_t bytes, index_t sequences = 64) {
    if (sequences < 0 || sequences > most_sequences)
      return detail::raise(detail::make_fault(errc::shape, "context: expected 0 to 2^40 sequences, got %lld",
                                              static_cast<long long>(sequences)));
    if (detail_plan(sequences) == nullptr || detail_families(sequences) == nullptr ||
        detail_batch(static_cast<std::size_t>((std::max)(sequences, index_t{1})) * detail_place_bytes) == nullptr)
      return;
    static_cast<void>(detail_scratch(bytes));
  }
  /// Bytes of scratch that the context has: those of the call that needed most, or what was reserved.
  [[nodiscard]] std::size_t scratch_bytes() const noexcept { return scratch_.size(); }

  /// Number of workers, at least 1.
  [[nodiscard]] index_t concurrency() const {
    return executor_ == nullptr ? 1 : std::max<index_t>(concurrency_(executor_), 1);
  }

  /// Calls f(task, worker) for every task in [0, tasks), in any order. An exception of a task reaches the caller after
  /// all others have run; without exceptions take_last_error() tells the caller of a task's error.
  template <class F>
  void for_each(index_t tasks, const F& f) {
    if (executor_ == nullptr || tasks <= 1) return for_each_serially(tasks, f);
#ifdef GQA_NO_EXCEPTIONS
    // Errors are noted by thread: one of a task becomes the caller's.
    std::atomic<errc> found{errc::ok};
    const auto watched = [&](index_t task, index_t worker) {
      const errc before = std::exchange(detail::last_error_of_thread(), errc::ok);
      f(task, worker);
      const errc own = std::exchange(detail::last_error_of_thread(), before);
      if (own != errc::ok) found = own;
    };
    run_(executor_, tasks, detail::task_ref::to(watched));
    if (found != errc::ok) detail::last_error_of_thread() = found;
#else
    std::exception_ptr first;
    std::mutex first_mutex;
    const auto guarded = [&](index_t task, index_t worker) {
      try {
        f(task, worker);
      } catch (...) {
        const std::lock_guard lock(first_mutex);
        if (!first) first = std::current_exception();
      }
    };
    run_(executor_, tasks, detail::task_ref::to(guarded));
    if (first) std::rethrow_exception(first);
#endif
  }

  /// The same on the calling thread, as worker 0, in ascending order.
  template <class F>
  static void for_each_serially(index_t tasks, const F& f) {
    for (index_t task = 0; task < tasks; ++task) f(task, index_t{0});
  }

  /// Internal: `bytes` of scratch aligned to a cache line, with the contents of no particular call; nullptr after a
  /// capacity error where exceptions are off.
  [[nodiscard]] std::byte* detail_scratch(std::size_t bytes) {
    return scratch_.at_least(bytes, "scratch");
  }

  /// Internal: a serial context for each worker, for calls made within tasks; their memory stays, too. Null like
  /// detail_scratch(). Not from tasks of this context; a task may ask the one that it got here.
  [[nodiscard]] context* detail_workers() {
    const index_t count = concurrency();
    if (count <= worker_count_) return workers_;
    // Not new context[]: of arrays even the form that does not throw may ask the one that does.
    void* const memory =
        ::operator new(static_cast<std::size_t>(count) * sizeof(context), worker_alignment, std::nothrow);
    if (memory == nullptr) {
      detail::raise(detail::make_fault(errc::capacity, "context: expected memory for %lld workers, got none",
                                       static_cast<long long>(count)));
      return nullptr;
    }
    forget_workers();
    workers_ = static_cast<context*>(memory), worker_count_ = count;
    for (index_t worker = 0; worker < count; ++worker) ::new (static_cast<void*>(workers_ + worker)) context;
    return workers_;
  }
  /// Internal: scratch, as detail_scratch(), that calls of this context leave alone.
  [[nodiscard]] std::byte* detail_scratch_aside(std::size_t bytes) {
    context* const workers = detail_workers();
    return workers == nullptr ? nullptr : workers[0].detail_scratch(bytes);
  }

  /// Internal: memory for a plan of so many sequences, zeros at first, then what the last call left there.
  [[nodiscard]] std::byte* detail_plan(index_t sequences) {
    const std::size_t bytes = detail_plan_bytes + static_cast<std::size_t>(sequences) * detail_sequence_bytes;
    const bool is_new = bytes > plan_.size();
    std::byte* const memory = plan_.at_least(bytes, "plan");
    if (is_new && memory != nullptr) std::memset(memory, 0, bytes);
    return memory;
  }
  /// Internal: memory for the families of so many sequences.
  [[nodiscard]] index_t* detail_families(index_t sequences) {
    const std::size_t bytes = (4 * static_cast<std::size_t>(sequences) + 1) * sizeof(index_t);
    return reinterpret_cast<index_t*>(families_.at_least(bytes, "families"));
  }
  /// Internal: `bytes` of what a call over a batch knows of each sequence; null like detail_scratch().
  [[nodiscard]] std::byte* detail_batch(std::size_t bytes) {
    return batch_.at_least(bytes, "a batch");
  }

  /// Internal: while this is there calls make room for what they need, and then return.
  class detail_dry_run {
   public:
    explicit detail_dry_run(context& ctx) noexcept : ctx_(ctx), before_(std::exchange(ctx.is_dry_, true)) {}
    ~detail_dry_run() { ctx_.is_dry_ = before_; }
    detail_dry_run(const detail_dry_run&) = delete;
    detail_dry_run& operator=(const detail_dry_run&) = delete;

   private:
    context& ctx_;
    bool before_;
  };
  [[nodiscard]] bool detail_is_dry() const noexcept {
    return is_dry_;
  }
  static constexpr std::size_t detail_place_bytes = 24;  // of a sequence of a batch with masks or positions
  static constexpr std::size_t detail_plan_bytes = 256, detail_sequence_bytes = 160;

 private:
  static constexpr std::align_val_t worker_alignment{64};
  static constexpr index_t most_sequences = index_t{1} << 40;  // so that no product of sizes overflows

  void forget_workers() noexcept {
    std::destroy_n(workers_, worker_count_);
    ::operator delete(static_cast<void*>(workers_), worker_alignment);
  }

  template <class E>
  void bind(E& e) noexcept {
    executor_ = const_cast<void*>(static_cast<const void*>(std::addressof(e)));  // cast back to E, const or not
    concurrency_ = [](void* self) { return static_cast<index_t>(static_cast<E*>(self)->concurrency()); };
    run_ = [](void* self, index_t tasks, const detail::task_ref& task) { static_cast<E*>(self)->run(tasks, task); };
  }

  std::unique_ptr<detail::pool_executor> pool_;
  void* executor_ = nullptr;
  index_t (*concurrency_)(void*) = nullptr;
  void (*run_)(void*, index_t, const detail::task_ref&) = nullptr;
  detail::growing_memory scratch_, plan_, families_, batch_;
  context* workers_ = nullptr;  // [worker_count_]
  index_t worker_count_ = 0;
  bool is_dry_ = false;
};

}  // namespace gqa
