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
  const int8_t* multiplier;  // (outputs, multiplied), or null: each of `multiplier_group` columns of 4-bit codes
  long multiplier_group, multiplied;
};

constexpr long kMultiplied = 32;  // a group of one multiplier has a multiple of so many columns

struct Panel {
  int8_t* codes;  // words [64 / kTile][padded columns / codes of a word][kTile]
  int* sums;      // [groups][64] sum of codes
  float* scale;   // [groups][64]
  float* bias;    // [64]
  uint16_t* up;   // [rank / 2][64][2]
  int* times;     // [multiplied][64] multipliers of codes, twice in 16 bits; only read by products of blocks
  long bytes;     // of the codes of a tile
  long group;     // columns of a multiplier, 0: all have that of `times[0]`, which is 1
};

// The multipliers of column k.
DQ_INLINE const int* times_at(const Panel& p, long k) { return p.group ? p.times + k / p.group * kWide : p.times; }

template <class Dot>
DQ_INLINE long tile_bytes(long padded) {
  return padded / Dot::kCodes * 4 * kTile;
}

template <class Dot>
DQ_INLINE size_t panel_bytes(long padded, long groups, long rank, long multiplied = 1) {
  return kWide / kTile * tile_bytes<Dot>(padded) + kWide * (groups * 8 + 4 + 4 * multiplied + 2 * round_up(rank, 2)) +
         64;
}

template <class Dot>
DQ_INLINE Panel panel_in(void* place, long padded, long groups, long multiplied = 1, long group = 0) {
  long bytes = tile_bytes<Dot>(padded);
  int8_t* codes = (int8_t*)place;
  int* sums = (int*)(codes + kWide / kTile * bytes);
  float *scale = (float*)(sums + kWide * groups), *bias = scale + kWide * groups;
  int* times = (int*)(bias + kWide);
  for (long n = 0; place && n < kWide * multiplied; n++) times[n] = 0x00010001;
  return {.codes = codes, .sums = sums, .scale = scale, .bias = bias, .up = (uint16_t*)(times + kWide * multiplied),
          .times = times, .bytes = bytes, .group = group};
}

// What a tile from output channel n of the panel on sees: the same arrays, from there.
DQ_INLINE Panel from(const Panel& p, long n) {
  return {.codes = p.codes + n / kTile * p.bytes + n % kTile * 4,
          .sums = p.sums + n,
          .scale = p.scale + n,
          .bias = p.bias + n,
          .up = p.up + 2 * n,
          .times = p.times + n,
          .bytes = p.bytes,
          .group = p.group};
}

// A step of kLanes whole rows; without a call for ends in the loop, which would keep the rows out of registers.
template <int FORM>
DQ_INLINE void whole_rows(Words r[kLanes], const int8_t* codes, long row_bytes, long k, long columns, int bits) {
  DQ_UNROLL for (int i = 0; i < kLanes; i++) r[i] = whole_codes<FORM>(codes + i * row_bytes, k, columns, bits);
}

template <class Dot>
DQ_INLINE void step_rows(Words r[kLanes], const int8_t* codes, long row_bytes, long there, long k, long columns,
                         int bits) {
  if (Dot::kCodes == 4 && there >= kLanes && columns - k >= kLanes * Dot::kCodes) {
    if (bits == 8) return whole_rows<8>(r, codes, row_bytes, k, columns, bits);
    if (bits == 4) return whole_rows<4>(r, codes, row_bytes, k, columns, bits);
    return whole_rows<0>(r, codes, row_bytes, k, columns, bits);
  }
  DQ_UNROLL for (int i = 0; i < kLanes; i++) {
    r[i] = i < there ? Dot::row_words(codes + i * row_bytes, k, columns, bits) : every(0);
  }
}

// kLanes rows (those beyond `there` are 0) into kLanes of every kTile words of `out`, the last four columns filled up.
// Where the product is of whole bytes, codes are multiplied here (`times`: as in Weight), and products fit a byte.
template <class Dot>
static inline void lay_block(const int8_t* codes, long row_bytes, long there, long columns, int bits, int8_t* out,
                             const int8_t* times = nullptr, long group = 1, long multiplied = 1) {
  constexpr long step = kLanes * Dot::kCodes;
  for (long k = 0; k < columns; k += step) {
    long words = std::min(kLanes, (round_up(columns, 4) - k) / Dot::kCodes);
    Words r[kLanes];
    step_rows<Dot>(r, codes, row_bytes, there, k, columns, bits);
    if constexpr (requires { Dot::multiplied(r[0], 1, 1); }) {
      const long g = k / group, next = std::min((k + kMultiplied) / group, multiplied - 1);
      for (int i = 0; times && i < kLanes && i < there; i++) {
        r[i] = Dot::multiplied(r[i], times[i * multiplied + g], times[i * multiplied + next]);
      }
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
      for (long k = g * group, stop; k < last; k = stop) {
        stop = std::min(k + kMultiplied, last);
        Words run[kRegisters];
        DQ_UNROLL for (int j = 0; j < kRegisters; j++) run[j] = every(0);
        for (long c = k; c < stop; c += Dot::kCodes) {
          const int8_t* at = part.codes + c / Dot::kCodes * 4 * kTile;
          DQ_UNROLL for (int j = 0; j < kRegisters; j++) Dot::dot(run[j], ones, read(at + 4 * kLanes * j));
        }
        if constexpr (requires { Dot::kBlock; }) {
          const int* times = times_at(part, k);
          DQ_UNROLL for (int j = 0; j < kRegisters; j++) Dot::multiply_low(run[j], read(times + kLanes * j));
        }
        DQ_UNROLL for (int j = 0; j < kRegisters; j++) sum[j] = add(sum[j], run[j]);
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

// Multipliers for products of blocks.
static inline void lay_times(const Panel& p, const Weight& w, long first) {
  for (long n = 0; n < kWide; n++) {
    for (long g = 0; g < w.multiplied; g++) {
      int times = first + n < w.outputs ? w.multiplier[(first + n) * w.multiplied + g] & 0x7f : 1;
      p.times[g * kWide + n] = times * 0x00010001;
    }
  }
}

template <class Dot>
static inline void lay_out(const Weight& w, long first, const Panel& p) {
  for (long n = 0; n < kWide; n += kLanes) {
    const int8_t* rows = w.codes + (first + n) * w.row_bytes;
    const int8_t* times = w.multiplier ? w.multiplier + (first + n) * w.multiplied : nullptr;
    lay_block<Dot>(rows, w.row_bytes, w.outputs - first - n, w.columns, w.bits, from(p, n).codes, times,
                   w.multiplier_group, w.multiplied);
  }
  if constexpr (requires { Dot::kBlock; }) {
    if (w.multiplier) lay_times(p, w, first);
  }
  if (w.zero) lay_zeros<Dot>(p, w, first);
  lay_sums<Dot>(p, w.columns, w.group, w.groups);
  lay_vectors(p, w, first);
}

}  // namespace dq::inline DQ_LEVEL
