// The product: MR rows of activation bytes times a panel of 64 output channels, and everything that follows it.
//
//   f[m, n] = sum_g sx[m, g] sw[n, g] (sum_{k in g} u[m, k] w[n, k] - (128 + z[m, g]) sum_{k in g} w[n, k])
//   y = epilogue(f + low[m] up[n]^T + bias[n])            u = code + 128: sums are exact in 32 bits up to K = 65 000
#pragma once
#include "panel.h"
#include "rows.h"

namespace dq {

struct Taps {
  const long* offset;  // bytes from a row's start to each tap (convolutions); one 0 for linears
  long count, width;   // width: columns of a tap, a multiple of 4
};

struct Output {
  void* y;
  const void* low;  // (rows, rank) bf16 first factor's product, or null
  long stride, rank;
  Dtype dtype;
  bool gelu;
};

template <int MR, bool AFFINE>
DQ_INLINE void start(__m512i acc[MR][4], const Panel& p, const Quantized& q, long m, long g) {
  DQ_UNROLL for (int j = 0; j < 4; j++) {
    __m512i sums = _mm512_loadu_si512(p.sums + g * kWide + 16 * j);
    __m512i even = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      if constexpr (AFFINE) {
        int zero = q.zero[(m + i) * q.groups + (q.groups > 1 ? g : 0)];
        acc[i][j] = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-128 - zero));
      } else {
        acc[i][j] = even;
      }
    }
  }
}

template <int MR>
DQ_INLINE void multiply(__m512i acc[MR][4], const uint8_t* const* row, long offset, const int8_t* codes, long words) {
  const uint8_t* a[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) a[i] = row[i] + offset;
  for (long k = 0; k < words; k++) {
    __m512i b[4];
    DQ_UNROLL for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(codes + k * 256 + 64 * j);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      __m512i u = broadcast4(a[i] + 4 * k);
      DQ_UNROLL for (int j = 0; j < 4; j++) dot4(acc[i][j], u, b[j]);
    }
  }
}

// In dot2, pairs of the low-rank branch: f += low[m, r] up[n, r].
template <int MR>
DQ_INLINE void add_branch(__m512 f[MR][4], const Panel& p, const Output& o, long m) {
  for (long r = 0; r < o.rank; r += 2) {
    __m512i b[4];
    DQ_UNROLL for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(p.up + r * kWide + 32 * j);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      __m512i a = broadcast4((const uint16_t*)o.low + (m + i) * o.rank + r);
      DQ_UNROLL for (int j = 0; j < 4; j++) dot2(f[i][j], a, b[j]);
    }
  }
}

template <int MR>
DQ_INLINE void finish(__m512 f[MR][4], const Panel& p, const Output& o, long n, long outputs, long at) {
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < 4; j++) {
      __mmask16 lanes = first_lanes(outputs - n - 16 * j);
      __m512 y = _mm512_add_ps(f[i][j], _mm512_loadu_ps(p.bias + 16 * j));
      if (o.gelu) y = gelu_tanh(y);
      store(o.y, (at + i) * o.stride + n + 16 * j, o.dtype, lanes, y);
    }
  }
}

// One scale a row and output channel. `at`: the row of o.y to write; n: first output channel, of `outputs`.
template <int MR, bool AFFINE>
static __attribute__((noinline)) void tile(const Panel& p, const Quantized& q, const Taps& taps, const Output& o,
                                           const uint8_t* const* row, long m, long n, long outputs, long at) {
  __m512i acc[MR][4];
  __m512 f[MR][4];
  start<MR, AFFINE>(acc, p, q, m, 0);
  for (long t = 0; t < taps.count; t++) {
    multiply<MR>(acc, row, taps.offset[t], p.codes + t * taps.width * kWide, taps.width / 4);
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    __m512 scale = _mm512_set1_ps(q.scale[m + i]);
    DQ_UNROLL for (int j = 0; j < 4; j++) {
      __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][j]), scale);
      f[i][j] = _mm512_mul_ps(sum, _mm512_loadu_ps(p.scale + 16 * j));
    }
  }
  if (o.low) add_branch<MR>(f, p, o, m);
  finish<MR>(f, p, o, n, outputs, at);
}

// f += the product over one group of columns, scaled. The sums of all groups live in memory (L1), and one group is one
// call: with either in registers GCC 12 spills the running sums in the inner loop, at three times the cost.
template <int MR, bool AFFINE, bool ACT>
static __attribute__((noinline)) void add_group(const Panel& p, const Quantized& q, const uint8_t* const* row, long m,
                                                long g, long first, long words, __m512 (*f)[4]) {
  __m512i acc[MR][4];
  start<MR, AFFINE>(acc, p, q, m, g);
  multiply<MR>(acc, row, first, p.codes + first * kWide, words);
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < 4; j++) {
      __m512 scale = _mm512_loadu_ps(p.scale + g * kWide + 16 * j);
      if constexpr (ACT) scale = _mm512_mul_ps(scale, _mm512_set1_ps(q.scale[(m + i) * q.groups + g]));
      f[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][j]), scale, f[i][j]);
    }
  }
}

// A scale for each group of columns: of the weight, of the activations (ACT) or of both.
template <int MR, bool AFFINE, bool ACT>
static void tile_grouped(const Panel& p, const Quantized& q, const Taps& taps, const Output& o, long group,
                         long groups, const uint8_t* const* row, long m, long n, long outputs, long at) {
  __m512 f[MR][4];
  for (int i = 0; i < MR; i++) {
    for (int j = 0; j < 4; j++) f[i][j] = _mm512_setzero_ps();
  }
  for (long g = 0; g < groups; g++) {
    long first = g * group, words = (std::min(group, taps.width - first) + 3) / 4;
    add_group<MR, AFFINE, ACT>(p, q, row, m, g, first, words, f);
  }
  for (int i = 0; i < MR && !ACT; i++) {
    for (int j = 0; j < 4; j++) f[i][j] = _mm512_mul_ps(f[i][j], _mm512_set1_ps(q.scale[m + i]));
  }
  if (o.low) add_branch<MR>(f, p, o, m);
  finish<MR>(f, p, o, n, outputs, at);
}

}  // namespace dq
