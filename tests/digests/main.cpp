// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

int main() {
  gqa::digests::digest_float();
  gqa::digests::digest_double();
  gqa::digests::digest_half();
  gqa::digests::digest_bfloat16();
  gqa::digests::digest_8_bits();
  gqa::digests::digest_groups();
  return std::fflush(stdout) == 0 && std::ferror(stdout) == 0 ? 0 : 2;
}
