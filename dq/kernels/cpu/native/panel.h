// Weights: 64 output channels at a time, from their canonical rows to the order the dot product wants, in cache.
//
//   rows (64, columns) int8 or int4  ->  words [64 / kTile][columns / codes of a word][kTile]
//
// A word is 32 bits: the codes of neighbouring columns that one lane of the dot product takes. A panel is laid out when
// it is needed and thrown away: at 64 bytes of weight per few cycles this costs a percent or two of the product it
// serves, and the stored weight stays one copy in one documented order.
#pragma once
#include "rows.h"

namespace dq::inline DQ_LEVEL {

constexpr long kTile = kRegisters * kLanes;  // output channels of a tile

struct Weight {
  const int8_t* codes;  // (outputs, row_bytes)
  const float* scale;   // (outputs, scale_groups), or one for all (scale_stride 0)
  const int8_t* zero;   // as scale: zero points of affine codes, or null
  const void* bias;     // (outputs,) in `dtype`, or null
  const void* up;       // (outputs, rank) bf16 second factor of the low-rank branch, or null
  long outputs, columns, row_bytes, scale_stride, scale_groups, group, groups, rank;
  int bits;
  Dtype dtype;
  float shift;  // of the activations: y -= shift * sum of the decoded weights
};

struct Panel {
  int8_t* codes;  // words [64 / kTile][padded columns / codes of a word][kTile]
  int* sums;      // [groups][64] sum of codes
  float* scale;   // [groups][64]
  float* bias;    // [64]
  uint16_t* up;   // [rank / 2][64][2]
  long bytes;     // of the codes of a tile
};

template <class Dot>
DQ_INLINE long tile_bytes(long padded) {
  return padded / Dot::kCodes * 4 * kTile;
}

template <class Dot>
DQ_INLINE size_t panel_bytes(long padded, long groups, long rank) {
  return kWide / kTile * tile_bytes<Dot>(padded) + kWide * (groups * 8 + 4 + 2 * round_up(rank, 2)) + 64;
}

template <class Dot>
DQ_INLINE Panel panel_in(void* place, long padded, long groups) {
  long bytes = tile_bytes<Dot>(padded);
  int8_t* codes = (int8_t*)place;
  int* sums = (int*)(codes + kWide / kTile * bytes);
  float *scale = (float*)(sums + kWide * groups), *bias = scale + kWide * groups;
  return {.codes = codes, .sums = sums, .scale = scale, .bias = bias, .up = (uint16_t*)(bias + kWide), .bytes = bytes};
}

// What a tile from output channel n of the panel on sees: the same arrays, from there.
DQ_INLINE Panel from(const Panel& p, long n) {
  return {.codes = p.codes + n / kTile * p.bytes + n % kTile * 4,
          .sums = p.sums + n,
          .scale = p.scale + n,
          .bias = p.bias + n,
          .up = p.up + 2 * n,
          .bytes = p.bytes};
}

// kLanes rows (those beyond `there` are 0) into kLanes of every kTile words of `out`, the last four columns filled up.
template <class Dot>
static inline void lay_block(const int8_t* codes, long row_bytes, long there, long columns, int bits, int8_t* out) {
  constexpr long step = kLanes * Dot::kCodes;
  for (long k = 0; k < columns; k += step) {
    long words = std::min(kLanes, (round_up(columns, 4) - k) / Dot::kCodes);
    Words r[kLanes];
    DQ_UNROLL for (int i = 0; i < kLanes; i++) {
      r[i] = i < there ? Dot::row_words(codes + i * row_bytes, k, columns, bits) : every(0);
    }
    transpose(r);
    int8_t* to = out + k / Dot::kCodes * 4 * kTile;
    if (words == kLanes) {
      DQ_UNROLL for (int i = 0; i < kLanes; i++) write(to + i * 4 * kTile, r[i]);
    } else {
      for (long i = 0; i < words; i++) write(to + i * 4 * kTile, r[i]);
    }
  }
}

// Affine codes less their zero points: a bit more than the codes have, which Dot must hold.
template <class Dot>
static inline void lay_zeros(const Panel& p, const Weight& w, long first) {
  constexpr int bits = 8 * sizeof(typename Dot::Code);
  for (long index = 0; index < w.groups * kWide; index += kLanes) {
    const long g = index / kWide, n = index % kWide, last = std::min((g + 1) * w.group, w.columns);
    unsigned zero[kLanes];
    for (long i = 0; i < kLanes; i++) {
      const long at = (first + n + i) * w.scale_stride + (w.scale_groups > 1 ? g : 0);
      zero[i] = first + n + i < w.outputs ? (bits == 8 ? 0xffu : 0xffffu) & w.zero[at] : 0;
      zero[i] *= Dot::kOnes;
    }
    const Words zeros = read((const void*)zero);
    int8_t* codes = from(p, n).codes;
    for (long k = g * w.group; k < last; k += Dot::kCodes) {
      int8_t* word = codes + k / Dot::kCodes * 4 * kTile;
      Words less = bits == 8 ? sub_bytes(read(word), zeros) : sub_halves(read(word), zeros);
      if (k + Dot::kCodes > w.columns) less = both(less, every(int((1u << bits * (w.columns - k)) - 1)));
      write(word, less);
    }
  }
}

// Sums of codes over each group of columns; `group` is a multiple of 4 or covers all columns.
template <class Dot>
static inline void lay_sums(const Panel& p, long columns, long group, long groups) {
  const Words ones = every(Dot::kOnes);
  for (long t = 0; t < kWide; t += kTile) {
    Panel part = from(p, t);
    for (long g = 0; g < groups; g++) {
      Words sum[kRegisters];
      DQ_UNROLL for (int j = 0; j < kRegisters; j++) sum[j] = every(0);
      long last = std::min((g + 1) * group, columns);
      for (long k = g * group; k < last; k += Dot::kCodes) {
        const int8_t* at = part.codes + k / Dot::kCodes * 4 * kTile;
        DQ_UNROLL for (int j = 0; j < kRegisters; j++) Dot::dot(sum[j], ones, read(at + 4 * kLanes * j));
      }
      DQ_UNROLL for (int j = 0; j < kRegisters; j++) write(part.sums + g * kWide + kLanes * j, sum[j]);
    }
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
  for (long n = 0; w.bias && n < kWide; n += kLanes) {
    Floats bias = load(w.bias, first + n, w.dtype, first_lanes(w.outputs - first - n));
    write(p.bias + n, add(read(p.bias + n), bias));
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

template <class Dot>
static inline void lay_out(const Weight& w, long first, const Panel& p) {
  for (long n = 0; n < kWide; n += kLanes) {
    const int8_t* rows = w.codes + (first + n) * w.row_bytes;
    lay_block<Dot>(rows, w.row_bytes, w.outputs - first - n, w.columns, w.bits, from(p, n).codes);
  }
  if (w.zero) lay_zeros<Dot>(p, w, first);
  lay_sums<Dot>(p, w.columns, w.group, w.groups);
  lay_vectors(p, w, first);
}

}  // namespace dq::inline DQ_LEVEL
