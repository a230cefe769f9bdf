// SPDX-License-Identifier: Apache-2.0
// What a call is refused with, with exceptions and without.
#pragma once

#include <string>

#include <gqa/error.hpp>

namespace gqa::test {

// What f is refused with.
struct refusal {
  errc code = errc::ok;
  std::string message;
};

inline refusal refusal_of(const auto& f) {
#ifdef GQA_NO_EXCEPTIONS
  static std::string message;
  // Calls of this within f have handlers of their own.
  const error_handler before = set_error_handler([](const error& e) { message = e.what(); });
  static_cast<void>(take_last_error());
  f();
  set_error_handler(before);
  return {take_last_error(), message};
#else
  try {
    f();
  } catch (const error& e) {
    return {e.code(), e.what()};
  }
  return {};
#endif
}

inline errc code_of(const auto& f) {
  return refusal_of(f).code;
}

}  // namespace gqa::test
