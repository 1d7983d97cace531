// What a weight-only product multiplies: fp32 numbers, or pairs of bf16 where there are units for them.
//
// A word is 32 bits: one number, or two of neighbouring columns.
#pragma once
#include "arguments.h"
#include "tile.h"

namespace dq::inline DQ_LEVEL {

constexpr long kStep = 4 * kLanes;  // codes of a row that are widened at a time

DQ_INLINE void widen_codes(Words codes, Floats w[4]) {
  w[0] = to_floats(quarter<0>(codes));
  w[1] = to_floats(quarter<1>(codes));
  w[2] = to_floats(quarter<2>(codes));
  w[3] = to_floats(quarter<3>(codes));
}

struct Singles {
  using Element = float;
  static constexpr long kCodes = 1;  // elements of a word
  static constexpr Dtype kDtype = FP32;
  static constexpr long kThin = kLanes == 8 ? 6 : 16;
  static constexpr int kWords = 4;  // vectors of a step

  // Panels: what a row's word adds to kLanes sums; kLanes channels by 4 columns as words of these columns; one element.
  static DQ_METHOD void dot(Floats& sum, Words act, Words weight) {
    sum = multiply_add(as_floats(act), as_floats(weight), sum);
  }
  static DQ_METHOD void lay(uint8_t* to, const Floats w[4]) {
    DQ_UNROLL for (int c = 0; c < 4; c++) write((float*)(to + c * 4 * kTile), w[c]);
  }
  static DQ_METHOD Element element(float value) { return value; }

  // Thin products: what is added to codes, and a step of them with it.
  template <int FORM>
  static constexpr float offset(int) {
    return 0;
  }
  static DQ_METHOD void join(const Floats from[4], Words w[4]) {
    DQ_UNROLL for (int j = 0; j < 4; j++) w[j] = as_words(from[j]);
  }
  template <int FORM, bool AFFINE>
  static DQ_METHOD void widen(const int8_t* row, long k, long columns, int bits, Floats shift, Words w[4]) {
    Floats f[4];
    widen_codes(whole_codes<FORM>(row, k, columns, bits), f);
    DQ_UNROLL for (int j = 0; j < 4; j++) w[j] = as_words(AFFINE ? add(f[j], shift) : f[j]);
  }
  template <int MR>
  static constexpr int together() {  // channels that share loads of x, as many as registers hold
    return kLanes == 8 ? (MR <= 2 ? 4 : MR <= 4 ? 2 : 1) : MR <= 4 ? 4 : MR <= 8 ? 2 : 1;
  }
  static void fetch_row(const void* x, long index, long width, Dtype dtype, uint8_t* row) {
    fetch(x, index, width, dtype, 0, (float*)row);
  }
};

#ifdef DQ_BF16_UNITS
struct Pairs {
  using Element = uint16_t;
  static constexpr long kCodes = 2;
  static constexpr Dtype kDtype = BF16;
  static constexpr long kThin = 16;
  static constexpr int kWords = 2;

  static DQ_METHOD void dot(Floats& sum, Words act, Words weight) { dot2(sum, act, weight); }
  static DQ_METHOD void lay(uint8_t* to, const Floats w[4]) {
    write(to, in_pairs(w[0], w[1]));
    write(to + 4 * kTile, in_pairs(w[2], w[3]));
  }
  static DQ_METHOD Element element(float value) {  // of a number that is one of bf16
    int bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
  }

  // In bf16, 0x4300 + u is the number 128 + u for u up to 127. Codes of up to 7 bits plus half their range are such u.
  template <int FORM>
  static constexpr float offset(int bits) {
    return FORM == 8 ? 0 : 128 + (1 << (bits - 1));
  }
  static DQ_METHOD void join(const Floats from[4], Words w[2]) {
    w[0] = in_order(from[0], from[1]);
    w[1] = in_order(from[2], from[3]);
  }
  template <int FORM, bool AFFINE>
  static DQ_METHOD void widen(const int8_t* row, long k, long columns, int bits, Floats shift, Words w[2]) {
    if constexpr (FORM == 8) {
      Floats f[4];
      widen_codes(whole_codes<8>(row, k, columns, 8), f);
      DQ_UNROLL for (int j = 0; j < 4; j++) f[j] = AFFINE ? add(f[j], shift) : f[j];
      join(f, w);
    } else {
      raised_codes(row, k, columns, FORM ? FORM : bits, w);
    }
  }
  template <int MR>
  static constexpr int together() {
    return MR <= 4 ? 4 : MR <= 8 ? 2 : 1;
  }
  static void fetch_row(const void* x, long index, long width, Dtype, uint8_t* row) {
    memcpy(row, (const uint16_t*)x + index, 2 * width);
  }
};
#endif

}  // namespace dq::inline DQ_LEVEL
