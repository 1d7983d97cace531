// softmax(q k^T scale + mask) v on the CPU, in bf16 or with eight-bit products. Loops over tasks; the arithmetic is in
// attention_rows.h, the packed layout in attention_pack.h.
#include <atomic>

#include "attention_rows.h"

namespace dq {
namespace {

enum Result { DONE = 0, NO_CPU = 1, NO_DTYPE = 2, NO_SHAPE = 3, NO_MASK = 4, NO_MEMORY = 5 };

constexpr size_t kMostPacked = 16 << 20;  // bytes of packed heads, unless a single head needs more

thread_local Scratch packed_heads, working;

struct Cut {
  int threads;
  long rows, blocks, heads;  // rows of a task, tasks of a head, heads packed at a time
};

// Enough tasks at a time to keep the threads busy; one thread goes head by head, which keeps the head in its cache.
Cut cut(const Attention& a, const Layout& l) {
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

template <class T, int DTYPE>
int run(const Attention& a) {
  const Layout l(a, T::kWord);
  const Cut c = cut(a, l);
  char* packed = (char*)packed_heads.get(c.heads * l.bytes);
  if (!packed) return NO_MEMORY;
  std::atomic<int> result{DONE};
#pragma omp parallel num_threads(c.threads)
  {
    Block* block = (Block*)working.get(sizeof(Block));
    if (!block) result = NO_MEMORY;
    for (long index = 0; index < a.batch * a.heads; index += c.heads) {
      const long heads = std::min(c.heads, a.batch * a.heads - index);
      if (T::kMeasured) {
#pragma omp for schedule(static)
        for (long i = 0; i < heads * l.spans; i++) {
          measure<DTYPE>(a, l, index + i / l.spans, i % l.spans, packed + i / l.spans * l.bytes);
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
  return result;
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

}  // namespace
}  // namespace dq

// q, out (batch, heads, rows, width), k, v (batch, heads, keys, width), dtype 0 fp32, 1 bf16, 2 fp16, last dimension
// contiguous; strides: (batch, head, token) of q, k, v and out, in elements. mask: fp32, added to the scaled scores, or
// null; mask_strides: batch, head, row, key (0 or 1), in elements. int8 0: bf16 products, dtype 1 only. Rows whose keys
// are all masked by -inf are zero. Returns 0, or 1 for the CPU, 2 the dtype, 3 the shape, 4 the mask, 5 no memory.
extern "C" int dq_attention(const void* q, const void* k, const void* v, void* out, int dtype, int64_t batch,
                            int64_t heads, int64_t rows, int64_t keys, int64_t width, const int64_t* strides,
                            const float* mask, const int64_t* mask_strides, float scale, int int8) {
  using namespace dq;
  if (!supported()) return NO_CPU;
  if (dtype < FP32 || dtype > FP16 || (!int8 && dtype != BF16)) return NO_DTYPE;
  if (batch < 0 || heads < 0 || rows < 0 || keys < 1 || width < 1 || width > kMaxWidth) return NO_SHAPE;
  if (mask && mask_strides[3] != 0 && mask_strides[3] != 1) return NO_MASK;
  if (batch * heads * rows == 0) return DONE;
  Attention a{};
  a.q = (const char*)q, a.k = (const char*)k, a.v = (const char*)v, a.out = (char*)out;
  a.batch = batch, a.heads = heads, a.rows = rows, a.keys = keys, a.width = width;
  for (int axis = 0; axis < 3; axis++) {
    a.q_stride[axis] = strides[axis], a.k_stride[axis] = strides[3 + axis];
    a.v_stride[axis] = strides[6 + axis], a.out_stride[axis] = strides[9 + axis];
  }
  a.mask = mask, a.scale = scale, a.dtype = dtype;
  for (int axis = 0; axis < 4; axis++) a.mask_stride[axis] = mask ? mask_strides[axis] : 0;
  if (!int8) return run<Bf16, BF16>(a);
  return dtype == FP32 ? run<Int8, FP32>(a) : dtype == BF16 ? run<Int8, BF16>(a) : run<Int8, FP16>(a);
}
