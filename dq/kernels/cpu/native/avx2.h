// AVX2: 8 lanes. Weights of more than 4 bits take 16-bit codes, two products a lane and instruction (vpmaddwd); narrower
// ones take bytes, four products (vpmaddubsw). With AVX-VNNI bytes serve all, four products and their sum (vpdpbusd).
// Every sum is exact.
#pragma once
#include "codes.h"
#ifdef DQ_AVXVNNI
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define DQ_LEVEL avxvnni
#define DQ_BYTE_PRODUCTS
#else
#pragma GCC target("avx2,fma,f16c")
#define DQ_LEVEL avx2
#endif

namespace dq::inline DQ_LEVEL {

constexpr long kLanes = 8;
constexpr int kRegisters = 2;  // vectors of outputs in a tile; with six rows, 12 of 16 registers hold sums
using Floats = __m256;
using Words = __m256i;  // 32-bit integers, or as many bits of smaller ones
using Flags = __m256;   // any lanes
struct Mask {
  long count;  // the first so many lanes
};

DQ_INLINE Mask first_lanes(long count) { return {std::clamp(count, 0l, kLanes)}; }
DQ_INLINE Mask all_lanes() { return {kLanes}; }

DQ_INLINE Floats every(float value) { return _mm256_set1_ps(value); }
DQ_INLINE Words every(int value) { return _mm256_set1_epi32(value); }
DQ_INLINE Words in_lanes(Mask lanes) {
  return _mm256_cmpgt_epi32(every(int(lanes.count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DQ_INLINE Floats read(const float* from) { return _mm256_loadu_ps(from); }
DQ_INLINE Floats read(const float* from, Mask lanes) {
  return lanes.count == kLanes ? read(from) : _mm256_maskload_ps(from, in_lanes(lanes));
}
DQ_INLINE Words read(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
DQ_INLINE void write(float* to, Floats value) { _mm256_storeu_ps(to, value); }
DQ_INLINE void write(void* to, Words value) { _mm256_storeu_si256((__m256i*)to, value); }

// The first bytes at `from`, at most 16; 0 after them.
DQ_INLINE __m128i read_bytes(const void* from, long count) {
  if (count >= 16) return _mm_loadu_si128((const __m128i*)from);
  alignas(16) char bytes[16] = {};
  memcpy(bytes, from, std::max(count, 0l));
  return _mm_load_si128((const __m128i*)bytes);
}
DQ_INLINE void write_bytes(void* to, long count, __m128i value) {
  if (count == 16) return _mm_storeu_si128((__m128i*)to, value);
  alignas(16) char bytes[16];
  _mm_store_si128((__m128i*)bytes, value);
  memcpy(to, bytes, count);
}
DQ_INLINE __m128i halves(Words value) {  // the low 16 bits of each word, which hold its number
  __m256i packed = _mm256_packs_epi32(value, value);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
DQ_INLINE void write_codes(int16_t* to, Mask lanes, Words value) { write_bytes(to, 2 * lanes.count, halves(value)); }
DQ_INLINE void write_codes(uint8_t* to, Mask lanes, Words value) {
  __m128i bytes = halves(value);
  bytes = _mm_packus_epi16(bytes, bytes);
  if (lanes.count == kLanes) return _mm_storel_epi64((__m128i*)to, bytes);
  write_bytes(to, lanes.count, bytes);
}

DQ_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
DQ_INLINE Floats add(Floats a, Floats b, Mask lanes) {
  return _mm256_and_ps(_mm256_add_ps(a, b), _mm256_castsi256_ps(in_lanes(lanes)));
}
DQ_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
DQ_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
DQ_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
DQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
DQ_INLINE Floats multiply_sub_from(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
DQ_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }  // b where one is NaN
DQ_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
DQ_INLINE Floats chosen(Floats a, Floats b, Mask lanes) {  // b in the lanes, else a
  return lanes.count == kLanes ? b : _mm256_blendv_ps(a, b, _mm256_castsi256_ps(in_lanes(lanes)));
}
DQ_INLINE Floats min(Floats a, Floats b, Mask lanes) { return chosen(a, min(a, b), lanes); }
DQ_INLINE Floats max(Floats a, Floats b, Mask lanes) { return chosen(a, max(a, b), lanes); }
DQ_INLINE float smallest(Floats a) {
  float lane[kLanes];
  write(lane, a);
  return *std::min_element(lane, lane + kLanes);
}
DQ_INLINE float largest(Floats a) {
  float lane[kLanes];
  write(lane, a);
  return *std::max_element(lane, lane + kLanes);
}
DQ_INLINE Flags nan_lanes(Floats a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
DQ_INLINE Flags either(Flags a, Flags b) { return _mm256_or_ps(a, b); }
DQ_INLINE bool any(Flags a) { return _mm256_movemask_ps(a); }
DQ_INLINE Floats to_nearest(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

DQ_INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
DQ_INLINE Words sub(Words a, Words b) { return _mm256_sub_epi32(a, b); }
DQ_INLINE Words mul(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
DQ_INLINE Words min(Words a, Words b) { return _mm256_min_epi32(a, b); }
DQ_INLINE Words max(Words a, Words b) { return _mm256_max_epi32(a, b); }
DQ_INLINE Floats as_floats(Words a) { return _mm256_castsi256_ps(a); }
DQ_INLINE Words as_words(Floats a) { return _mm256_castps_si256(a); }
DQ_INLINE Words sub_bytes(Words a, Words b) { return _mm256_sub_epi8(a, b); }
DQ_INLINE Words sub_halves(Words a, Words b) { return _mm256_sub_epi16(a, b); }
DQ_INLINE Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
DQ_INLINE Words times_128(Words a) { return _mm256_slli_epi32(a, 7); }
DQ_INLINE Words round(Floats a) { return _mm256_cvtps_epi32(a); }
DQ_INLINE Floats to_floats(Words a) { return _mm256_cvtepi32_ps(a); }

// a 2^whole, in two factors: either alone is a normal number for |whole| up to 250.
DQ_INLINE Floats times_power(Floats a, Floats whole) {
  Words power = round(whole), half = _mm256_srai_epi32(power, 1), rest = sub(power, half), bias = every(127);
  Floats first = _mm256_castsi256_ps(_mm256_slli_epi32(add(half, bias), 23));
  return mul(mul(a, first), _mm256_castsi256_ps(_mm256_slli_epi32(add(rest, bias), 23)));
}

// 8 elements at `index` as floats; lanes outside of `lanes` are 0 and not read.
DQ_INLINE Floats load(const void* base, long index, Dtype dtype, Mask lanes) {
  if (dtype == FP32) return read((const float*)base + index, lanes);
  __m128i half = read_bytes((const uint16_t*)base + index, 2 * lanes.count);
  if (dtype == FP16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

DQ_INLINE __m128i to_bf16(Floats value) {
  Words bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), every(1));
  Words rounded = _mm256_srli_epi32(add(bits, add(odd, every(0x7fff))), 16);
  rounded = _mm256_blendv_epi8(rounded, every(0x7fc0), _mm256_castps_si256(nan_lanes(value)));
  __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

DQ_INLINE void store(void* base, long index, Dtype dtype, Mask lanes, Floats value) {
  if (dtype == FP32) {
    float* to = (float*)base + index;
    return lanes.count == kLanes ? write(to, value) : _mm256_maskstore_ps(to, in_lanes(lanes), value);
  }
  __m128i half = dtype == FP16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(value);
  write_bytes((uint16_t*)base + index, 2 * lanes.count, half);
}

DQ_INLINE Words broadcast4(const void* four) {
  int word;
  memcpy(&word, four, 4);
  return every(word);
}
// acc += sum of two neighbouring products, bf16 x bf16
DQ_INLINE Floats lower(Words pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
DQ_INLINE Floats upper(Words pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, every(int(0xffff0000)))); }
DQ_INLINE void dot2(Floats& acc, Words a, Words b) {
  acc = multiply_add(upper(a), upper(b), multiply_add(lower(a), lower(b), acc));
}

// 8 x 8 words in place: lane c of vector r becomes lane r of vector c.
DQ_INLINE void transpose(Words r[kLanes]) {
  Words t[8];
  DQ_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  DQ_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // half b of r[4 g + c] now holds column 4 b + c of rows 4 g to 4 g + 3
  DQ_UNROLL for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
  }
  DQ_UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

// Up to 16 bytes of a row of `length` from byte `at` on; 0 after its end.
DQ_INLINE __m128i read_row(const int8_t* row, long at, long length) {
  const long left = length - at;
  if (left >= 16 || left <= 0 || length < 16) return read_bytes(row + at, left);
  alignas(16) static constexpr int8_t kSlide[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(row + length - 16)),
                          _mm_loadu_si128((const __m128i*)(kSlide + 16 - left)));
}

// 32 codes of a row from column k on, a multiple of 8, as signed bytes, all of them there. FORM: 8 and 4 bits, or 0: any.
template <int FORM>
DQ_INLINE Words whole_codes(const int8_t* row, long k, long columns, int bits) {
  if constexpr (FORM == 8) return read((const void*)(row + k));
  if constexpr (FORM == 4) {
    const Words low = _mm256_set1_epi16(0x0f), high = _mm256_set1_epi16(0xf0), eight = _mm256_set1_epi8(8);
    Words wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k / 2)));  // low nibble first
    Words both = _mm256_or_si256(_mm256_and_si256(wide, low), _mm256_slli_epi16(_mm256_and_si256(wide, high), 4));
    return _mm256_sub_epi8(_mm256_xor_si256(both, eight), eight);
  }
  const Spread& s = spread(bits);
  const long at = k * bits / 8, length = bytes_of(columns, bits);
  const Words packed = _mm256_set_m128i(read_row(row, at + 2 * bits, length), read_row(row, at, length));
  const __m128i down = _mm_cvtsi32_si128(16 - bits);
  const Words raise = read(s.raise);
  Words first = _mm256_mullo_epi16(_mm256_shuffle_epi8(packed, read(s.first)), raise);
  Words second = _mm256_mullo_epi16(_mm256_shuffle_epi8(packed, read(s.second)), raise);
  return _mm256_packs_epi16(_mm256_sra_epi16(first, down), _mm256_sra_epi16(second, down));
}

// The same of any width, with 0 beyond the end.
static __attribute__((noinline)) Words last_codes(const int8_t* row, long k, long columns, int bits) {
  alignas(32) int8_t bytes[64] = {};
  memcpy(bytes, row + k * bits / 8, bytes_of(columns, bits) - k * bits / 8);
  Words codes = bits == 8   ? whole_codes<8>(bytes, 0, 64, 8)
                : bits == 4 ? whole_codes<4>(bytes, 0, 64, 4)
                            : whole_codes<0>(bytes, 0, 64, bits);
  write(bytes, codes);
  memset(bytes + columns - k, 0, 32 - (columns - k));
  return read((const void*)bytes);
}

DQ_INLINE Words row_codes(const int8_t* row, long k, long columns, int bits) {
  if (columns - k < 32) return columns > k ? last_codes(row, k, columns, bits) : every(0);
  if (bits == 8) return whole_codes<8>(row, k, columns, bits);
  return bits == 4 ? whole_codes<4>(row, k, columns, bits) : whole_codes<0>(row, k, columns, bits);
}

// Quarter P of 32 signed bytes, and 8 of them from memory.
template <int P>
DQ_INLINE Words quarter(Words bytes) {
  const __m128i half = P < 2 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1);
  return _mm256_cvtepi8_epi32(P % 2 ? _mm_unpackhi_epi64(half, half) : half);
}
DQ_INLINE Words read_codes(const int8_t* from) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
// Byte B of each word, with its sign.
template <int B>
DQ_INLINE Words byte_of(Words words) {
  return _mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * B), 24);
}
DQ_INLINE float sum_of(Floats a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// --- dot products ---------------------------------------------------------------------------------------------------
// A row's step in assembly, because GCC spills around intrinsics: 12 sums, 2 weights and these 2 are all 16 registers.

#define DQ_STEP(MULTIPLY, ADD)                                             \
  Words u = broadcast4(act), t;                                            \
  asm inline(MULTIPLY " %4, %2, %3\n\t" MULTIPLY " %5, %2, %2\n\t" ADD            \
               " %3, %0, %0\n\t" ADD " %2, %1, %1"                         \
      : "+x"(sum[0]), "+x"(sum[1]), "+x"(u), "=&x"(t)                      \
      : "x"(weights[0]), "x"(weights[1]))

// A word holds two codes of 16 bits: products of codes of up to 9 bits and their sums by pairs are far from 2^31.
struct Halves {
  using Code = int16_t;
  static constexpr long kCodes = 2;  // codes of a word
  static constexpr int kOffset = 0;  // of an activation
  static constexpr int kOnes = 0x00010001;
  static DQ_METHOD void dot(Words& sum, Words act, Words weight) { sum = add(sum, _mm256_madd_epi16(act, weight)); }
  static DQ_METHOD void dots(Words* sum, const void* act, const Words* weights) { DQ_STEP("vpmaddwd", "vpaddd"); }
  static DQ_METHOD Words row_words(const int8_t* row, long k, long columns, int bits) {
    if (bits == 8) return _mm256_cvtepi8_epi16(read_bytes(row + k, columns - k));
    return _mm256_cvtepi8_epi16(_mm256_castsi256_si128(row_codes(row, k, columns, bits)));
  }
};

// A word holds four codes: activations u8, code + 128, times weights of few bits. A sum of 2 products with -8 to 7 is
// within 4,080 and one of 16 within 32,640, so that vpmaddubsw never saturates and eight words may be added in 16 bits;
// with -16 to 15 it is four.
template <long WORDS>
struct Short {
  using Code = uint8_t;
  static constexpr long kCodes = 4;
  static constexpr int kOffset = 128;
  static constexpr int kOnes = 0x01010101;
  static constexpr long kBlock = WORDS;
  static DQ_METHOD void short_dots(Words* sum, const void* act, const Words* weights) {
    DQ_STEP("vpmaddubsw", "vpaddw");
  }
  // times: a multiplier below 128, twice in each word
  static DQ_METHOD void widen(Words& sum, Words halves, Words times) {
    sum = add(sum, _mm256_madd_epi16(halves, times));
  }
  static DQ_METHOD void multiply_low(Words& sum, Words times) {
    sum = mul(sum, _mm256_and_si256(times, every(0xffff)));
  }
  static DQ_METHOD void dot(Words& sum, Words act, Words weight) {
    widen(sum, _mm256_maddubs_epi16(act, weight), _mm256_set1_epi16(1));
  }
  static DQ_METHOD Words row_words(const int8_t* row, long k, long columns, int bits) {
    return row_codes(row, k, columns, bits);
  }
};

using Nibbles = Short<8>;

#ifdef DQ_AVXVNNI
// A word holds four codes: activations u8, code + 128, times weights s8.
struct Bytes {
  using Code = uint8_t;
  static constexpr long kCodes = 4;
  static constexpr int kOffset = 128;
  static constexpr int kOnes = 0x01010101;
  static DQ_METHOD void dot(Words& sum, Words act, Words weight) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(act), "x"(weight));
  }
  static DQ_METHOD void dots(Words* sum, const void* act, const Words* weights) {
    Words u = broadcast4(act);
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) dot(sum[j], u, weights[j]);
  }
  static DQ_METHOD Words row_words(const int8_t* row, long k, long columns, int bits) {
    return row_codes(row, k, columns, bits);
  }
  // 32 codes of -8 to 7 times their multiplier
  static DQ_METHOD Words multiplied(Words codes, int8_t times, int8_t) {
    Words table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)multiples(times)));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
  }
};
using Wide = Bytes;      // weights of up to 8 bits
using Narrow = Bytes;    // of up to 4
using Between = Bytes;   // of up to 5
#else
using Wide = Halves;
using Narrow = Nibbles;
using Between = Short<4>;
#endif

// --- what attention needs -------------------------------------------------------------------------------------------

constexpr bool kHalves = false;  // vectors of half the lanes would save little here
using HalfFloats = Floats;
using HalfWords = Words;
DQ_INLINE HalfWords low_half(Words a) { return a; }
DQ_INLINE HalfWords read_half(const void* from) { return read(from); }
DQ_INLINE Floats whole(HalfFloats a) { return a; }
DQ_INLINE Words whole(HalfWords a) { return a; }

DQ_INLINE Flags equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
DQ_INLINE Floats chosen(Floats a, Floats b, Flags flags) { return _mm256_blendv_ps(a, b, flags); }  // b where set
DQ_INLINE int sum_of(Words a) {
  int lane[kLanes], sum = 0;
  write((void*)lane, a);
  for (int each : lane) sum += each;
  return sum;
}
DQ_INLINE int largest(Words a) {
  int lane[kLanes];
  write((void*)lane, a);
  return *std::max_element(lane, lane + kLanes);
}

// t - floor(t), and p 2^floor(t), for t up to 127: NaN stays NaN, below -126 the power is 0.
DQ_INLINE Floats raised(Floats t) { return max(every(-127.f), t); }
DQ_INLINE Floats floored(Floats t) { return _mm256_round_ps(raised(t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
DQ_INLINE Floats above_floor(Floats t) { return sub(raised(t), floored(t)); }
DQ_INLINE Floats times_floor_power(Floats p, Floats t) {
  return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(add(round(floored(t)), every(127)), 23)));
}

// The first `bytes` at `from`, up to a vector; 0 after them.
DQ_INLINE Words read_part(const void* from, long bytes) {
  return _mm256_set_m128i(read_bytes((const char*)from + 16, bytes - 16), read_bytes(from, bytes));
}

// acc += a b, as floats. In assembly for the reason above.
DQ_INLINE void dot1(Floats& acc, Words a, Words b) { asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }

#ifdef DQ_AVXVNNI
DQ_INLINE void dot4(Words& acc, Words u8, Words s8) { Bytes::dot(acc, u8, s8); }

DQ_INLINE void write_codes(int8_t* to, Mask lanes, Words value) {
  __m128i bytes = halves(value);
  write_bytes(to, lanes.count, _mm_packs_epi16(bytes, bytes));
}
// Four vectors of numbers of 0 to 255, as bytes in their order.
DQ_INLINE Words bytes_of(const Words w[4]) {
  Words packed = _mm256_packus_epi16(_mm256_packus_epi32(w[0], w[1]), _mm256_packus_epi32(w[2], w[3]));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#else
// acc += sum of two neighbouring products of 16 bits
DQ_INLINE void dot2(Words& acc, Words a, Words b) {
  Words t;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(t) : "x"(a), "x"(b));
}
// Two vectors of numbers of 16 bits, as such in their order.
DQ_INLINE Words halves_of(const Words w[2]) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(w[0], w[1]), 0xd8); }
#endif

}  // namespace dq::inline DQ_LEVEL
