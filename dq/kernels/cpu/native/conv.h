// Quantized convolutions of 1 to 3 dimensions as an implicit matrix product: no patches are ever written.
//
//   y[b, n, o] = sx[b] sw[n] sum_{t, c} (q[b, c, o stride + t dilation] - z[b]) w[n, c, t] + bias[n]
//
// The whole of it for one level: conv_avx512.cpp and its like include a level, this, and export dq_conv_<level>.
#pragma once
#include "conv_image.h"
#include "conv_weight.h"
#include "tile.h"

namespace dq::inline DQ_LEVEL {
namespace {

thread_local Scratch images, workshops;

constexpr long kPixels = 96;  // output pixels of a task

// What every task of a call sees.
template <class Dot>
struct Call {
  const DqConv& c;
  const Geometry& g;
  const Image& s;
  const Quantized& q;

  template <int MR>
  void tile_of(const Panel& p, const Output& o, long b, long pixel, long n, long at) const {
    const uint8_t* row[MR];
    for (int i = 0; i < MR; i++) row[i] = s.codes + b * g.image + s.offset[pixel + i];
    const Taps taps{.offset = s.offset + g.pixels, .count = g.taps, .width = g.channels};
    const long m = b * g.pixels + pixel;
    (q.affine ? tile<Dot, MR, true> : tile<Dot, MR, false>)(p, q, taps, o, row, m, n, c.outputs, at);
  }

  // The codes that six pixels from `pixel` on are the first to need. The processor does not guess them: a pixel's codes
  // are a short run of bytes, and from memory they would cost a pointwise convolution a third of its time.
  void ahead(long b, long pixel) const {
    const uint8_t* image = s.codes + b * g.image + s.offset[g.pixels + g.taps - 1];
    for (const long last = std::min(pixel + 6, g.pixels); pixel < last; pixel++) {
      for (long k = 0; k < g.pixel; k += 64) __builtin_prefetch(image + s.offset[pixel] + k, 0, 2);
    }
  }

  // Pixels first to last times a tile of output channels; row m of the output is pixel m + shift.
  void tiles(const Panel& p, const Output& o, long b, long first, long last, long n, long shift) const {
    long m = first;
    for (; m + 6 <= last; m += 6) {
      if (n % kWide == 0) ahead(b, m + 12);
      tile_of<6>(p, o, b, m, n, m + shift);
    }
    for (; m + 3 <= last; m += 3) tile_of<3>(p, o, b, m, n, m + shift);
    for (; m < last; m++) tile_of<1>(p, o, b, m, n, m + shift);
  }

  // A block of output pixels: straight to channels-last memory, or through a small block that is turned.
  void block(const Panel& p, long b, long first, long n, float* turned) const {
    const long last = std::min(first + kPixels, g.pixels);
    for (long t = 0; t < kWide && n + t < c.outputs; t += kTile) {
      if (c.channels_last) {
        const Output o{.y = c.y, .stride = c.outputs, .dtype = c.dtype};
        tiles(from(p, t), o, b, first, last, n + t, b * g.pixels);
      } else {
        const Output o{.y = turned - (n + t), .stride = kTile, .dtype = FP32};
        tiles(from(p, t), o, b, first, last, n + t, -first);
        turn(turned, b, first, last, n + t);
      }
    }
  }

  // A turned block, (pixels, kTile), to its places in the output.
  void turn(const float* turned, long b, long first, long last, long n) const {
    for (long k = 0; k < kTile && n + k < c.outputs; k += kLanes) {
      const long there = std::min(kLanes, c.outputs - n - k);
      for (long i = 0; i < last - first; i += kLanes) {
        Words part[kLanes];
        DQ_UNROLL for (long j = 0; j < kLanes; j++) part[j] = read((const void*)(turned + (i + j) * kTile + k));
        transpose(part);
        const Mask lanes = first_lanes(last - first - i);
        const long to = (b * c.outputs + n + k) * g.pixels + first + i;
        for (long j = 0; j < there; j++) store(c.y, to + j * g.pixels, c.dtype, lanes, (Floats)part[j]);
      }
    }
  }
};

Weight weight_of(const DqConv& c, long columns) {
  return {
      .codes = c.weight,
      .scale = c.weight_scale,
      .bias = c.bias,
      .outputs = c.outputs,
      .columns = columns,
      .row_bytes = c.row_bytes,
      .scale_stride = c.weight_scale_stride,
      .scale_groups = 1,
      .group = columns,
      .groups = 1,
      .bits = c.weight_bits,
      .dtype = c.dtype,
  };
}

template <class Dot>
void product(const Call<Dot>& call, bool& failed) {
  const DqConv& c = call.c;
  const Geometry& g = call.g;
  const long columns = g.taps * g.channels, panels = (c.outputs + kWide - 1) / kWide;
  const Weight w = weight_of(c, columns);
  const size_t turned = kPixels * kTile * 4, tools = round_up(Workshop::bytes(g.taps), 64);
  char* place = (char*)workshops.get(turned + tools + panel_bytes<Dot>(round_up(columns, 64), 1, 0));
  if (!place) failed = true;
  const Panel p = panel_in<Dot>(place + turned + tools, round_up(columns, 64), 1);
  const Workshop shop(g.taps, place ? place + turned : nullptr);
  const long blocks = (g.pixels + kPixels - 1) / kPixels, threads = omp_get_num_threads();
  // neighbouring tasks share a panel; small images are cut where a thread changes panels
  const long each = std::max(1l, c.batch * blocks / (panels >= 2 * threads ? 1 : 2 * threads));
  long held = -1;
#pragma omp for schedule(dynamic, each)
  for (long task = 0; task < panels * c.batch * blocks; task++) {
    if (!place) continue;
    const long panel = task / (c.batch * blocks), b = task / blocks % c.batch, first = task % blocks * kPixels;
    if (panel != held) lay_panel<Dot>(shop, w, c.channels, panel * kWide, p);
    held = panel;
    call.block(p, b, first, panel * kWide, (float*)place);
  }
}

template <class Dot>
int run_conv(const DqConv& c) {
  const Geometry g = geometry_of(c, sizeof(typename Dot::Code));
  if (c.batch * g.pixels * c.outputs == 0) return 0;
  const Image s = image_in(c, g, images);
  if (!s.codes) return 1;
  lay_offsets(c, g, s.offset);
  const Quantized q{
      .scale = s.scale,
      .zero = s.zero,
      .groups = 1,
      .low = lowest_code(c.act_bits, c.act_affine),
      .high = highest_code(c.act_bits),
      .affine = bool(c.act_affine),
      .stored = c.act_scale,
  };
  bool failed = false;  // set by any thread that got no memory, only ever to true
  const double work = double(c.batch) * g.pixels * c.outputs * g.taps * c.channels;
  const int threads = work < 1e6 ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads)
  {
    lay_image<Dot>(c, g, s, q);
    product(Call<Dot>{c, g, s, q}, failed);
  }
  return failed;
}

int run_conv(const DqConv& c) { return c.weight_bits <= 4 ? run_conv<Narrow>(c) : run_conv<Wide>(c); }

}  // namespace
}  // namespace dq::inline DQ_LEVEL
