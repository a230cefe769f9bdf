// SPDX-License-Identifier: Apache-2.0
/// \file
/// The SIMD vocabulary of the kernels, over Eigen's packets: whatever Eigen vectorises, the library does.
///
/// Two rules keep results independent of how the compiler arranges the code around an operation:
///   * madd() is one rounding where the ISA has a fused multiply-add and two where it has not, never a mixture;
///   * mul() is a product that the compiler may not fuse into a later addition. (GCC contracts a*b + c by default, and
///     across intrinsics; an fma with -0 as its addend is the product rounded once, with no addition left to fuse.)
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <Eigen/Core>

#include <gqa/config.hpp>

// GCC says of every packet type that a template ignores its attributes (true and harmless), and of GCC 12's own
// AVX-512 intrinsics that they read their undefined merge operand (https://gcc.gnu.org/PR105593).
// Clang tells nobody when its flags let it reassociate (config.hpp refuses them of GCC), so there arithmetic that
// relies on its order is kept in order by a pragma. It reaches the operators that stand between the two macros, and not
// those in the bodies of intrinsics: sums, differences and quotients of packets are operators for this reason.
#if defined(__clang__)
#define GQA_BEGIN_PACKET_CODE _Pragma("float_control(precise, on, push)")
#define GQA_END_PACKET_CODE _Pragma("float_control(pop)")
#elif defined(__GNUC__)
#define GQA_BEGIN_PACKET_CODE                                                               \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wignored-attributes\"") \
      _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")                                 \
          _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define GQA_END_PACKET_CODE _Pragma("GCC diagnostic pop")
#else
#define GQA_BEGIN_PACKET_CODE
#define GQA_END_PACKET_CODE
#endif

// Whether a multiply-add is one rounding, in packets as in scalars.
#if defined(__FMA__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
#define GQA_FUSED 1
#else
#define GQA_FUSED 0
#endif

GQA_BEGIN_PACKET_CODE

namespace gqa::detail {
inline namespace GQA_ISA {

/// The widest packet of accumulators A (float or double); A itself where Eigen does not vectorise.
template <class A>
using packet = typename Eigen::internal::packet_traits<A>::type;

/// Elements in a packet.
template <class A>
inline constexpr int packet_size = Eigen::internal::unpacket_traits<packet<A>>::size;

/// Vector registers of the ISA, which bound the micro-kernel's block.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int packet_registers = 32;
#else
inline constexpr int packet_registers = 16;
#endif

template <class A>
[[nodiscard]] inline packet<A> load(const A* from) noexcept {
  return Eigen::internal::ploadu<packet<A>>(from);
}

template <class A>
inline void store(A* to, const packet<A>& x) noexcept {
  Eigen::internal::pstoreu(to, x);
}

/// Asks for the cache line `bytes` after `base`, which need not lie in the same object, or anywhere: into L1, or no
/// nearer than cache level `Level` for what is not read at once.
/// (Always inlined: GCC takes a function that does nothing else for one without effects, and may drop its calls.)
template <int Level = 1>
GQA_INLINE void prefetch(const void* base, index_t bytes) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(base) + bytes), 0, 4 - Level);
#else
  static_cast<void>(base), static_cast<void>(bytes);
#endif
}

/// Makes a loaded packet a register for all that follows. GCC would rather load it again as a memory operand of each
/// multiply-add, and then loads, not multiply-adds, bound the loop (a third slower with 4 rows).
template <class P>
GQA_INLINE void keep_in_register([[maybe_unused]] P& x) noexcept {
#if defined(__GNUC__) && defined(__x86_64__)
  asm("" : "+v"(x));
#endif
}

template <class A>
[[nodiscard]] inline packet<A> broadcast(A x) noexcept {
  return Eigen::internal::pset1<packet<A>>(x);
}

template <class A>
[[nodiscard]] inline packet<A> zeros() noexcept {
  return Eigen::internal::pzero(packet<A>{});
}

template <class P>
[[nodiscard]] inline P add(const P& a, const P& b) noexcept {
  return a + b;
}

template <class P>
[[nodiscard]] inline P sub(const P& a, const P& b) noexcept {
  return a - b;
}

template <class P>
[[nodiscard]] inline P div(const P& a, const P& b) noexcept {
  return a / b;
}

/// x with any NaN replaced by the one that is stored.
template <class A>
[[nodiscard]] inline packet<A> with_one_nan(const packet<A>& x) noexcept {
  const packet<A> nan = broadcast(std::numeric_limits<A>::quiet_NaN());
  if constexpr (packet_size<A> == 1) {
    return x == x ? x : nan;
  } else {
    return Eigen::internal::pselect(Eigen::internal::pcmp_eq(x, x), x, nan);
  }
}

/// a * b + c.
template <class P>
[[nodiscard]] inline P madd(const P& a, const P& b, const P& c) noexcept {
#if GQA_FUSED
  if constexpr (std::is_floating_point_v<P>) {
    return std::fma(a, b, c);
  } else {
    return Eigen::internal::pmadd(a, b, c);
  }
#else
  return a * b + c;
#endif
}

/// a * b, rounded once and for all.
template <class A>
[[nodiscard]] inline packet<A> mul(const packet<A>& a, const packet<A>& b) noexcept {
#if GQA_FUSED
  return madd(a, b, broadcast(A{-0.0}));
#else
  return a * b;
#endif
}

/// The larger of each pair of lanes. NaN in `a` stays; NaN in `b` may or may not.
template <class P>
[[nodiscard]] inline P max_or_nan(const P& a, const P& b) noexcept {
  return Eigen::internal::pmax(a, b);
}

/// True if a lane of `a` is below the same lane of `b`.
template <class A>
[[nodiscard]] inline bool any_less(const packet<A>& a, const packet<A>& b) noexcept {
  if constexpr (packet_size<A> == 1) {
    return a < b;
#if defined(EIGEN_VECTORIZE_AVX512)  // Eigen's comparison would expand the mask to a packet and compare again
  } else if constexpr (packet_size<A> == 16) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0;
  } else if constexpr (sizeof(packet<A>) == 64) {
    return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ) != 0;
#endif
  } else {
    return Eigen::internal::predux_any(Eigen::internal::pcmp_lt(a, b));
  }
}

/// Lane i of `a` where bit i is set, of `b` where not.
template <class A>
[[nodiscard]] inline packet<A> select_bits(std::uint64_t bits, const packet<A>& a, const packet<A>& b) noexcept {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (packet_size<A> == 16) {
    return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a);
  } else if constexpr (sizeof(packet<A>) == 64) {
    return _mm512_mask_mov_pd(b, static_cast<__mmask8>(bits), a);
  }
#endif
  if constexpr (packet_size<A> == 1) {
    return (bits & 1) != 0 ? a : b;
  } else {
    alignas(64) A from[packet_size<A>], to[packet_size<A>];
    store(from, a), store(to, b);
    for (int i = 0; i < packet_size<A>; ++i) to[i] = (bits >> i & 1) != 0 ? from[i] : to[i];
    return load(to);
  }
}

/// The largest lane; unspecified if one is NaN. (Flattened: GCC has its false warning of above for Eigen's function on
/// its own.)
template <class A>
[[nodiscard, gnu::flatten]] inline A max_lane(const packet<A>& x) noexcept {
  return Eigen::internal::predux_max(x);
}

/// The sum of all lanes, in an order of the instruction set.
template <class A>
[[nodiscard]] inline A lane_sum(const packet<A>& x) noexcept {
  return Eigen::internal::predux(x);
}

/// Bit i set where lane i of `a` equals that of `b`.
template <class A>
[[nodiscard]] inline std::uint64_t equal_bits(const packet<A>& a, const packet<A>& b) noexcept {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (packet_size<A> == 16) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  } else if constexpr (sizeof(packet<A>) == 64) {
    return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
  }
#endif
  alignas(64) A x[packet_size<A>], y[packet_size<A>];
  store(x, a), store(y, b);
  std::uint64_t bits = 0;
  for (int i = 0; i < packet_size<A>; ++i) bits |= static_cast<std::uint64_t>(x[i] == y[i]) << i;
  return bits;
}

/// The first lane.
template <class A>
[[nodiscard]] inline A first_lane(const packet<A>& x) noexcept {
  return Eigen::internal::pfirst(x);
}

#if defined(EIGEN_VECTORIZE_AVX512)
/// 16 x 16 floats in 64 shuffles: 32-bit, then 64-bit pairs within 128-bit lanes, then the lanes themselves. (Eigen's
/// goes through 256-bit halves, some 190 instructions.)
inline void transpose_16x16(__m512 (&rows)[16]) noexcept {
  __m512 t[16];
  GQA_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  GQA_UNROLL
  for (int i = 0; i < 16; i += 4) {  // rows[i + j]: column 4 l + j of rows i .. i + 3, in lane l
    rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  GQA_UNROLL
  for (int j = 0; j < 4; ++j) {  // lanes 0, 2 and 1, 3 of the upper and the lower eight rows
    t[j] = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0xdd);
  }
  GQA_UNROLL
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd);
    rows[4 + j] = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
    rows[12 + j] = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
  }
}
#endif

#if GQA_VNNI  // which has AVX512BW
#define GQA_TRANSPOSES_PAIRS 1
/// 16-bit elements from [16][16][2] to [8][32][2], rows of the latter `to_stride` elements apart: (i, t, j) goes to (t
/// / 2, 2 i + j, t % 2). As 32-bit pairs: 80 shuffles, where as floats it would be twice 64 and as many conversions.
inline void transpose_pairs(const void* from, std::uint16_t* to, index_t to_stride) noexcept {
  __m512 rows[16];
  GQA_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(static_cast<const float*>(from) + i * 16);
  transpose_16x16(rows);
  alignas(64) static constexpr std::uint16_t order[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  GQA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m512i places = _mm512_load_si512(order[half]);
    GQA_UNROLL
    for (int t = 0; t < 16; t += 2)
      _mm512_storeu_si512(
          to + t / 2 * to_stride + half * 32,
          _mm512_permutex2var_epi16(_mm512_castps_si512(rows[t]), places, _mm512_castps_si512(rows[t + 1])));
  }
}
#else
#define GQA_TRANSPOSES_PAIRS 0
#endif

/// Transposes a square of packet_size<A> packets in registers.
template <class A>
inline void transpose(packet<A> (&rows)[packet_size<A>]) noexcept {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (packet_size<A> == 16) {
    transpose_16x16(rows);
    return;
  }
#endif
  if constexpr (packet_size<A> != 1) {
    Eigen::internal::PacketBlock<packet<A>, packet_size<A>> block;
    GQA_UNROLL
    for (int i = 0; i < packet_size<A>; ++i) block.packet[i] = rows[i];
    Eigen::internal::ptranspose(block);
    GQA_UNROLL
    for (int i = 0; i < packet_size<A>; ++i) rows[i] = block.packet[i];
  }
}

#if defined(EIGEN_VECTORIZE_AVX512)
/// The sums of the lanes of 16 packets, one a lane: 30 shuffles, less than half of a transpose's.
[[nodiscard]] inline __m512 sum_lanes_16(const float* packets) noexcept {
  const auto four = [packets](int i) {  // lane l of 128 bits: parts of the sums of packets i .. i + 3
    const auto at = [packets](int n) { return load(packets + n * 16); };
    const auto two = [&at](int n) {
      return _mm512_add_ps(_mm512_unpacklo_ps(at(n), at(n + 1)), _mm512_unpackhi_ps(at(n), at(n + 1)));
    };
    const __m512 a = two(i), b = two(i + 2);
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const auto eight = [&four](int i) {  // the same of packets i .. i + 3 in the first half, i + 4 .. i + 7 in the second
    const __m512 a = four(i), b = four(i + 4);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 a = eight(0), b = eight(8);
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

/// The sums of the lanes of packet_size<A> packets that lie one after the other, one a lane: each a tree.
template <class A>
[[nodiscard]] inline packet<A> sum_lanes_each(const A* packets) noexcept {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (packet_size<A> == 16) return sum_lanes_16(packets);
#endif
  constexpr int width = packet_size<A>;
  packet<A> square[width];
  GQA_UNROLL
  for (int i = 0; i < width; ++i) square[i] = load(packets + i * width);
  transpose<A>(square);
  GQA_UNROLL
  for (int half = width / 2; half >= 1; half /= 2) {
    GQA_UNROLL
    for (int i = 0; i < half; ++i) square[i] = add(square[i], square[i + half]);
  }
  return square[0];
}

/// tanh, a few ulp; NaN stays NaN. Double has no packet version: libm, lane by lane. (Flattened as
/// max_lane().)
template <class A>
[[nodiscard, gnu::flatten]] inline packet<A> tanh(const packet<A>& x) noexcept {
  if constexpr (std::is_same_v<A, float> && packet_size<A> != 1) {
    // Eigen's ptanh clamps its argument, which loses NaN.
    const packet<A> is_number = Eigen::internal::pcmp_eq(x, x);
    return Eigen::internal::pselect(is_number, Eigen::internal::ptanh(x), x);
  } else {
    alignas(64) A lanes[packet_size<A>];
    store(lanes, x);
    for (A& lane : lanes) lane = std::tanh(lane);
    return load(lanes);
  }
}

/// The bits of each lane of `t` shifted left into the exponent: 2^(i - bias) if the low bits of t's mantissa hold i.
template <class A>
[[nodiscard]] inline packet<A> shift_into_exponent(const packet<A>& t) noexcept {
  using bits = std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>;
  constexpr int mantissa_bits = sizeof(A) == 4 ? 23 : 52;
  if constexpr (packet_size<A> == 1) {
    using unsigned_bits = std::make_unsigned_t<bits>;
    return std::bit_cast<A>(static_cast<unsigned_bits>(std::bit_cast<unsigned_bits>(t) << mantissa_bits));
  } else {
    typedef bits vector __attribute__((vector_size(sizeof(packet<A>))));
    return std::bit_cast<packet<A>>(std::bit_cast<vector>(t) << mantissa_bits);
  }
}

/// Whether the ISA multiplies by powers of two: scale_by_power(p, n) = p 2^n for whole n; +0 for n = -inf, even if p is
/// NaN (then it is the product of rounding -inf), NaN for n = NaN.
#if defined(EIGEN_VECTORIZE_AVX512)
template <class A>
inline constexpr bool has_scale = sizeof(packet<A>) == 64;

template <class A>
[[nodiscard]] inline packet<A> scale_by_power(const packet<A>& p, const packet<A>& n) noexcept {
  if constexpr (packet_size<A> == 16) {
    return _mm512_scalef_ps(p, n);
  } else {
    return _mm512_scalef_pd(p, n);
  }
}

template <class A>
[[nodiscard]] inline packet<A> round_to_integer(const packet<A>& x) noexcept {
  if constexpr (packet_size<A> == 16) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
  } else {
    return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT);
  }
}
#else
template <class A>
inline constexpr bool has_scale = false;
#endif

/// a * b + c of scalars, by the rule of the packets.
template <class A>
[[nodiscard]] inline A scalar_madd(A a, A b, A c) noexcept {
#if GQA_FUSED
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

/// x as it is stored: rounded to Out, NaN in one bit pattern whatever its origin and zero without a sign, so that equal
/// results are equal bytes.
template <class Out, class A>
[[nodiscard]] inline Out stored(A x) noexcept {
  const Out rounded = static_cast<Out>(x == x ? x : std::numeric_limits<A>::quiet_NaN());
  return rounded == Out(0) ? Out(0) : rounded;
}

/// a * b of scalars, by the rule of the packets.
template <class A>
[[nodiscard]] inline A scalar_mul(A a, A b) noexcept {
  return scalar_madd(a, b, A{-0.0});
}

}  // namespace GQA_ISA
}  // namespace gqa::detail

GQA_END_PACKET_CODE
