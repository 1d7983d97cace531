// The product: MR rows of activation codes times a tile of output channels, and everything that follows it.
//
//   f[m, n] = sum_g sx[m, g] sw[n, g] (sum_{k in g} u[m, k] w[n, k] - (o + z[m, g]) sum_{k in g} w[n, k])
//   y = epilogue(f + low[m] up[n]^T + bias[n])     u = code + o, o = Dot::kOffset: exact in 32 bits up to K = 65 000
#pragma once
#include "panel.h"

namespace dq::inline DQ_LEVEL {

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

// 2^t; relative error under 3e-7. t above 127 gives infinity, below -150 zero.
DQ_INLINE Floats exp2(Floats t) {
  t = min(max(t, every(-160.f)), every(130.f));
  Floats whole = to_nearest(t), part = sub(t, whole);
  const float taylor[] = {
      1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f};
  Floats sum = every(taylor[0]);
  DQ_UNROLL for (int i = 1; i < 7; i++) sum = multiply_add(sum, part, every(taylor[i]));
  return times_power(sum, whole);
}

// x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): GELU in its tanh form. NaN stays NaN: x is a factor of the result.
DQ_INLINE Floats gelu_tanh(Floats x) {
  Floats cubic = multiply_add(mul(x, x), every(0.044715f), every(1.f));
  Floats t = mul(mul(x, cubic), every(-2.f * 0.7978845608f * 1.44269504f));
  return div(x, add(every(1.f), exp2(t)));
}

template <class Dot, int MR, bool AFFINE>
DQ_INLINE void start(Words acc[MR][kRegisters], const Panel& p, const Quantized& q, long m, long g) {
  DQ_UNROLL for (int j = 0; j < kRegisters; j++) {
    Words sums = read(p.sums + g * kWide + kLanes * j);
    Words even = Dot::kOffset ? sub(every(0), times_128(sums)) : every(0);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      if constexpr (AFFINE) {
        int zero = q.zero[(m + i) * q.groups + (q.groups > 1 ? g : 0)];
        acc[i][j] = mul(sums, every(-Dot::kOffset - zero));
      } else {
        acc[i][j] = even;
      }
    }
  }
}

// `words` of a block, whose sums fit 16 bits and are widened once, times the multiplier of their group.
template <class Dot, int MR>
DQ_INLINE void multiply_block(Words acc[MR][kRegisters], const uint8_t* const* a, long k, const int8_t* codes,
                              const int* times, int words) {
  Words sum[MR][kRegisters];
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) sum[i][j] = every(0);
  }
  DQ_UNROLL for (int w = 0; w < words; w++) {
    Words b[kRegisters];
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) b[j] = read(codes + 4 * kTile * (k + w) + 4 * kLanes * j);
    DQ_UNROLL for (int i = 0; i < MR; i++) Dot::short_dots(sum[i], a[i] + 4 * (k + w), b);
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) Dot::widen(acc[i][j], sum[i][j], read(times + kLanes * j));
  }
}

template <class Dot, int MR>
DQ_INLINE void multiply(Words acc[MR][kRegisters], const uint8_t* const* row, long offset, const int8_t* codes,
                        long words, const int* times, long group) {
  const uint8_t* a[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) a[i] = row[i] + offset;
  if constexpr (requires { Dot::kBlock; }) {
    long k = 0, next = group ? group / Dot::kCodes : words + 1;  // word of the next multiplier
    for (; k + Dot::kBlock <= words; k += Dot::kBlock) {
      multiply_block<Dot, MR>(acc, a, k, codes, times, Dot::kBlock);
      if (k + Dot::kBlock == next) times += kWide, next += group / Dot::kCodes;
    }
    for (; k < words; k++) multiply_block<Dot, MR>(acc, a, k, codes, times, 1);
  } else {
    for (long k = 0; k < words; k++) {
      Words b[kRegisters];
      DQ_UNROLL for (int j = 0; j < kRegisters; j++) b[j] = read(codes + 4 * kTile * k + 4 * kLanes * j);
      DQ_UNROLL for (int i = 0; i < MR; i++) Dot::dots(acc[i], a[i] + 4 * k, b);
    }
  }
}

// In dot2, pairs of the low-rank branch: f += low[m, r] up[n, r].
template <int MR>
DQ_INLINE void add_branch(Floats f[MR][kRegisters], const Panel& p, const Output& o, long m) {
  for (long r = 0; r < o.rank; r += 2) {
    Words b[kRegisters];
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) b[j] = read(p.up + r * kWide + 2 * kLanes * j);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      Words a = broadcast4((const uint16_t*)o.low + (m + i) * o.rank + r);
      DQ_UNROLL for (int j = 0; j < kRegisters; j++) dot2(f[i][j], a, b[j]);
    }
  }
}

template <int MR>
DQ_INLINE void finish(Floats f[MR][kRegisters], const Panel& p, const Output& o, long n, long outputs, long at) {
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) {
      Mask lanes = first_lanes(outputs - n - kLanes * j);
      Floats y = add(f[i][j], read(p.bias + kLanes * j));
      if (o.gelu) y = gelu_tanh(y);
      store(o.y, (at + i) * o.stride + n + kLanes * j, o.dtype, lanes, y);
    }
  }
}

// One scale a row and output channel. `at`: the row of o.y to write; n: first output channel, of `outputs`.
template <class Dot, int MR, bool AFFINE>
static __attribute__((noinline)) void tile(const Panel& p, const Quantized& q, const Taps& taps, const Output& o,
                                           const uint8_t* const* row, long m, long n, long outputs, long at) {
  Words acc[MR][kRegisters];
  Floats f[MR][kRegisters];
  start<Dot, MR, AFFINE>(acc, p, q, m, 0);
  const long words = taps.width / Dot::kCodes;
  for (long t = 0; t < taps.count; t++) {
    multiply<Dot, MR>(acc, row, taps.offset[t], p.codes + t * words * 4 * kTile, words, p.times, p.group);
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    Floats scale = every(q.scale[m + i]);
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) {
      Floats sum = mul(to_floats(acc[i][j]), scale);
      f[i][j] = mul(sum, read(p.scale + kLanes * j));
    }
  }
  if (o.low) add_branch<MR>(f, p, o, m);
  finish<MR>(f, p, o, n, outputs, at);
}

// f += the product over one group of columns, scaled. The sums of all groups live in memory (L1), and one group is one
// call: with either in registers GCC 12 spills the running sums in the inner loop, at three times the cost.
template <class Dot, int MR, bool AFFINE, bool ACT>
static __attribute__((noinline)) void add_group(const Panel& p, const Quantized& q, const uint8_t* const* row, long m,
                                                long g, long first, long words, Floats (*f)[kRegisters]) {
  Words acc[MR][kRegisters];
  start<Dot, MR, AFFINE>(acc, p, q, m, g);
  multiply<Dot, MR>(acc, row, first * sizeof(typename Dot::Code), p.codes + first * (4 / Dot::kCodes) * kTile, words,
                    p.group ? p.times + g * kWide : p.times, p.group);  // groups of activations are those of the weight
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) {
      Floats scale = read(p.scale + g * kWide + kLanes * j);
      if constexpr (ACT) scale = mul(scale, every(q.scale[(m + i) * q.groups + g]));
      f[i][j] = multiply_add(to_floats(acc[i][j]), scale, f[i][j]);
    }
  }
}

// A scale for each group of columns: of the weight, of the activations (ACT) or of both.
template <class Dot, int MR, bool AFFINE, bool ACT>
static void tile_grouped(const Panel& p, const Quantized& q, const Taps& taps, const Output& o, long group,
                         long groups, const uint8_t* const* row, long m, long n, long outputs, long at) {
  Floats f[MR][kRegisters];
  for (int i = 0; i < MR; i++) {
    for (int j = 0; j < kRegisters; j++) f[i][j] = every(0.f);
  }
  for (long g = 0; g < groups; g++) {
    long first = g * group, words = (std::min(group, taps.width - first) + Dot::kCodes - 1) / Dot::kCodes;
    add_group<Dot, MR, AFFINE, ACT>(p, q, row, m, g, first, words, f);
  }
  for (int i = 0; i < MR && !ACT; i++) {
    for (int j = 0; j < kRegisters; j++) f[i][j] = mul(f[i][j], every(q.scale[m + i]));
  }
  if (o.low) add_branch<MR>(f, p, o, m);
  finish<MR>(f, p, o, n, outputs, at);
}

}  // namespace dq::inline DQ_LEVEL
