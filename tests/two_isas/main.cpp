// SPDX-License-Identifier: Apache-2.0
// Two translation units with different -m flags in one program each keep their own kernels: the results agree to
// rounding, and are not the same, because only one of them fuses its multiply-adds. One context serves both.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>

#include "two_isas.hpp"

int main() {
#if defined(__GNUC__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("skipped: this machine has no AVX2");
    return 77;
  }
#endif
  gqa::context ctx;
  const std::vector<float> plain = attend_baseline(ctx), fused = attend_avx2(ctx), again = attend_baseline(ctx);
  float worst = 0;
  for (std::size_t i = 0; i < plain.size(); ++i) worst = std::max(worst, std::abs(plain[i] - fused[i]));
  std::printf("largest difference %.1e, repeated %s\n", static_cast<double>(worst),
              plain == again ? "the same" : "DIFFERENT");
  return worst > 0 && worst < 2e-6f && plain == again ? 0 : 1;
}
