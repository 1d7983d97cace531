// Activations of a convolution: rounded once into a channels-last image of codes, padded with the code of zero, so that
// the row of an output pixel and tap is an address. One scale and zero point a sample, or a pixel.
#pragma once
#include "arguments.h"
#include "rows.h"

namespace dq::inline DQ_LEVEL {
namespace {

struct Geometry {
  long pixels, taps, channels, padded[3];  // of the output; of the kernel; rounded up to 4; of the image
  long inside, plane;                      // elements of a sample; pixels of a sample
  long pixel, line, image;                 // bytes of codes
};

Geometry geometry_of(const DqConv& c, long code_bytes) {
  Geometry g{
      .pixels = c.out[0] * c.out[1] * c.out[2],
      .taps = c.kernel[0] * c.kernel[1] * c.kernel[2],
      .channels = round_up(c.channels, 4),
      .plane = c.size[0] * c.size[1] * c.size[2],
  };
  for (int d = 0; d < 3; d++) g.padded[d] = c.size[d] + 2 * c.pad[d];
  g.inside = c.channels * g.plane;
  g.pixel = g.channels * code_bytes;
  g.line = g.padded[2] * g.pixel;
  g.image = g.padded[0] * g.padded[1] * g.line;
  return g;
}

// Everything the threads share, in one buffer.
struct Image {
  uint8_t* codes;  // (batch, image) bytes
  float* scale;    // (batch, pixels)
  int* zero;
  Range* ranges;  // (batch, kChunks)
  long* offset;   // (pixels,) of a pixel's first byte in the image, then (taps,)
};

constexpr long kChunks = 16;  // pieces of a sample that are worked on in parallel

Image image_in(const DqConv& c, const Geometry& g, Scratch& room) {
  long rows = c.batch * g.pixels;
  size_t bytes = round_up(c.batch * g.image + 64, 64);
  char* at = (char*)room.get(bytes + rows * 8 + c.batch * kChunks * 8 + (g.pixels + g.taps) * 8 + 256);
  Image s{};
  if (!at) return s;
  s.codes = (uint8_t*)at;
  s.offset = (long*)(at + bytes);
  s.ranges = (Range*)(s.offset + g.pixels + g.taps);
  s.scale = (float*)(s.ranges + c.batch * kChunks);
  s.zero = (int*)(s.scale + rows);
  return s;
}

void lay_offsets(const DqConv& c, const Geometry& g, long* offset) {
  auto address = [&](long d, long h, long w) { return (d * g.padded[1] + h) * g.line + w * g.pixel; };
  for (long d = 0; d < c.out[0]; d++)
    for (long h = 0; h < c.out[1]; h++)
      for (long w = 0; w < c.out[2]; w++) *offset++ = address(d * c.step[0], h * c.step[1], w * c.step[2]);
  for (long d = 0; d < c.kernel[0]; d++)
    for (long h = 0; h < c.kernel[1]; h++)
      for (long w = 0; w < c.kernel[2]; w++) *offset++ = address(d * c.gap[0], h * c.gap[1], w * c.gap[2]);
}

// --- scales ----------------------------------------------------------------------------------------------------------

void find_ranges(const DqConv& c, const Geometry& g, Range* ranges) {
  const long each = round_up((g.inside + kChunks - 1) / kChunks, 16);
#pragma omp for schedule(static)
  for (long task = 0; task < c.batch * kChunks; task++) {
    long first = std::min(task % kChunks * each, g.inside), count = std::min(each, g.inside - first);
    ranges[task] = range_of(c.x, task / kChunks * g.inside + first, count, c.dtype);
  }
}

void fit_sample(const DqConv& c, const Geometry& g, const Image& s, const Quantized& q, long b) {
  Range all{INFINITY, -INFINITY};
  for (long i = 0; i < kChunks && !q.stored; i++) {
    Range r = s.ranges[b * kChunks + i];
    if (r.low != r.low) all = {NAN, NAN};
    if (r.low < all.low) all.low = r.low;
    if (r.high > all.high) all.high = r.high;
  }
  float scale = q.stored ? *q.stored : 0;
  int zero = 0;
  if (!q.stored) fit(all, q, scale, zero);
  std::fill_n(s.scale + b * g.pixels, g.pixels, scale);
  std::fill_n(s.zero + b * g.pixels, g.pixels, zero);
}

constexpr long kGroups = 4, kRun = kGroups * kLanes;  // pixels that are looked at together, kLanes in a group

// Pixels `first` to `first + count` of a sample, at most kRun.
struct Run {
  long sample, first, count, groups;
  DQ_METHOD Mask lanes(long group) const { return first_lanes(count - group * kLanes); }
  DQ_METHOD long row(const Geometry& g) const { return sample * g.pixels + first; }
};

// Range of every pixel over its channels, which are `g.plane` apart. NaN is rare: pixels that have one are found one by
// one.
template <Dtype DTYPE>
void ranges_of_pixels(const DqConv& c, const Geometry& g, const Run& run, Range* ranges) {
  const long at = run.sample * g.inside + run.first;
  Floats low[kGroups], high[kGroups];
  DQ_UNROLL for (long i = 0; i < kGroups; i++) low[i] = every(INFINITY), high[i] = every(-INFINITY);
  Flags strange = nan_lanes(low[0]);
  auto meet = [&](long k, long i, Mask lanes) __attribute__((always_inline)) {
    Floats v = load(c.x, at + k * g.plane + i * kLanes, DTYPE, lanes);
    low[i] = min(low[i], v);
    high[i] = max(high[i], v);
    strange = either(strange, nan_lanes(v));
  };
  for (long k = 0; k < c.channels; k++) {
    if (run.count == kRun) {
      DQ_UNROLL for (long i = 0; i < kGroups; i++) meet(k, i, first_lanes(kLanes));
    } else {
      DQ_UNROLL for (long i = 0; i < kGroups; i++) meet(k, i, run.lanes(i));
    }
  }
  float lows[kRun], highs[kRun];
  DQ_UNROLL for (long i = 0; i < kGroups; i++) write(lows + i * kLanes, low[i]), write(highs + i * kLanes, high[i]);
  for (long i = 0; i < run.count; i++) {
    bool whole = true;
    for (long k = 0; any(strange) && k < c.channels; k++) {
      whole &= !any(nan_lanes(load(c.x, at + k * g.plane + i, DTYPE, first_lanes(1))));
    }
    ranges[i] = whole ? Range{lows[i], highs[i]} : Range{NAN, NAN};
  }
}

template <Dtype DTYPE>
void fit_pixels(const DqConv& c, const Geometry& g, const Image& s, const Quantized& q, const Run& run) {
  Range ranges[kRun];
  if (c.channels_last) {
    for (long i = 0; i < run.count; i++) {
      ranges[i] = range_of(c.x, run.sample * g.inside + (run.first + i) * c.channels, c.channels, DTYPE);
    }
  } else {
    ranges_of_pixels<DTYPE>(c, g, run, ranges);
  }
  for (long i = 0, row = run.row(g); i < run.count; i++, row++) {
    s.zero[row] = 0;
    if (q.stored) {
      s.scale[row] = *q.stored;
    } else {
      fit(ranges[i], q, s.scale[row], s.zero[row]);
    }
  }
}

// --- codes -----------------------------------------------------------------------------------------------------------

using Ints = int __attribute__((vector_size(4 * kLanes)));

// Floats to codes under a scale and zero point a lane; the quotient is exact (rows.h: encode).
struct Rounder {
  Floats divisor, inverse;
  Words low, high, offset;
  bool plain;  // the remainder is exact
  DQ_METHOD Words codes(Floats v) const {
    Floats quotient = mul(v, inverse);
    quotient = multiply_add(multiply_sub_from(quotient, divisor, v), inverse, quotient);
    if (!plain) quotient = div(v, divisor);
    return add(min(max(round(quotient), low), high), offset);
  }
};

template <class Dot>
Rounder rounder_of(const Quantized& q, long row, bool per_pixel, Mask lanes) {
  Floats scale = per_pixel ? read(q.scale + row, lanes) : every(q.scale[row]);
  Words zero = per_pixel ? (Words)read((const float*)q.zero + row, lanes) : every(q.zero[row]);
  float least = smallest(scale), most = largest(scale);
  return {
      .divisor = scale,
      .inverse = div(every(1.f), scale),
      .low = sub(every(q.low), zero),
      .high = sub(every(q.high), zero),
      .offset = add(zero, every(Dot::kOffset)),
      .plain = least > 1e-30f && most < 1e30f && !any(nan_lanes(scale)),
  };
}

// Where pixel `pixel` of a sample and those after it lie in its image.
struct Places {
  long w, h, d;
  const DqConv& c;
  const Geometry& g;
  Places(const DqConv& c, const Geometry& g, long pixel)
      : w(pixel % c.size[2]), h(pixel / c.size[2] % c.size[1]), d(pixel / (c.size[2] * c.size[1])), c(c), g(g) {}
  DQ_METHOD long next() {
    long at = ((d + c.pad[0]) * g.padded[1] + h + c.pad[1]) * g.line + (w + c.pad[2]) * g.pixel;
    if (++w == c.size[2]) w = 0, h++;
    if (h == c.size[1]) h = 0, d++;
    return at;
  }
};

// kLanes pixels of as many words of channels, which are apart: turned in registers. `at`: the first element.
template <class Dot, Dtype DTYPE>
DQ_INLINE void turn_pixels(const DqConv& c, const Geometry& g, const Rounder& r, long at, long first, Mask lanes,
                           long count, uint8_t* const* to) {
  constexpr int bits = 32 / Dot::kCodes;
  constexpr long step = kLanes * Dot::kCodes;
  const long words = std::min(kLanes, (g.channels - first) / Dot::kCodes);
  Words block[kLanes];
  for (long i = 0; i < kLanes; i++) {
    Ints word = {};
    DQ_UNROLL for (long j = 0; j < Dot::kCodes; j++) {
      const long channel = first + i * Dot::kCodes + j;
      if (channel >= c.channels) break;
      __builtin_prefetch((const char*)c.x + (at + (channel + step) * g.plane) * element_bytes(DTYPE));  // pages apart
      Ints code = (Ints)r.codes(load(c.x, at + channel * g.plane, DTYPE, lanes));
      word |= (code & int(~0u >> (32 - bits))) << int(bits * j);
    }
    block[i] = (Words)word;
  }
  transpose(block);
  const long byte = first * sizeof(typename Dot::Code);
  for (long i = 0; i < count; i++) {
    if (words == kLanes) {
      write(to[i] + byte, block[i]);
    } else {
      store(to[i] + byte, 0, FP32, first_lanes(words), (Floats)block[i]);
    }
  }
}

template <class Dot, Dtype DTYPE>
void lay_apart(const DqConv& c, const Geometry& g, const Quantized& q, const Run& run, uint8_t* const* to) {
  Rounder r[kGroups];
  for (long i = 0; i < run.groups; i++) {
    r[i] = rounder_of<Dot>(q, c.per_pixel ? run.row(g) + i * kLanes : run.sample * g.pixels, c.per_pixel, run.lanes(i));
  }
  const long at = run.sample * g.inside + run.first;
  for (long first = 0; first < c.channels; first += kLanes * Dot::kCodes) {
    for (long i = 0; i < run.groups; i++) {
      const long pixel = i * kLanes, count = std::min(kLanes, run.count - pixel);
      if (count == kLanes) {
        turn_pixels<Dot, DTYPE>(c, g, r[i], at + pixel, first, first_lanes(kLanes), kLanes, to + pixel);
      } else {
        turn_pixels<Dot, DTYPE>(c, g, r[i], at + pixel, first, first_lanes(count), count, to + pixel);
      }
    }
  }
}

// Pixels whose channels are neighbours.
template <class Dot, Dtype DTYPE>
void lay_together(const DqConv& c, const Geometry& g, const Quantized& q, const Run& run, uint8_t* const* to) {
  for (long i = 0; i < run.count; i++) {
    const Rounder r = rounder_of<Dot>(q, c.per_pixel ? run.row(g) + i : run.sample * g.pixels, false, first_lanes(1));
    const long at = run.sample * g.inside + (run.first + i) * c.channels;
    for (long k = 0; k < c.channels; k += kLanes) {
      const Mask lanes = first_lanes(c.channels - k);
      write_codes((typename Dot::Code*)to[i] + k, lanes, r.codes(load(c.x, at + k, DTYPE, lanes)));
    }
  }
}

// Pixels first to last of a sample into its image.
template <class Dot, Dtype DTYPE>
void lay_pixels(const DqConv& c, const Geometry& g, const Image& s, const Quantized& q, long b, long first,
                long last) {
  Places places(c, g, first);
  for (; first < last; first += kRun) {
    const long count = std::min(kRun, last - first);
    const Run run{.sample = b, .first = first, .count = count, .groups = (count + kLanes - 1) / kLanes};
    if (c.per_pixel) fit_pixels<DTYPE>(c, g, s, q, run);
    uint8_t* to[kRun];
    for (long i = 0; i < count; i++) to[i] = s.codes + b * g.image + places.next();
    (c.channels_last ? lay_together<Dot, DTYPE> : lay_apart<Dot, DTYPE>)(c, g, q, run, to);
  }
}

// What lies around the pixels of one line of the image.
template <class Dot>
void lay_border(const DqConv& c, const Geometry& g, const Image& s, long b, long d, long h) {
  using Code = typename Dot::Code;
  Code* line = (Code*)(s.codes + b * g.image + (d * g.padded[1] + h) * g.line);
  const Code zero = Code(s.zero[b * g.pixels] + Dot::kOffset);
  const bool inside = d >= c.pad[0] && d < c.pad[0] + c.size[0] && h >= c.pad[1] && h < c.pad[1] + c.size[1];
  const long side = (inside ? c.pad[2] : g.padded[2]) * g.channels;
  std::fill_n(line, side, zero);
  if (inside) std::fill_n(line + (c.pad[2] + c.size[2]) * g.channels, side, zero);
}

template <class Dot>
void lay_image(const DqConv& c, const Geometry& g, const Image& s, const Quantized& q) {
  if (!c.per_pixel) {
    if (!q.stored) find_ranges(c, g, s.ranges);
#pragma omp for schedule(static)
    for (long b = 0; b < c.batch; b++) fit_sample(c, g, s, q, b);
  }
  const long lines = g.padded[0] * g.padded[1];
  if (c.pad[0] + c.pad[1] + c.pad[2]) {
#pragma omp for schedule(static) nowait
    for (long i = 0; i < c.batch * lines; i++) {
      lay_border<Dot>(c, g, s, i / lines, i % lines / g.padded[1], i % g.padded[1]);
    }
  }
  const long each = round_up((g.plane + kChunks - 1) / kChunks, kRun);
  auto* lay = c.dtype == FP32   ? lay_pixels<Dot, FP32>
              : c.dtype == BF16 ? lay_pixels<Dot, BF16>
                                : lay_pixels<Dot, FP16>;
#pragma omp for schedule(static)
  for (long task = 0; task < c.batch * kChunks; task++) {
    const long first = task % kChunks * each;
    if (first < g.plane) lay(c, g, s, q, task / kChunks, first, std::min(first + each, g.plane));
  }
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
