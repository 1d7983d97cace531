// Quantized linears: y = epilogue(Q(prologue(x)) W^T + low up^T + bias), integer dot products throughout.
#include "linear.h"
#include "tile.h"

using namespace dq;

namespace {

thread_local Scratch activations, panels;
thread_local int64_t held = 0;  // key of the codes in `activations`

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

Quantized quantized_in(const DqLinear& l, const Shape& s) {
  Quantized q;
  q.stride = s.padded;
  q.group = l.act_group ? l.act_group : l.columns;
  q.groups = (l.columns + q.group - 1) / q.group;
  size_t codes = l.rows * q.stride, scales = l.rows * q.groups * 4;
  q.codes = (uint8_t*)activations.get(codes + 2 * scales + 64);
  if (!q.codes) return q;
  q.scale = (float*)(q.codes + codes);
  q.zero = (int*)(q.codes + codes + scales);
  q.low = l.act_low;
  q.high = l.act_high;
  q.affine = l.act_affine;
  q.stored = l.act_scale;
  return q;
}

void quantize(const DqLinear& l, const Quantized& q, bool& failed) {
  RowSource source{l.x,     l.mod_scale, l.mod_shift, l.smooth, l.columns, l.columns, l.rows_per_batch,
                   l.mod_stride, l.dtype, l.norm,      l.eps,    l.shift};
  float* row = (float*)panels.get(round_up(l.columns, 64) * 4);
#pragma omp for schedule(static)
  for (long m = 0; m < l.rows; m++) {
    if (!row) {
      failed = true;
      continue;
    }
    fetch(source, m, row);
    quantize_row(row, l.columns, m, q);
  }
}

template <int MR>
void rows_of(const DqLinear& l, const Shape& s, const Panel& p, const Quantized& q, const Output& o, long m, long n) {
  const uint8_t* row[MR];
  for (int i = 0; i < MR; i++) row[i] = q.codes + (m + i) * q.stride;
  const long zero = 0;
  Taps taps{&zero, 1, round_up(l.columns, 4)};
  if (s.groups == 1) return (q.affine ? tile<MR, true> : tile<MR, false>)(p, q, taps, o, row, m, n, l.outputs, m);
  auto grouped = q.groups == 1 ? (q.affine ? tile_grouped<MR, true, false> : tile_grouped<MR, false, false>)
                               : (q.affine ? tile_grouped<MR, true, true> : tile_grouped<MR, false, true>);
  grouped(p, q, taps, o, s.group, s.groups, row, m, n, l.outputs, m);
}

void panel_rows(const DqLinear& l, const Shape& s, const Panel& p, const Quantized& q, const Output& o, long first,
                long last, long n) {
  long m = first;
  for (; m + 6 <= last; m += 6) rows_of<6>(l, s, p, q, o, m, n);
  for (; m + 3 <= last; m += 3) rows_of<3>(l, s, p, q, o, m, n);
  for (; m < last; m++) rows_of<1>(l, s, p, q, o, m, n);
}

void product(const DqLinear& l, const Shape& s, const Quantized& q, bool& failed) {
  Weight w{l.weight, l.weight_scale, l.bias, l.up, l.outputs, l.columns, l.row_bytes, l.weight_scale_stride,
           l.weight_group ? (l.columns + l.weight_group - 1) / l.weight_group : 1, s.group, s.groups,
           l.low ? l.rank : 0, l.weight_bits, l.dtype, l.shift};
  Output o{l.y, l.low, l.gate, l.residual, l.outputs, l.rank, l.rows_per_batch, l.dtype, l.gelu};
  void* place = panels.get(panel_bytes(s.padded, s.groups, w.rank));
  Panel p = panel_in(place, s.padded, s.groups, w.rank);
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
    if (panel != held) lay_out(w, panel * kWide, p);
    held = panel;
    panel_rows(l, s, p, q, o, first, last, panel * kWide);
  }
}

}  // namespace

extern "C" int dq_linear(const DqLinear* args) {
  const DqLinear& l = *args;
  if (l.rows == 0 || l.outputs == 0) return 0;
  double work = double(l.rows) * l.outputs * l.columns;
  int threads = work < 1e6 ? 1 : omp_get_max_threads();
  Shape s = shape_of(l, threads);
  Quantized q = quantized_in(l, s);
  if (!q.codes) return 1;
  const bool ready = l.key && l.key == held;
  held = 0;
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(threads)
  {
    if (!ready) quantize(l, q, failed);
    product(l, s, q, failed);
  }
  held = failed ? 0 : l.key;
  return failed;
}

extern "C" long dq_linear_size() { return sizeof(DqLinear); }
