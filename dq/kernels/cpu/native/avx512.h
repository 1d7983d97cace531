// AVX512 with VNNI: 16 lanes, four products of bytes a lane and instruction, or two of bf16 where there are units.
#pragma once
#include "codes.h"
#define DQ_BYTE_PRODUCTS
#ifdef DQ_WITHOUT_BF16
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define DQ_LEVEL avx512vnni
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#define DQ_LEVEL avx512
#define DQ_BF16_UNITS
#endif

namespace dq::inline DQ_LEVEL {

constexpr long kLanes = 16;
constexpr int kRegisters = 4;  // vectors of outputs in a tile; with six rows, 24 of 32 registers hold sums
using Floats = __m512;
using Words = __m512i;  // 32-bit integers, or as many bits of smaller ones
using Mask = __mmask16;   // the first so many lanes
using Flags = __mmask16;  // any lanes

DQ_INLINE __mmask16 first_lanes(long count) {
  return count >= 16 ? 0xffff : __mmask16((1u << std::max(count, 0l)) - 1);
}
DQ_INLINE Mask all_lanes() { return 0xffff; }
DQ_INLINE __mmask64 first_bytes(long count) { return count >= 64 ? ~0ull : (1ull << std::max(count, 0l)) - 1; }

// 16 elements at `index` as floats; lanes outside of `lanes` are 0 and not read.
DQ_INLINE __m512 load(const void* base, long index, Dtype dtype, __mmask16 lanes) {
  if (dtype == FP32) return _mm512_maskz_loadu_ps(lanes, (const float*)base + index);
  __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t*)base + index);
  if (dtype == FP16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

DQ_INLINE __m256i to_bf16(Floats value) {
#ifdef DQ_WITHOUT_BF16
  Words bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  Words rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  Flags strange = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), strange, _mm512_set1_epi32(0x7fc0)));
#else
  return (__m256i)_mm512_cvtneps_pbh(value);
#endif
}

DQ_INLINE void store(void* base, long index, Dtype dtype, __mmask16 lanes, __m512 value) {
  if (dtype == FP32) return _mm512_mask_storeu_ps((float*)base + index, lanes, value);
  __m256i half = dtype == FP16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                               : to_bf16(value);
  _mm256_mask_storeu_epi16((uint16_t*)base + index, lanes, half);
}

// acc += sum of four neighbouring products, u8 x s8. GCC 12 spills accumulators around the intrinsic: hence assembly.
DQ_INLINE void dot4(__m512i& acc, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}
// acc += sum of two neighbouring products, bf16 x bf16
#ifdef DQ_WITHOUT_BF16
DQ_INLINE Floats lower(Words pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
DQ_INLINE Floats upper(Words pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}
DQ_INLINE void dot2(Floats& acc, Words a, Words b) {
  acc = _mm512_fmadd_ps(upper(a), upper(b), _mm512_fmadd_ps(lower(a), lower(b), acc));
}
#else
DQ_INLINE void dot2(__m512& acc, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#endif

// --- lanes, as every level names them -------------------------------------------------------------------------------

DQ_INLINE Floats every(float value) { return _mm512_set1_ps(value); }
DQ_INLINE Words every(int value) { return _mm512_set1_epi32(value); }
DQ_INLINE Floats read(const float* from) { return _mm512_loadu_ps(from); }
DQ_INLINE Floats read(const float* from, Mask lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
DQ_INLINE Words read(const void* from) { return _mm512_loadu_si512(from); }
DQ_INLINE void write(float* to, Floats value) { _mm512_storeu_ps(to, value); }
DQ_INLINE void write(void* to, Words value) { _mm512_storeu_si512(to, value); }
DQ_INLINE void write_codes(int16_t* to, Mask lanes, Words value) {
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(value));
}
DQ_INLINE void write_codes(uint8_t* to, Mask lanes, Words value) {
  __m128i codes = _mm512_cvtepi32_epi8(value);
  if (lanes == all_lanes()) return _mm_storeu_si128((__m128i*)to, codes);
  _mm_mask_storeu_epi8(to, lanes, codes);
}

DQ_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
DQ_INLINE Floats add(Floats a, Floats b, Mask lanes) { return _mm512_maskz_add_ps(lanes, a, b); }
DQ_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
DQ_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
DQ_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
DQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
DQ_INLINE Floats multiply_sub_from(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
DQ_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where one is NaN
DQ_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
DQ_INLINE Floats min(Floats a, Floats b, Mask lanes) { return _mm512_mask_min_ps(a, lanes, a, b); }  // else a
DQ_INLINE Floats max(Floats a, Floats b, Mask lanes) { return _mm512_mask_max_ps(a, lanes, a, b); }
DQ_INLINE float smallest(Floats a) { return _mm512_reduce_min_ps(a); }
DQ_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a); }
DQ_INLINE Flags nan_lanes(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
DQ_INLINE Flags either(Flags a, Flags b) { return a | b; }
DQ_INLINE bool any(Flags a) { return a; }
DQ_INLINE Floats to_nearest(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
DQ_INLINE Floats times_power(Floats a, Floats whole) { return _mm512_scalef_ps(a, whole); }  // a 2^whole

DQ_INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
DQ_INLINE Words sub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
DQ_INLINE Words mul(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
DQ_INLINE Words min(Words a, Words b) { return _mm512_min_epi32(a, b); }
DQ_INLINE Words max(Words a, Words b) { return _mm512_max_epi32(a, b); }
DQ_INLINE Floats as_floats(Words a) { return _mm512_castsi512_ps(a); }
DQ_INLINE Words as_words(Floats a) { return _mm512_castps_si512(a); }
DQ_INLINE Words sub_bytes(Words a, Words b) { return _mm512_sub_epi8(a, b); }
DQ_INLINE Words sub_halves(Words a, Words b) { return _mm512_sub_epi16(a, b); }
DQ_INLINE Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
DQ_INLINE Words times_128(Words a) { return _mm512_slli_epi32(a, 7); }
DQ_INLINE Words round(Floats a) { return _mm512_cvtps_epi32(a); }
DQ_INLINE Floats to_floats(Words a) { return _mm512_cvtepi32_ps(a); }
DQ_INLINE __m512i broadcast4(const void* four) {
  int word;
  memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
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

DQ_INLINE void transpose(Words r[kLanes]) { transpose16(r); }

// The bytes of 64 codes of 2 to 7 bits, and what moves those a shuffle has paired to the top of 16 bits. Masked loads
// only where a whole one would leave the row: what they read, processors do not prefetch.
DQ_INLINE Words packed_codes(const int8_t* row, long k, long columns, int bits) {
  const long at = k * bits / 8;
  if (at + 64 <= bytes_of(columns, bits)) return _mm512_loadu_si512(row + at);
  return _mm512_maskz_loadu_epi8((1ull << 8 * bits) - 1, row + at);
}
DQ_INLINE Words raised(Words packed, const uint8_t* pairs, const Spread& s) {
  return _mm512_mullo_epi16(_mm512_shuffle_epi8(packed, read(pairs)), read(s.raise));
}

// 64 codes of a row from column k on, a multiple of 8, as signed bytes, all of them there. FORM: 8 and 4 bits, or 0: any.
template <int FORM>
DQ_INLINE Words whole_codes(const int8_t* row, long k, long columns, int bits) {
  if constexpr (FORM == 8) return _mm512_loadu_si512(row + k);
  if constexpr (FORM == 4) {
    const Words low = _mm512_set1_epi16(0x0f), high = _mm512_set1_epi16(0xf0), eight = _mm512_set1_epi8(8);
    Words wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + k / 2)));  // low nibble first
    Words both = _mm512_or_si512(_mm512_and_si512(wide, low), _mm512_slli_epi16(_mm512_and_si512(wide, high), 4));
    return _mm512_sub_epi8(_mm512_xor_si512(both, eight), eight);
  }
  const Spread& s = spread(bits);
  const Words packed = _mm512_permutexvar_epi16(read(s.start), packed_codes(row, k, columns, bits));
  const __m128i down = _mm_cvtsi32_si128(16 - bits);
  return _mm512_packs_epi16(_mm512_sra_epi16(raised(packed, s.first, s), down),
                            _mm512_sra_epi16(raised(packed, s.second, s), down));
}

// The same of any width, with 0 beyond the end.
static __attribute__((noinline)) Words last_codes(const int8_t* row, long k, long columns, int bits) {
  alignas(64) int8_t bytes[64] = {};
  memcpy(bytes, row + k * bits / 8, bytes_of(columns, bits) - k * bits / 8);
  Words codes = bits == 8   ? whole_codes<8>(bytes, 0, 64, 8)
                : bits == 4 ? whole_codes<4>(bytes, 0, 64, 4)
                            : whole_codes<0>(bytes, 0, 64, bits);
  return _mm512_maskz_mov_epi8(first_bytes(columns - k), codes);
}

DQ_INLINE Words row_codes(const int8_t* row, long k, long columns, int bits) {
  if (columns - k < 64) return columns > k ? last_codes(row, k, columns, bits) : every(0);
  if (bits == 8) return whole_codes<8>(row, k, columns, bits);
  return bits == 4 ? whole_codes<4>(row, k, columns, bits) : whole_codes<0>(row, k, columns, bits);
}

// Quarter P of 64 signed bytes, and 16 of them from memory.
template <int P>
DQ_INLINE Words quarter(Words bytes) {
  return _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, P));
}
DQ_INLINE Words read_codes(const int8_t* from) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)); }
// Byte B of each word, with its sign.
template <int B>
DQ_INLINE Words byte_of(Words words) {
  return _mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * B), 24);
}
DQ_INLINE float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
#ifdef DQ_BF16_UNITS
// 64 codes of up to 7 bits as the bf16 numbers 128 + 2^(bits - 1) + code, in order.
DQ_INLINE void raised_codes(const int8_t* row, long k, long columns, int bits, Words w[2]) {
  const Spread& s = spread(bits);
  const Words packed = packed_codes(row, k, columns, bits);
  const __m128i down = _mm_cvtsi32_si128(16 - bits);
  const Words base = _mm512_set1_epi16(0x4300 | 1 << (bits - 1));  // the sign bit turned: code + half the range
  DQ_UNROLL for (int j = 0; j < 2; j++) {
    const Words here = _mm512_permutexvar_epi16(read(s.turn[j]), packed);
    w[j] = _mm512_xor_si512(_mm512_srl_epi16(raised(here, s.ordered, s), down), base);
  }
}

// 32 numbers of bf16, `first` before `second`; and 16 words, each with one of `even` below one of `odd`.
DQ_INLINE Words in_order(Floats first, Floats second) { return (Words)_mm512_cvtne2ps_pbh(second, first); }
DQ_INLINE Words in_pairs(Floats even, Floats odd) {
  const Words in_turn = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), every(0x00010001)));
  return _mm512_permutexvar_epi16(in_turn, in_order(even, odd));
}
#endif

// --- the dot product ------------------------------------------------------------------------------------------------

// A word holds four codes: activations u8, code + 128, times weights s8.
struct Bytes {
  using Code = uint8_t;
  static constexpr long kCodes = 4;    // codes of a word
  static constexpr int kOffset = 128;  // of an activation
  static constexpr int kOnes = 0x01010101;
  static DQ_METHOD void dot(Words& sum, Words act, Words weight) { dot4(sum, act, weight); }
  static DQ_METHOD void dots(Words* sum, const void* act, const Words* weights) {
    Words u = broadcast4(act);
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) dot4(sum[j], u, weights[j]);
  }
  static DQ_METHOD Words row_words(const int8_t* row, long k, long columns, int bits) {
    return row_codes(row, k, columns, bits);
  }
  // 64 codes of -8 to 7 times the multiplier of each half
  static DQ_METHOD Words multiplied(Words codes, int8_t times, int8_t next) {
    Words table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)multiples(times)));
    table = _mm512_mask_broadcast_i32x4(table, 0xff00, _mm_load_si128((const __m128i*)multiples(next)));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
};

// A word holds two codes of 16 bits: what affine weights of 8 bits take once their zero points are subtracted.
struct Halves {
  using Code = int16_t;
  static constexpr long kCodes = 2;
  static constexpr int kOffset = 0;
  static constexpr int kOnes = 0x00010001;
  static DQ_METHOD void dot(Words& sum, Words act, Words weight) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(act), "v"(weight));
  }
  static DQ_METHOD void dots(Words* sum, const void* act, const Words* weights) {
    Words u = broadcast4(act);
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) dot(sum[j], u, weights[j]);
  }
  static DQ_METHOD Words row_words(const int8_t* row, long k, long columns, int bits) {
    return _mm512_cvtepi8_epi16(_mm512_castsi512_si256(row_codes(row, k, columns, bits)));
  }
};

using Wide = Bytes;     // weights of up to 8 bits
using Narrow = Bytes;   // of up to 4
using Between = Bytes;  // of up to 5

// --- what attention needs -------------------------------------------------------------------------------------------

constexpr bool kHalves = true;  // half the work on processors that split wide vectors
using HalfFloats = __m256;
using HalfWords = __m256i;
DQ_INLINE HalfWords low_half(Words a) { return _mm512_castsi512_si256(a); }
DQ_INLINE HalfWords read_half(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
DQ_INLINE Floats whole(HalfFloats a) { return _mm512_castps256_ps512(a); }
DQ_INLINE Words whole(HalfWords a) { return _mm512_castsi256_si512(a); }

DQ_INLINE Flags equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
DQ_INLINE Floats chosen(Floats a, Floats b, Flags flags) { return _mm512_mask_mov_ps(a, flags, b); }  // b where set
DQ_INLINE int sum_of(Words a) { return _mm512_reduce_add_epi32(a); }
DQ_INLINE int largest(Words a) { return _mm512_reduce_max_epi32(a); }

// t - floor(t), and p 2^floor(t): NaN stays NaN, and vreduceps and vscalefps define both ends.
DQ_INLINE Floats above_floor(Floats t) { return _mm512_reduce_ps(t, 0x09); }  // subtract the floor, no exceptions
DQ_INLINE Floats times_floor_power(Floats p, Floats t) { return _mm512_scalef_ps(p, t); }

// The first `bytes` at `from`, up to a vector; 0 after them.
DQ_INLINE Words read_part(const void* from, long bytes) { return _mm512_maskz_loadu_epi8(first_bytes(bytes), from); }

// acc += a b, as floats; the products above on half the lanes. In assembly for the reason above.
DQ_INLINE void dot1(Floats& acc, Words a, Words b) { asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
DQ_INLINE void dot1(HalfFloats& acc, HalfWords a, HalfWords b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
DQ_INLINE void dot4(HalfWords& acc, HalfWords u8, HalfWords s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}
#ifndef DQ_WITHOUT_BF16
DQ_INLINE void dot2(HalfFloats& acc, HalfWords a, HalfWords b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
#endif

DQ_INLINE void write_codes(int8_t* to, Mask lanes, Words value) {
  _mm_mask_storeu_epi8(to, lanes, _mm512_cvtsepi32_epi8(value));
}
// Four vectors of numbers of 0 to 255, as bytes in their order.
DQ_INLINE Words bytes_of(const Words w[4]) {
  const Words in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Words packed = _mm512_packus_epi16(_mm512_packus_epi32(w[0], w[1]), _mm512_packus_epi32(w[2], w[3]));
  return _mm512_permutexvar_epi32(in_order, packed);
}

}  // namespace dq::inline DQ_LEVEL
