// Quantized convolutions of 1 to 3 dimensions as an implicit matrix product: no patches are ever written.
//
//   y[b, n, o] = sx[b] sw[n] sum_{t, c} (q[b, c, o stride + t dilation] - z[b]) w[n, c, t] + bias[n]
//
// The input is rounded once into a channels-last image of bytes, padded with the code of zero; the row of a pixel and
// tap is then an address, and the product of linears serves. One activation scale and zero point a sample.
#include "avx512.h"
#include "fields.h"
#include "tile.h"

using namespace dq;

extern "C" {

struct DqConv {
  const void* x;
  const int8_t* weight;  // (outputs, channels * taps) codes, taps innermost
  const float* weight_scale;
  const void* bias;
  const float* act_scale;
  void* y;
  int64_t batch, channels, outputs, row_bytes, weight_scale_stride;
  int64_t size[3], kernel[3], step[3], pad[3], gap[3], out[3];
  Dtype dtype;
  int32_t weight_bits, act_bits, act_affine, channels_last;
};
}

namespace {

thread_local Scratch shared, own;

struct Geometry {
  long pixels, taps, channels, padded[3], image, inside;  // channels: rounded up to 4; inside: elements of a sample
};

Geometry geometry_of(const DqConv& c) {
  Geometry g{
      .pixels = c.out[0] * c.out[1] * c.out[2],
      .taps = c.kernel[0] * c.kernel[1] * c.kernel[2],
      .channels = round_up(c.channels, 4),
      .inside = c.channels * c.size[0] * c.size[1] * c.size[2],
  };
  for (int d = 0; d < 3; d++) g.padded[d] = c.size[d] + 2 * c.pad[d];
  g.image = g.padded[0] * g.padded[1] * g.padded[2] * g.channels;
  return g;
}

// Everything the threads share, in one buffer.
struct Shared {
  uint8_t* images;  // (batch, image) bytes
  float* scale;     // (batch * pixels,)
  int* zero;
  Range* ranges;  // (batch, kChunks)
  long* offset;   // (pixels,) of a pixel's first byte in the image, then (taps,)
};

constexpr long kChunks = 16;  // pieces of a sample whose ranges are found in parallel

Shared shared_in(const DqConv& c, const Geometry& g) {
  long rows = c.batch * g.pixels;
  size_t bytes = round_up(c.batch * g.image + 64, 64);
  char* at = (char*)shared.get(bytes + rows * 8 + c.batch * kChunks * 8 + (g.pixels + g.taps) * 8 + 256);
  Shared s{};
  if (!at) return s;
  s.images = (uint8_t*)at;
  s.offset = (long*)(at + bytes);
  s.ranges = (Range*)(s.offset + g.pixels + g.taps);
  s.scale = (float*)(s.ranges + c.batch * kChunks);
  s.zero = (int*)(s.scale + rows);
  return s;
}

void lay_offsets(const DqConv& c, const Geometry& g, long* offset) {
  auto address = [&](long d, long h, long w) { return ((d * g.padded[1] + h) * g.padded[2] + w) * g.channels; };
  for (long d = 0; d < c.out[0]; d++)
    for (long h = 0; h < c.out[1]; h++)
      for (long w = 0; w < c.out[2]; w++) *offset++ = address(d * c.step[0], h * c.step[1], w * c.step[2]);
  for (long d = 0; d < c.kernel[0]; d++)
    for (long h = 0; h < c.kernel[1]; h++)
      for (long w = 0; w < c.kernel[2]; w++) *offset++ = address(d * c.gap[0], h * c.gap[1], w * c.gap[2]);
}

void find_ranges(const DqConv& c, const Geometry& g, Range* ranges) {
#pragma omp for schedule(static)
  for (long task = 0; task < c.batch * kChunks; task++) {
    long each = round_up((g.inside + kChunks - 1) / kChunks, 16), first = task % kChunks * each;
    long count = std::min(each, g.inside - first);
    ranges[task] = range_of(c.x, task / kChunks * g.inside + first, count, c.dtype);
  }
}

void fit_sample(const DqConv& c, const Geometry& g, const Shared& s, const Quantized& q, long b) {
  Range all{INFINITY, -INFINITY};
  for (long i = 0; i < kChunks; i++) {
    Range r = s.ranges[b * kChunks + i];
    if (r.low != r.low) all = {NAN, NAN};
    if (r.low < all.low) all.low = r.low;
    if (r.high > all.high) all.high = r.high;
  }
  float scale = c.act_scale ? *c.act_scale : 0;
  int zero = 0;
  if (!c.act_scale) fit(all, q, scale, zero);
  std::fill_n(s.scale + b * g.pixels, g.pixels, scale);
  std::fill_n(s.zero + b * g.pixels, g.pixels, zero);
}

// One line of pixels (all channels) of one sample into its image, borders included.
void lay_line(const DqConv& c, const Geometry& g, const Shared& s, const Quantized& q, long b, long d, long h) {
  long width = c.size[2], from_d = d - c.pad[0], from_h = h - c.pad[1];
  uint8_t* line = s.images + b * g.image + (d * g.padded[1] + h) * g.padded[2] * g.channels;
  int zero = s.zero[b * g.pixels];
  bool inside = from_d >= 0 && from_d < c.size[0] && from_h >= 0 && from_h < c.size[1];
  if (!inside || c.pad[2] || g.channels != c.channels) memset(line, zero + 128, g.padded[2] * g.channels);
  if (!inside) return;
  line += c.pad[2] * g.channels;
  float scale = s.scale[b * g.pixels];
  long row = from_d * c.size[1] + from_h;
  float values[1024];
  uint8_t codes[1024];
  if (c.channels_last) {
    long start = b * g.inside + row * width * c.channels;
    for (long w = 0; w < width; w++) {
      for (long first = 0; first < c.channels; first += 1024) {
        long count = std::min(1024l, c.channels - first);
        for (long k = 0; k < count; k += 16) {
          _mm512_storeu_ps(values + k, load(c.x, start + w * c.channels + first + k, c.dtype, first_lanes(count - k)));
        }
        encode<Bytes>(values, count, scale, zero, q, line + w * g.channels + first);
      }
    }
    return;
  }
  long plane = c.size[0] * c.size[1] * width;
  for (long first = 0; first < width; first += 16) {  // 16 pixels of 64 channels: a block that stays in L1
    long pixels = std::min(16l, width - first);
    for (long channel = 0; channel < c.channels; channel += 64) {
      long count = std::min(64l, c.channels - channel);
      for (long k = 0; k < count; k++) {
        long at = b * g.inside + (channel + k) * plane + row * width + first;
        _mm512_storeu_ps(values, load(c.x, at, c.dtype, first_lanes(pixels)));
        encode<Bytes>(values, pixels, scale, zero, q, codes + 16 * k);
      }
      for (long w = 0; w < pixels; w++) {
        uint8_t* to = line + (first + w) * g.channels + channel;
        for (long k = 0; k < count; k++) to[k] = codes[16 * k + w];
      }
    }
  }
}

// Channels apart: (channels, taps) -> (taps, channels rounded up to 4), one row of codes.
void deinterleave(const int8_t* row, long channels, long taps, long padded, int8_t* out) {
  for (long t = 0; t < taps; t++) {
    for (long k = 0; k < channels; k++) out[t * padded + k] = row[k * taps + t];
    for (long k = channels; k < padded; k++) out[t * padded + k] = 0;
  }
}

// Where output t finds its bytes in input register r, when 64 channels of `taps` taps are read as `taps` registers.
struct Pick {
  int8_t index[64];
  __mmask64 wanted;
  char unused[56];  // 64-byte steps
};

constexpr long kMostTaps = 32;  // tables of more would not stay in cache

void lay_picks(long taps, Pick* picks) {
  memset((void*)picks, 0, taps * taps * sizeof(Pick));
  for (long t = 0; t < taps; t++) {
    for (long k = 0; k < 64; k++) {
      Pick& pick = picks[t * taps + (k * taps + t) / 64];
      pick.index[k] = int8_t((k * taps + t) % 64);
      pick.wanted |= 1ull << k;
    }
  }
}

// The same, 64 channels at a time: output t takes the bytes at t, t + taps, ... out of `taps` registers.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void deinterleave_fast(const int8_t* row, long channels,
                                                                              long taps, long padded, int8_t* out,
                                                                              const Pick* picks) {
  for (long first = 0; first < channels; first += 64) {
    __m512i in[kMostTaps];
    for (long r = 0; r < taps; r++) {
      in[r] = _mm512_maskz_loadu_epi8(first_bytes((channels - first) * taps - 64 * r), row + first * taps + 64 * r);
    }
    for (long t = 0; t < taps; t++) {
      __m512i gathered = _mm512_setzero_si512();
      for (long r = 0; r < taps; r++) {
        const Pick& pick = picks[t * taps + r];
        gathered = _mm512_mask_permutexvar_epi8(gathered, pick.wanted, _mm512_load_si512(pick.index), in[r]);
      }
      _mm512_mask_storeu_epi8(out + t * padded + first, first_bytes(padded - first), gathered);
    }
  }
}

void lay_panel(const DqConv& c, const Geometry& g, const Weight& w, long first, const Panel& p, int8_t* rows,
               const Pick* picks) {
  const bool fast = g.taps <= kMostTaps && __builtin_cpu_supports("avx512vbmi");
  long columns = c.channels * g.taps, spread = g.taps * g.channels;
  int8_t* plain = rows + 16 * spread;
  for (long n = first; n < first + kWide; n += 16) {
    long there = std::clamp(c.outputs - n, 0l, 16l);
    for (long i = 0; i < there; i++) {
      const int8_t* row = w.codes + (n + i) * w.row_bytes;
      if (w.bits == 4) {
        for (long k = 0; k < columns; k += 64) {
          _mm512_mask_storeu_epi8(plain + k, first_bytes(columns - k), row_codes(row, k, columns, 4));
        }
        row = plain;
      }
      if (fast) {
        deinterleave_fast(row, c.channels, g.taps, g.channels, rows + i * spread, picks);
      } else {
        deinterleave(row, c.channels, g.taps, g.channels, rows + i * spread);
      }
    }
    lay_block<Bytes>(rows, spread, there, spread, 8, p.codes + (n - first) * 4);
  }
  lay_sums<Bytes>(p, spread, spread, 1);
  lay_vectors(p, w, first);
}

template <int MR>
void pixels_of(const DqConv& c, const Geometry& g, const Shared& s, const Panel& p, const Quantized& q,
               const Output& o, long b, long pixel, long n, long at) {
  const uint8_t* row[MR];
  for (int i = 0; i < MR; i++) row[i] = s.images + b * g.image + s.offset[pixel + i];
  Taps taps{.offset = s.offset + g.pixels, .count = g.taps, .width = g.channels};
  (q.affine ? tile<Bytes, MR, true> : tile<Bytes, MR, false>)(p, q, taps, o, row, b * g.pixels + pixel, n, c.outputs, at);
}

constexpr long kPixels = 96;  // output pixels of a task

// A block of output pixels: straight to channels-last memory, or through a small block that is turned.
void block(const DqConv& c, const Geometry& g, const Shared& s, const Panel& p, const Quantized& q, long b, long first,
           long n, char* turned) {
  long last = std::min(first + kPixels, g.pixels), wide = std::min(kWide, c.outputs - n),
       bytes = element_bytes(c.dtype);
  const Output o{
      .y = c.channels_last ? c.y : turned - n * bytes,
      .stride = c.channels_last ? c.outputs : kWide,
      .dtype = c.dtype,
  };
  long base = c.channels_last ? b * g.pixels : -first, m = first;
  for (; m + 6 <= last; m += 6) pixels_of<6>(c, g, s, p, q, o, b, m, n, base + m);
  for (; m < last; m++) pixels_of<1>(c, g, s, p, q, o, b, m, n, base + m);
  if (c.channels_last) return;
  for (long k = 0; k < wide; k++) {
    long to = (b * c.outputs + n + k) * g.pixels + first;
    if (bytes == 4) {
      for (long i = 0; i < last - first; i++) ((float*)c.y)[to + i] = ((float*)turned)[i * kWide + k];
    } else {
      for (long i = 0; i < last - first; i++) ((uint16_t*)c.y)[to + i] = ((uint16_t*)turned)[i * kWide + k];
    }
  }
}

Weight weight_of(const DqConv& c, long spread) {
  return {
      .codes = c.weight,
      .scale = c.weight_scale,
      .bias = c.bias,
      .outputs = c.outputs,
      .columns = spread,
      .row_bytes = c.row_bytes,
      .scale_stride = c.weight_scale_stride,
      .scale_groups = 1,
      .group = spread,
      .groups = 1,
      .bits = c.weight_bits,
      .dtype = c.dtype,
  };
}

void product(const DqConv& c, const Geometry& g, const Shared& s, const Quantized& q, bool& failed) {
  long spread = g.taps * g.channels, panels = (c.outputs + kWide - 1) / kWide;
  const Weight w = weight_of(c, spread);
  size_t panel = round_up(panel_bytes<Bytes>(round_up(spread, 64), 1, 0), 64), rows = round_up(17 * spread + 128, 64);
  size_t turned = kPixels * kWide * 4, table = g.taps <= kMostTaps ? g.taps * g.taps * sizeof(Pick) : 0;
  char* place = (char*)own.get(panel + rows + turned + table);
  Panel p = panel_in<Bytes>(place, round_up(spread, 64), 1);
  Pick* picks = (Pick*)(place + panel + rows + turned);
  if (place && table) lay_picks(g.taps, picks);
  long blocks = (g.pixels + kPixels - 1) / kPixels, held = -1;
  // neighbouring tasks share a panel; small images are cut where a thread changes panels
  long each = std::max(1l, c.batch * blocks / (panels >= 2 * omp_get_num_threads() ? 1 : 2 * omp_get_num_threads()));
#pragma omp for schedule(dynamic, each)
  for (long task = 0; task < panels * c.batch * blocks; task++) {
    if (!place) {
      failed = true;
      continue;
    }
    long index = task / (c.batch * blocks), b = task / blocks % c.batch, first = task % blocks * kPixels;
    if (index != held) lay_panel(c, g, w, index * kWide, p, (int8_t*)place + panel, picks);
    held = index;
    block(c, g, s, p, q, b, first, index * kWide, place + panel + rows);
  }
}

}  // namespace

extern "C" int dq_conv(const DqConv* args) {
  const DqConv& c = *args;
  Geometry g = geometry_of(c);
  if (c.batch * g.pixels * c.outputs == 0) return 0;
  Shared s = shared_in(c, g);
  if (!s.images) return 1;
  lay_offsets(c, g, s.offset);
  const Quantized q{
      .scale = s.scale,
      .zero = s.zero,
      .groups = 1,
      .low = lowest_code(c.act_bits, c.act_affine),
      .high = highest_code(c.act_bits),
      .affine = bool(c.act_affine),
  };
  bool failed = false;
  double work = double(c.batch) * g.pixels * c.outputs * g.taps * c.channels;
  int threads = work < 1e6 ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads)
  {
    if (!c.act_scale) find_ranges(c, g, s.ranges);
#pragma omp for schedule(static)
    for (long b = 0; b < c.batch; b++) fit_sample(c, g, s, q, b);
#pragma omp for schedule(static)
    for (long line = 0; line < c.batch * g.padded[0] * g.padded[1]; line++) {
      lay_line(c, g, s, q, line / (g.padded[0] * g.padded[1]), line / g.padded[1] % g.padded[0], line % g.padded[1]);
    }
    product(c, g, s, q, failed);
  }
  return failed;
}

DQ_FIELDS(DqConv, dq_conv_fields, FIELD(x), FIELD(weight), FIELD(weight_scale), FIELD(bias), FIELD(act_scale),
          FIELD(y), FIELD(batch), FIELD(channels), FIELD(outputs), FIELD(row_bytes), FIELD(weight_scale_stride),
          FIELD(size), FIELD(kernel), FIELD(step), FIELD(pad), FIELD(gap), FIELD(out), FIELD(dtype),
          FIELD(weight_bits), FIELD(act_bits), FIELD(act_affine), FIELD(channels_last))
