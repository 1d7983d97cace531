// What the processor can run: 0 none of this folder, 1 AVX2 (linears), 2 AVX512 with VNNI and bf16 (everything).
extern "C" int dq_cpu_level() {
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

// Which sources this was built from; library.py refuses a library of others.
extern "C" const char* dq_fingerprint() { return DQ_FINGERPRINT; }
