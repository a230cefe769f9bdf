// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

void gqa::digests::digest_bfloat16() {
  digest_tensors<Eigen::bfloat16, Eigen::bfloat16>("bfloat16");
  digest_caches<Eigen::bfloat16, float>("bfloat16_of_float");
  digest_caches<Eigen::bfloat16, Eigen::bfloat16>("bfloat16");
}
