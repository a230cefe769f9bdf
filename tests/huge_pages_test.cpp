// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory_resource>
#include <new>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/refusal.hpp"

namespace gqa::test {
namespace {

TEST(HugePages, AreAlignedAndWritable) {
  huge_pages memory;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{2} << 20, (std::size_t{6} << 20) + 5}) {
    void* const piece = memory.allocate(bytes, 64);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % (std::size_t{2} << 20), 0u);
    std::memset(piece, 1, bytes);
    memory.deallocate(piece, bytes, 64);
  }
  EXPECT_TRUE(memory.is_equal(memory));
}

#ifndef GQA_NO_EXCEPTIONS
TEST(HugePages, SayWhenThereAreNone) {
  huge_pages memory;
  constexpr auto most = std::numeric_limits<std::size_t>::max();  // overflows when it is rounded up
  EXPECT_THROW(static_cast<void>(memory.allocate(most, 64)), std::bad_alloc);
}
#else
// Resources that cannot throw return null, and caches say so.
TEST(HugePages, SayWhenThereAreNone) {
  struct empty_resource final : std::pmr::memory_resource {
    void* do_allocate(std::size_t, std::size_t) override { return nullptr; }
    void do_deallocate(void*, std::size_t, std::size_t) override {}
    [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  };
  huge_pages memory;
  empty_resource nothing;
  for (std::pmr::memory_resource* from :
       {static_cast<std::pmr::memory_resource*>(&nothing), static_cast<std::pmr::memory_resource*>(&memory)}) {
    const index_t tokens = from == &nothing ? 100 : index_t{1} << 36;
    EXPECT_EQ(code_of([&] { kv_cache<float> cache(1, 1, tokens, 512, 512, from); }), errc::capacity);
    EXPECT_EQ(code_of([&] { latent_kv_cache<float> cache(1, tokens, 512, 512, from); }), errc::capacity);
    EXPECT_EQ(code_of([&] { paged_kv_cache<float> cache(1, tokens / 64, 64, 4, 512, 512, from); }), errc::capacity);
  }
}
#endif

TEST(HugePages, HoldACache) {
  const operands<float, float> in(attention_case{{2, 3, 100, 4, 2, 32, 32}, with_causal, layout::bshd});
  const auto filled = [&](std::pmr::memory_resource* memory) {
    kv_cache<float> cache(2, 2, 128, 32, 32, memory);
    cache.append(in.k.view(), in.v.view());
    std::vector<float> out(2 * 3 * 4 * 32);
    attention(in.q.view(), cache, view(out.data(), {2, 3, 4, 32}), {.causal = true});
    return out;
  };
  huge_pages memory;
  EXPECT_EQ(filled(&memory), filled(nullptr));
}

}  // namespace
}  // namespace gqa::test
