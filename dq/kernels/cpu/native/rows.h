// Activations: rows of floats to unsigned bytes q + 128.
//
//   q = clip(rne((x + shift) / s) + z)
//
// The quotient is exact, as in dq/formats/integer.py, so that codes equal the reference's to the bit.
#pragma once
#include "common.h"

namespace dq {

struct Quantized {
  uint8_t* codes;  // (rows, stride): code + 128, zero-padded columns hold anything (their weights are 0)
  float* scale;    // (rows, groups)
  int* zero;       // (rows, groups); only written for affine formats
  long stride, group, groups;
  int low, high;  // code range
  bool affine;
  const float* stored;  // one stored scale, or null: measured
};

// The code range of `bits` bits: without a zero point it has as many negative codes as positive ones.
DQ_INLINE int highest_code(int bits) { return (1 << (bits - 1)) - 1; }
DQ_INLINE int lowest_code(int bits, bool affine) { return -highest_code(bits) - affine; }

// `width` elements at `index`, plus the shift, as floats; `row`: room for the width rounded up to 16, the rest is 0.
static inline void fetch(const void* x, long index, long width, Dtype dtype, float shift, float* row) {
  for (long k = 0; k < width; k += 16) {
    __mmask16 lanes = first_lanes(width - k);
    __m512 v = load(x, index + k, dtype, lanes);
    _mm512_storeu_ps(row + k, shift == 0 ? v : _mm512_maskz_add_ps(lanes, v, _mm512_set1_ps(shift)));
  }
}

struct Range {
  float low, high;
};

// Range of `width` elements from `at` on; NaN on both ends if there is one.
DQ_INLINE Range range_of(const void* row, long at, long width, Dtype dtype) {
  __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
  __mmask16 strange = 0;  // min and max drop NaN
  for (long k = 0; k < width; k += 16) {
    __mmask16 lanes = first_lanes(width - k);
    __m512 v = load(row, at + k, dtype, lanes);
    low = _mm512_mask_min_ps(low, lanes, low, v);
    high = _mm512_mask_max_ps(high, lanes, high, v);
    strange |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  if (strange) return {NAN, NAN};
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

constexpr float kScaleFloor = 1e-12f;  // formats.SCALE_FLOOR

DQ_INLINE float at_least_floor(float scale) { return scale < kScaleFloor ? kScaleFloor : scale; }  // NaN stays

// Codes of one block under a scale and zero point: 16 correctly rounded quotients for one division a row. With r the
// rounded reciprocal and p = v r, the remainder v - p s is exact in a fused multiply-add and corrects p (Markstein).
DQ_INLINE void encode(const float* row, long width, float scale, int zero, const Quantized& q, uint8_t* out) {
  __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.f / scale);
  __m512i low = _mm512_set1_epi32(q.low - zero), high = _mm512_set1_epi32(q.high - zero);
  __m512i offset = _mm512_set1_epi32(zero + 128);
  const bool tiny = !(scale > 1e-30f && scale < 1e30f);  // the remainder may not be exact there
  for (long k = 0; k < width; k += 16) {
    __mmask16 lanes = first_lanes(width - k);
    __m512 v = _mm512_maskz_loadu_ps(lanes, row + k), quotient;
    if (tiny) {
      quotient = _mm512_div_ps(v, divisor);
    } else {
      quotient = _mm512_mul_ps(v, inverse);
      quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, divisor, v), inverse, quotient);
    }
    __m512i code = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(quotient), low), high);
    _mm_mask_storeu_epi8(out + k, lanes, _mm512_cvtepi32_epi8(_mm512_add_epi32(code, offset)));
  }
}

// Scale (and zero point) from a range, as dq/formats/integer.py fits them.
DQ_INLINE void fit(Range range, const Quantized& q, float& scale, int& zero) {
  zero = 0;
  if (!q.affine) {
    scale = at_least_floor(std::max(std::fabs(range.low), std::fabs(range.high)) / q.high);
    if (range.low != range.low) scale = NAN;
    return;
  }
  float low = range.low > 0 ? 0 : range.low, high = range.high < 0 ? 0 : range.high;
  scale = at_least_floor((high - low) / (q.high - q.low));
  float steps = std::nearbyint(low / scale);
  zero = steps == steps && std::fabs(steps) < 1e6f ? std::clamp(q.low - int(steps), q.low, q.high) : 0;
}

static inline void quantize_row(const float* row, long width, long m, const Quantized& q) {
  for (long g = 0; g < q.groups; g++) {
    long first = g * q.group, count = std::min(q.group, width - first);
    float scale = q.stored ? *q.stored : 0;
    int zero = 0;
    if (!q.stored) fit(range_of(row, first, count, FP32), q, scale, zero);
    encode(row + first, count, scale, zero, q, q.codes + m * q.stride + first);
    q.scale[m * q.groups + g] = scale;
    if (q.affine) q.zero[m * q.groups + g] = zero;
  }
}

}  // namespace dq
