// SPDX-License-Identifier: Apache-2.0
// The tuner: its table and plot, captures that it reads and files that it refuses. The program itself is GQA_TUNER.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "../examples/capture.hpp"
#include "support/run_program.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

outcome run_tuner(const std::string& arguments) {
  return run_program(GQA_TUNER, arguments);
}
std::string temporary(const char* name) {
  return ::testing::TempDir() + "/gqa_tuner_" + name;
}

struct line {
  double foreseen, measured, error;
  bool is_best;
};
std::vector<line> table_of(const std::string& out) {
  std::vector<line> lines;
  std::istringstream stream(out);
  for (std::string text; std::getline(stream, text);) {
    const std::size_t window = text.find(", window ");
    line l{};
    char star = ' ';
    if (window == std::string::npos) continue;
    const int found =
        std::sscanf(text.c_str() + window, ", window %*d %lfx %lfx %lf %c", &l.foreseen, &l.measured, &l.error, &star);
    EXPECT_GE(found, 3) << text;
    l.is_best = star == '*';
    lines.push_back(l);
  }
  return lines;
}

// A capture of records that are 1, 2, 3, ... in the order of the file.
example::capture counted(index_t layers, index_t tokens) {
  example::capture c(layers, 4, 2, 8);
  float next = 0;
  for (index_t layer = 0; layer < layers; ++layer) {
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<float> q(32), k(16), v(16);
      for (std::vector<float>* x : {&q, &k, &v})
        for (float& y : *x) y = ++next;
      c.append(layer, q.data(), k.data(), v.data(), 1);
    }
  }
  return c;
}

TEST(Capture, IsAFileOfRecordsThatNumPyReads) {
  const std::string path = temporary("counted.npy");
  counted(2, 3).write(path);
  const std::string bytes = read_file(path);
  EXPECT_EQ(bytes.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
  const std::size_t header = static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
  EXPECT_EQ((10 + header) % 64, 0u);
  EXPECT_EQ(bytes[9 + header], '\n');
  const std::string expected =
      "{'descr': [('q', '<f4', (4, 8)), ('k', '<f4', (2, 8)), ('v', '<f4', (2, 8))], 'fortran_order': False, "
      "'shape': (2, 3, ), }";
  EXPECT_EQ(bytes.substr(10, expected.size()), expected);
  EXPECT_EQ(bytes.size(), 10 + header + 2 * 3 * 64 * sizeof(float));

  const auto c = example::capture::read(path);
  EXPECT_EQ(c.layers(), 2);
  EXPECT_EQ(c.tokens(), 3);
  EXPECT_EQ(c.queries(0, 3)(0, 0, 0, 0), 1);
  EXPECT_EQ(c.queries(1, 3)(0, 2, 3, 7), 5 * 64 + 32);
  EXPECT_EQ(c.keys(1, 3)(0, 2, 1, 0), 5 * 64 + 32 + 9);
  EXPECT_EQ(c.values(0, 3)(0, 1, 1, 7), 2 * 64);
}

TEST(Capture, RefusesOtherFiles) {
  const std::string path = temporary("other.npy");
  counted(2, 3).write(path);
  const std::string good = read_file(path);
  const auto refuses = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
    try {
      (void)example::capture::read(path);
    } catch (const std::runtime_error& e) {
      return std::string(e.what()).find(path) == 0;
    }
    return false;
  };
  const auto with = [&](const std::string& old, const std::string& changed) {
    std::string bytes = good;
    return bytes.replace(bytes.find(old), old.size(), changed);
  };
  EXPECT_FALSE(refuses(good));
  for (const std::size_t length : {0u, 5u, 9u, 10u, 60u}) EXPECT_TRUE(refuses(good.substr(0, length))) << length;
  EXPECT_TRUE(refuses(good.substr(0, good.size() - 1)));
  EXPECT_TRUE(refuses(with("NUMPY", "NUMPI")));
  EXPECT_TRUE(refuses(with("<f4", "<f8")));
  EXPECT_TRUE(refuses(with("('k', '<f4', (2, 8))", "('k', '<f4', (2, 4))")));
  EXPECT_TRUE(refuses(with("('v', '<f4', (2, 8))", "('v', '<f4', (1, 8))")));
  EXPECT_TRUE(refuses(with("('q', '<f4', (4, 8))", "('q', '<f4', (3, 8))")));
  EXPECT_TRUE(refuses(with("(2, 3, )", "(9, 3, )")));
  EXPECT_TRUE(refuses(with("(2, 3, )", "(0, 3, )")));
  EXPECT_TRUE(refuses(with("(2, 3, )", "(2, 0, )")));
  EXPECT_TRUE(refuses(with("('q', '<f4', (4, 8))", "('q', '<f4', (0, 8))")));
  // Extents whose product is beyond 64 bits, and layers that nothing could hold.
  std::string absurd = with("(2, 3, )", "(999999999, 999999999)");
  for (const std::string heads : {"(4, 8)", "(2, 8)"}) {
    for (std::size_t at = absurd.find(heads); at != std::string::npos; at = absurd.find(heads))
      absurd.replace(at, heads.size(), "(999999, 999999)");
  }
  EXPECT_TRUE(refuses(absurd));
  EXPECT_TRUE(refuses(with("(2, 3, )", "(999999999, 1)")));
  EXPECT_TRUE(refuses(with("(2, 3, )", "(2,    )")));
  EXPECT_TRUE(refuses(with("False", "True ")));
  EXPECT_THROW((void)example::capture::read("/no/such/file.npy"), std::runtime_error);
}

TEST(Tuner, PrintsAndPlotsChoices) {
  const std::string svg = temporary("front.svg");
  const outcome o = run_tuner(
      "--tokens 600 --block 64 --window 32,64 --always 1 --groups 4,200 --tolerance 0 "
      "--top-keys 0,8 --rounds 1 --svg " +
      svg);
  ASSERT_EQ(o.exit_code, 0) << o.err;
  EXPECT_NE(o.err.find("12 of 12"), std::string::npos);  // progress
  const auto lines = table_of(o.out);
  ASSERT_EQ(lines.size(), 12u) << o.out;
  double fewest = 0, many = 0;
  int best = 0;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    EXPECT_GT(lines[i].measured, 0);
    EXPECT_GT(lines[i].foreseen, 0);
    if (i % 3 == 0) fewest += lines[i].error;
    if (i % 3 == 1) many += lines[i].error;
    if (i % 3 == 2) {
      EXPECT_LT(lines[i].error, 1e-5);  // tolerance 0
    }
    // By figures that are printed rounded.
    bool is_beaten = false, may_be_beaten = false;
    for (const line& other : lines) {
      is_beaten = is_beaten || (other.measured > 1.02 * lines[i].measured && other.error < 0.98 * lines[i].error);
      may_be_beaten = may_be_beaten || (&other != &lines[i] && other.measured >= 0.98 * lines[i].measured &&
                                        other.error <= 1.02 * lines[i].error);
    }
    EXPECT_FALSE(lines[i].is_best && is_beaten) << o.out;
    EXPECT_TRUE(lines[i].is_best || may_be_beaten) << o.out;
    best += lines[i].is_best ? 1 : 0;
  }
  EXPECT_GE(best, 1);
  EXPECT_GT(fewest, 2 * many);
  const std::string plot = read_file(svg);
  EXPECT_EQ(plot.find("<svg "), 0u);
  EXPECT_EQ(plot.substr(plot.size() - 7), "</svg>\n");
  std::size_t circles = 0;
  for (std::size_t at = plot.find("<circle"); at != std::string::npos; at = plot.find("<circle", at + 1)) ++circles;
  EXPECT_EQ(circles, 12u);
  EXPECT_EQ(plot.find("nan"), std::string::npos);
}

TEST(Tuner, ReadsCaptures) {
  const std::string path = temporary("read.npy");
  counted(3, 70).write(path);
  const outcome all = run_tuner("--groups 4 --tolerance '' --top-keys 8 --rounds 1 --capture " + path);
  EXPECT_EQ(all.exit_code, 0) << all.err;
  EXPECT_EQ(all.out.find("70 tokens, 4 query heads on 2 of dim 8, 3 layers"), 0u) << all.out;
  const outcome one =
      run_tuner("--groups 4 --tolerance '' --top-keys 8 --rounds 1 --layer 2 --tokens 50 --capture " + path);
  EXPECT_EQ(one.out.find("50 tokens, 4 query heads on 2 of dim 8, 1 layers"), 0u) << one.out;
}

TEST(Tuner, RefusesBadOptionsAndFiles) {
  EXPECT_EQ(run_tuner("--help").exit_code, 0);
  const std::string path = temporary("empty.npy");
  counted(3, 0).write(path);
  for (const std::string& arguments :
       {std::string("--nonsense 1"), std::string("--groups"), std::string("--groups 0"), std::string("--groups 1,"),
        std::string("--groups 1,x"), std::string("--tolerance 3"), std::string("--window -1"),
        std::string("--groups '' --tolerance ''"), std::string("--rounds 0"), std::string("--capture /no/such/file"),
        "--capture " + path, std::string("--tokens 64 --layer 1"),
        std::string("--tokens 64 --rounds 1 --svg /no/such/folder/x.svg")}) {
    const outcome o = run_tuner(arguments);
    EXPECT_EQ(o.exit_code, 2) << arguments;
    EXPECT_NE(o.err.find("gqa_tuner: "), std::string::npos) << arguments;
    EXPECT_EQ(o.out, "") << arguments;
    if (arguments == "--capture " + path) {
      EXPECT_NE(o.err.find("holds no tokens"), std::string::npos) << o.err;
    }
  }
  auto broken = counted(1, 70);
  const std::vector<float> nan(32, std::numeric_limits<float>::quiet_NaN());
  broken.append(0, nan.data(), nan.data(), nan.data(), 1);
  broken.write(path);
  const outcome o = run_tuner("--rounds 1 --capture " + path);
  EXPECT_EQ(o.exit_code, 2);
  EXPECT_NE(o.err.find("NaN"), std::string::npos) << o.err;
}

}  // namespace
}  // namespace gqa::test
