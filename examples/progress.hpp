// SPDX-License-Identifier: Apache-2.0
// Tells how far a program is: a line that overwrites itself on a terminal, plain lines elsewhere.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <string>

namespace example {

class progress {
 public:
  explicit progress(std::FILE* to) : to_(to), live_(isatty(fileno(to)) != 0) {}

  void show(const std::string& what) const {
    std::fprintf(to_, live_ ? "\r\033[K%s" : "%s\n", what.c_str());
    std::fflush(to_);
  }
  void done() const {
    if (live_) std::fprintf(to_, "\r\033[K");
  }

 private:
  std::FILE* to_;
  bool live_;
};

}  // namespace example
