// SPDX-License-Identifier: Apache-2.0
// Bad calls: each is refused with the right code and a message that names the argument, before anything is written.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

namespace gqa::test {
namespace {

constexpr index_t big = std::numeric_limits<index_t>::max();

// A small sound call whose parts a test spoils.
struct call {
  std::vector<float> q_data = std::vector<float>(2 * 3 * 4 * 8, 0.5f);
  std::vector<float> k_data = std::vector<float>(2 * 5 * 2 * 8, 0.25f);
  std::vector<float> v_data = std::vector<float>(2 * 5 * 2 * 6, 0.125f);
  std::vector<float> out_data = std::vector<float>(2 * 3 * 4 * 6, -7);
  std::vector<float> lse_data = std::vector<float>(2 * 3 * 4, -7);
  tensor_view<const float, 4> q{q_data.data(), {2, 3, 4, 8}};
  tensor_view<const float, 4> k{k_data.data(), {2, 5, 2, 8}};
  tensor_view<const float, 4> v{v_data.data(), {2, 5, 2, 6}};
  tensor_view<float, 4> out{out_data.data(), {2, 3, 4, 6}};
  tensor_view<float, 3> lse{lse_data.data(), {2, 3, 4}};
  attention_options options;

  // What check() says, having made sure that attention() says the same of `argument` and writes nothing.
  errc refused(const std::string& argument, bool with_state = false) {
    const partial_state<float> state{out, lse};
    const errc code = with_state ? check(q, k, v, state, options) : check(q, k, v, out, options);
    const auto run = [&] {
      context ctx;
      if (with_state) {
        attention(q, k, v, state, options, ctx);
      } else {
        attention(q, k, v, out, options, ctx);
      }
    };
#ifdef GQA_NO_EXCEPTIONS
    static std::string message;
    set_error_handler([](const error& e) { message = e.what(); });
    run();
    EXPECT_EQ(take_last_error(), code);
    EXPECT_NE(message.find(argument), std::string::npos) << message;
#else
    try {
      run();
      ADD_FAILURE() << "not refused: " << argument;
    } catch (const error& e) {
      EXPECT_EQ(e.code(), code);
      EXPECT_NE(std::string(e.what()).find(argument), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("expected"), std::string::npos) << e.what();
    }
#endif
    for (const float x : out_data) EXPECT_EQ(x, -7);
    for (const float x : lse_data) EXPECT_EQ(x, -7);
    return code;
  }
};

TEST(Check, AcceptsASoundCall) {
  call c;
  EXPECT_EQ(check(c.q, c.k, c.v, c.out), errc::ok);
  EXPECT_EQ(check(c.q, c.k, c.v, partial_state<float>{c.out, c.lse}), errc::ok);
  EXPECT_EQ(check(c.q, kv_view(c.k, c.v), c.out, c.options), errc::ok);
  attention(c.q, c.k, c.v, c.out);
  EXPECT_EQ(c.out_data[0], 0.125f);
}

TEST(Check, RefusesShapesThatDoNotFit) {
  const auto with = [](auto spoil, const char* argument) {
    call c;
    spoil(c);
    EXPECT_EQ(c.refused(argument), errc::shape) << argument;
  };
  with([](call& c) { c.k = {c.k_data.data(), {1, 5, 2, 8}}; }, "v:");
  with([](call& c) { c.k = {c.k_data.data(), {1, 5, 2, 8}}, c.v = {c.v_data.data(), {1, 5, 2, 6}}; }, "q:");
  with([](call& c) { c.v = {c.v_data.data(), {2, 4, 2, 6}}; }, "v:");
  with([](call& c) { c.v = {c.v_data.data(), {2, 5, 1, 6}}; }, "v:");
  with([](call& c) { c.k = {c.k_data.data(), {2, 5, 2, 7}}; }, "q:");
  with([](call& c) { c.q = {c.q_data.data(), {2, 3, 3, 8}}, c.out = {c.out_data.data(), {2, 3, 3, 6}}; }, "q:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 3, 4, 5}}; }, "out:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 2, 4, 6}}; }, "out:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 3, 2, 6}}; }, "out:");
  with([](call& c) { c.out = {c.out_data.data(), {1, 3, 4, 6}}; }, "out:");
  with([](call& c) { c.q = {c.q_data.data(), {2, -3, 4, 8}}; }, "q:");
  with([](call& c) { c.q = {nullptr, {2, 3, 4, 8}}; }, "q:");
  with([](call& c) { c.q = {c.q_data.data(), {2, 3, big / 2, 8}}; }, "q:");
  with([](call& c) { c.k = {c.k_data.data(), {2, 5, 0, 8}}, c.v = {c.v_data.data(), {2, 5, 0, 6}}; }, "k:");
  with(
      [](call& c) {
        c.q = {c.q_data.data(), {2, 3, 4, 0}};
        c.k = {c.k_data.data(), {2, 5, 2, 0}};
      },
      "k, v:");
}

TEST(Check, RefusesAStateWhoseLogSumExpDoesNotFit) {
  call c;
  c.lse = {c.lse_data.data(), {2, 3, 3}};
  EXPECT_EQ(c.refused("lse", true), errc::shape);
  call overlapping;
  overlapping.lse = {overlapping.lse_data.data(), {2, 3, 4}, {0, 4, 1}};
  EXPECT_EQ(overlapping.refused("lse", true), errc::stride);
  call inside;
  inside.lse = {inside.out_data.data(), {2, 3, 4}};
  EXPECT_EQ(inside.refused("lse", true), errc::stride);
}

TEST(Check, RefusesLayoutsThatDoNotWork) {
  const auto with = [](auto spoil, const char* argument) {
    call c;
    spoil(c);
    EXPECT_EQ(c.refused(argument), errc::stride) << argument;
  };
  with([](call& c) { c.q = {c.q_data.data(), {2, 3, 4, 8}, {96, 32, 8, 2}}; }, "q:");
  with([](call& c) { c.k = {c.k_data.data(), {2, 5, 2, 8}, {80, 16, 1, 2}}; }, "k:");
  with([](call& c) { c.v = {c.v_data.data(), {2, 5, 2, 6}, {60, 12, 6, 0}}; }, "v:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 3, 4, 6}, {72, 24, 6, 2}}; }, "out:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 3, 4, 6}, {0, 24, 6, 1}}; }, "out:");
  with([](call& c) { c.out = {c.out_data.data(), {2, 3, 4, 6}, {72, 24, 5, 1}}; }, "out:");
  with([](call& c) { c.q = {c.q_data.data(), {2, 3, 4, 8}, {big / 2, 32, 8, 1}}; }, "q:");
  with([](call& c) { c.q = {c.q_data.data(), {2, 3, 4, 8}, {std::numeric_limits<index_t>::min(), 32, 8, 1}}; }, "q:");
}

TEST(Check, RefusesAnOutputThatOverlapsAnInput) {
  std::vector<float> shared(1000);
  call c;
  c.q = {shared.data(), {2, 3, 4, 8}};
  c.out = {shared.data() + 100, {2, 3, 4, 6}};
  EXPECT_EQ(c.refused("out:"), errc::stride);
  call k;
  k.k = {k.out_data.data(), {2, 5, 2, 8}, {0, 16, 8, 1}};
  EXPECT_EQ(k.refused("apart from k"), errc::stride);
  call v;
  v.v = {v.out_data.data() + 24, {2, 5, 2, 6}, {0, 12, 6, 1}};
  EXPECT_EQ(v.refused("apart from v"), errc::stride);
  call bias;
  bias.options.bias = tensor_view<const float, 4>(bias.out_data.data(), {1, 1, 3, 5});
  EXPECT_EQ(bias.refused("options.bias"), errc::stride);
  call mask;
  mask.options.mask = tensor_view<const bool, 4>(reinterpret_cast<const bool*>(mask.out_data.data()), {1, 1, 3, 5});
  EXPECT_EQ(mask.refused("options.mask"), errc::stride);
  call sinks;
  sinks.options.sinks = std::span<const float>(sinks.out_data).subspan(5, 4);
  EXPECT_EQ(sinks.refused("options.sinks"), errc::stride);
  call lse;
  lse.q = {lse.lse_data.data(), {2, 3, 4, 8}, {0, 0, 0, 1}};
  EXPECT_EQ(lse.refused("out.lse", true), errc::stride);
  // Right beside each other is fine.
  call beside;
  beside.q = {shared.data(), {2, 3, 4, 8}};
  beside.out = {shared.data() + 2 * 3 * 4 * 8, {2, 3, 4, 6}};
  EXPECT_EQ(check(beside.q, beside.k, beside.v, beside.out), errc::ok);
}

TEST(Check, RefusesOptionsWithoutAMeaning) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const auto with = [](auto spoil, const char* argument) {
    call c;
    spoil(c.options);
    EXPECT_EQ(c.refused(argument), errc::option) << argument;
  };
  with([&](auto& o) { o.scale = nan; }, "options.scale");
  with([&](auto& o) { o.scale = inf; }, "options.scale");
  with([&](auto& o) { o.softcap = -1; }, "options.softcap");
  with([&](auto& o) { o.softcap = nan; }, "options.softcap");
  with([&](auto& o) { o.softcap = inf; }, "options.softcap");
  with([&](auto& o) { o.softcap = 1e39; }, "options.softcap");
  with([&](auto& o) { o.softcap = 1e-40; }, "options.softcap");
  static const std::vector<float> nans(4, static_cast<float>(nan)), infinite(4, static_cast<float>(inf));
  with([&](auto& o) { o.sinks = nans; }, "options.sinks[0]");
  with([&](auto& o) { o.sinks = infinite; }, "options.sinks[0]");
  with([&](auto& o) { o.alibi_slopes = nans; }, "options.alibi_slopes[0]");
  with([&](auto& o) { o.alibi_slopes = infinite; }, "options.alibi_slopes[0]");
  with([&](auto& o) { o.window.left = -2; }, "options.window");
  with([&](auto& o) { o.window.right = -5; }, "options.window");
  static const std::array<index_t, 2> offsets{0, 1};
  with([&](auto& o) { o.query_offset = 0, o.query_offsets = offsets; }, "query_offset");
}

TEST(Check, RefusesSpansOfAnotherSize) {
  static const std::vector<index_t> lengths(3, 1);
  static const std::vector<float> numbers(3, 1);
  const auto with = [](auto spoil, const char* argument) {
    call c;
    spoil(c.options);
    EXPECT_EQ(c.refused(argument), errc::shape) << argument;
  };
  with([](auto& o) { o.kv_lengths = lengths; }, "options.kv_lengths");
  with([](auto& o) { o.query_offsets = lengths; }, "options.query_offsets");
  with([](auto& o) { o.alibi_slopes = numbers; }, "options.alibi_slopes");
  with([](auto& o) { o.sinks = numbers; }, "options.sinks");
  static const std::vector<index_t> groups{0, 4};
  with([](auto& o) { o.group_offsets = groups; }, "options.group_offsets");
}

TEST(Check, RefusesLengthsThatAreNotThere) {
  for (const index_t length : {index_t{-1}, index_t{6}, index_t{1} << 40, big, std::numeric_limits<index_t>::min()}) {
    for (const std::size_t b : {0u, 1u}) {
      std::vector<index_t> lengths{5, 5};
      lengths[b] = length;
      call c;
      c.options.kv_lengths = lengths;
      EXPECT_EQ(c.refused("options.kv_lengths[" + std::to_string(b)), errc::length) << length;
    }
  }
}

TEST(Check, RefusesOffsetsOutOfRange) {
  call c;
  c.options.query_offset = big;
  EXPECT_EQ(c.refused("options.query_offset"), errc::range);
  for (const std::vector<index_t>& groups :
       {std::vector<index_t>{0, 5, 4}, {1, 2, 4}, {0, 2, 3}, {0, -1, 4}, {0, big, 4}, {0, 2, 5}}) {
    call g;
    g.options.group_offsets = groups;
    EXPECT_EQ(g.refused("options.group_offsets"), errc::range);
  }
}

TEST(Check, RefusesMasksOfAnotherShape) {
  static const std::array<bool, 1000> mask{};
  static const std::array<float, 1000> bias{};
  for (const std::array<index_t, 4> n :
       {std::array<index_t, 4>{3, 1, 3, 5}, {1, 2, 3, 5}, {1, 1, 2, 5}, {1, 1, 3, 4}, {2, 4, 3, 6}}) {
    call m;
    m.options.mask = tensor_view<const bool, 4>(mask.data(), n);
    EXPECT_EQ(m.refused("options.mask"), errc::shape);
    call b;
    b.options.bias = tensor_view<const float, 4>(bias.data(), n);
    EXPECT_EQ(b.refused("options.bias"), errc::shape);
  }
  call null;
  null.options.mask = tensor_view<const bool, 4>(nullptr, {1, 1, 3, 5});
  EXPECT_EQ(null.refused("options.mask"), errc::shape);
}

}  // namespace
}  // namespace gqa::test
