// Packed weights to floating point: what torch's own products and convolutions take.
//
//   w[n, k] = (q[n, k] - z[n, g]) s[n, g]          one rounding in fp32, one more where y is of 16 bits
#pragma once
#include "arguments.h"
#include "rows.h"

namespace dq::inline DQ_LEVEL {
namespace {

thread_local Scratch row_bytes;

// One row of packed codes to bytes; `out` has room for the columns rounded up to 4 kLanes.
DQ_INLINE void unpack_row(const int8_t* row, long columns, int bits, int8_t* out) {
  for (long k = 0; k < columns; k += 4 * kLanes) write(out + k, row_codes(row, k, columns, bits));
}

template <Dtype DTYPE>
DQ_INLINE void decode_row(const DqDecode& d, long n, int8_t* codes) {
  unpack_row(d.weight + n * d.row_bytes, d.columns, d.weight_bits, codes);
  const long group = d.weight_group ? d.weight_group : d.columns, at = n * d.weight_scale_stride;
  for (long first = 0, g = 0; first < d.columns; first += group, g++) {
    const long last = std::min(first + group, d.columns);
    const Floats scale = every(d.weight_scale[at + g]);
    const Floats zero = every(d.weight_zero ? float(d.weight_zero[at + g]) : 0.f);
    for (long k = first; k < last; k += kLanes) {
      Floats value = mul(sub(to_floats(read_codes(codes + k)), zero), scale);
      store(d.y, n * d.columns + k, DTYPE, first_lanes(last - k), value);
    }
  }
}

template <Dtype DTYPE>
int decode_rows(const DqDecode& d) {
  const int threads = double(d.rows) * d.columns < 1e5 ? 1 : omp_get_max_threads();
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(threads)
  {
    int8_t* codes = (int8_t*)row_bytes.get(round_up(d.columns, 64) + 64);
    if (!codes) failed = true;
#pragma omp for schedule(static)
    for (long n = 0; n < d.rows; n++) {
      if (codes) decode_row<DTYPE>(d, n, codes);
    }
  }
  return failed;
}

int run_decode(const DqDecode& d) {
  if (d.dtype == FP32) return decode_rows<FP32>(d);
  return d.dtype == BF16 ? decode_rows<BF16>(d) : decode_rows<FP16>(d);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
