// SPDX-License-Identifier: Apache-2.0
#define GQA_TEST_OTHER template
#include "kernels.hpp"
