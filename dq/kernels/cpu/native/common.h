// Shared by the AVX512 sources: element types, lanes of 16 floats, threads. No PyTorch headers in this folder.
#pragma once
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#define DQ_UNROLL _Pragma("GCC unroll 16")
#define DQ_INLINE static inline __attribute__((always_inline))

namespace dq {

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

DQ_INLINE long round_up(long value, long step) { return (value + step - 1) / step * step; }
constexpr long element_bytes(Dtype dtype) { return dtype == FP32 ? 4 : 2; }
DQ_INLINE __mmask16 first_lanes(long count) {
  return count >= 16 ? 0xffff : __mmask16((1u << std::max(count, 0l)) - 1);
}
DQ_INLINE __mmask64 first_bytes(long count) { return count >= 64 ? ~0ull : (1ull << std::max(count, 0l)) - 1; }

// 16 elements at `index` as floats; lanes outside of `lanes` are 0 and not read.
DQ_INLINE __m512 load(const void* base, long index, Dtype dtype, __mmask16 lanes) {
  if (dtype == FP32) return _mm512_maskz_loadu_ps(lanes, (const float*)base + index);
  __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t*)base + index);
  if (dtype == FP16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

DQ_INLINE void store(void* base, long index, Dtype dtype, __mmask16 lanes, __m512 value) {
  if (dtype == FP32) return _mm512_mask_storeu_ps((float*)base + index, lanes, value);
  __m256i half = dtype == FP16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                               : (__m256i)_mm512_cvtneps_pbh(value);
  _mm256_mask_storeu_epi16((uint16_t*)base + index, lanes, half);
}

// acc += sum of four neighbouring products, u8 x s8. GCC 12 spills accumulators around the intrinsic: hence assembly.
DQ_INLINE void dot4(__m512i& acc, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}
// acc += sum of two neighbouring products, bf16 x bf16
DQ_INLINE void dot2(__m512& acc, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
DQ_INLINE __m512i broadcast4(const void* four) {
  int word;
  memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}

// 2^t; relative error under 3e-7. t above 127 gives infinity, below -150 zero.
DQ_INLINE __m512 exp2(__m512 t) {
  t = _mm512_min_ps(_mm512_max_ps(t, _mm512_set1_ps(-160.f)), _mm512_set1_ps(130.f));
  __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
         part = _mm512_sub_ps(t, whole);
  const float taylor[] = {
      1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f};
  __m512 sum = _mm512_set1_ps(taylor[0]);
  DQ_UNROLL for (int i = 1; i < 7; i++) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(taylor[i]));
  return _mm512_scalef_ps(sum, whole);
}

// x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): GELU in its tanh form. NaN stays NaN: x is a factor of the result.
DQ_INLINE __m512 gelu_tanh(__m512 x) {
  __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.f));
  __m512 t = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-2.f * 0.7978845608f * 1.44269504f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), exp2(t)));
}

// 16 x 16 words in place: lane c of vector r becomes lane r of vector c.
DQ_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  DQ_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  DQ_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // quarter b of r[4 g + c] now holds column 4 b + c of rows 4 g to 4 g + 3
  DQ_UNROLL for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);           // quarters 0 and 2 of groups 0 and 1
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);       // quarters 1 and 3
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);  // the same of groups 2 and 3
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
  DQ_UNROLL for (int c = 0; c < 4; c++) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// A buffer that grows and stays with its thread, 64-byte aligned: page faults of fresh memory cost as much as a pass.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = round_up(bytes, 1 << 16);
      data_ = aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }
  ~Scratch() { free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dq
