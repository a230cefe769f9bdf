// SPDX-License-Identifier: Apache-2.0
#define GQA_TEST_CALL template
#include "kernels.hpp"
