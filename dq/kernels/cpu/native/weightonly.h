// Weight-only linears: y = f(x W^T + low up^T + bias), W decoded in cache while it is used, f a tanh GELU or nothing.
//
//   rows (64, columns) of packed codes -> words [blocks][64 / kTile][columns of a block / elements of a word][kTile]
//
// Columns are cut in blocks, so that the decoded words stay in cache, and rows, so that their part of a block does; sums
// of a block of rows wait in memory meanwhile. The branch is one more block of columns: low rows, up weights.
#pragma once
#include "decode.h"
#include "thin.h"

namespace dq::inline DQ_LEVEL {
namespace {

thread_local Scratch shared_rows, decoded;

constexpr long kBlockWords = 256;  // of a block of columns: 64 KB of a panel
constexpr long kBlockRows = 96;    // as many of the rows

struct Cut {
  long panels, splits, blocks, last_words;  // blocks: of columns, the branch's included; words of the branch's
  long stride, low_stride;                  // bytes of a row of x and of low, as Unit::Element
  bool direct;                              // x is read where it is
};

// What is decoded once a panel: its scales, beside the words of one block or, where rows come in several, of all.
struct Decoded {
  uint8_t* words;  // [blocks][64 / kTile][kBlockWords][kTile]
  float* scale;    // [groups][64]
  float* zero;     // as scale
  float* bias;     // [64]
  float* sums;     // [kBlockRows][64]
  float* row;      // one row of the second factor
  long apart;      // bytes between blocks: 0 where they take turns
};

constexpr long kPanelBytes = kBlockWords * kWide * 4;

template <class Unit>
Cut cut_of(const DqWeightOnly& l, int threads) {
  constexpr long size = sizeof(typename Unit::Element), most = kBlockWords * Unit::kCodes;
  Cut c;
  c.panels = (l.outputs + kWide - 1) / kWide;
  c.splits = c.panels >= 4 * threads ? 1 : std::min(std::max(1l, l.rows / 48), (4 * threads + c.panels - 1) / c.panels);
  c.blocks = (l.columns + most - 1) / most + (l.low ? (l.rank + most - 1) / most : 0);
  c.direct = l.dtype == Unit::kDtype && l.columns % Unit::kCodes == 0;
  c.stride = (c.direct ? l.columns : round_up(l.columns, kLanes)) * size;
  c.low_stride = round_up(l.rank, kLanes) * size;
  return c;
}

// Scales and zero points of the panel's channels side by side.
void lay_scales(const DqWeightOnly& l, long first, const Decoded& d) {
  const long group = l.weight_group ? l.weight_group : l.columns, groups = (l.columns + group - 1) / group;
  for (long n = 0; n < kWide; n++) {
    const bool there = first + n < l.outputs;
    const long at = (first + n) * l.weight_scale_stride;
    for (long g = 0; g < groups; g++) {
      d.scale[g * kWide + n] = there ? l.weight_scale[at + g] : 0;
      d.zero[g * kWide + n] = there && l.weight_zero ? l.weight_zero[at + g] : 0;
    }
  }
  for (long n = 0; n < kWide; n += kLanes) {
    write(d.bias + n, l.bias ? load(l.bias, first + n, l.dtype, first_lanes(l.outputs - first - n)) : every(0.f));
  }
}

// Words of kLanes channels, four columns a vector of `codes`, from column k on.
template <class Unit>
DQ_INLINE void lay_words(const int* codes, long words, long k, long group, const float* scale, const float* zero,
                         uint8_t* out) {
  long g = k / group, edge = (g + 1) * group;
  Floats s = read(scale + g * kWide), z = read(zero + g * kWide);
  for (long i = 0; i < words; i++, k += 4) {
    if (k == edge) {
      g++;
      edge += group;
      s = read(scale + g * kWide);
      z = read(zero + g * kWide);
    }
    const Words four = read((const void*)(codes + i * kLanes));
    Floats w[4] = {to_floats(byte_of<0>(four)), to_floats(byte_of<1>(four)), to_floats(byte_of<2>(four)),
                   to_floats(byte_of<3>(four))};
    DQ_UNROLL for (int c = 0; c < 4; c++) w[c] = mul(sub(w[c], z), s);
    Unit::lay(out + i * (4 / Unit::kCodes) * 4 * kTile, w);
  }
}

// kLanes rows of codes from column k on, four columns a word; rows beyond the last repeat it.
template <int FORM>
DQ_INLINE void turn_codes(const DqWeightOnly& l, const int8_t* rows, long there, long k, int* codes) {
  Words r[kLanes];
  const bool whole = k + kStep <= l.columns;
  if (whole && there >= kLanes) {
    DQ_UNROLL for (int i = 0; i < kLanes; i++) {
      r[i] = whole_codes<FORM>(rows + i * l.row_bytes, k, l.columns, l.weight_bits);
    }
  } else {
    for (int i = 0; i < kLanes; i++) {
      r[i] = row_codes(rows + std::min<long>(i, there - 1) * l.row_bytes, k, l.columns, l.weight_bits);
    }
  }
  transpose(r);
  DQ_UNROLL for (int i = 0; i < kLanes; i++) write((void*)(codes + i * kLanes), r[i]);
}

// Columns k to k + width of the panel at channel `first`.
template <class Unit, int FORM>
void lay_columns(const DqWeightOnly& l, long first, long k, long width, const Decoded& d, uint8_t* out) {
  const long group = l.weight_group ? l.weight_group : round_up(l.columns, 64);
  for (long n = 0; n < kWide; n += kLanes) {
    const long there = l.outputs - first - n;
    const int8_t* rows = l.weight + (there > 0 ? first + n : l.outputs - 1) * l.row_bytes;
    uint8_t* to = out + n / kTile * (kBlockWords * 4 * kTile) + n % kTile * 4;
    for (long at = 0; at < width; at += kStep) {
      alignas(64) int codes[kLanes * kLanes];
      turn_codes<FORM>(l, rows, std::max(there, 1l), k + at, codes);
      lay_words<Unit>(codes, std::min(kLanes, (width - at + 3) / 4), k + at, group, d.scale + n, d.zero + n,
                      to + at / Unit::kCodes * 4 * kTile);
    }
  }
}

template <class Unit>
void lay_block(const DqWeightOnly& l, long first, long k, long width, const Decoded& d, uint8_t* out) {
  if (l.weight_bits == 8) return lay_columns<Unit, 8>(l, first, k, width, d, out);
  return (l.weight_bits == 4 ? lay_columns<Unit, 4> : lay_columns<Unit, 0>)(l, first, k, width, d, out);
}

// Columns r to r + width of the branch's second factor.
template <class Unit>
void lay_branch(const DqWeightOnly& l, long first, long r, long width, const Decoded& d, uint8_t* out) {
  using Element = typename Unit::Element;
  for (long n = 0; n < kWide; n++) {
    const bool there = first + n < l.outputs;
    if (there) fetch(l.up, (first + n) * l.rank + r, width, l.dtype, 0, d.row);
    Element* to = (Element*)(out + n / kTile * (kBlockWords * 4 * kTile) + n % kTile * 4);
    for (long k = 0; k < round_up(width, Unit::kCodes); k++) {
      to[k / Unit::kCodes * kTile * Unit::kCodes + k % Unit::kCodes] = Unit::element(there && k < width ? d.row[k] : 0);
    }
  }
}

// sums (MR, 64) of a tile += MR rows times `count` words. Each block of columns sums up from 0: shorter sums round less.
template <class Unit, int MR>
static __attribute__((noinline)) void add_product(const uint8_t* const* row, const uint8_t* words, long count,
                                                  float* sums, bool start) {
  Floats f[MR][kRegisters];
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) f[i][j] = every(0.f);
  }
  const uint8_t* a[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) a[i] = row[i];
  for (long k = 0; k < count; k++) {
    Words b[kRegisters];
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) b[j] = read((const void*)(words + 4 * kTile * k + 4 * kLanes * j));
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      const Words act = broadcast4(a[i] + 4 * k);
      DQ_UNROLL for (int j = 0; j < kRegisters; j++) Unit::dot(f[i][j], act, b[j]);
    }
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < kRegisters; j++) {
      float* to = sums + i * kWide + kLanes * j;
      write(to, start ? f[i][j] : add(f[i][j], read(to)));
    }
  }
}

template <class Unit, int MR>
DQ_INLINE void tiles(const uint8_t* x, long stride, const uint8_t* words, long count, float* sums, bool start) {
  const uint8_t* row[MR];
  for (int i = 0; i < MR; i++) row[i] = x + i * stride;
  add_product<Unit, MR>(row, words, count, sums, start);
}

// `rows` rows times a block of the panel's columns.
template <class Unit>
void multiply_rows(const uint8_t* x, long stride, long rows, long there, const uint8_t* words, long count, float* sums,
                   bool start) {
  for (long t = 0; t < there; t += kTile, words += kBlockWords * 4 * kTile, sums += kTile) {
    long m = 0;
    for (; m + 6 <= rows; m += 6) tiles<Unit, 6>(x + m * stride, stride, words, count, sums + m * kWide, start);
    const uint8_t* rest = x + m * stride;
    float* to = sums + m * kWide;
    if (rows - m == 1) tiles<Unit, 1>(rest, stride, words, count, to, start);
    if (rows - m == 2) tiles<Unit, 2>(rest, stride, words, count, to, start);
    if (rows - m == 3) tiles<Unit, 3>(rest, stride, words, count, to, start);
    if (rows - m == 4) tiles<Unit, 4>(rest, stride, words, count, to, start);
    if (rows - m == 5) tiles<Unit, 5>(rest, stride, words, count, to, start);
  }
}

void finish_rows(const DqWeightOnly& l, const Decoded& d, long first, long rows, long n) {
  for (long m = 0; m < rows; m++) {
    for (long j = 0; j < kWide && n + j < l.outputs; j += kLanes) {
      Floats y = add(read(d.sums + m * kWide + j), read(d.bias + j));
      if (l.gelu) y = gelu_tanh(y);
      store(l.y, (first + m) * l.outputs + n + j, l.dtype, first_lanes(l.outputs - n - j), y);
    }
  }
}

struct Inputs {
  const uint8_t *x, *low;
};

// A block of rows times one panel; `lay`: its words are not there yet.
template <class Unit>
void block_rows(const DqWeightOnly& l, const Cut& c, const Inputs& in, const Decoded& d, long first, long rows, long n,
                bool lay) {
  constexpr long most = kBlockWords * Unit::kCodes, size = sizeof(typename Unit::Element);
  const long own = (l.columns + most - 1) / most, there = l.outputs - n;
  for (long b = 0; b < c.blocks; b++) {
    const bool branch = b >= own;
    const long k = (branch ? b - own : b) * most, width = std::min(most, (branch ? l.rank : l.columns) - k);
    const long stride = branch ? c.low_stride : c.stride;
    uint8_t* words = d.words + b * d.apart;
    if (lay) (branch ? lay_branch<Unit> : lay_block<Unit>)(l, n, k, width, d, words);
    const uint8_t* x = (branch ? in.low : in.x) + first * stride + k * size;
    multiply_rows<Unit>(x, stride, rows, std::min(there, kWide), words, (width + Unit::kCodes - 1) / Unit::kCodes,
                        d.sums, b == 0);
  }
  finish_rows(l, d, first, rows, n);
}

template <class Unit>
void panel_rows(const DqWeightOnly& l, const Cut& c, const Inputs& in, const Decoded& d, long first, long last,
                long panel, bool held) {
  const long n = panel * kWide;
  if (!held) lay_scales(l, n, d);
  for (long m = first; m < last; m += kBlockRows) {
    const bool lay = d.apart ? m == first && !held : true;
    block_rows<Unit>(l, c, in, d, m, std::min(kBlockRows, last - m), n, lay);
  }
}

Decoded decoded_in(const DqWeightOnly& l, const Cut& c, long rows) {
  const long groups = l.weight_group ? (l.columns + l.weight_group - 1) / l.weight_group : 1;
  const long blocks = rows > kBlockRows || c.blocks == 1 ? c.blocks : 1, floats = 2 * groups * kWide + kWide;
  const long bytes = blocks * kPanelBytes + 4 * (floats + kBlockRows * kWide + round_up(l.rank, 16));
  uint8_t* place = (uint8_t*)decoded.get(bytes);
  float* scale = (float*)(place + blocks * kPanelBytes);
  return {.words = place,
          .scale = scale,
          .zero = scale + groups * kWide,
          .bias = scale + 2 * groups * kWide,
          .sums = scale + floats,
          .row = scale + floats + kBlockRows * kWide,
          .apart = blocks == c.blocks ? kPanelBytes : 0};
}

// Rows of x and low as the unit takes them.
template <class Unit>
void fetch_rows(const DqWeightOnly& l, const Cut& c, uint8_t* x, uint8_t* low) {
#pragma omp for schedule(static)
  for (long m = 0; m < l.rows; m++) {
    if (!c.direct) {
      const long bytes = l.columns * sizeof(typename Unit::Element);
      memset(x + m * c.stride + bytes, 0, c.stride - bytes);
      Unit::fetch_row(l.x, m * l.columns, l.columns, l.dtype, x + m * c.stride);
    }
    if (low) {
      memset(low + m * c.low_stride, 0, c.low_stride);
      Unit::fetch_row(l.low, m * l.rank, l.rank, l.dtype, low + m * c.low_stride);
    }
  }
}

template <class Unit>
void share_panels(const DqWeightOnly& l, const Cut& c, const Inputs& in, bool& failed) {
  const long each = round_up((l.rows + c.splits - 1) / c.splits, 6);
  const Decoded d = decoded_in(l, c, each);
  long held = -1;
#pragma omp for schedule(dynamic, 1)
  for (long task = 0; task < c.panels * c.splits; task++) {
    if (!d.words) {
      failed = true;
      continue;
    }
    const long panel = task / c.splits, first = task % c.splits * each, last = std::min(l.rows, first + each);
    if (first >= last) continue;
    panel_rows<Unit>(l, c, in, d, first, last, panel, panel == held);
    held = panel;
  }
}

template <class Unit>
int run_panels(const DqWeightOnly& l, int threads) {
  const Cut c = cut_of<Unit>(l, threads);
  const long own = c.direct ? 0 : round_up(l.rows * c.stride, 64), low = l.low ? l.rows * c.low_stride : 0;
  uint8_t* place = own + low ? (uint8_t*)shared_rows.get(own + low) : nullptr;
  if (own + low && !place) return 1;
  const Inputs in{.x = c.direct ? (const uint8_t*)l.x : place, .low = place + own};
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(threads)
  {
    if (place) fetch_rows<Unit>(l, c, place, l.low ? place + own : nullptr);
    share_panels<Unit>(l, c, in, failed);
  }
  return failed;
}

template <class Unit>
int run_weightonly(const DqWeightOnly& l) {
  const int threads = double(l.rows) * l.outputs * l.columns < 1e6 ? 1 : omp_get_max_threads();
  // more than eight rows only where x stays in L1
  const bool few = l.rows <= 8 || l.rows * l.columns * long(sizeof(typename Unit::Element)) <= kThinBytes;
  const bool thin = few && l.rows <= Unit::kThin && l.weight_group % kLanes == 0;
  return thin ? run_thin<Unit>(l, threads) : run_panels<Unit>(l, threads);
}

int run_weightonly(const DqWeightOnly& l) {
  if (l.rows == 0 || l.outputs == 0) return 0;
#ifdef DQ_BF16_UNITS
  if (l.dtype == BF16) return run_weightonly<Pairs>(l);
#endif
  return run_weightonly<Singles>(l);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
