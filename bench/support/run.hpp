// SPDX-License-Identifier: Apache-2.0
// The main program of a bench whose operands and caches lie in huge pages.
#pragma once

#include <benchmark/benchmark.h>

#include <memory_resource>

#include <gqa/huge_pages.hpp>

namespace gqa::bench {

// Adds the benchmarks and runs those that the command line picks; what main() returns.
inline int run_in_huge_pages(int argc, char** argv, void (*add_all)()) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  huge_pages pages;
  std::pmr::set_default_resource(&pages);
  add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace gqa::bench
