// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

void gqa::digests::digest_float() {
  digest_tensors<float, float>("float");
  digest_caches<float, float>("float");
}
