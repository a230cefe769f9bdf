// SPDX-License-Identifier: Apache-2.0
// What the machine can do at most, measured beside the kernels: multiply-adds, and reads from memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <memory_resource>
#include <type_traits>
#include <vector>

#include <gqa/context.hpp>
#include <gqa/detail/kernel/tile_kernel.hpp>
#include <gqa/detail/simd/packet.hpp>
#include <gqa/detail/simd/product.hpp>
#include <gqa/huge_pages.hpp>

#include "stopwatch.hpp"

namespace gqa::bench {

// Products of panels of P with queries of L on registers alone: as many independent sums as a register block of the
// kernels has. Operations, two a multiply-add, per second of all workers together.
template <class P, class L>
[[gnu::noinline]] accumulator_t<P> multiply_add_loop(index_t steps) {
  using A = accumulator_t<P>;
  using product = detail::lane_product<P, L>;
  alignas(64) P lanes[64];
  alignas(64) L elements[2];
  std::fill(std::begin(lanes), std::end(lanes), P(1));
  std::fill(std::begin(elements), std::end(elements), L(0.5f));
  const typename product::right right = product::load(lanes, 0);
  const typename product::left left = product::broadcast(elements, 0);
  detail::packet<A> sum[detail::block_rows][detail::block_vectors];
  detail::clear<A>(sum);
  for (index_t i = 0; i < steps; ++i) {
    GQA_UNROLL
    for (int r = 0; r < detail::block_rows; ++r) {
      GQA_UNROLL
      for (int v = 0; v < detail::block_vectors; ++v) sum[r][v] = product::madd(left, right, sum[r][v]);
    }
  }
  A total{0};
  for (const auto& row : sum) {
    for (const auto& s : row) total += detail::max_lane<A>(s);
  }
  return total;
}

template <class P, class L = accumulator_t<P>>
double multiply_add_rate(context& ctx) {
  using product = detail::lane_product<P, L>;
  // Ten milliseconds and more, by threads that are awake: waking them takes up to a tenth of one.
  constexpr index_t steps = 1 << 22;
  constexpr index_t products = detail::block_rows * detail::block_vectors * detail::packet_size<accumulator_t<P>> *
                               (product::depth / product::parts);
  const index_t workers = ctx.concurrency();
  std::vector<accumulator_t<P>> results(static_cast<std::size_t>(workers));
  const auto run = [&](index_t count) {
    return seconds_of([&] {
      ctx.for_each(workers, [&](index_t task, index_t) {
        results[static_cast<std::size_t>(task)] = multiply_add_loop<P, L>(count);
      });
    });
  };
  static_cast<void>(run(steps / 16));
  return static_cast<double>(2 * products * steps * workers) / run(steps);
}

// What keys of K meet under queries of Q: pairs where the ISA multiplies them and the queries have 16 bits.
template <class Q, class K>
double product_rate(context& ctx) {
  using A = accumulator_t<K>;
  if constexpr (detail::has_dot<K> && std::is_same_v<Q, K>) return multiply_add_rate<K, K>(ctx);
  return multiply_add_rate<A, A>(ctx);
}

// Reads memory in huge pages from end to end, `streams` places at a time, each worker its share.
class read_probe {
 public:
  explicit read_probe(std::size_t bytes = std::size_t{256} << 20) : memory_(bytes / sizeof(float), 1.0f, &pages_) {}

  // Bytes per second, the best of reading 1, 2, 4 and 8 streams, fetched ahead by software or not, of all of the memory
  // each: 10 milliseconds, beside which waking threads does not count.
  double rate(context& ctx) {
    double best = 0;
    for (const index_t streams : {1, 2, 4, 8}) {
      best = std::max(best, rate_of(ctx, streams, read<false>));
      best = std::max(best, rate_of(ctx, streams, read<true>));
    }
    return best;
  }

 private:
  double rate_of(context& ctx, index_t streams, void (*reader)(const float*, index_t, index_t)) {
    const index_t workers = ctx.concurrency();
    constexpr index_t width = detail::packet_size<float>;
    const index_t length = static_cast<index_t>(memory_.size()) / (workers * streams) / (4 * width) * (4 * width);
    const float* const begin = memory_.data();
    const double seconds = seconds_of([&] {
      ctx.for_each(workers, [&](index_t task, index_t) { reader(begin + task * streams * length, streams, length); });
    });
    return static_cast<double>(workers * streams * length) * sizeof(float) / seconds;
  }

  template <bool Fetches>
  static void read(const float* from, index_t streams, index_t length) {
    constexpr index_t width = detail::packet_size<float>, line = 64 / sizeof(float), ahead = 4096 / sizeof(float);
    detail::packet<float> sum[4];
    for (auto& s : sum) s = detail::zeros<float>();
    for (index_t i = 0; i < length; i += 4 * width) {
      for (index_t stream = 0; stream < streams; ++stream) {
        const float* const at = from + stream * length + i;
        for (index_t n = 0; Fetches && n < 4 * width; n += line)
          detail::prefetch(at, (ahead + n) * index_t{sizeof(float)});
        GQA_UNROLL
        for (int n = 0; n < 4; ++n) sum[n] = detail::add(sum[n], detail::load(at + n * width));
      }
    }
    volatile float sink = 0;
    for (const auto& s : sum) sink = sink + detail::max_lane<float>(s);
  }

  huge_pages pages_;
  std::pmr::vector<float> memory_;
};

// One for all benches of a program.
inline read_probe& memory() {
  static read_probe probe;
  return probe;
}

}  // namespace gqa::bench
