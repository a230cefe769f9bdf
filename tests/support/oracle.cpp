// SPDX-License-Identifier: Apache-2.0
#include "oracle.hpp"

#include <functional>
#include <limits>

#include <gqa/reference.hpp>

namespace gqa::test {
namespace {

// Scores of a row, and in how many units of roundoff each may be off.
struct row_errors {
  std::vector<double> score, roundings;
};

// Roundings of a product of `dim` terms, in units of roundoff: each partial sum is rounded once, in the order of d or
// over lanes and then from lane to lane. Queries times the scale are rounded once, and once more where products and
// sums are rounded apart, or a pair's second product meets the sum before its first: two magnitudes of slack each.
struct product_sizes {
  double roundings, magnitude;
};
product_sizes sizes_of_product(const double* q, const double* k, index_t dim, int lanes) {
  double sum = 0, in_order = 0, over_lanes = 0, magnitude = 0;
  for (index_t d = 0; d < dim; ++d) {
    const double product = q[d] * k[d];
    sum += product;
    in_order += std::abs(sum);
    magnitude += std::abs(product);
  }
  std::array<double, 16> lane{};
  for (index_t first = 0; first < dim; first += lanes) {
    for (index_t d = first; d < std::min(first + lanes, dim); ++d) {
      double& own = lane[static_cast<std::size_t>(d - first)];
      own += q[d] * k[d];
      over_lanes += std::abs(own);
    }
  }
  double of_lanes = 0;
  for (const double x : lane) of_lanes += std::abs(x);
  return {std::max(in_order, over_lanes + of_lanes * std::log2(lanes + 1.0)) + 4 * magnitude, magnitude};
}

// By how much weights, and the log-sum-exp, of a row change whose scores are off by so many roundings.
void add_row(const row_errors& row, double sink, const kernel_arithmetic& kernel, double splits,
             oracle_result& result) {
  double top = sink;
  for (const double x : row.score) top = std::max(top, x);
  if (top == -std::numeric_limits<double>::infinity()) {  // nothing is seen, and nothing is rounded
    result.weight_error.push_back(0);
    result.lse_error.push_back(0);
    return;
  }
  // Of a weight, beside its score's own: the distance from the reference, its product with log2(e), and again when the
  // reference rises, which it does by 5 at least; exponentials, two units each; a factor for each split that is merged.
  const auto off_by = [&](double score, double roundings) {
    return kernel.unit * (roundings + 7 * (top - score) + 60 + 4 * splits);
  };
  double sum = std::exp(sink - top), low = sum, high = sum;
  for (std::size_t i = 0; i < row.score.size(); ++i) {
    const double x = row.score[i], off = off_by(x, row.roundings[i]);
    sum += std::exp(x - top), low += std::exp(x - top - off), high += std::exp(x - top + off);
  }
  const double of_sum = std::max(std::log(high / sum), std::log(sum / low));
  double of_weights = 0;
  for (std::size_t i = 0; i < row.score.size(); ++i) {
    const double x = row.score[i], off = off_by(x, row.roundings[i]) + of_sum;
    of_weights += (std::exp(x - top + off) - std::exp(x - top)) / sum;
  }
  result.weight_error.push_back(of_weights);
  result.lse_error.push_back(of_sum + 2 * kernel.unit * std::abs(top + std::log(sum)));
}

}  // namespace

oracle_result run_oracle(tensor_view<const double, 4> q, tensor_view<const double, 4> k, tensor_view<const double, 4> v,
                         const attention_options& options, const kernel_arithmetic& kernel) {
  const index_t q_len = q.extent(1), q_heads = q.extent(2), rows = q.extent(0) * q_len * q_heads, e = v.extent(3);
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.extent(3))));
  oracle_result result;
  std::vector<row_errors> errors(static_cast<std::size_t>(rows));
  // A variant that changes nothing, and notes every score.
  struct recorder {
    std::function<void(double, const position&)> note;
    double score(double s, const position& p) const {
      note(s, p);
      return s;
    }
  };
  const auto note = [&](double score, const position& p) {
    if (score == -std::numeric_limits<double>::infinity()) return;  // hidden by its bias
    if (std::isfinite(score)) result.max_score = std::max(result.max_score, std::abs(score));
    const index_t keys = reference::impl::keys_of(options, p.batch, k.extent(1));
    const index_t s = p.query - reference::impl::first_position(options, p.batch, keys, q_len);
    row_errors& row = errors[static_cast<std::size_t>((p.batch * q_len + s) * q_heads + p.q_head)];
    const index_t g = reference::impl::kv_head_of(options, p.q_head, q_heads, k.extent(2));
    const product_sizes product =
        sizes_of_product(&q(p.batch, s, p.q_head, 0), &k(p.batch, p.key, g, 0), q.extent(3), kernel.lanes);
    double roundings = std::abs(scale) * product.roundings;
    double added = 0;
    if (options.bias) {
      const auto& bias = *options.bias;
      added += std::abs(bias(bias.extent(0) == 1 ? 0 : p.batch, bias.extent(1) == 1 ? 0 : p.q_head, s, p.key));
    }
    if (!options.alibi_slopes.empty())
      added += std::abs(static_cast<double>(options.alibi_slopes[static_cast<std::size_t>(p.q_head)]) *
                        static_cast<double>(p.key - p.query));
    // The cap's quotient, its tangent (3 units) and products, of what is added to afterwards; then a rounding a term.
    if (options.softcap != 0) roundings += 10 * std::min(options.softcap, std::abs(score) + added + 1);
    if (added != 0 && std::isfinite(added)) roundings += 2 * (std::abs(score) + added);
    const double magnitude = std::abs(scale) * product.magnitude + added;
    if (std::isfinite(magnitude)) result.max_magnitude = std::max(result.max_magnitude, magnitude);
    row.score.push_back(score), row.roundings.push_back(roundings);
  };

  result.out.resize(static_cast<std::size_t>(std::max<index_t>(rows * e, 1)));
  result.lse.resize(static_cast<std::size_t>(std::max<index_t>(rows, 1)));
  const partial_state<double> state{tensor_view<double, 4>(result.out.data(), {q.extent(0), q_len, q_heads, e}),
                                    tensor_view<double, 3>(result.lse.data(), {q.extent(0), q_len, q_heads})};
  reference::attention(q, k, v, state, options, recorder{note});

  const double splits = static_cast<double>(k.extent(1) / 1024 + 2);
  for (index_t i = 0; i < rows; ++i) {
    const float sink = options.sinks.empty() ? -std::numeric_limits<float>::infinity()
                                             : options.sinks[static_cast<std::size_t>(i % q_heads)];
    if (std::isfinite(sink)) result.max_score = std::max(result.max_score, std::abs(static_cast<double>(sink)));
    add_row(errors[static_cast<std::size_t>(i)], static_cast<double>(sink), kernel, splits, result);
  }
  // A chain of 64 keys, two roundings a tile of a split's 16, two a split, the quotient's.
  result.sum_error = kernel.unit * (64 + 32 + 2 * splits + 4);
  for (index_t i = 0; i < v.size(); ++i) {
    const double x = std::abs(v.data()[i]);
    if (std::isfinite(x)) result.max_value = std::max(result.max_value, x);
  }
  return result;
}

}  // namespace gqa::test
