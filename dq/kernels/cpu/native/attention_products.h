// The kinds of products attention is made of, each by how it fills the 4 bytes of a word, and what they share.
//
//   Fp32    one number: every dtype on every level
//   Bf16    two: bf16 where there are units for it
//   Int8    four bytes, k + 128 and q, p and v
//   Int16   two codes of 8 bits in 16, where no instruction multiplies bytes without saturating
//
// kStep: keys the exponentials take at a time. kKeys: keys of a block. kWidest: blocks of columns of a tile of the weighted
// sum, as registers allow. kMeasured: codes, whose scales come first.
#pragma once
#include "attention_arguments.h"
#include "common.h"

#ifndef DQ_LEVEL
#error "include a level first: avx512.h or avx2.h"
#endif

namespace dq::inline DQ_LEVEL {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLog2Of255 = 7.99435343685886f;

using Lanes32 = int __attribute__((vector_size(4 * kLanes)));  // for operators: Words are vectors of 64 bits to them

DQ_INLINE void clear(Floats& a) { a = every(0.f); }
DQ_INLINE void clear(Words& a) { a = every(0); }
DQ_INLINE Floats as_floats(Floats a) { return a; }
DQ_INLINE Floats as_floats(Words a) { return to_floats(a); }

// --- 2^t ------------------------------------------------------------------------------------------------------------
// t = floor(t) + f; a polynomial in f, then the exponent. Unlike exp2 of tile.h: NaN stays NaN, -inf is exactly 0. The
// fits have the smallest relative error on [0, 1].

template <int TERMS>
DQ_INLINE Floats power(Floats t, const float (&fit)[TERMS]) {
  Floats f = above_floor(t), p = every(fit[0]);
  DQ_UNROLL for (int i = 1; i < TERMS; i++) p = multiply_add(p, f, every(fit[i]));
  return times_floor_power(p, t);
}

// relative errors 7.5e-5, for results of 8 bits, and 1.5e-7 with the rounding of every step
constexpr float kCubic[] = {0.0780245511f, 0.226067143f, 0.695833528f, 0.999925219f};
constexpr float kQuintic[] = {0.00187757937f, 0.00898933969f, 0.0558263101f, 0.240153626f, 0.693153083f, 0.99999994f};

// --- quantization ---------------------------------------------------------------------------------------------------

// |x| as integers: they order like the numbers, with infinity and then NaN above all of them
DQ_INLINE Words magnitude(Floats x) { return (Words)x & every(0x7fffffff); }

// Scale s of symmetric 8-bit codes, x = code * s, for a largest magnitude (bits of a float): NaN unless it is finite.
DQ_INLINE float scale_of(int peak) {
  float largest;
  memcpy(&largest, &peak, 4);
  return largest <= std::numeric_limits<float>::max() ? std::max(largest, 1e-12f) / 127.f : kNaN;
}

// --- products -------------------------------------------------------------------------------------------------------

constexpr long kAhead = 8;  // tokens

// Where a head of a tensor starts, and its bytes from token to token.
struct Rows {
  const char* first;
  long step, bytes;

  const char* at(long token) const { return first + token * step; }
  // Tokens of a head are far apart, often a page: what comes soon is fetched now, whether it exists or not.
  void expect(long token) const {
    for (long byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at(token + kAhead) + byte);
  }
};

struct Fp32 {
  using Sum = Floats;
  using HalfSum = HalfFloats;
  static constexpr long kWord = 1, kStep = kLanes, kKeys = 256, kWidest = kLanes == 16 ? 5 : 3;
  static constexpr bool kMeasured = false;
  static constexpr auto& kFit = kQuintic;

  template <class S, class W>
  static DQ_METHOD void step(S& sum, W a, W b) {
    dot1(sum, a, b);
  }
  // Words of one token from `word` on.
  template <Dtype DTYPE>
  static DQ_METHOD Words words(const char* token, long word, long width) {
    return (Words)load(token, word, DTYPE, first_lanes(width - word));
  }
  // Words of a vector of columns, across the tokens of a word.
  template <Dtype DTYPE>
  static DQ_METHOD Words across(const Rows& v, long key, long, long column, long width, const float*) {
    return (Words)load(v.at(key), column, DTYPE, first_lanes(width - column));
  }
  // kStep numbers p to words; their sum goes to `total`, a vector that starts at 0.
  static DQ_METHOD void weights(const Floats* p, Floats& total, char* to) {
    total = add(total, p[0]);
    write((float*)to, p[0]);
  }
};

#if defined(DQ_BF16_UNITS)
struct Bf16 {
  using Sum = Floats;
  using HalfSum = HalfFloats;
  static constexpr long kWord = 2, kStep = 2 * kLanes, kKeys = 512, kWidest = 5;
  static constexpr bool kMeasured = false;
  static constexpr auto& kFit = kCubic;

  template <class S, class W>
  static DQ_METHOD void step(S& sum, W a, W b) {
    dot2(sum, a, b);
  }
  template <Dtype>
  static DQ_METHOD Words words(const char* token, long word, long width) {
    return read_part(token + 4 * word, 2 * width - 4 * word);
  }
  template <Dtype>
  static DQ_METHOD Words across(const Rows& v, long key, long keys, long column, long width, const float*) {
    __m256i pair[2];
    DQ_UNROLL for (int i = 0; i < 2; i++) {
      pair[i] = _mm256_maskz_loadu_epi16(first_lanes(key + i < keys ? width - column : 0), v.at(key + i) + 2 * column);
    }
    return _mm512_cvtepu16_epi32(pair[0]) | _mm512_slli_epi32(_mm512_cvtepu16_epi32(pair[1]), 16);
  }
  static DQ_METHOD void weights(const Floats* p, Floats& total, char* to) {
    total = add(total, add(p[0], p[1]));
    write((void*)to, (Words)_mm512_cvtne2ps_pbh(p[1], p[0]));
  }
};
#endif

// Codes of values, `kWord` to a word, the first token lowest.
template <class T, Dtype DTYPE>
DQ_INLINE Words codes_across(const Rows& v, long key, long keys, long column, long width, const float* inverse) {
  constexpr int bits = 32 / T::kWord;
  Lanes32 word = (Lanes32)every(0);
  DQ_UNROLL for (int i = T::kWord - 1; i >= 0; i--) {
    Floats x = load(v.at(key + i), column, DTYPE, first_lanes(key + i < keys ? width - column : 0));
    word = word << bits | ((Lanes32)round(mul(x, read(inverse + column))) & ((1 << bits) - 1));
  }
  return (Words)word;
}

#if defined(DQ_BYTE_PRODUCTS)
struct Int8 {
  using Code = int8_t;
  using Sum = Words;
  using HalfSum = HalfWords;
  static constexpr long kWord = 4, kStep = 4 * kLanes, kKeys = 512, kWidest = kLanes == 16 ? 5 : 3;
  static constexpr int kOffset = 128;  // of a key's codes
  static constexpr bool kMeasured = true;
  static constexpr auto& kFit = kCubic;

  template <class S, class W>
  static DQ_METHOD void step(S& sum, W a, W b) {
    dot4(sum, a, b);
  }
  static DQ_METHOD Words with_offset(Words codes) { return codes ^ every(int(0x80808080)); }
  template <Dtype DTYPE>
  static DQ_METHOD Words across(const Rows& v, long key, long keys, long column, long width, const float* inverse) {
    return codes_across<Int8, DTYPE>(v, key, keys, column, width, inverse);
  }
  static DQ_METHOD void weights(const Floats* p, Words& total, char* to) {
    Words codes[4] = {round(p[0]), round(p[1]), round(p[2]), round(p[3])}, bytes = bytes_of(codes);
    dot4(total, bytes, every(0x01010101));
    write((void*)to, bytes);
  }
};
using Integers = Int8;
#else
struct Int16 {
  using Code = int16_t;
  using Sum = Words;
  using HalfSum = HalfWords;
  static constexpr long kWord = 2, kStep = 2 * kLanes, kKeys = 512, kWidest = 2;
  static constexpr int kOffset = 0;
  static constexpr bool kMeasured = true;
  static constexpr auto& kFit = kCubic;

  template <class S, class W>
  static DQ_METHOD void step(S& sum, W a, W b) {
    dot2(sum, a, b);
  }
  static DQ_METHOD Words with_offset(Words codes) { return codes; }
  template <Dtype DTYPE>
  static DQ_METHOD Words across(const Rows& v, long key, long keys, long column, long width, const float* inverse) {
    return codes_across<Int16, DTYPE>(v, key, keys, column, width, inverse);
  }
  static DQ_METHOD void weights(const Floats* p, Words& total, char* to) {
    Words codes[2] = {round(p[0]), round(p[1])}, halves = halves_of(codes);
    dot2(total, halves, every(0x00010001));
    write((void*)to, halves);
  }
};
using Integers = Int16;
#endif

}  // namespace
}  // namespace dq::inline DQ_LEVEL
