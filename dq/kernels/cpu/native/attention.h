// softmax(q k^T scale + mask) v on the CPU. Loops over tasks; the arithmetic is in attention_rows.h, the packed layout
// in attention_pack.h, the kinds of products in attention_products.h.
#pragma once
#include "attention_rows.h"

namespace dq::inline DQ_LEVEL {
namespace {

enum Result { DONE = 0, NO_DTYPE = 1, NO_SHAPE = 2, NO_MASK = 3, NO_MEMORY = 4 };  // PROBLEMS of attention.py

constexpr size_t kMostPacked = 16 << 20;  // bytes of packed heads, unless a single head needs more

thread_local Scratch packed_heads, working;

struct Cut {
  int threads;
  long rows, blocks, heads;  // rows of a task, tasks of a head, heads packed at a time
};

// Enough tasks at a time to keep the threads busy; one thread goes head by head, which keeps the head in its cache.
Cut cut(const DqAttention& a, const Layout& l) {
  Cut c;
  long total = a.batch * a.heads;
  double products = double(total) * a.rows * a.keys * a.width;
  c.threads = omp_in_parallel() || products < 1e5 ? 1 : omp_get_max_threads();
  c.rows = std::clamp(round_up(total * a.rows / (8l * c.threads), 6), 6l, kRowBlock);
  if (c.threads == 1) c.rows = kRowBlock;
  c.blocks = (a.rows + c.rows - 1) / c.rows;
  c.heads = c.threads == 1 ? 1 : (32l * c.threads + c.blocks - 1) / c.blocks;
  c.heads = std::min({c.heads, total, std::max(1l, long(kMostPacked / l.bytes))});
  return c;
}

template <class T, Dtype DTYPE>
int run(const DqAttention& a) {
  const Layout l(T(), a);
  const Cut c = cut(a, l);
  char* packed = (char*)packed_heads.get(c.heads * l.bytes);
  if (!packed) return NO_MEMORY;
  bool failed = false;  // set by any thread that got no memory, only ever to true
#pragma omp parallel num_threads(c.threads)
  {
    Block* block = (Block*)working.get(sizeof(Block));
    if (!block) failed = true;
    for (long index = 0; index < a.batch * a.heads; index += c.heads) {
      const long heads = std::min(c.heads, a.batch * a.heads - index);
      if constexpr (T::kMeasured) {
#pragma omp for schedule(static)
        for (long i = 0; i < heads * l.spans; i++) {
          measure<T, DTYPE>(a, l, index + i / l.spans, i % l.spans, packed + i / l.spans * l.bytes);
        }
      }
#pragma omp for schedule(static)
      for (long i = 0; i < heads * l.spans; i++) {
        pack<T, DTYPE>(a, l, index + i / l.spans, i % l.spans, packed + i / l.spans * l.bytes);
      }
#pragma omp for schedule(dynamic, 1)
      for (long i = 0; i < heads * c.blocks; i++) {
        long first = i % c.blocks * c.rows, rows = std::min(c.rows, a.rows - first);
        if (block) attend<T, DTYPE>(a, l, index + i / c.blocks, first, rows, packed + i / c.blocks * l.bytes, *block);
      }
    }
  }
  return failed ? NO_MEMORY : DONE;
}

template <class T>
int run(const DqAttention& a) {
  return a.dtype == FP32 ? run<T, FP32>(a) : a.dtype == BF16 ? run<T, BF16>(a) : run<T, FP16>(a);
}

int run_attention(const DqAttention& a) {
  if (a.dtype < FP32 || a.dtype > FP16) return NO_DTYPE;
  if (a.batch < 0 || a.heads < 0 || a.rows < 0 || a.keys < 1 || a.width < 1 || a.width > kMaxWidth) return NO_SHAPE;
  if (a.mask && a.mask_stride[3] != 0 && a.mask_stride[3] != 1) return NO_MASK;
  if (a.batch * a.heads * a.rows == 0) return DONE;
  if (a.int8) return run<Integers>(a);
#ifdef DQ_BF16_UNITS
  if (a.dtype == BF16) return run<Bf16, BF16>(a);
#endif
  return run<Fp32>(a);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
