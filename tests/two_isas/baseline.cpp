// SPDX-License-Identifier: Apache-2.0
#define GQA_TEST_NAME attend_baseline
#include "attend.inc"
