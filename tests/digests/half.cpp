// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

void gqa::digests::digest_half() {
  digest_tensors<Eigen::half, Eigen::half>("half");
  digest_caches<Eigen::half, float>("half");
}
