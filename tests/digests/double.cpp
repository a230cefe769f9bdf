// SPDX-License-Identifier: Apache-2.0
#include "digests.hpp"

void gqa::digests::digest_double() {
  digest_tensors<double, double>("double");
  digest_caches<double, double>("double");
}
