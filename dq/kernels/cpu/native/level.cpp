// What the processor can run: 0 none of this folder, 1 AVX512 with VNNI and bf16 (everything). LEVELS of library.py.
extern "C" int dq_cpu_level() {
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// Which sources this was built from; library.py refuses a library of others.
extern "C" const char* dq_fingerprint() { return DQ_FINGERPRINT; }
