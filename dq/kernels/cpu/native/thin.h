// Weight-only linears on a few rows (modulation, time and text projections): bound by reading the weight once.
//
//   y[m, n] = f(s[n] (sum_k x[m, k] (q[n, k] + o) - (z[n] + o) sum_k x[m, k]) + low[m] up[n]^T + bias[n])
//
// Some output channels at a time, their codes widened in registers and met by every row. Codes are exact in bf16, too,
// so that nothing but the sum is rounded. o: what a unit adds to codes because that is the quickest way to widen them,
// or -z.
// Where groups of columns have scales of their own, weights are scaled before they meet the rows.
#pragma once
#include "units.h"

namespace dq::inline DQ_LEVEL {
namespace {

constexpr long kThinBytes = kLanes == 8 ? 24 << 10 : 40 << 10;  // of x, in L1 of 32 or 48 KB while all channels pass

struct Thin {
  const uint8_t* x;  // [steps][MR][kStep] of Unit::Element, zeros behind the columns
  const float* sums;  // [kLanes] of the rows of x
  const float* low;   // (MR, low_stride), zeros behind the rank; or null
  const int* group;   // [steps * 4] that kLanes columns belong to
  float* y;           // (outputs, kLanes): the rows of a channel side by side
  long steps, low_stride;
};

// What NR channels from n on read.
template <int NR>
struct Channels {
  const int8_t* row[NR];
  const float* scale[NR];
  const int8_t* zero[NR];

  Channels(const DqWeightOnly& l, long n) {
    for (int c = 0; c < NR; c++) {
      const long at = std::min(n + c, l.outputs - 1);
      row[c] = l.weight + at * l.row_bytes;
      scale[c] = l.weight_scale + at * l.weight_scale_stride;
      zero[c] = l.weight_zero + at * l.weight_scale_stride;
    }
  }
};

// A step of weights as floats, each with the zero point and scale of its group.
template <bool AFFINE>
DQ_INLINE void scale_step(Floats w[4], const int* group, const float* scale, const int8_t* zero) {
  DQ_UNROLL for (int j = 0; j < 4; j++) {
    if constexpr (AFFINE) w[j] = sub(w[j], every(float(zero[group[j]])));
    w[j] = mul(w[j], every(scale[group[j]]));
  }
}

// sums over the whole steps from `first` on, before `last`, of every channel and row.
template <class Unit, int MR, int NR, int FORM, bool AFFINE, bool GROUPED>
static __attribute__((noinline)) void add_steps(const DqWeightOnly& l, const Thin& t, const Channels<NR>& given,
                                                long first, long last, Floats* out) {
  constexpr int chains = Unit::kWords > 1 && MR * NR <= 4 ? 2 : 1;  // so that one sum need not wait for the other
  constexpr long bytes = kStep * sizeof(typename Unit::Element);
  Floats sum[chains][NR * MR];
  DQ_UNROLL for (int c = 0; c < chains; c++) {
    DQ_UNROLL for (int i = 0; i < NR * MR; i++) sum[c][i] = every(0.f);
  }
  const uint8_t* x = t.x + first * MR * bytes;
  const int bits = l.weight_bits;
  const long columns = l.columns, step_bytes = kStep * bits / 8, ahead = NR * l.row_bytes;  // the same of the next rows
  const Channels<NR> rows = given;
  for (long s = first; s < last; s++, x += MR * bytes) {
    DQ_UNROLL for (int c = 0; c < NR; c++) {
      __builtin_prefetch(rows.row[c] + s * step_bytes + ahead);
      Words w[Unit::kWords];
      if constexpr (GROUPED) {
        Floats f[4];
        widen_codes(whole_codes<FORM>(rows.row[c], s * kStep, columns, bits), f);
        scale_step<AFFINE>(f, t.group + 4 * s, rows.scale[c], rows.zero[c]);
        Unit::join(f, w);
      } else {
        const Floats shift = every(AFFINE ? -float(*rows.zero[c]) : 0.f);
        Unit::template widen<FORM, AFFINE>(rows.row[c], s * kStep, columns, bits, shift, w);
      }
      DQ_UNROLL for (int j = 0; j < Unit::kWords; j++) {
        DQ_UNROLL for (int i = 0; i < MR; i++) {
          Unit::dot(sum[j % chains][c * MR + i], w[j], read((const void*)(x + i * bytes + 4 * kLanes * j)));
        }
      }
    }
  }
  DQ_UNROLL for (int i = 0; i < NR * MR; i++) {
    out[i] = sum[0][i];
    DQ_UNROLL for (int c = 1; c < chains; c++) out[i] = add(out[i], sum[c][i]);
  }
}

// The last step of one channel, which the row ends in: codes behind it meet zeros.
template <class Unit, int MR>
static __attribute__((noinline)) void add_rest(const DqWeightOnly& l, const Thin& t, const int8_t* row,
                                               const float* scale, const int8_t* zero, float offset, Floats* out) {
  const long s = t.steps - 1, bytes = kStep * sizeof(typename Unit::Element);
  Floats f[4];
  Words w[Unit::kWords];
  widen_codes(row_codes(row, s * kStep, l.columns, l.weight_bits), f);
  if (!l.weight_group) {
    const float shift = offset ? offset : l.weight_zero ? -*zero : 0;
    DQ_UNROLL for (int j = 0; j < 4; j++) f[j] = add(f[j], every(shift));
  } else {
    (l.weight_zero ? scale_step<true> : scale_step<false>)(f, t.group + 4 * s, scale, zero);
  }
  Unit::join(f, w);
  for (int j = 0; j < Unit::kWords; j++) {
    for (int i = 0; i < MR; i++) {
      Unit::dot(out[i], w[j], read((const void*)(t.x + (s * MR + i) * bytes + 4 * kLanes * j)));
    }
  }
}

// Sums over the lanes of MR vectors, side by side.
template <int MR>
DQ_INLINE Floats sums_of(const Floats* from) {
  if constexpr (MR <= 2) {
    float sums[kLanes] = {};
    for (int i = 0; i < MR; i++) sums[i] = sum_of(from[i]);
    return read(sums);
  }
  Words r[kLanes];
  DQ_UNROLL for (int i = 0; i < kLanes; i++) r[i] = i < MR ? as_words(from[i]) : every(0);
  transpose(r);
  DQ_UNROLL for (int step = kLanes / 2; step; step /= 2) {
    DQ_UNROLL for (int i = 0; i < kLanes / 2; i++) {
      if (i < step) r[i] = as_words(add(as_floats(r[i]), as_floats(r[i + step])));
    }
  }
  return as_floats(r[0]);
}

// Columns of steps `first` to `last` times channel n and its neighbours.
template <class Unit, int MR, int NR, int FORM, bool AFFINE, bool GROUPED>
void some_steps(const DqWeightOnly& l, const Thin& t, long n, long first, long last) {
  const Channels<NR> rows(l, n);
  const float offset = GROUPED ? 0 : Unit::template offset<FORM>(l.weight_bits);
  const bool rest = last * kStep > l.columns;
  Floats out[NR * MR];
  add_steps<Unit, MR, NR, FORM, AFFINE, GROUPED>(l, t, rows, first, last - rest, out);
  for (int c = 0; c < NR && n + c < l.outputs; c++) {
    if (rest) add_rest<Unit, MR>(l, t, rows.row[c], rows.scale[c], rows.zero[c], offset, out + c * MR);
    Floats y = sums_of<MR>(out + c * MR);
    if (offset && first == 0) {
      const float added = offset + (AFFINE ? *rows.zero[c] : 0);
      y = multiply_sub_from(read(t.sums), every(added), y);
    }
    if constexpr (!GROUPED) y = mul(y, every(*rows.scale[c]));
    float* to = t.y + (n + c) * kLanes;
    write(to, first == 0 ? y : add(y, read(to)));
  }
}

// The branch of channel n, before its rows are turned.
template <int MR>
DQ_INLINE void add_branch_of(const DqWeightOnly& l, const Thin& t, long n) {
  Floats sum[MR];
  for (int i = 0; i < MR; i++) sum[i] = every(0.f);
  for (long r = 0; r < l.rank; r += kLanes) {
    const Floats up = load(l.up, n * l.rank + r, l.dtype, first_lanes(l.rank - r));
    for (int i = 0; i < MR; i++) sum[i] = multiply_add(up, read(t.low + i * t.low_stride + r), sum[i]);
  }
  write(t.y + n * kLanes, add(sums_of<MR>(sum), read(t.y + n * kLanes)));
}

// kLanes channels from n on: their rows to y, with the branch, the bias and what follows.
template <int MR>
void finish_channels(const DqWeightOnly& l, const Thin& t, long n) {
  const Mask lanes = first_lanes(l.outputs - n);
  const long there = std::min(kLanes, l.outputs - n);
  for (long i = 0; t.low && i < there; i++) add_branch_of<MR>(l, t, n + i);
  Words r[kLanes];
  DQ_UNROLL for (int i = 0; i < kLanes; i++) r[i] = read((const void*)(t.y + (n + std::min<long>(i, there - 1)) * kLanes));
  transpose(r);
  const Floats bias = l.bias ? load(l.bias, n, l.dtype, lanes) : every(0.f);
  float rows[kLanes * kLanes];
  DQ_UNROLL for (int i = 0; i < kLanes; i++) write(rows + i * kLanes, as_floats(r[i]));
  for (long m = 0; m < l.rows; m++) {
    const Floats y = add(read(rows + m * kLanes), bias);
    store(l.y, m * l.outputs + n, l.dtype, lanes, l.gelu ? gelu_tanh(y) : y);
  }
}

template <class Unit, int MR, int FORM, bool AFFINE, bool GROUPED>
void share_channels(const DqWeightOnly& l, const Thin& t, int threads) {
  constexpr int NR = Unit::template together<MR>();
  const long fit = std::max(1l, kThinBytes / (MR * kStep * long(sizeof(typename Unit::Element))));
  const long blocks = (t.steps + fit - 1) / fit, most = (t.steps + blocks - 1) / blocks;
#pragma omp parallel num_threads(threads)
  {
    for (long first = 0; first < t.steps; first += most) {
#pragma omp for schedule(static)
      for (long n = 0; n < l.outputs; n += NR) {
        some_steps<Unit, MR, NR, FORM, AFFINE, GROUPED>(l, t, n, first, std::min(first + most, t.steps));
      }
    }
#pragma omp for schedule(static)
    for (long n = 0; n < l.outputs; n += kLanes) finish_channels<MR>(l, t, n);
  }
}

template <class Unit, int MR, int FORM>
void channels(const DqWeightOnly& l, const Thin& t, int threads) {
  if (l.weight_group) {
    auto share = l.weight_zero ? share_channels<Unit, MR, FORM, true, true> : share_channels<Unit, MR, FORM, false, true>;
    share(l, t, threads);
  } else {
    auto share = l.weight_zero ? share_channels<Unit, MR, FORM, true, false> : share_channels<Unit, MR, FORM, false, false>;
    share(l, t, threads);
  }
}

thread_local Scratch thin_rows;

// Row m of MR, in steps, and its sum.
template <class Unit>
void turn_row(const DqWeightOnly& l, long m, long MR, long steps, uint8_t* row, uint8_t* x, float* sums) {
  constexpr long bytes = kStep * sizeof(typename Unit::Element);
  Unit::fetch_row(l.x, m * l.columns, l.columns, l.dtype, row);
  for (long s = 0; s < steps; s++) memcpy(x + (s * MR + m) * bytes, row + s * bytes, bytes);
  Floats sum = every(0.f);
  for (long k = 0; Unit::kCodes > 1 && k < l.columns; k += kLanes) {
    sum = add(sum, load(l.x, m * l.columns + k, l.dtype, first_lanes(l.columns - k)));
  }
  sums[m] = sum_of(sum);
}

template <class Unit>
bool thin_in(const DqWeightOnly& l, long MR, Thin& t) {
  t.steps = (l.columns + kStep - 1) / kStep;
  t.low_stride = round_up(l.rank, kLanes);
  const long row = t.steps * kStep * sizeof(typename Unit::Element), outputs = round_up(l.outputs, kLanes);
  const long cleared = (MR + 1) * row + 4 * (MR * t.low_stride + kLanes);
  uint8_t* x = (uint8_t*)thin_rows.get(cleared + 4 * (outputs * kLanes + t.steps * 4));
  if (!x) return false;
  memset(x, 0, cleared);
  float *low = (float*)(x + (MR + 1) * row), *sums = low + MR * t.low_stride;
  for (long m = 0; m < l.rows; m++) {
    turn_row<Unit>(l, m, MR, t.steps, x + MR * row, x, sums);
    if (l.low) fetch(l.low, m * l.rank, l.rank, l.dtype, 0, low + m * t.low_stride);
  }
  t.x = x;
  t.sums = sums;
  t.low = l.low ? low : nullptr;
  t.y = sums + kLanes;
  int* group = (int*)(t.y + outputs * kLanes);
  const long last = l.weight_group ? (l.columns - 1) / l.weight_group : 0;
  for (long b = 0; l.weight_group && b < t.steps * 4; b++) group[b] = std::min(b * kLanes / l.weight_group, last);
  t.group = group;
  return true;
}

template <class Unit, int MR>
int run_rows(const DqWeightOnly& l, int threads) {
  Thin t;
  if (!thin_in<Unit>(l, MR, t)) return 1;
  if (l.weight_bits == 8) {
    channels<Unit, MR, 8>(l, t, threads);
  } else {
    (l.weight_bits == 4 ? channels<Unit, MR, 4> : channels<Unit, MR, 0>)(l, t, threads);
  }
  return 0;
}

// For up to Unit::kThin rows; groups are multiples of kLanes columns.
template <class Unit>
int run_thin(const DqWeightOnly& l, int threads) {
  if (l.rows <= 1) return run_rows<Unit, 1>(l, threads);
  if (l.rows <= 2) return run_rows<Unit, 2>(l, threads);
  if (l.rows <= 4) return run_rows<Unit, 4>(l, threads);
  if constexpr (Unit::kThin == 6) return run_rows<Unit, 6>(l, threads);
  if constexpr (Unit::kThin > 8) {
    if (l.rows > 8) return run_rows<Unit, 16>(l, threads);
  }
  return run_rows<Unit, 8>(l, threads);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
