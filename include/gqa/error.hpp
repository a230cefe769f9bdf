// SPDX-License-Identifier: Apache-2.0
/// \file
/// What goes wrong at a door, and how the caller hears of it.
///
/// Every public function checks its arguments once, before it writes anything. A bad call throws gqa::error. Where
/// exceptions are off (-fno-exceptions or GQA_NO_EXCEPTIONS) the same object goes to a handler that the program may
/// set, and the function returns with every output untouched. Nothing is ever printed and nothing aborts.
#pragma once

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include <gqa/config.hpp>

namespace gqa {

/// The kind of a mistake. The names are stable; error::what() says which argument, what was expected and what came.
enum class errc {
  ok = 0,
  shape,     ///< extents, or the number of entries of a span, do not fit the other arguments
  stride,    ///< memory layout: a last axis that is not contiguous, an output that overlaps itself or an input
  length,    ///< a sequence length that is negative or beyond the keys there are
  option,    ///< an option without a meaning: NaN, infinite, negative, contradicting another
  range,     ///< an offset or index outside of what it points into
  capacity,  ///< no room left: a full cache, scratch memory that could not be had
  page,      ///< a page table that names pages there are not
};

/// Thrown by every door for a bad call.
class error : public std::runtime_error {
 public:
  error(errc code, const char* message) : std::runtime_error(message), code_(code) {}
  [[nodiscard]] errc code() const noexcept { return code_; }

 private:
  errc code_;
};

/// Called with each error where exceptions are off. It may return; the failed call then returns too.
using error_handler = void (*)(const error&);

namespace detail {

inline std::atomic<error_handler>& current_error_handler() noexcept {
  static std::atomic<error_handler> handler{nullptr};
  return handler;
}

inline errc& last_error_of_thread() noexcept {
  thread_local errc code = errc::ok;
  return code;
}

}  // namespace detail

/// Sets the handler for errors where exceptions are off (nullptr: none) and returns the one before. Thread-safe.
inline error_handler set_error_handler(error_handler handler) noexcept {
  return detail::current_error_handler().exchange(handler);
}

/// The code of the last error raised on this thread while exceptions were off; reading it resets it to errc::ok.
[[nodiscard]] inline errc take_last_error() noexcept {
  const errc code = detail::last_error_of_thread();
  detail::last_error_of_thread() = errc::ok;
  return code;
}

namespace detail {

/// What a check found: errc::ok, or a code and a message. Made without the heap, so that noexcept checks can return it.
struct fault {
  errc code = errc::ok;
  std::array<char, 224> message{};

  [[nodiscard]] explicit operator bool() const noexcept { return code != errc::ok; }
};

/// A fault with a printf-style message.
#if defined(__GNUC__)
[[gnu::format(printf, 2, 3)]]
#endif
inline fault
make_fault(errc code, const char* format, ...) noexcept {
  fault f;
  f.code = code;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(f.message.data(), f.message.size(), format, arguments);
  va_end(arguments);
  return f;
}

/// Hands a fault to the caller: throws, or calls the handler and returns where exceptions are off.
inline void raise(const fault& f) {
#ifdef GQA_NO_EXCEPTIONS
  last_error_of_thread() = f.code;
  if (const error_handler handler = current_error_handler().load()) handler(error(f.code, f.message.data()));
#else
  throw error(f.code, f.message.data());
#endif
}

/// Notices errors that calls within a task raise. Where there are exceptions those end the task by themselves.
class error_watch {
 public:
#ifdef GQA_NO_EXCEPTIONS
  error_watch() noexcept : before_(last_error_of_thread()) {
    last_error_of_thread() = errc::ok;
  }
  ~error_watch() {
    if (!failed()) last_error_of_thread() = before_;
  }
  error_watch(const error_watch&) = delete;
  error_watch& operator=(const error_watch&) = delete;
  [[nodiscard]] bool failed() const noexcept {
    return last_error_of_thread() != errc::ok;
  }

 private:
  errc before_;
#else
  [[nodiscard]] static constexpr bool failed() noexcept {
    return false;
  }
#endif
};

}  // namespace detail
}  // namespace gqa
