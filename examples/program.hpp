// SPDX-License-Identifier: Apache-2.0
// What the programs with options have in common: help, errors as exit code 2, threads.
#pragma once

#include <gqa/gqa.hpp>

#include <cstdio>
#include <exception>
#include <future>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "printed.hpp"

namespace example {

// Calls set(name, value) for each of a command line's options, "--name value", which says whether there is one of that
// name. False if help was asked for.
template <class Set>
bool read_options(int argc, char** argv, const Set& set) {
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    if (name == "--help" || name == "-h") return false;
    if (i + 1 == argc) throw std::invalid_argument(std::string(name) + ": unknown option, or its value is missing");
    if (!set(name, std::string_view(argv[i + 1])))
      throw std::invalid_argument(std::string(name) + ": unknown option; see --help");
  }
  return true;
}

// Runs run(options) with what parse(argc, argv) makes of the command line: nothing if help was asked for.
template <class Parse, class Run>
int run_program(const char* name, const char* usage, int argc, char** argv, const Parse& parse, const Run& run) {
  try {
    const auto options = parse(argc, argv);
    if (!options) {
      std::fputs(usage, stdout);
    } else {
      run(*options);
    }
    if (!is_printed()) throw std::runtime_error("standard output: cannot be written");
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s: not enough memory for the files and options of this command line; see --help\n", name);
    return 2;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s: %s\n", name, problem.what());
    return 2;
  }
  return 0;
}

// Makes so many threads once and ends them again: a pool that gets some of its own and then no more waits for ever.
inline void require_threads(int count) {
  std::vector<std::thread> made;
  std::promise<void> go;
  const std::shared_future<void> gone = go.get_future().share();
  std::string problem;
  try {
    made.reserve(static_cast<std::size_t>(count));
    while (static_cast<int>(made.size()) < count) made.emplace_back([gone] { gone.wait(); });
  } catch (const std::exception& failed) {
    problem = failed.what();
  }
  go.set_value();
  for (std::thread& t : made) t.join();
  if (!problem.empty())
    throw std::runtime_error("--threads: expected what the system has, which is " + std::to_string(made.size()) +
                             " more, got " + std::to_string(count) + " (" + problem + ")");
}

// A context of so many threads, and the pool that it runs on.
class workers {
 public:
  explicit workers(int threads) {
    if (threads > 1) {
      require_threads(threads);
      pool_ = std::make_unique<Eigen::ThreadPool>(threads);
    }
    ctx_ = pool_ ? std::make_unique<gqa::context>(*pool_) : std::make_unique<gqa::context>();
  }
  [[nodiscard]] gqa::context& ctx() { return *ctx_; }

 private:
  std::unique_ptr<Eigen::ThreadPool> pool_;
  std::unique_ptr<gqa::context> ctx_;
};

}  // namespace example
