// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace gqa::test {

// Heap allocations of the program so far. Link count_allocations.cpp, which replaces operator new.
long allocations() noexcept;

// Those of them that ask the operator new that throws. Without exceptions it ends the program when it has no memory.
long throwing_allocations() noexcept;

// Lets the n-th allocation from now on fail (1: the next), and the ones after it succeed again; 0: none.
void fail_allocation(long n) noexcept;

}  // namespace gqa::test
