// Quantized linears: y = epilogue(Q(x + shift) W^T + low up^T + bias), integer dot products throughout.
#include "fields.h"
#include "tile.h"

using namespace dq;

extern "C" {

struct DqLinear {
  const void* x;
  const float* act_scale;  // one stored scale of the activations, or null: measured
  const int8_t* weight;
  const float* weight_scale;
  const void* bias;
  const void* low;  // the low-rank branch: (rows, rank) bf16, or null
  const void* up;   // (outputs, rank) bf16
  void* y;
  int64_t rows, columns, outputs, row_bytes, rank;
  int64_t weight_group, act_group;  // 0: the whole row
  int64_t weight_scale_stride;
  Dtype dtype;
  int32_t weight_bits, act_bits, act_affine, gelu;
  float shift;
};
}

namespace {

thread_local Scratch activations, panels;

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
  const long group = l.act_group ? l.act_group : l.columns, groups = (l.columns + group - 1) / group;
  size_t codes = l.rows * s.padded, scales = l.rows * groups * 4;
  uint8_t* place = (uint8_t*)activations.get(codes + 2 * scales + 64);
  return {
      .codes = place,
      .scale = (float*)(place + codes),
      .zero = (int*)(place + codes + scales),
      .stride = s.padded,
      .group = group,
      .groups = groups,
      .low = lowest_code(l.act_bits, l.act_affine),
      .high = highest_code(l.act_bits),
      .affine = bool(l.act_affine),
      .stored = l.act_scale,
  };
}

void quantize(const DqLinear& l, const Quantized& q, bool& failed) {
  float* row = (float*)panels.get(round_up(l.columns, 64) * 4);
#pragma omp for schedule(static)
  for (long m = 0; m < l.rows; m++) {
    if (!row) {
      failed = true;
      continue;
    }
    fetch(l.x, m * l.columns, l.columns, l.dtype, l.shift, row);
    quantize_row(row, l.columns, m, q);
  }
}

template <int MR>
void rows_of(const DqLinear& l, const Shape& s, const Panel& p, const Quantized& q, const Output& o, long m, long n) {
  const uint8_t* row[MR];
  for (int i = 0; i < MR; i++) row[i] = q.codes + (m + i) * q.stride;
  const long zero = 0;
  Taps taps{.offset = &zero, .count = 1, .width = round_up(l.columns, 4)};
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

Weight weight_of(const DqLinear& l, const Shape& s) {
  return {
      .codes = l.weight,
      .scale = l.weight_scale,
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
  };
}

void product(const DqLinear& l, const Shape& s, const Quantized& q, bool& failed) {
  const Weight w = weight_of(l, s);
  const Output o{.y = l.y, .low = l.low, .stride = l.outputs, .rank = l.rank, .dtype = l.dtype, .gelu = bool(l.gelu)};
  void* place = panels.get(panel_bytes(s.padded, s.groups, w.rank));
  Panel p = panel_in(place, s.padded, s.groups);
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
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(threads)
  {
    quantize(l, q, failed);
    product(l, s, q, failed);
  }
  return failed;
}

DQ_FIELDS(DqLinear, dq_linear_fields, FIELD(x), FIELD(act_scale), FIELD(weight), FIELD(weight_scale), FIELD(bias),
          FIELD(low), FIELD(up), FIELD(y), FIELD(rows), FIELD(columns), FIELD(outputs), FIELD(row_bytes), FIELD(rank),
          FIELD(weight_group), FIELD(act_group), FIELD(weight_scale_stride), FIELD(dtype), FIELD(weight_bits),
          FIELD(act_bits), FIELD(act_affine), FIELD(gelu), FIELD(shift))
