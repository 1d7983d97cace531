// Weights: 64 output channels at a time, from their canonical rows to the order the dot product wants, in cache.
//
//   rows (64, columns) int8 or int4  ->  codes [columns / 4][64][4]
//
// A panel is laid out when it is needed and thrown away: at 64 bytes of weight per few cycles this costs a percent or
// two of the product it serves, and the stored weight stays one copy in one documented order.
#pragma once
#include "common.h"

namespace dq {

constexpr long kWide = 64;  // output channels of a panel

struct Weight {
  const int8_t* codes;  // (outputs, row_bytes)
  const float* scale;   // (outputs, scale_groups), or one for all (scale_stride 0)
  const void* bias;     // (outputs,) in `dtype`, or null
  const void* up;       // (outputs, rank) bf16 second factor of the low-rank branch, or null
  long outputs, columns, row_bytes, scale_stride, scale_groups, group, groups, rank;
  int bits;
  Dtype dtype;
  float shift;  // of the activations: y -= shift * sum of the decoded weights
};

struct Panel {
  int8_t* codes;  // [padded / 4][64][4]
  int* sums;      // [groups][64] sum of codes
  float* scale;   // [groups][64]
  float* bias;    // [64]
  uint16_t* up;   // [rank / 2][64][2]
};

DQ_INLINE size_t panel_bytes(long padded, long groups, long rank) {
  return kWide * (padded + groups * 8 + 4 + 2 * round_up(rank, 2)) + 64;
}

DQ_INLINE Panel panel_in(void* place, long padded, long groups) {
  int8_t* codes = (int8_t*)place;
  int* sums = (int*)(codes + kWide * padded);
  float *scale = (float*)(sums + kWide * groups), *bias = scale + kWide * groups;
  return {.codes = codes, .sums = sums, .scale = scale, .bias = bias, .up = (uint16_t*)(bias + kWide)};
}

// 64 codes of one row from column k on, as signed bytes; 0 beyond the end.
DQ_INLINE __m512i row_codes(const int8_t* row, long k, long columns, int bits) {
  if (bits == 8) return _mm512_maskz_loadu_epi8(first_bytes(columns - k), row + k);
  long left = (columns - k + 1) / 2;
  __m256i packed = _mm256_maskz_loadu_epi8((__mmask32)first_bytes(std::min(left, 32l)), row + k / 2);
  __m512i wide = _mm512_cvtepu8_epi16(packed);  // low nibble first
  __m512i both = _mm512_or_si512(_mm512_and_si512(wide, _mm512_set1_epi16(0x0f)),
                                 _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0xf0)), 4));
  const __m512i eight = _mm512_set1_epi8(8);
  return _mm512_maskz_sub_epi8(first_bytes(columns - k), _mm512_xor_si512(both, eight), eight);
}

// 16 rows (those beyond `there` are 0) into every fourth word of 64 bytes of `out`.
static inline void lay_block(const int8_t* codes, long row_bytes, long there, long columns, int bits, int8_t* out) {
  for (long k = 0; k < columns; k += 64) {
    long words = std::min(16l, (columns - k + 3) / 4);
    __m512i r[16];
    DQ_UNROLL for (int i = 0; i < 16; i++) {
      r[i] = i < there ? row_codes(codes + i * row_bytes, k, columns, bits) : _mm512_setzero_si512();
    }
    transpose16(r);
    if (words == 16) {
      DQ_UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + k * kWide + i * 256, r[i]);
    } else {
      for (long i = 0; i < words; i++) _mm512_storeu_si512(out + k * kWide + i * 256, r[i]);
    }
  }
}

// Sums of codes over each group of columns; `group` is a multiple of 4 or covers all columns.
static inline void lay_sums(const Panel& p, long columns, long group, long groups) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (long g = 0; g < groups; g++) {
    __m512i sum[4];
    DQ_UNROLL for (int j = 0; j < 4; j++) sum[j] = _mm512_setzero_si512();
    long last = std::min((g + 1) * group, columns);
    for (long k = g * group; k < last; k += 4) {
      DQ_UNROLL for (int j = 0; j < 4; j++) dot4(sum[j], ones, _mm512_loadu_si512(p.codes + k * kWide + 64 * j));
    }
    DQ_UNROLL for (int j = 0; j < 4; j++) _mm512_storeu_si512(p.sums + g * kWide + 16 * j, sum[j]);
  }
}

static inline void lay_vectors(const Panel& p, const Weight& w, long first) {
  for (long n = 0; n < kWide; n++) {
    bool there = first + n < w.outputs;
    float folded = 0;
    for (long g = 0; g < w.groups; g++) {
      float scale = there ? w.scale[(first + n) * w.scale_stride + (w.scale_groups > 1 ? g : 0)] : 0;
      p.scale[g * kWide + n] = scale;
      folded += scale * p.sums[g * kWide + n];
    }
    p.bias[n] = -w.shift * folded;
  }
  for (long n = 0; w.bias && n < kWide; n += 16) {
    __m512 bias = load(w.bias, first + n, w.dtype, first_lanes(w.outputs - first - n));
    _mm512_storeu_ps(p.bias + n, _mm512_add_ps(_mm512_loadu_ps(p.bias + n), bias));
  }
  for (long r = 0; w.up && r < w.rank; r += 2) {
    for (long n = 0; n < kWide; n++) {
      const uint16_t* row = (const uint16_t*)w.up + (first + n) * w.rank + r;
      bool there = first + n < w.outputs;
      p.up[r * kWide + 2 * n] = there ? row[0] : 0;
      p.up[r * kWide + 2 * n + 1] = there && r + 1 < w.rank ? row[1] : 0;
    }
  }
}

static inline void lay_out(const Weight& w, long first, const Panel& p) {
  for (long n = first; n < first + kWide; n += 16) {
    lay_block(w.codes + n * w.row_bytes, w.row_bytes, w.outputs - n, w.columns, w.bits, p.codes + (n - first) * 4);
  }
  lay_sums(p, w.columns, w.group, w.groups);
  lay_vectors(p, w, first);
}

}  // namespace dq
