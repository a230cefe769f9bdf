// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include <gqa/context.hpp>

std::vector<float> attend_baseline(gqa::context& ctx);  // plain x86-64: no fused multiply-add
std::vector<float> attend_avx2(gqa::context& ctx);      // x86-64-v3
