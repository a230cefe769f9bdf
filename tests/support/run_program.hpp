// SPDX-License-Identifier: Apache-2.0
// Programs as a user runs them: exit code and what they print.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <functional>
#include <string>

#include "test_data.hpp"

namespace gqa::test {

struct outcome {
  int exit_code;
  std::string out, err;
};

inline outcome run_program(const std::string& program, const std::string& arguments) {
  const std::string command = program + ' ' + arguments;
  const std::string stem = ::testing::TempDir() + "/gqa_run_" + std::to_string(std::hash<std::string>{}(command));
  const int status = std::system((command + " >" + stem + ".out 2>" + stem + ".err").c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(stem + ".out"), read_file(stem + ".err")};
}

}  // namespace gqa::test
