#include "arguments.h"
#include "fields.h"

// What the processor can run: bit i for level i of LEVELS in library.py.
extern "C" int dq_cpu_levels() {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
#ifdef DQ_HAS_AVXVNNI
  bool bytes = avx2 && __builtin_cpu_supports("avxvnni");
#else
  bool bytes = false;
#endif
  return 1 | avx2 << 1 | bytes << 2 | wide << 3 | (wide && __builtin_cpu_supports("avx512bf16")) << 4;
}

// Which sources this was built from; library.py refuses a library of others.
extern "C" const char* dq_fingerprint() { return DQ_FINGERPRINT; }

DQ_FIELDS(DqLinear, dq_linear_fields, FIELD(x), FIELD(act_scale), FIELD(weight), FIELD(weight_scale),
          FIELD(weight_zero), FIELD(multiplier), FIELD(bias), FIELD(low), FIELD(up), FIELD(y), FIELD(rows),
          FIELD(columns), FIELD(outputs), FIELD(row_bytes), FIELD(rank), FIELD(weight_group), FIELD(act_group),
          FIELD(multiplier_group), FIELD(weight_scale_stride), FIELD(dtype), FIELD(weight_bits), FIELD(act_bits),
          FIELD(act_affine), FIELD(gelu), FIELD(shift), FIELD(clip))

DQ_FIELDS(DqConv, dq_conv_fields, FIELD(x), FIELD(weight), FIELD(weight_scale), FIELD(bias), FIELD(act_scale),
          FIELD(y), FIELD(batch), FIELD(channels), FIELD(outputs), FIELD(row_bytes), FIELD(weight_scale_stride),
          FIELD(size), FIELD(kernel), FIELD(step), FIELD(pad), FIELD(gap), FIELD(out), FIELD(dtype),
          FIELD(weight_bits), FIELD(act_bits), FIELD(act_affine), FIELD(channels_last), FIELD(per_pixel))

DQ_FIELDS(DqWeightOnly, dq_weightonly_fields, FIELD(x), FIELD(weight), FIELD(weight_scale), FIELD(weight_zero),
          FIELD(bias), FIELD(low), FIELD(up), FIELD(y), FIELD(rows), FIELD(columns), FIELD(outputs), FIELD(row_bytes),
          FIELD(rank), FIELD(weight_group), FIELD(weight_scale_stride), FIELD(dtype), FIELD(weight_bits), FIELD(gelu))

DQ_FIELDS(DqDecode, dq_decode_fields, FIELD(weight), FIELD(weight_scale), FIELD(weight_zero), FIELD(y), FIELD(rows),
          FIELD(columns), FIELD(row_bytes), FIELD(weight_group), FIELD(weight_scale_stride), FIELD(dtype),
          FIELD(weight_bits))
