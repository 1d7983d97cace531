// Weights of 2 to 8 bits: where the codes of a packed row are, the same for every level.
//
// A row is a little-endian stream of bits (dq/formats/base.py: pack_bits), so that eight codes of b bits are b bytes and
// a code lies in two neighbouring bytes. 16 bytes of the row, shuffled so that each 16-bit lane holds the two bytes of
// its code, times the power of two that moves the code to the top, shifted back with its sign: eight codes.
#pragma once
#include "common.h"

namespace dq {

struct Spread {
  alignas(64) uint16_t start[32];  // of 64 bytes: 128-bit lane l takes eight words from 16 l codes on
  alignas(64) uint8_t first[64];   // bytes of a lane: the first eight codes of its 16
  alignas(64) uint8_t second[64];  // and the other eight
  alignas(64) uint16_t raise[32];  // 2^(bits above the code)
  // the same for codes in order: lane l takes eight, from 8 l on, and in the other half of the step 32 more
  alignas(64) uint16_t turn[2][32];
  alignas(64) uint8_t ordered[64];
};

constexpr Spread spread_of(int bits) {
  Spread s{};
  for (int i = 0; i < 32; i++) {
    const int bit = i % 8 * bits, byte = bit / 8;
    s.start[i] = i / 8 * bits + i % 8;
    for (int half = 0; half < 2; half++) {
      s.first[2 * i + half] = byte + half;
      s.second[2 * i + half] = byte + half + bits;
      s.ordered[2 * i + half] = byte + half + i / 8 * bits % 2;
      s.turn[half][i] = i / 8 * bits / 2 + i % 8 + half * 2 * bits;
    }
    s.raise[i] = 1 << (16 - bits - bit % 8);
  }
  return s;
}

inline constexpr Spread kSpread[] = {spread_of(2), spread_of(3), spread_of(4), spread_of(5), spread_of(6), spread_of(7)};

DQ_INLINE const Spread& spread(int bits) { return kSpread[bits - 2]; }
DQ_INLINE long bytes_of(long codes, int bits) { return (codes * bits + 7) / 8; }

}  // namespace dq
