// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

void gqa::digests::digest_8_bits() {
  digest_caches<q8, float>("q8");
  digest_caches<kv_types<q8, Eigen::bfloat16>, float>("q8_bfloat16");
}
