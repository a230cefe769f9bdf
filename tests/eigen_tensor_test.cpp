// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/attend.hpp"
#include "support/cases.hpp"

namespace gqa::test {
namespace {

template <int Order, int Rank = 4>
using tensor_t = Eigen::Tensor<float, Rank, Order>;
using row_major = tensor_t<Eigen::RowMajor>;
using col_major = tensor_t<Eigen::ColMajor>;

static_assert(tensor_like<row_major&> && tensor_like<const col_major&>);
static_assert(!tensor_like<row_major>);  // a dying tensor
static_assert(tensor_like<Eigen::TensorMap<row_major>> && tensor_like<Eigen::TensorMap<const col_major>>);
static_assert(std::is_same_v<decltype(view(std::declval<row_major&>())), tensor_view<float, 4>>);
static_assert(std::is_same_v<decltype(view(std::declval<const row_major&>())), tensor_view<const float, 4>>);
static_assert(std::is_same_v<decltype(view(std::declval<Eigen::TensorMap<row_major>>())), tensor_view<float, 4>>);
static_assert(
    std::is_same_v<decltype(view(std::declval<Eigen::TensorMap<const row_major>>())), tensor_view<const float, 4>>);

TEST(EigenView, OfRowMajorNamesAxesSlowestFirst) {
  row_major t(2, 3, 4, 5);
  t.setRandom();
  const auto v = view(t);
  EXPECT_EQ(v.extent(0), 2);
  EXPECT_EQ(v.extent(1), 3);
  EXPECT_EQ(v.extent(2), 4);
  EXPECT_EQ(v.extent(3), 5);
  EXPECT_EQ(&v(1, 2, 3, 4), &t(1, 2, 3, 4));
  row_major heads_first(2, 4, 3, 5);  // batch, heads, seq, dim
  const auto w = view(heads_first, layout::bhsd);
  EXPECT_EQ(w.extent(1), 3);
  EXPECT_EQ(w.extent(2), 4);
  EXPECT_EQ(&w(1, 2, 3, 4), &heads_first(1, 3, 2, 4));
}

TEST(EigenView, OfColMajorNamesAxesFastestFirst) {
  col_major t(5, 4, 3, 2);  // dim, heads, seq, batch
  const auto v = view(t);
  EXPECT_EQ(v.extent(0), 2);
  EXPECT_EQ(v.extent(1), 3);
  EXPECT_EQ(v.extent(2), 4);
  EXPECT_EQ(v.extent(3), 5);
  EXPECT_EQ(&v(1, 2, 3, 4), &t(4, 3, 2, 1));
  col_major heads_first(5, 3, 4, 2);  // dim, seq, heads, batch
  const auto w = view(heads_first, layout::bhsd);
  EXPECT_EQ(w.extent(1), 3);
  EXPECT_EQ(&w(1, 2, 3, 4), &heads_first(4, 2, 3, 1));
}

TEST(EigenView, OfRankThreeIsABatchOfOne) {
  tensor_t<Eigen::RowMajor, 3> r(3, 4, 5);
  tensor_t<Eigen::ColMajor, 3> c(5, 4, 3);
  EXPECT_EQ(view(r).extent(0), 1);
  EXPECT_EQ(&view(r)(0, 2, 3, 4), &r(2, 3, 4));
  EXPECT_EQ(&view(c)(0, 2, 3, 4), &c(4, 3, 2));
}

TEST(EigenView, OfMapsAndFixedSizes) {
  std::vector<float> memory(2 * 3 * 4 * 5);
  EXPECT_EQ(&view(Eigen::TensorMap<row_major>(memory.data(), 2, 3, 4, 5))(1, 2, 3, 4), &memory.back());
  const Eigen::TensorMap<const col_major> map(memory.data(), 5, 4, 3, 2);
  EXPECT_EQ(&view(map)(1, 2, 3, 4), &memory.back());
  Eigen::TensorFixedSize<float, Eigen::Sizes<2, 3, 4, 5>, Eigen::RowMajor> fixed;
  EXPECT_EQ(&view(fixed)(1, 2, 3, 4), &fixed(1, 2, 3, 4));
}

// The same call in every storage order and layout, to the bit.
template <int Order>
std::vector<float> attend(const operands<float, float>& in, layout order) {
  const auto make = [&](const tensor_view<const float, 4>& from) {
    const bool heads_first = order == layout::bhsd, columns = Order == Eigen::ColMajor;
    std::array<index_t, 4> n{from.extent(0), from.extent(1), from.extent(2), from.extent(3)};
    if (heads_first) std::swap(n[1], n[2]);
    tensor_t<Order> t = columns ? tensor_t<Order>(n[3], n[2], n[1], n[0]) : tensor_t<Order>(n[0], n[1], n[2], n[3]);
    const auto to = view(t, order);
    for (index_t b = 0; b < from.extent(0); ++b)
      for (index_t s = 0; s < from.extent(1); ++s)
        for (index_t h = 0; h < from.extent(2); ++h)
          for (index_t d = 0; d < from.extent(3); ++d) to(b, s, h, d) = from(b, s, h, d);
    return t;
  };
  auto q = make(in.q.view()), k = make(in.k.view()), v = make(in.v.view()), out = make(in.q.view());
  out.setZero();
  if (order == layout::bshd) {
    attention(q, k, v, out, in.options);  // tensors themselves
  } else {
    attention(view(q, order), view(k, order), view(v, order), view(out, order), in.options);
  }
  std::vector<float> dense;
  const auto from = view(out, order);
  for (index_t b = 0; b < from.extent(0); ++b)
    for (index_t s = 0; s < from.extent(1); ++s)
      for (index_t h = 0; h < from.extent(2); ++h)
        for (index_t d = 0; d < from.extent(3); ++d) dense.push_back(from(b, s, h, d));
  return dense;
}

TEST(EigenView, GivesTheSameAttentionInEveryOrderAndLayout) {
  for (const index_t s : {1, 40}) {
    const operands<float, float> in(attention_case{{2, s, 100, 6, 2, 32, 32}, with_causal, layout::bshd});
    context ctx;
    const auto expected = run(in, ctx).out;
    EXPECT_EQ(attend<Eigen::RowMajor>(in, layout::bshd), expected);
    EXPECT_EQ(attend<Eigen::RowMajor>(in, layout::bhsd), expected);
    EXPECT_EQ(attend<Eigen::ColMajor>(in, layout::bshd), expected);
    EXPECT_EQ(attend<Eigen::ColMajor>(in, layout::bhsd), expected);
  }
}

}  // namespace
}  // namespace gqa::test
