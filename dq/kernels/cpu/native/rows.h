// Activations: rows of floats, optionally normalized, modulated and smoothed, to unsigned bytes q + 128.
//
//   v = (norm(x) * mod_scale + mod_shift) * smooth + shift        q = clip(rne(v / s) + z)
//
// q / s is an exact division, as in dq/formats/integer.py, so that codes equal the reference's to the bit.
#pragma once
#include "common.h"

namespace dq {

struct RowSource {
  const void* x;         // (rows, width), rows `stride` elements apart
  const void* mod_scale; // (batch, width) in the dtype of x, or null: weights of the norm, modulation or both
  const void* mod_shift; // (batch, width), null without mod_scale
  const float* smooth;   // (width,) or null
  long width, stride, rows_per_batch, mod_stride;
  int dtype, norm;       // norm: 0 none, 1 LayerNorm, 2 RMSNorm, neither with weights of its own
  float eps, shift;
};

struct Quantized {
  uint8_t* codes;        // (rows, stride): code + 128, zero-padded columns hold anything (their weights are 0)
  float* scale;          // (rows, groups)
  int* zero;             // (rows, groups); only written for affine formats
  long stride, group, groups;
  int low, high, affine; // code range
  const float* stored;   // one stored scale, or null: measured
};

DQ_INLINE void normalize(float* row, long width, int norm, float eps) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  if (norm == 1) {
    for (long k = 0; k < width; k += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(width - k), row + k));
  }
  __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
  for (long k = 0; k < width; k += 16) {
    __mmask16 lanes = first_lanes(width - k);
    __m512 v = _mm512_maskz_sub_ps(lanes, _mm512_maskz_loadu_ps(lanes, row + k), mean);
    _mm512_mask_storeu_ps(row + k, lanes, v);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
  for (long k = 0; k < width; k += 16) {
    __mmask16 lanes = first_lanes(width - k);
    _mm512_mask_storeu_ps(row + k, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + k), scale));
  }
}

// Row m of the source as floats; `row` has room for the width rounded up to 16, the rest is 0.
static inline void fetch(const RowSource& s, long m, float* row) {
  for (long k = 0; k < s.width; k += 16) {
    _mm512_storeu_ps(row + k, load(s.x, m * s.stride + k, s.dtype, first_lanes(s.width - k)));
  }
  if (s.norm) normalize(row, s.width, s.norm, s.eps);
  if (!s.mod_scale && !s.smooth && s.shift == 0) return;
  long mod = s.mod_scale ? m / s.rows_per_batch * s.mod_stride : 0;
  for (long k = 0; k < s.width; k += 16) {
    __mmask16 lanes = first_lanes(s.width - k);
    __m512 v = _mm512_loadu_ps(row + k);
    if (s.mod_scale) {
      __m512 gain = load(s.mod_scale, mod + k, s.dtype, lanes);
      v = _mm512_fmadd_ps(v, gain, load(s.mod_shift, mod + k, s.dtype, lanes));
    }
    if (s.smooth) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes, s.smooth + k));
    _mm512_storeu_ps(row + k, _mm512_maskz_add_ps(lanes, v, _mm512_set1_ps(s.shift)));
  }
}

struct Range {
  float low, high;
};

// Range of `width` elements from `at` on; NaN on both ends if there is one.
DQ_INLINE Range range_of(const void* row, long at, long width, int dtype) {
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
