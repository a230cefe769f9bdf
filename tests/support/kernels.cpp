// SPDX-License-Identifier: Apache-2.0
#define GQA_TEST_KERNEL template
#include "kernels.hpp"
