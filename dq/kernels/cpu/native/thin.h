// Weight-only linears on a few rows (modulation, time and text projections): bound by reading the weight once.
//
//   y[m, n] = f(sum_g s[n, g] (sum_{k in g} x[m, k] (q[n, k] + o) - (z[n, g] + o) sum_{k in g} x[m, k])
//               + low[m] up[n]^T + bias[n])
//
// One output channel at a time, its codes widened in registers and met by every row. They are exact in bf16, too, so that
// nothing but the sum is rounded. o: what a unit adds to codes because that is the quickest way to widen them, or -z.
#pragma once
#include "units.h"

namespace dq::inline DQ_LEVEL {
namespace {

constexpr long kMostRows = 16;

struct Thin {
  const uint8_t* x;   // (rows, stride bytes): Unit::Element, zeros behind the columns
  const float* sums;  // [groups][kMostRows] of the rows of x
  const float* low;   // (rows, low_stride), zeros behind the rank; or null
  long stride, low_stride;
};

// A group of columns of one output channel: what `first` to `last` share.
struct Group {
  long first, last;
  float scale, shift;  // shift: o
};

// total += scale * sums over lanes, MR rows. The running sums of all groups live in memory, and a group is one call: with
// either in registers GCC 12 spills the sums of the inner loop.
template <int MR, int CHAINS>
DQ_INLINE void add_sums(Floats sum[CHAINS][MR], float scale, Floats* total) {
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    Floats all = sum[0][i];
    DQ_UNROLL for (int c = 1; c < CHAINS; c++) all = add(all, sum[c][i]);
    total[i] = multiply_add(all, every(scale), total[i]);
  }
}

// The whole steps of a group.
template <class Unit, int MR, int FORM, bool AFFINE>
static __attribute__((noinline)) void add_steps(const DqWeightOnly& l, const Thin& t, const int8_t* row, const Group& g,
                                                Floats* total) {
  constexpr int chains = Unit::template chains<MR>();  // sums a row, so that one need not wait for the other
  Floats sum[chains][MR];
  DQ_UNROLL for (int c = 0; c < chains; c++) {
    DQ_UNROLL for (int i = 0; i < MR; i++) sum[c][i] = every(0.f);
  }
  const uint8_t* x = t.x + g.first * sizeof(typename Unit::Element);
  const Floats shift = every(g.shift);
  const long stride = t.stride, columns = l.columns, end = g.last - kStep;
  const int bits = l.weight_bits;
  for (long k = g.first; k <= end; k += kStep, x += kStep * sizeof(typename Unit::Element)) {
    Words w[Unit::kWords];
    Unit::template widen<FORM, AFFINE>(row, k, columns, bits, shift, w);
    Unit::template meet<MR, chains>(sum, x, stride, w);
  }
  add_sums<MR, chains>(sum, g.scale, total);
}

// The columns of a group from k on, fewer than a step.
template <class Unit, int MR>
static __attribute__((noinline)) void add_rest(const DqWeightOnly& l, const Thin& t, const int8_t* row, const Group& g,
                                               long k, Floats* total) {
  Floats sum[1][MR], w[4];
  DQ_UNROLL for (int i = 0; i < MR; i++) sum[0][i] = every(0.f);
  widen_codes(row_codes(row, k, g.last, l.weight_bits), w);
  DQ_UNROLL for (int j = 0; j < 4; j++) w[j] = add(w[j], every(g.shift), first_lanes(g.last - k - kLanes * j));
  Words words[Unit::kWords];
  Unit::join(w, words);
  Unit::template meet<MR, 1>(sum, t.x + k * sizeof(typename Unit::Element), t.stride, words);
  add_sums<MR, 1>(sum, g.scale, total);
}

// Sums over lanes less what the offset added, the branch, the bias and what follows.
template <int MR>
void finish_channel(const DqWeightOnly& l, const Thin& t, long n, Floats* total, const float* added) {
  for (long r = 0; t.low && r < l.rank; r += kLanes) {
    const Floats up = load(l.up, n * l.rank + r, l.dtype, first_lanes(l.rank - r));
    for (int i = 0; i < MR; i++) total[i] = multiply_add(up, read(t.low + i * t.low_stride + r), total[i]);
  }
  float bias[kLanes] = {}, y[kMostRows];
  if (l.bias) write(bias, load(l.bias, n, l.dtype, first_lanes(1)));
  for (int i = 0; i < MR; i++) y[i] = sum_of(total[i]) - added[i] + bias[0];
  for (long i = 0; i < l.rows; i++) {
    const Floats value = every(y[i]);
    store(l.y, i * l.outputs + n, l.dtype, first_lanes(1), l.gelu ? gelu_tanh(value) : value);
  }
}

template <class Unit, int MR, int FORM, bool AFFINE>
void channel(const DqWeightOnly& l, const Thin& t, long n) {
  const int8_t* row = l.weight + n * l.row_bytes;
  const long group = l.weight_group ? l.weight_group : l.columns, at = n * l.weight_scale_stride;
  const float offset = Unit::template offset<FORM>(l.weight_bits);
  Floats total[MR];
  float added[kMostRows] = {};
  for (int i = 0; i < MR; i++) total[i] = every(0.f);
  for (long first = 0, i = 0; first < l.columns; first += group, i++) {
    const float zero = AFFINE ? l.weight_zero[at + i] : 0;
    const Group g{first, std::min(first + group, l.columns), l.weight_scale[at + i], offset ? offset : -zero};
    add_steps<Unit, MR, FORM, AFFINE>(l, t, row, g, total);
    const long rest = first + (g.last - first) / kStep * kStep;
    if (rest < g.last) add_rest<Unit, MR>(l, t, row, g, rest, total);
    for (long m = 0; offset && m < kMostRows; m += kLanes) {
      const Floats sums = read(t.sums + i * kMostRows + m);
      write(added + m, multiply_add(sums, every(g.scale * (offset + zero)), read(added + m)));
    }
  }
  finish_channel<MR>(l, t, n, total, added);
}

template <class Unit, int MR, int FORM>
void some_channels(const DqWeightOnly& l, const Thin& t, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < l.outputs; n++) {
    (l.weight_zero ? channel<Unit, MR, FORM, true> : channel<Unit, MR, FORM, false>)(l, t, n);
  }
}

template <class Unit, int MR>
void channels(const DqWeightOnly& l, const Thin& t, int threads) {
  if (l.weight_bits == 8) return some_channels<Unit, MR, 8>(l, t, threads);
  return (l.weight_bits == 4 ? some_channels<Unit, MR, 4> : some_channels<Unit, MR, 0>)(l, t, threads);
}

thread_local Scratch thin_rows;

// Sums of each group of columns of row m.
void sum_groups(const DqWeightOnly& l, long m, float* sums) {
  const long group = l.weight_group ? l.weight_group : l.columns;
  for (long first = 0, g = 0; first < l.columns; first += group, g++) {
    const long last = std::min(first + group, l.columns);
    Floats sum = every(0.f);
    for (long k = first; k < last; k += kLanes) {
      sum = add(sum, load(l.x, m * l.columns + k, l.dtype, first_lanes(last - k)));
    }
    sums[g * kMostRows + m] = sum_of(sum);
  }
}

// `rows`: those of the form, l.rows of which exist; the others are zeros.
template <class Unit>
bool thin_in(const DqWeightOnly& l, long rows, Thin& t) {
  const long groups = l.weight_group ? (l.columns + l.weight_group - 1) / l.weight_group : 1;
  t.stride = (round_up(l.columns, kStep) + kStep) * sizeof(typename Unit::Element);
  t.low_stride = round_up(l.rank, kLanes);
  const long bytes = rows * (t.stride + t.low_stride * 4) + groups * kMostRows * 4;
  uint8_t* x = (uint8_t*)thin_rows.get(bytes);
  if (!x) return false;
  memset(x, 0, bytes);
  float *low = (float*)(x + rows * t.stride), *sums = low + rows * t.low_stride;
  for (long m = 0; m < l.rows; m++) {
    Unit::fetch_row(l.x, m * l.columns, l.columns, l.dtype, x + m * t.stride);
    if (l.low) fetch(l.low, m * l.rank, l.rank, l.dtype, 0, low + m * t.low_stride);
    if (Unit::kCodes > 1) sum_groups(l, m, sums);
  }
  t.x = x;
  t.sums = sums;
  t.low = l.low ? low : nullptr;
  return true;
}

template <class Unit, int MR>
int run_rows(const DqWeightOnly& l, int threads) {
  Thin t;
  if (!thin_in<Unit>(l, MR, t)) return 1;
  channels<Unit, MR>(l, t, threads);
  return 0;
}

// For up to Unit::kThin rows; groups are multiples of 8 columns.
template <class Unit>
int run_thin(const DqWeightOnly& l, int threads) {
  if (l.rows <= 1) return run_rows<Unit, 1>(l, threads);
  if (l.rows <= 2) return run_rows<Unit, 2>(l, threads);
  if (l.rows <= 4) return run_rows<Unit, 4>(l, threads);
  if (l.rows <= 6) return run_rows<Unit, 6>(l, threads);
  if constexpr (Unit::kThin > 6) {
    if (l.rows <= 8) return run_rows<Unit, 8>(l, threads);
    if (l.rows <= 12) return run_rows<Unit, 12>(l, threads);
    return run_rows<Unit, 16>(l, threads);
  }
  return 1;
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
