// SPDX-License-Identifier: Apache-2.0
// Calls that must not compile, one a CASE; case 0 is sound, so that no case fails for another's reason.
#include <gqa/attention.hpp>
#include <gqa/eigen_tensor.hpp>

using tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;

tensor make_tensor() {
  return tensor(1, 2, 3, 4);
}

void calls() {
  [[maybe_unused]] tensor q(1, 2, 4, 8), k(1, 3, 2, 8), v(1, 3, 2, 8), out(1, 2, 4, 8);
  [[maybe_unused]] const tensor read_only = out;
  [[maybe_unused]] Eigen::Tensor<Eigen::half, 4, Eigen::RowMajor> half_k(1, 3, 2, 8), half_q(1, 2, 4, 8);
  [[maybe_unused]] Eigen::Tensor<Eigen::bfloat16, 4, Eigen::RowMajor> bfloat_q(1, 2, 4, 8);
  [[maybe_unused]] Eigen::Tensor<int, 4, Eigen::RowMajor> int_k(1, 3, 2, 8);
  [[maybe_unused]] Eigen::Tensor<float, 2, Eigen::RowMajor> flat(3, 8);
  [[maybe_unused]] gqa::context ctx;
#if CASE == 0
  gqa::attention(q, k, v, out);
  gqa::attention(q, half_k, half_k, out);
  static_cast<void>(gqa::view(k));
#elif CASE == 1  // an owning temporary
  static_cast<void>(gqa::view(make_tensor()));
#elif CASE == 2
  gqa::attention(q, make_tensor(), v, out);
#elif CASE == 3  // a matrix
  static_cast<void>(gqa::view(flat));
#elif CASE == 4  // types that do not go together
  gqa::attention(bfloat_q, half_k, half_k, out);
#elif CASE == 5
  gqa::attention(half_q, k, v, out);
#elif CASE == 6
  gqa::attention(q, k, v, half_q);
#elif CASE == 7
  gqa::attention(q, int_k, int_k, out);
#elif CASE == 8
  gqa::attention(int_k, int_k, int_k, out);
#elif CASE == 9
  gqa::attention(q, k, int_k, out);
#elif CASE == 10  // an output that cannot be written
  gqa::attention(q, k, v, read_only);
#elif CASE == 11  // not a variant
  struct nothing {};
  gqa::attention(q, k, v, out, {}, nothing{}, ctx);
#elif CASE == 12  // a context is not copied
  gqa::context copy = ctx;
#endif
}
