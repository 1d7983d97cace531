// Activations: rows of floats to codes, as the dot product takes them: bytes q + 128, or 16 bits.
//
//   q = clip(rne((x + shift) / s) + z),   s, z from `clip` times the measured range
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
  float clip = 1;       // share of a measured range that codes cover
};

// The code range of `bits` bits: without a zero point it has as many negative codes as positive ones.
DQ_INLINE int highest_code(int bits) { return (1 << (bits - 1)) - 1; }
DQ_INLINE int lowest_code(int bits, bool affine) { return -highest_code(bits) - affine; }

// f(k, lanes) for vectors of `width` elements; the compiler sees that all but the last are whole.
template <class Use>
DQ_INLINE void each_vector(long width, const Use& use) {
  long k = 0;
  for (; k + kLanes <= width; k += kLanes) use(k, all_lanes());
  if (k < width) use(k, first_lanes(width - k));
}

struct Range {
  float low, high;
};

// Smallest and largest of what was met; NaN on both ends if there was one.
struct Extent {
  Floats low, high;
  Flags strange;  // lanes that met NaN, which min and max drop
  DQ_METHOD Extent() : low(every(INFINITY)), high(every(-INFINITY)), strange(nan_lanes(low)) {}
  DQ_METHOD void meet(Floats v, Mask lanes) {
    low = min(low, v, lanes);
    high = max(high, v, lanes);
    strange = either(strange, nan_lanes(v));
  }
  DQ_METHOD Range range() const {
    if (any(strange)) return {NAN, NAN};
    return {smallest(low), largest(high)};
  }
};

// `width` elements at `index`, plus the shift, as floats, and their range; `row`: room for whole vectors, the rest is 0.
template <Dtype DTYPE>
DQ_INLINE Range fetch(const void* x, long index, long width, float shift, float* row) {
  Extent all;
  const Floats more = every(shift);
  each_vector(width, [&](long k, Mask lanes) __attribute__((always_inline)) {
    Floats v = load(x, index + k, DTYPE, lanes);
    if (shift != 0) v = add(v, more, lanes);
    write(row + k, v);
    all.meet(v, lanes);
  });
  return all.range();
}

static inline Range fetch(const void* x, long index, long width, Dtype dtype, float shift, float* row) {
  if (dtype == FP32) return fetch<FP32>(x, index, width, shift, row);
  return dtype == BF16 ? fetch<BF16>(x, index, width, shift, row) : fetch<FP16>(x, index, width, shift, row);
}

// Range of `width` elements from `at` on.
DQ_INLINE Range range_of(const void* row, long at, long width, Dtype dtype) {
  Extent all;
  each_vector(width, [&](long k, Mask lanes) __attribute__((always_inline)) {
    all.meet(load(row, at + k, dtype, lanes), lanes);
  });
  return all.range();
}

constexpr float kScaleFloor = 1e-12f;  // formats.SCALE_FLOOR

DQ_INLINE float at_least_floor(float scale) { return scale < kScaleFloor ? kScaleFloor : scale; }  // NaN stays

// Codes of one block under a scale and zero point: correctly rounded quotients for one division a row. With r the
// rounded reciprocal and p = v r, the remainder v - p s is exact in a fused multiply-add and corrects p (Markstein).
template <class Dot>
DQ_INLINE void encode(const float* row, long width, float scale, int zero, const Quantized& q,
                      typename Dot::Code* out) {
  const Floats divisor = every(scale), inverse = every(1.f / scale);
  const Words low = every(q.low - zero), high = every(q.high - zero), offset = every(zero + Dot::kOffset);
  auto put = [&](long k, Mask lanes, Floats quotient) __attribute__((always_inline)) {
    write_codes(out + k, lanes, add(min(max(round(quotient), low), high), offset));
  };
  if (!(scale > 1e-30f && scale < 1e30f)) {  // the remainder may not be exact there
    each_vector(width, [&](long k, Mask lanes) { put(k, lanes, div(read(row + k, lanes), divisor)); });
    return;
  }
  each_vector(width, [&](long k, Mask lanes) __attribute__((always_inline)) {
    Floats v = read(row + k, lanes), quotient = mul(v, inverse);
    put(k, lanes, multiply_add(multiply_sub_from(quotient, divisor, v), inverse, quotient));
  });
}

// Scale (and zero point) from a range, as dq/formats/integer.py fits them.
DQ_INLINE void fit(Range range, const Quantized& q, float& scale, int& zero) {
  zero = 0;
  range.low *= q.clip, range.high *= q.clip;
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

// `whole`: the range of the row.
template <class Dot>
static inline void quantize_row(const float* row, long width, long m, Range whole, const Quantized& q) {
  auto* codes = (typename Dot::Code*)(q.codes + m * q.stride);
  for (long g = 0; g < q.groups; g++) {
    long first = g * q.group, count = std::min(q.group, width - first);
    float scale = q.stored ? *q.stored : 0;
    int zero = 0;
    if (!q.stored) fit(q.groups == 1 ? whole : range_of(row, first, count, FP32), q, scale, zero);
    encode<Dot>(row + first, count, scale, zero, q, codes + first);
    q.scale[m * q.groups + g] = scale;
    if (q.affine) q.zero[m * q.groups + g] = zero;
  }
}

}  // namespace dq::inline DQ_LEVEL
