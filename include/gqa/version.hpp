// SPDX-License-Identifier: Apache-2.0
/// \file
/// The library's version; CMake reads it from here, so this is its one home.
#pragma once

#define GQA_VERSION_MAJOR 0
#define GQA_VERSION_MINOR 1
#define GQA_VERSION_PATCH 0
