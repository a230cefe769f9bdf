// SPDX-License-Identifier: Apache-2.0
// Whether what was printed has arrived: output to a full disk or a closed pipe is lost without a word otherwise.
#pragma once

#include <cstdio>

namespace example {

// True once all that was printed to stdout so far is written.
inline bool is_printed() {
  return std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
}

// The exit code of a program that ends with `code`.
inline int ended(int code) {
  if (is_printed()) return code;
  std::fputs("standard output: cannot be written\n", stderr);
  return 2;
}

}  // namespace example
