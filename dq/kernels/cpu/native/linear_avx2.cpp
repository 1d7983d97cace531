// The same linears for processors without VNNI: plain loops that AVX2 carries out, correct first. No prologue, no branch,
// no epilogue but bias: callers leave those to torch.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

namespace {

float read(const void* base, long at, int dtype) {
  if (dtype == 0) return ((const float*)base)[at];
  uint16_t half = ((const uint16_t*)base)[at];
  if (dtype == 2) return _cvtsh_ss(half);
  uint32_t word = uint32_t(half) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

void write(void* base, long at, int dtype, float value) {
  if (dtype == 0) {
    ((float*)base)[at] = value;
  } else if (dtype == 2) {
    ((uint16_t*)base)[at] = _cvtss_sh(value, 0);
  } else {
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    ((uint16_t*)base)[at] = value != value ? 0x7fc0 : uint16_t(rounded);
  }
}

struct Rows {
  std::vector<int16_t> codes;  // code - zero: what the weight is multiplied with
  std::vector<float> scale;
  long group, groups;
};

void encode(const DqLinear& l, const float* row, long count, float* scale, int16_t* out) {
  float low = 0, high = 0, top = 0;
  bool strange = false;
  for (long k = 0; k < count; k++) {
    strange |= row[k] != row[k];
    low = std::min(low, row[k]);
    high = std::max(high, row[k]);
    top = std::max(top, std::fabs(row[k]));
  }
  float s = l.act_affine ? (high - low) / (l.act_high - l.act_low) : top / l.act_high;
  s = l.act_scale ? *l.act_scale : strange ? NAN : std::max(s, 1e-12f);
  float steps = std::nearbyint(low / s);
  int zero = l.act_affine && std::fabs(steps) < 1e6f ? std::clamp(l.act_low - int(steps), l.act_low, l.act_high) : 0;
  for (long k = 0; k < count; k++) {
    float q = std::nearbyint(row[k] / s);
    q = std::min(std::max(q, float(l.act_low - zero)), float(l.act_high - zero));
    out[k] = int16_t(q == q ? q : 0);
  }
  *scale = s;
}

int dot(const int16_t* a, const int16_t* b, long count) {
  __m256i sum = _mm256_setzero_si256();
  long k = 0;
  for (; k + 16 <= count; k += 16) {
    __m256i x = _mm256_loadu_si256((const __m256i*)(a + k)), y = _mm256_loadu_si256((const __m256i*)(b + k));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
  }
  int part[8], total = 0;
  _mm256_storeu_si256((__m256i*)part, sum);
  for (int value : part) total += value;
  for (; k < count; k++) total += a[k] * b[k];
  return total;
}

void channel(const DqLinear& l, const Rows& rows, long n, int16_t* codes) {
  const int8_t* packed = l.weight + n * l.row_bytes;
  int sum = 0;
  float folded = 0;
  long group = std::min(rows.group, l.weight_group ? l.weight_group : l.columns);
  auto factor = [&](long g) { return l.weight_scale[n * l.weight_scale_stride + (l.weight_group ? g : 0)]; };
  for (long k = 0; k < l.columns; k++) {
    int8_t byte = packed[l.weight_bits == 8 ? k : k / 2];
    codes[k] = l.weight_bits == 8 ? byte : k % 2 ? byte >> 4 : int8_t(byte << 4) >> 4;
    sum += codes[k];
    if ((k + 1) % group == 0 || k + 1 == l.columns) {
      folded += factor(k / group) * sum;
      sum = 0;
    }
  }
  float bias = (l.bias ? read(l.bias, n, l.dtype) : 0) - l.shift * folded;
  for (long m = 0; m < l.rows; m++) {
    float y = 0;
    for (long first = 0, g = 0; first < l.columns; first += group, g++) {
      int product = dot(&rows.codes[m * l.columns + first], codes + first, std::min(group, l.columns - first));
      y += product * rows.scale[m * rows.groups + (rows.groups > 1 ? g : 0)] * factor(g);
    }
    write(l.y, m * l.outputs + n, l.dtype, y + bias);
  }
}

}  // namespace

extern "C" int dq_linear_avx2(const DqLinear* args) {
  const DqLinear& l = *args;
  if (l.low || l.norm || l.mod_scale || l.smooth || l.gelu || l.residual) return 2;
  try {
    Rows rows;
    rows.group = l.act_group ? l.act_group : l.columns;
    rows.groups = (l.columns + rows.group - 1) / rows.group;
    rows.codes.resize(l.rows * l.columns);
    rows.scale.resize(l.rows * rows.groups);
#pragma omp parallel for schedule(static)
    for (long m = 0; m < l.rows; m++) {
      std::vector<float> row(l.columns);
      for (long k = 0; k < l.columns; k++) row[k] = read(l.x, m * l.columns + k, l.dtype) + l.shift;
      for (long g = 0; g < rows.groups; g++) {
        long first = g * rows.group, count = std::min(rows.group, l.columns - first);
        encode(l, &row[first], count, &rows.scale[m * rows.groups + g], &rows.codes[m * l.columns + first]);
      }
    }
#pragma omp parallel for schedule(static)
    for (long n = 0; n < l.outputs; n++) {
      std::vector<int16_t> codes(l.columns);
      channel(l, rows, n, codes.data());
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
