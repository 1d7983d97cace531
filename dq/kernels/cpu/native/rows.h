// Activations: rows of floats to codes, as the dot product takes them: bytes q + 128, or 16 bits.
//
//   q = clip(rne((x + shift) / s) + z)
//
// The quotient is exact, as in dq/formats/integer.py, so that codes equal the reference's to the bit.
#pragma once
#include "common.h"

#ifndef DQ_LEVEL
#error "include a level first: avx512.h or avx2.h"
#endif

namespace dq::inline DQ_LEVEL {

struct Quantized {
  uint8_t* codes;  // (rows, stride bytes): Dot::Code, padded columns hold anything (their weights are 0)
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

// `width` elements at `index`, plus the shift, as floats; `row`: room for the width rounded up to kLanes, the rest is 0.
static inline void fetch(const void* x, long index, long width, Dtype dtype, float shift, float* row) {
  for (long k = 0; k < width; k += kLanes) {
    Mask lanes = first_lanes(width - k);
    Floats v = load(x, index + k, dtype, lanes);
    write(row + k, shift == 0 ? v : add(v, every(shift), lanes));
  }
}

struct Range {
  float low, high;
};

// Range of `width` elements from `at` on; NaN on both ends if there is one.
DQ_INLINE Range range_of(const void* row, long at, long width, Dtype dtype) {
  Floats low = every(INFINITY), high = every(-INFINITY);
  Flags strange = nan_lanes(low);  // none yet; min and max drop NaN
  for (long k = 0; k < width; k += kLanes) {
    Mask lanes = first_lanes(width - k);
    Floats v = load(row, at + k, dtype, lanes);
    low = min(low, v, lanes);
    high = max(high, v, lanes);
    strange = either(strange, nan_lanes(v));
  }
  if (any(strange)) return {NAN, NAN};
  return {smallest(low), largest(high)};
}

constexpr float kScaleFloor = 1e-12f;  // formats.SCALE_FLOOR

DQ_INLINE float at_least_floor(float scale) { return scale < kScaleFloor ? kScaleFloor : scale; }  // NaN stays

// Codes of one block under a scale and zero point: correctly rounded quotients for one division a row. With r the
// rounded reciprocal and p = v r, the remainder v - p s is exact in a fused multiply-add and corrects p (Markstein).
template <class Dot>
DQ_INLINE void encode(const float* row, long width, float scale, int zero, const Quantized& q,
                      typename Dot::Code* out) {
  Floats divisor = every(scale), inverse = every(1.f / scale);
  Words low = every(q.low - zero), high = every(q.high - zero);
  Words offset = every(zero + Dot::kOffset);
  const bool tiny = !(scale > 1e-30f && scale < 1e30f);  // the remainder may not be exact there
  for (long k = 0; k < width; k += kLanes) {
    Mask lanes = first_lanes(width - k);
    Floats v = read(row + k, lanes), quotient;
    if (tiny) {
      quotient = div(v, divisor);
    } else {
      quotient = mul(v, inverse);
      quotient = multiply_add(multiply_sub_from(quotient, divisor, v), inverse, quotient);
    }
    Words code = min(max(round(quotient), low), high);
    write_codes(out + k, lanes, add(code, offset));
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

template <class Dot>
static inline void quantize_row(const float* row, long width, long m, const Quantized& q) {
  auto* codes = (typename Dot::Code*)(q.codes + m * q.stride);
  for (long g = 0; g < q.groups; g++) {
    long first = g * q.group, count = std::min(q.group, width - first);
    float scale = q.stored ? *q.stored : 0;
    int zero = 0;
    if (!q.stored) fit(range_of(row, first, count, FP32), q, scale, zero);
    encode<Dot>(row + first, count, scale, zero, q, codes + first);
    q.scale[m * q.groups + g] = scale;
    if (q.affine) q.zero[m * q.groups + g] = zero;
  }
}

}  // namespace dq::inline DQ_LEVEL
