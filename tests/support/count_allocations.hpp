// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace gqa::test {

// Heap allocations of the program so far. Link count_allocations.cpp, which replaces operator new.
long allocations() noexcept;

}  // namespace gqa::test
