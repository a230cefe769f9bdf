// SPDX-License-Identifier: Apache-2.0
// What the machine can do at most, measured beside the kernels: multiply-adds, and reads from memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include <gqa/context.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/tile_kernel.hpp>

#include "stopwatch.hpp"

namespace gqa::bench {

// Multiply-adds on registers alone: as many independent sums as a register block of the kernels has.
template <class A>
[[gnu::noinline]] A multiply_add_loop(index_t steps) {
  detail::packet<A> sum[detail::block_rows][detail::block_vectors];
  const detail::packet<A> factor = detail::broadcast(A{0.5}), addend = detail::broadcast(A{1});
  detail::clear<A>(sum);
  for (index_t i = 0; i < steps; ++i) {
    GQA_UNROLL
    for (int r = 0; r < detail::block_rows; ++r) {
      GQA_UNROLL
      for (int v = 0; v < detail::block_vectors; ++v) sum[r][v] = detail::madd(sum[r][v], factor, addend);
    }
  }
  A total{0};
  for (const auto& row : sum) {
    for (const auto& s : row) total += detail::max_lane<A>(s);
  }
  return total;
}

// Operations (two a multiply-add) per second on all workers together.
template <class A>
double multiply_add_rate(context& ctx) {
  constexpr index_t steps = 1 << 18;  // about a millisecond: waking threads takes microseconds
  constexpr index_t sums = detail::block_rows * detail::block_vectors;
  const index_t workers = ctx.concurrency();
  std::vector<A> results(static_cast<std::size_t>(workers));
  const double seconds = seconds_of([&] {
    ctx.for_each(workers,
                 [&](index_t task, index_t) { results[static_cast<std::size_t>(task)] = multiply_add_loop<A>(steps); });
  });
  return static_cast<double>(2 * sums * detail::packet_size<A> * steps * workers) / seconds;
}

// Reads memory from end to end, `streams` places at a time, each worker its share.
class read_probe {
 public:
  explicit read_probe(std::size_t bytes = std::size_t{256} << 20) : memory_(bytes / sizeof(float), 1.0f) {}

  // Bytes per second, the best of reading 1, 2, 4 and 8 streams, of a quarter of the memory each.
  double rate(context& ctx) {
    double best = 0;
    for (const index_t streams : {1, 2, 4, 8}) best = std::max(best, rate_of(ctx, streams));
    return best;
  }

 private:
  double rate_of(context& ctx, index_t streams) {
    const index_t workers = ctx.concurrency(), quarter = static_cast<index_t>(memory_.size()) / 4;
    constexpr index_t width = detail::packet_size<float>;
    const index_t length = quarter / (workers * streams) / (4 * width) * (4 * width);
    const float* const begin = memory_.data() + next_ * quarter;
    next_ = (next_ + 1) % 4;
    const double seconds = seconds_of([&] {
      ctx.for_each(workers, [&](index_t task, index_t) { read(begin + task * streams * length, streams, length); });
    });
    return static_cast<double>(workers * streams * length) * sizeof(float) / seconds;
  }

  static void read(const float* from, index_t streams, index_t length) {
    constexpr index_t width = detail::packet_size<float>;
    detail::packet<float> sum[4];
    for (auto& s : sum) s = detail::zeros<float>();
    for (index_t i = 0; i < length; i += 4 * width) {
      for (index_t stream = 0; stream < streams; ++stream) {
        GQA_UNROLL
        for (int n = 0; n < 4; ++n) sum[n] = detail::add(sum[n], detail::load(from + stream * length + i + n * width));
      }
    }
    volatile float sink = 0;
    for (const auto& s : sum) sink = sink + detail::max_lane<float>(s);
  }

  std::vector<float> memory_;
  index_t next_ = 0;
};

}  // namespace gqa::bench
