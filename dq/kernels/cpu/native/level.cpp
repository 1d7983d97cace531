#include "arguments.h"
#include "fields.h"

// What the processor can run: 0 none of this folder, 1 AVX2 (linears), 2 AVX512 with VNNI and bf16 (everything).
// LEVELS of library.py.
extern "C" int dq_cpu_level() {
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Which sources this was built from; library.py refuses a library of others.
extern "C" const char* dq_fingerprint() { return DQ_FINGERPRINT; }

DQ_FIELDS(DqLinear, dq_linear_fields, FIELD(x), FIELD(act_scale), FIELD(weight), FIELD(weight_scale), FIELD(bias),
          FIELD(low), FIELD(up), FIELD(y), FIELD(rows), FIELD(columns), FIELD(outputs), FIELD(row_bytes), FIELD(rank),
          FIELD(weight_group), FIELD(act_group), FIELD(weight_scale_stride), FIELD(dtype), FIELD(weight_bits),
          FIELD(act_bits), FIELD(act_affine), FIELD(gelu), FIELD(shift))
