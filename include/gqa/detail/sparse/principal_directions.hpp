// SPDX-License-Identifier: Apache-2.0
/// \file
/// principal_directions: the directions in which some rows vary most, and what rows are along them and outside. Eigen's
/// part of projected_keys.hpp.
#pragma once

#include <optional>

#include <Eigen/Core>
#include <Eigen/Eigenvalues>

#include <gqa/config.hpp>

namespace gqa::detail {
inline namespace GQA_ISA {

/// A template for programs to share what it takes to compile (extern template). X: double, so that what is left out is
/// known well below the rounding of any score.
template <class X>
struct principal_directions {
  using matrix = Eigen::Matrix<X, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using row = Eigen::Matrix<X, 1, Eigen::Dynamic>;

  matrix directions;  // P [r, D], orthonormal
  row mean;           // m [D]
  X residual = 0;     // share of the rows' variance outside of the directions

  [[nodiscard]] index_t rank() const noexcept { return directions.rows(); }

  /// Of rows [n, D]: `wanted` directions, or as many as leave no more than `most_residual` outside.
  void find(matrix rows, std::optional<index_t> wanted, X most_residual);
  /// P (rows - m), and rows - m in `rest`.
  void project(const matrix& rows, matrix& coordinates, matrix& rest) const;
  /// rest - P^T coordinates in `rest`, and P of that in `along`.
  void leave_out(const matrix& coordinates, matrix& rest, matrix& along) const;
};

template <class X>
void principal_directions<X>::find(matrix rows, std::optional<index_t> wanted, X most_residual) {
  const index_t dim = rows.cols();
  mean = row::Zero(dim);
  if (rows.rows() > 0) mean = rows.colwise().mean();
  rows.rowwise() -= mean;
  matrix covariance = matrix::Zero(dim, dim);
  if (rows.rows() > 0)  // Eigen divides by the inner size
    covariance.template selfadjointView<Eigen::Lower>().rankUpdate(rows.transpose());
  const Eigen::SelfAdjointEigenSolver<matrix> solved(covariance);
  const auto& variances = solved.eigenvalues();  // ascending
  const X all = variances.cwiseMax(X{0}).sum();
  const auto share_outside = [&](index_t rank) {
    return all > 0 ? variances.head(dim - rank).cwiseMax(X{0}).sum() / all : X{0};
  };
  index_t rank = wanted.value_or(0);
  while (!wanted && rank < dim && share_outside(rank) > most_residual) ++rank;
  residual = share_outside(rank);
  directions = solved.eigenvectors().rightCols(rank).rowwise().reverse().transpose();
}

template <class X>
void principal_directions<X>::project(const matrix& rows, matrix& coordinates, matrix& rest) const {
  rest = rows.rowwise() - mean;
  coordinates.noalias() = rest * directions.transpose();
}

template <class X>
void principal_directions<X>::leave_out(const matrix& coordinates, matrix& rest, matrix& along) const {
  rest.noalias() -= coordinates * directions;
  along.noalias() = rest * directions.transpose();
}

}  // namespace GQA_ISA
}  // namespace gqa::detail
