// SPDX-License-Identifier: Apache-2.0
// The main program of a bench whose operands and caches lie in huge pages.
#pragma once

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdio>
#include <fstream>
#include <memory_resource>
#include <string>
#include <vector>

#include <gqa/huge_pages.hpp>

namespace gqa::bench {

// Whether the system gives huge pages where it is asked for them: what a piece that has been written to lies in.
inline bool huge_pages_there() {
  constexpr std::size_t bytes = std::size_t{32} << 20;
  huge_pages pages;
  std::pmr::vector<char> piece(bytes, char{1}, &pages);
  std::ifstream maps("/proc/self/smaps_rollup");
  for (std::string line; std::getline(maps, line);) {
    long kilobytes = 0;
    if (std::sscanf(line.c_str(), "AnonHugePages: %ld kB", &kilobytes) == 1)
      return kilobytes * 1024 >= static_cast<long>(bytes);
  }
  return false;
}

// Adds the benchmarks and runs those that the command line picks; what main() returns.
inline int run_in_huge_pages(int argc, char** argv, void (*add_all)()) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  huge_pages pages;
  std::pmr::set_default_resource(&pages);
  add_all();
  benchmark::AddCustomContext("huge pages", huge_pages_there() ? "as asked for" : "none: the system gives small ones");
#ifdef GQA_BENCH_BESIDE_TESTS
  benchmark::AddCustomContext("figures", "of no use: built beside tests, what is compared is less optimised");
#endif
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace gqa::bench
