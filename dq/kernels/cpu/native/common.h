// Shared by every level: element types, sizes, memory that stays with its thread. No PyTorch headers in this folder.
//
// One source serves several instruction sets. avx512.h and avx2.h define two levels each: the lanes of a vector, the
// arithmetic on them and the dot products; rows.h, panel.h, tile.h and linear.h are written in these terms and
// compiled once a level, in the namespace dq::DQ_LEVEL. Standard headers come first, outside of the level's target:
// what they define may be shared between object files, and must run on every processor.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

// compilers that know the instruction; older ones build the other levels
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define DQ_HAS_AVXVNNI
#endif

#define DQ_UNROLL _Pragma("GCC unroll 16")
#define DQ_INLINE static inline __attribute__((always_inline))
#define DQ_METHOD inline __attribute__((always_inline))

namespace dq {

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

DQ_INLINE long round_up(long value, long step) { return (value + step - 1) / step * step; }
constexpr long element_bytes(Dtype dtype) { return dtype == FP32 ? 4 : 2; }

constexpr long kWide = 64;  // output channels of a panel

// Products of a multiplier and each 4-bit code, in the order of the codes' bits; those beyond a byte never occur.
struct Multiples {
  alignas(16) int8_t of[128][16];
};
constexpr Multiples all_multiples() {
  Multiples all{};
  for (int m = 0; m < 128; m++) {
    for (int code = 0; code < 16; code++) all.of[m][code] = int8_t(m * ((code ^ 8) - 8));
  }
  return all;
}
constexpr Multiples kMultiples = all_multiples();
DQ_INLINE const int8_t* multiples(int8_t times) { return kMultiples.of[times & 127]; }

// A buffer that grows and stays with its thread, 64-byte aligned: page faults of fresh memory cost as much as a pass.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = round_up(bytes, 1 << 16);
      data_ = aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }
  ~Scratch() { free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dq
