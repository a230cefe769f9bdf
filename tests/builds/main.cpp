// SPDX-License-Identifier: Apache-2.0
// One small program for every build that a user may choose: compilers, flags, instruction sets, releases of Eigen. It
// says what it was built for, and checks every element type and cache against sums in double of its own, values of one,
// and the bits of decode against those of prefill. Exits with 1 where something is wrong.
// GQA_TEST_FLOAT_ONLY leaves out the other types, most of what it takes to compile.
//
// Bounds (docs/01_numerics.md): a score of D products errs by at most (D + 8) u a, a the sum of their magnitudes and of
// what is added; weights that err by factors of e^c move an output by (e^2c - 1) times the largest value m; sums of 64
// keys, of 16 tiles and of splits, weights and the quotient add 300 u m. With weights or queries in 16 bits u is 2^-8.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef GQA_TEST_MIN_MAX  // as <windows.h> defines them, once standard and Eigen's headers are there
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <unsupported/Eigen/CXX11/Tensor>
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#endif

#include <gqa/gqa.hpp>

namespace {

using gqa::index_t;

struct shape {
  index_t s, t, h, g, d, e;
};

struct random_numbers {
  std::uint64_t state = 0x9e3779b97f4a7c15u;
  double next() {  // of [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<std::int64_t>(state) >> 11) * 0x1p-52;
  }
};

template <class T>
std::vector<T> random_elements(random_numbers& random, index_t count, double magnitude) {
  std::vector<T> elements;
  for (index_t i = 0; i < count; ++i) elements.push_back(static_cast<T>(static_cast<float>(random.next() * magnitude)));
  return elements;
}

template <class T>
double at(const std::vector<T>& elements, index_t i) {
  return static_cast<double>(elements[static_cast<std::size_t>(i)]);
}

int failures = 0;

void expect(bool holds, const char* what, const char* type, const shape& n, double off, double allowed) {
  if (holds) return;
  ++failures;
  std::printf("  wrong: %s of %s, q_len %lld kv_len %lld dim %lld: off by %g, %g allowed\n", what, type,
              static_cast<long long>(n.s), static_cast<long long>(n.t), static_cast<long long>(n.d), off, allowed);
}

// Output [S, H, E] of a causal call, and what each element may be off by.
struct expected_output {
  std::vector<double> out, bound;
};

template <class Q, class K>
expected_output attend(const shape& n, const std::vector<Q>& q, const std::vector<K>& k, const std::vector<K>& v,
                       const gqa::attention_options& options, double unit) {
  expected_output expected;
  const double scale = 1 / std::sqrt(static_cast<double>(n.d));
  for (index_t s = 0; s < n.s; ++s) {
    for (index_t h = 0; h < n.h; ++h) {
      const index_t g = h / (n.h / n.g), position = n.t - n.s + s;
      std::vector<double> weights;
      double top = -std::numeric_limits<double>::infinity(), most = 0, largest = 0, sum = 0;
      for (index_t t = 0; t <= position; ++t) {
        double product = 0, magnitude = 0;
        for (index_t d = 0; d < n.d; ++d) {
          const double x = at(q, (s * n.h + h) * n.d + d) * at(k, (t * n.g + g) * n.d + d);
          product += x, magnitude += std::fabs(x);
        }
        double score = product * scale;
        magnitude *= scale;
        if (options.softcap != 0) score = options.softcap * std::tanh(score / options.softcap);
        if (!options.alibi_slopes.empty()) {
          const double added = static_cast<double>(options.alibi_slopes[static_cast<std::size_t>(h)]) *
                               static_cast<double>(t - position);
          score += added, magnitude += std::fabs(added);
        }
        weights.push_back(score);
        top = std::fmax(top, score), most = std::fmax(most, magnitude);
      }
      for (double& w : weights) w = std::exp(w - top), sum += w;
      std::vector<double> out(static_cast<std::size_t>(n.e), 0.0);
      for (index_t t = 0; t <= position; ++t) {
        for (index_t e = 0; e < n.e; ++e) {
          const double x = at(v, (t * n.g + g) * n.e + e);
          out[static_cast<std::size_t>(e)] += weights[static_cast<std::size_t>(t)] / sum * x;
          largest = std::fmax(largest, std::fabs(x));
        }
      }
      const double c = static_cast<double>(n.d + 8) * 0x1p-24 * most + unit * (1 + most);
      for (const double x : out) {
        expected.out.push_back(x);
        expected.bound.push_back((std::expm1(2 * c) + 300 * 0x1p-24) * largest);
      }
    }
  }
  return expected;
}

template <class Q, class K, class KV>
std::vector<float> run(const shape& n, const std::vector<Q>& q, const KV& kv, const gqa::attention_options& options) {
  std::vector<float> out(static_cast<std::size_t>(n.s * n.h * n.e), std::numeric_limits<float>::quiet_NaN());
  gqa::context ctx;
  gqa::attention(gqa::view(q.data(), {1, n.s, n.h, n.d}), kv, gqa::view(out.data(), {1, n.s, n.h, n.e}), options, ctx);
  return out;
}

// `Cached` is what a cache stores of K.
template <class Q, class K, class Cached>
void check(const char* type, const shape& n, double unit) {
  random_numbers random;
  const auto q = random_elements<Q>(random, n.s * n.h * n.d, 2);
  const auto k = random_elements<K>(random, n.t * n.g * n.d, 2), v = random_elements<K>(random, n.t * n.g * n.e, 1);
  std::vector<float> slopes;
  for (index_t h = 0; h < n.h; ++h) slopes.push_back(std::ldexp(1.0f, -static_cast<int>(h) - 1));
  gqa::attention_options with_rules{.causal = true, .softcap = 5};
  with_rules.alibi_slopes = slopes;
  const auto view_of = [](const auto& elements, index_t t, index_t g, index_t dim) {
    return gqa::view(elements.data(), {1, t, g, dim});
  };
  gqa::kv_cache<Cached> cache(1, n.g, n.t, n.d, n.e);
  cache.append(view_of(k, n.t, n.g, n.d), view_of(v, n.t, n.g, n.e));

  for (const gqa::attention_options& options : {gqa::attention_options{.causal = true}, with_rules}) {
    const expected_output expected = attend(n, q, k, v, options, unit);
    const auto compare = [&](const std::vector<float>& out, const char* what) {
      double worst = 0, off = 0, allowed = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        const double now = std::fabs(static_cast<double>(out[i]) - expected.out[i]);
        const double share = now <= expected.bound[i] ? now / expected.bound[i] : HUGE_VAL;  // NaN is beyond any bound
        if (share > worst) worst = share, off = now, allowed = expected.bound[i];
      }
      expect(worst <= 1, what, type, n, off, allowed);
    };
    const auto of_cache = run<Q, K>(n, q, cache, options);
    compare(of_cache, "cache");
    if constexpr (std::is_same_v<K, Cached>)
      compare(run<Q, K>(n, q, gqa::kv_view(view_of(k, n.t, n.g, n.d), view_of(v, n.t, n.g, n.e)), options), "tensors");
    // The last query by itself: a decode step.
    shape one = n;
    one.s = 1;
    const std::vector<Q> last(q.end() - n.h * n.d, q.end());
    const auto decoded = run<Q, K>(one, last, cache, options);
    expect(std::memcmp(decoded.data(), of_cache.data() + (n.s - 1) * n.h * n.e, decoded.size() * sizeof(float)) == 0,
           "bits of a decode step", type, n, 1, 0);
  }

  if constexpr (std::is_same_v<K, Cached>) {
    if (unit != 0) return;  // rounded weights: 1 within 2^-17
    const std::vector<K> ones(v.size(), static_cast<K>(1.0f));
    const auto out = run<Q, K>(n, q, gqa::kv_view(view_of(k, n.t, n.g, n.d), view_of(ones, n.t, n.g, n.e)), with_rules);
    for (const float x : out) expect(x == 1, "values of one", type, n, static_cast<double>(x) - 1, 0);
  }
}

// Two halves of the keys, merged.
void check_merge() {
  const shape n{3, 130, 4, 2, 64, 64};
  random_numbers random;
  const auto q = random_elements<float>(random, n.s * n.h * n.d, 2);
  const auto k = random_elements<float>(random, n.t * n.g * n.d, 2),
             v = random_elements<float>(random, n.t * n.g * n.e, 1);
  std::vector<float> out[2], lse[2];
  gqa::context ctx;
  for (index_t half = 0; half < 2; ++half) {
    auto& o = out[half];
    auto& l = lse[half];
    o.resize(static_cast<std::size_t>(n.s * n.h * n.e)), l.resize(static_cast<std::size_t>(n.s * n.h));
    const gqa::partial_state<float> state{gqa::view(o.data(), {1, n.s, n.h, n.e}), {l.data(), {1, n.s, n.h}}};
    const index_t first = half * 65, keys = 65;
    gqa::attention(gqa::view(q.data(), {1, n.s, n.h, n.d}),
                   gqa::view(k.data() + first * n.g * n.d, {1, keys, n.g, n.d}),
                   gqa::view(v.data() + first * n.g * n.e, {1, keys, n.g, n.e}), state,
                   {.causal = true, .query_offset = n.t - n.s - first}, ctx);
  }
  const auto state_of = [&](int half) {
    return gqa::partial_state<float>{gqa::view(out[half].data(), {1, n.s, n.h, n.e}),
                                     {lse[half].data(), {1, n.s, n.h}}};
  };
  gqa::merge(state_of(0), state_of(1), ctx);
  const expected_output expected = attend(n, q, k, v, {.causal = true}, 0);
  for (std::size_t i = 0; i < expected.out.size(); ++i) {
    const double off = std::fabs(static_cast<double>(out[0][i]) - expected.out[i]);
    expect(off <= expected.bound[i], "merge", "float", n, off, expected.bound[i]);
  }
}

#define GQA_TEXT_OF(x) #x
#define GQA_TEXT(x) GQA_TEXT_OF(x)

}  // namespace

int main() {
  // What has a dot product rounds weights, and queries that are not floats, to what it multiplies.
  const bool has_pairs = gqa::detail::has_dot<Eigen::bfloat16>;
#ifdef EIGEN_PATCH_VERSION  // Eigen 5 counts in the places after the first
  const int eigen[] = {EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION, EIGEN_PATCH_VERSION};
#else
  const int eigen[] = {EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION};
#endif
  std::printf("%s, Eigen %d.%d.%d, floats in %d lanes, bfloat16 %s, 8 bits %s\n", GQA_TEXT(GQA_ISA), eigen[0], eigen[1],
              eigen[2], gqa::detail::packet_size<float>, has_pairs ? "in pairs" : "widened",
              gqa::detail::has_dot<gqa::q8> ? "as integers" : "decoded");
  for (const shape n : {shape{5, 70, 8, 2, 64, 64}, shape{33, 200, 6, 2, 128, 128}, shape{2, 65, 3, 1, 72, 40}}) {
    check<float, float, float>("float", n, 0);
#ifndef GQA_TEST_FLOAT_ONLY
    check<double, double, double>("double", n, 0);
    check<Eigen::half, Eigen::half, Eigen::half>("half", n, 0);
    check<Eigen::bfloat16, Eigen::bfloat16, Eigen::bfloat16>("bfloat16", n, has_pairs ? 0x1p-8 + 0x1p-16 : 0);
    check<float, float, gqa::q8>("8 bits", n, 0x1p-7);
#endif
  }
  check_merge();
  std::printf("%s\n", failures == 0 ? "right" : "WRONG");
  return failures == 0 ? 0 : 1;
}
