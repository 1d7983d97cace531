// Quantized linears: y = epilogue(Q(x + shift) W^T + low up^T + bias), integer dot products throughout.
// The whole of it for one level: linear_avx512.cpp and its like include a level, this, and export dq_linear_<level>.
#pragma once
#include "arguments.h"
#include "tile.h"

namespace dq::inline DQ_LEVEL {
namespace {

thread_local Scratch activations, panels;

constexpr long kBlockBytes = 96 << 10;  // of activation codes that stay in L2 beside a tile

struct Shape {
  long padded, group, groups, panels, splits;
};

Shape shape_of(const DqLinear& l, int threads) {
  Shape s;
  s.padded = round_up(l.columns, 64);
  long smaller = l.weight_group && l.act_group ? std::min(l.weight_group, l.act_group) : l.weight_group + l.act_group;
  s.group = smaller ? smaller : l.columns;
  s.groups = (l.columns + s.group - 1) / s.group;
  s.panels = (l.outputs + kWide - 1) / kWide;
  // few panels: several threads take parts of the rows of one
  long most = std::max(1l, l.rows / 48);
  s.splits = s.panels >= 4 * threads ? 1 : std::min(most, (4 * threads + s.panels - 1) / s.panels);
  return s;
}

template <class Dot>
Quantized quantized_in(const DqLinear& l, const Shape& s) {
  const long group = l.act_group ? l.act_group : l.columns, groups = (l.columns + group - 1) / group;
  const long stride = s.padded * sizeof(typename Dot::Code);
  size_t codes = l.rows * stride, scales = l.rows * groups * 4;
  uint8_t* place = (uint8_t*)activations.get(codes + 2 * scales + 64);
  return {
      .codes = place,
      .scale = (float*)(place + codes),
      .zero = (int*)(place + codes + scales),
      .stride = stride,
      .group = group,
      .groups = groups,
      .low = lowest_code(l.act_bits, l.act_affine),
      .high = highest_code(l.act_bits),
      .affine = bool(l.act_affine),
      .stored = l.act_scale,
      .clip = l.clip,
  };
}

template <class Dot>
void quantize(const DqLinear& l, const Quantized& q, bool& failed) {
  float* row = (float*)panels.get(round_up(l.columns, 64) * 4);
#pragma omp for schedule(static)
  for (long m = 0; m < l.rows; m++) {
    if (!row) {
      failed = true;
      continue;
    }
    Range whole = fetch(l.x, m * l.columns, l.columns, l.dtype, l.shift, row);
    quantize_row<Dot>(row, l.columns, m, whole, q);
  }
}

template <class Dot, int MR>
void rows_of(const DqLinear& l, const Shape& s, const Panel& p, const Quantized& q, const Output& o, long m, long n) {
  const uint8_t* row[MR];
  for (int i = 0; i < MR; i++) row[i] = q.codes + (m + i) * q.stride;
  const long zero = 0;
  Taps taps{.offset = &zero, .count = 1, .width = round_up(l.columns, 4)};
  if (s.groups == 1) return (q.affine ? tile<Dot, MR, true> : tile<Dot, MR, false>)(p, q, taps, o, row, m, n, l.outputs, m);
  auto grouped = q.groups == 1 ? (q.affine ? tile_grouped<Dot, MR, true, false> : tile_grouped<Dot, MR, false, false>)
                               : (q.affine ? tile_grouped<Dot, MR, true, true> : tile_grouped<Dot, MR, false, true>);
  grouped(p, q, taps, o, s.group, s.groups, row, m, n, l.outputs, m);
}

// Rows first to last times a panel. Each tile meets a block of rows that stays in L2, so that both are read from cache.
template <class Dot>
void panel_rows(const DqLinear& l, const Shape& s, const Panel& p, const Quantized& q, const Output& o, long first,
                long last, long n) {
  const long block = kWide == kTile ? last - first : std::max(12l, kBlockBytes / q.stride / 6 * 6);
  for (; first < last; first += block) {
    const long end = std::min(first + block, last);
    for (long t = 0; t < kWide && n + t < l.outputs; t += kTile) {
      const Panel part = from(p, t);
      long m = first;
      for (; m + 6 <= end; m += 6) rows_of<Dot, 6>(l, s, part, q, o, m, n + t);
      for (; m + 3 <= end; m += 3) rows_of<Dot, 3>(l, s, part, q, o, m, n + t);
      for (; m < end; m++) rows_of<Dot, 1>(l, s, part, q, o, m, n + t);
    }
  }
}

Weight weight_of(const DqLinear& l, const Shape& s) {
  return {
      .codes = l.weight,
      .scale = l.weight_scale,
      .zero = l.weight_zero,
      .bias = l.bias,
      .up = l.up,
      .outputs = l.outputs,
      .columns = l.columns,
      .row_bytes = l.row_bytes,
      .scale_stride = l.weight_scale_stride,
      .scale_groups = l.weight_group ? (l.columns + l.weight_group - 1) / l.weight_group : 1,
      .group = s.group,
      .groups = s.groups,
      .rank = l.low ? l.rank : 0,
      .bits = l.weight_bits,
      .dtype = l.dtype,
      .shift = l.shift,
      .multiplier = l.multiplier,
      .multiplier_group = l.multiplier ? l.multiplier_group : l.columns,
      .multiplied = l.multiplier ? (l.columns + l.multiplier_group - 1) / l.multiplier_group : 1,
  };
}

template <class Dot>
void product(const DqLinear& l, const Shape& s, const Quantized& q, bool& failed) {
  const Weight w = weight_of(l, s);
  const Output o{.y = l.y, .low = l.low, .stride = l.outputs, .rank = l.rank, .dtype = l.dtype, .gelu = bool(l.gelu)};
  void* place = panels.get(panel_bytes<Dot>(s.padded, s.groups, w.rank, w.multiplied));
  Panel p = panel_in<Dot>(place, s.padded, s.groups, w.multiplied, l.multiplier ? l.multiplier_group : 0);
  long held = -1, each = round_up((l.rows + s.splits - 1) / s.splits, 6);
#pragma omp for schedule(dynamic, 1)
  for (long task = 0; task < s.panels * s.splits; task++) {
    if (!place) {
      failed = true;
      continue;
    }
    long panel = task / s.splits, part = task % s.splits;
    long first = part * each, last = std::min(l.rows, first + each);
    if (first >= last) continue;
    if (panel != held) lay_out<Dot>(w, panel * kWide, p);
    held = panel;
    panel_rows<Dot>(l, s, p, q, o, first, last, panel * kWide);
  }
}

template <class Dot>
int run_linear(const DqLinear& l) {
  if (l.rows == 0 || l.outputs == 0) return 0;
  double work = double(l.rows) * l.outputs * l.columns;
  int threads = work < 1e6 ? 1 : omp_get_max_threads();
  Shape s = shape_of(l, threads);
  Quantized q = quantized_in<Dot>(l, s);
  if (!q.codes) return 1;
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(threads)
  {
    quantize<Dot>(l, q, failed);
    product<Dot>(l, s, q, failed);
  }
  return failed;
}

int run_linear(const DqLinear& l) {
  const int bits = l.weight_bits + (l.weight_zero ? 1 : 0);  // of a code less its zero point
  if (bits <= 4) return run_linear<Narrow>(l);
  if (bits <= 5) return run_linear<Between>(l);
  return bits <= 8 ? run_linear<Wide>(l) : run_linear<Halves>(l);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
