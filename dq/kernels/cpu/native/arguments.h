// Arguments of the kernels that every level has; mirrored field by field in ops.py and weightonly.py.
#pragma once
#include "common.h"

extern "C" {

struct DqLinear {
  const void* x;
  const float* act_scale;  // one stored scale of the activations, or null: measured
  const int8_t* weight;
  const float* weight_scale;
  const int8_t* weight_zero;  // zero points of affine weights, as weight_scale; or null
  const int8_t* multiplier;   // (outputs, groups of multiplier_group columns) of two-level scales, or null
  const void* bias;
  const void* low;  // the low-rank branch: (rows, rank) bf16, or null
  const void* up;   // (outputs, rank) bf16
  void* y;
  int64_t rows, columns, outputs, row_bytes, rank;
  int64_t weight_group, act_group;  // 0: the whole row
  int64_t multiplier_group;         // a multiple of kMultiplied
  int64_t weight_scale_stride;
  dq::Dtype dtype;
  int32_t weight_bits, act_bits, act_affine, gelu;
  float shift;
  float clip;  // share of the measured range of activations that their codes cover
};

struct DqConv {
  const void* x;
  const int8_t* weight;  // (outputs, channels * taps) codes, taps innermost
  const float* weight_scale;
  const void* bias;
  const float* act_scale;  // one stored scale of the activations, or null: measured
  void* y;
  int64_t batch, channels, outputs, row_bytes, weight_scale_stride;
  int64_t size[3], kernel[3], step[3], pad[3], gap[3], out[3];
  dq::Dtype dtype;
  int32_t weight_bits, act_bits, act_affine, channels_last;
  int32_t per_pixel;  // a scale and zero point a pixel instead of one a sample; output pixels are input pixels then
};

struct DqWeightOnly {
  const void* x;  // (rows, columns)
  const int8_t* weight;
  const float* weight_scale;
  const int8_t* weight_zero;
  const void* bias;
  const void* low;  // the low-rank branch: (rows, rank), or null
  const void* up;   // (outputs, rank)
  void* y;          // (rows, outputs); x, bias, low, up and y are of `dtype`
  int64_t rows, columns, outputs, row_bytes, rank;
  int64_t weight_group;  // 0: the whole row
  int64_t weight_scale_stride;
  dq::Dtype dtype;
  int32_t weight_bits, gelu;
};

struct DqDecode {
  const int8_t* weight;
  const float* weight_scale;
  const int8_t* weight_zero;
  void* y;  // (rows, columns) of `dtype`
  int64_t rows, columns, row_bytes, weight_group, weight_scale_stride;
  dq::Dtype dtype;
  int32_t weight_bits;
};
}
