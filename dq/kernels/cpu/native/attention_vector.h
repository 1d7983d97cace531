// Vector pieces of the attention kernels: 2^t, magnitudes and their scales, 32-bit transposes.
#pragma once
#include "avx512.h"

namespace dq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.44269504088896341f;

DQ_INLINE __mmask32 first_halves(long count) { return count >= 32 ? ~0u : (1u << std::max(count, 0l)) - 1; }

// --- 2^t ------------------------------------------------------------------------------------------------------------
// t = floor(t) + f; a polynomial in f, then the exponent. Unlike exp2 of tile.h: NaN stays NaN, -inf is exactly 0,
// and no clamping, because vreduceps and vscalefps define both ends. The fits have the smallest relative error on
// [0, 1].

constexpr int kFloor = 0x09;  // vreduceps: subtract the floor, without exceptions

template <int TERMS>
DQ_INLINE __m512 power(__m512 t, const float (&fit)[TERMS]) {
  __m512 f = _mm512_reduce_ps(t, kFloor), p = _mm512_set1_ps(fit[0]);
  DQ_UNROLL for (int i = 1; i < TERMS; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(fit[i]));
  return _mm512_scalef_ps(p, t);
}

// relative errors 7.5e-5, for results of 8 bits, and 2.6e-6
constexpr float kCubic[] = {0.0780245511f, 0.226067143f, 0.695833528f, 0.999925219f};
constexpr float kQuartic[] = {0.0135347405f, 0.0520103037f, 0.241443477f, 0.693003704f, 1.00000259f};

// --- quantization ---------------------------------------------------------------------------------------------------

// |x| as integers: they order like the numbers, with infinity and then NaN above all of them
DQ_INLINE __m512i magnitude(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// Scale s of symmetric 8-bit codes, x = code * s, for a largest magnitude (bits of a float): NaN unless it is finite.
DQ_INLINE float scale_of(int peak) {
  float largest;
  memcpy(&largest, &peak, 4);
  return largest <= std::numeric_limits<float>::max() ? std::max(largest, 1e-12f) / 127.f : kNaN;
}

}  // namespace
}  // namespace dq
