// Arguments of attention, the same for every level; mirrored field by field in attention.py.
#pragma once
#include "common.h"

// q, out (batch, heads, rows, width), k, v (batch, heads, keys, width), last dimension contiguous. Strides in elements.
// Rows whose keys are all masked by -inf are zero.
struct DqAttention {
  const char *q, *k, *v;
  char* out;
  const float* mask;  // added to the scaled scores, or null
  int64_t batch, heads, rows, keys, width;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
  int64_t mask_stride[4];                                        // batch, head, row, key (0 or 1)
  dq::Dtype dtype;
  int32_t int8;  // products of small integers, else of floats
  float scale;
};
