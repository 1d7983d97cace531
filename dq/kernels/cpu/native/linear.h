// Arguments of a quantized linear; mirrored field by field in ops.py.
#pragma once
#include <stdint.h>

extern "C" {

struct DqLinear {
  // activations and what happens to them before rounding
  const void* x;
  const void* mod_scale;
  const void* mod_shift;
  const float* smooth;
  const float* act_scale;
  // weight
  const int8_t* weight;
  const float* weight_scale;
  const void* bias;
  const void* low;
  const void* up;
  // what happens to the output
  const void* gate;
  const void* residual;
  void* y;
  int64_t rows, columns, outputs, row_bytes, rank, rows_per_batch, mod_stride;
  int64_t weight_group, act_group;  // 0: the whole row
  int64_t weight_scale_stride;
  int64_t key;  // a name for the rounded activations, or 0: with the key of the last call its codes are taken
  int32_t dtype, norm, weight_bits, act_low, act_high, act_affine, gelu;
  float eps, shift;
};
}
