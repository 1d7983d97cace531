// Weight-only linears on a few rows (modulation, time and text projections): bound by reading the weight once.
//
//   y[m, n] = sum_g sw[n, g] sum_{k in g} x[m, k] w[n, k] + bias[n]          x stays floating point
#include "avx512.h"
#include "fields.h"

using namespace dq;

extern "C" {

struct DqThin {
  const void* x;
  const int8_t* weight;
  const float* weight_scale;
  const void* bias;
  void* y;
  int64_t rows, columns, outputs, row_bytes, weight_group, weight_scale_stride;
  Dtype dtype;
  int32_t weight_bits;
};
}

namespace {

thread_local Scratch floats;

// One output channel for MR rows of `x` (padded to 64 columns with zeros).
template <int MR>
DQ_INLINE void channel(const DqThin& t, const float* x, long width, long n, long m) {
  const int8_t* codes = t.weight + n * t.row_bytes;
  const float* scale = t.weight_scale + n * t.weight_scale_stride;
  long group = t.weight_group ? t.weight_group : t.columns;
  __m512 total[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) total[i] = _mm512_setzero_ps();
  for (long first = 0, g = 0; first < t.columns; first += group, g++) {
    __m512 sum[MR];
    DQ_UNROLL for (int i = 0; i < MR; i++) sum[i] = _mm512_setzero_ps();
    long last = std::min(first + group, t.columns);
    for (long k = first; k < last; k += 64) {
      __m512i bytes = _mm512_maskz_mov_epi8(first_bytes(last - k), row_codes(codes, k, t.columns, t.weight_bits));
      __m128i part[4] = {_mm512_castsi512_si128(bytes), _mm512_extracti32x4_epi32(bytes, 1),
                         _mm512_extracti32x4_epi32(bytes, 2), _mm512_extracti32x4_epi32(bytes, 3)};
      DQ_UNROLL for (int j = 0; j < 4; j++) {
        __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[j]));
        DQ_UNROLL for (int i = 0; i < MR; i++) {
          sum[i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + (m + i) * width + k + 16 * j), sum[i]);
        }
      }
    }
    __m512 factor = _mm512_set1_ps(t.weight_group ? scale[g] : scale[0]);
    DQ_UNROLL for (int i = 0; i < MR; i++) total[i] = _mm512_fmadd_ps(sum[i], factor, total[i]);
  }
  float bias = t.bias ? _mm512_cvtss_f32(load(t.bias, n, t.dtype, 1)) : 0;
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    store(t.y, (m + i) * t.outputs + n, t.dtype, 1, _mm512_set1_ps(_mm512_reduce_add_ps(total[i]) + bias));
  }
}

}  // namespace

extern "C" int dq_thin(const DqThin* args) {
  const DqThin& t = *args;
  long width = round_up(t.columns, 64) + 64;
  float* x = (float*)floats.get(t.rows * width * 4);
  if (!x) return 1;
  for (long m = 0; m < t.rows; m++) {
    for (long k = 0; k < width; k += 16) {
      _mm512_storeu_ps(x + m * width + k, load(t.x, m * t.columns + k, t.dtype, first_lanes(t.columns - k)));
    }
  }
  int threads = double(t.rows) * t.columns * t.outputs < 1e6 ? 1 : omp_get_max_threads();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < t.outputs; n++) {
    long m = 0;
    for (; m + 4 <= t.rows; m += 4) channel<4>(t, x, width, n, m);
    for (; m + 2 <= t.rows; m += 2) channel<2>(t, x, width, n, m);
    for (; m < t.rows; m++) channel<1>(t, x, width, n, m);
  }
  return 0;
}

DQ_FIELDS(DqThin, dq_thin_fields, FIELD(x), FIELD(weight), FIELD(weight_scale), FIELD(bias), FIELD(y), FIELD(rows),
          FIELD(columns), FIELD(outputs), FIELD(row_bytes), FIELD(weight_group), FIELD(weight_scale_stride),
          FIELD(dtype), FIELD(weight_bits))
