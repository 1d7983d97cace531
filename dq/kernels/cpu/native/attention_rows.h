// A block of rows against one packed head: scores, softmax, weighted sum of the values, a block of keys at a time.
//
//   s = q k^T,  p = 2^((s - m) f),  o = sum_j p_j v_j / sum_j p_j     m: largest s of the row so far, f = scale log2 e
//
// When a later block of keys has a larger score, what was summed before is multiplied by 2^((old - new m) f). Eight
// bits: p is rounded to 0 .. 255 under the largest score of its own block of keys, and its sum is one of integers. No
// row depends on how rows are cut into blocks, so the number of threads changes no bit.
#pragma once
#include <utility>

#include "attention_pack.h"

namespace dq {
namespace {

constexpr long kRowBlock = 24, kRowLanes = 32;      // rows of a task, and rounded up to whole vectors
constexpr long kScoreStride = kKeyBlock + 16;       // floats; not a power of two, whose rows would share cache sets
constexpr long kWeightStride = kKeyBlock * 2 + 64;  // bytes, at most

constexpr float kLog2Of255 = 7.99435343685886f;

struct Block {  // the working memory of a thread
  alignas(64) char query[kRowBlock * 2 * kMaxWidth];
  alignas(64) float score[kRowBlock * kScoreStride];
  alignas(64) char weight[kRowBlock * kWeightStride];
  alignas(64) float sum[kRowBlock * kMaxWidth];
  alignas(64) float peaks[kRowBlock * 16];  // largest score so far in each lane
  // per row: factor on scores before the mask and after, 1 and f or f and 1; the m of a block of keys; the largest m;
  // denominator; 2^((old - new m) f); what p of the block is worth; -128 sum of the row's codes
  alignas(64) float before[kRowLanes], after[kRowLanes], shift[kRowLanes], largest[kRowLanes], total[kRowLanes];
  alignas(64) float keep[kRowLanes], worth[kRowLanes];
  int start[kRowLanes];
};

// --- one tile of scores: MR rows x 64 keys --------------------------------------------------------------------------

struct ScoreTile {
  const char* query;       // (rows, words) packed words
  const char* keys;        // (words, 64 keys)
  const float* key_scale;  // (64,), eight bits only
  long words, query_step;  // step in bytes
  float *score, *peaks;
  const int* start;
  const float* before;
  const float* mask;  // of the first row and key, or null
  long mask_row, mask_key, valid;
};

DQ_INLINE void begin(__m512& sum, const ScoreTile&, int) { sum = _mm512_setzero_ps(); }
DQ_INLINE void begin(__m512i& sum, const ScoreTile& t, int row) { sum = _mm512_set1_epi32(t.start[row]); }
DQ_INLINE void step(__m512& sum, __m512i keys, __m512i query) { dot2(sum, keys, query); }
DQ_INLINE void step(__m512i& sum, __m512i keys, __m512i query) { dot4(sum, keys, query); }
DQ_INLINE __m512 value_of(__m512 sum, const ScoreTile&, int) { return sum; }
DQ_INLINE __m512 value_of(__m512i sum, const ScoreTile& t, int j) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(t.key_scale + 16 * j));
}

// Score times its factor plus mask times log2 e. A finite mask stays finite: rows masked everywhere by the smallest
// number are averages, rows masked everywhere by -inf are zero.
DQ_INLINE __m512 masked(__m512 score, const ScoreTile& t, int row, int j) {
  score = _mm512_mul_ps(score, _mm512_set1_ps(t.before[row]));
  __mmask16 lanes = first_lanes(t.valid - 16 * j);
  if (t.mask) {
    const float* from = t.mask + row * t.mask_row;
    __m512 add = t.mask_key ? _mm512_maskz_loadu_ps(lanes, from + 16 * j) : _mm512_set1_ps(*from);
    __mmask16 off = _mm512_cmp_ps_mask(add, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    add = _mm512_mask_max_ps(add, __mmask16(~off), _mm512_set1_ps(-2e38f), add);
    score = _mm512_fmadd_ps(add, _mm512_set1_ps(kLog2e), score);
  }
  return _mm512_mask_blend_ps(lanes, _mm512_set1_ps(-kInfinity), score);
}

// GENERAL: a mask, a factor before it, or fewer than 64 keys.
template <class T, int MR, bool GENERAL>
__attribute__((noinline)) void scores(const ScoreTile& t) {
  typename T::Sum sum[MR][4];
  DQ_UNROLL for (int i = 0; i < MR; i++) DQ_UNROLL for (int j = 0; j < 4; j++) begin(sum[i][j], t, i);
  const char *keys = t.keys, *query = t.query;
  const long query_step = t.query_step;
  for (long word = 0; word < t.words; word++, keys += 256, query += 4) {
    __m512i k[4];
    DQ_UNROLL for (int j = 0; j < 4; j++) k[j] = _mm512_load_si512(keys + 64 * j);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      __m512i q = broadcast4(query + i * query_step);
      DQ_UNROLL for (int j = 0; j < 4; j++) step(sum[i][j], k[j], q);
    }
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    __m512 peak = _mm512_load_ps(t.peaks + 16 * i);
    DQ_UNROLL for (int j = 0; j < 4; j++) {
      __m512 score = value_of(sum[i][j], t, j);
      if (GENERAL) {
        score = masked(score, t, i, j);
        __mmask16 strange = _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q);
        peak = _mm512_mask_mov_ps(_mm512_max_ps(score, peak), strange, score);  // NaN stays: max gives its second
      } else {
        peak = _mm512_max_ps(peak, score);
      }
      _mm512_store_ps(t.score + i * kScoreStride + 16 * j, score);
    }
    _mm512_store_ps(t.peaks + 16 * i, peak);
  }
}

constexpr long kScoreRows = 6;

template <class T, bool GENERAL, size_t... MR>
void scores_of(long rows, const ScoreTile& t, std::index_sequence<MR...>) {
  using Tile = void (*)(const ScoreTile&);
  static constexpr Tile tiles[] = {scores<T, int(MR) + 1, GENERAL>...};
  tiles[rows - 1](t);
}

// --- softmax --------------------------------------------------------------------------------------------------------

// Exponents (s - m) f + top of 16 scores. Small: m f was rounded once for the row, which saves an operation here and
// moves every exponent by up to an ulp of it.
struct Exponent {
  __m512 factor, shift, top, product;
  Exponent(float f, float m, float top)
      : factor(_mm512_set1_ps(f)),
        shift(_mm512_set1_ps(m)),
        top(_mm512_set1_ps(top)),
        product(_mm512_set1_ps(m * f - top)) {}
};

DQ_INLINE bool is_small(float f, float m) { return std::fabs(m * f) < 1024; }

template <bool SMALL>
DQ_INLINE __m512 exponent(const Exponent& e, const float* score) {
  __m512 s = _mm512_load_ps(score);
  return SMALL ? _mm512_fmsub_ps(s, e.factor, e.product) : _mm512_fmadd_ps(_mm512_sub_ps(s, e.shift), e.factor, e.top);
}

// p of one row in bf16; returns their sum.
template <bool SMALL>
DQ_INLINE float exponentials(Bf16, const float* score, long keys, float factor, float shift, char* weight) {
  const Exponent e(factor, shift, 0);
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long key = 0; key < keys; key += 32) {
    __m512 p[2];
    DQ_UNROLL for (int j = 0; j < 2; j++) {
      p[j] = power(exponent<SMALL>(e, score + key + 16 * j), kCubic);
      total[j] = _mm512_add_ps(total[j], p[j]);
    }
    _mm512_store_si512(weight + 2 * key, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
}

// The same in 0 .. 255.
template <bool SMALL>
DQ_INLINE float exponentials(Int8, const float* score, long keys, float factor, float shift, char* weight) {
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Exponent e(factor, shift, kLog2Of255);
  __m512i total = _mm512_setzero_si512();
  for (long key = 0; key < keys; key += 64) {
    __m512i p[4];
    DQ_UNROLL for (int j = 0; j < 4; j++) {
      p[j] = _mm512_cvtps_epi32(power(exponent<SMALL>(e, score + key + 16 * j), kCubic));
    }
    __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(p[0], p[1]), _mm512_packus_epi32(p[2], p[3]));
    bytes = _mm512_permutexvar_epi32(in_order, bytes);
    dot4(total, bytes, _mm512_set1_epi8(1));
    _mm512_store_si512(weight + key, bytes);
  }
  return _mm512_reduce_add_epi32(total);
}

// The largest scores of a block of keys, into references and factors of every row.
template <class T>
void refer(Block& b, long rows) {
  alignas(64) float peak[kRowLanes] = {};
  for (long i = 0; i < rows; i++) {
    __m512 lanes = _mm512_load_ps(b.peaks + 16 * i);
    peak[i] = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q) ? kNaN : _mm512_reduce_max_ps(lanes);
  }
  const __m512 none = _mm512_set1_ps(-kInfinity), zero = _mm512_setzero_ps();
  for (long i = 0; i < rows; i += 16) {
    __m512 here = _mm512_load_ps(peak + i), old = _mm512_load_ps(b.largest + i), f = _mm512_load_ps(b.after + i);
    __m512 now = _mm512_mask_mov_ps(_mm512_max_ps(here, old), _mm512_cmp_ps_mask(here, here, _CMP_UNORD_Q), here);
    // where all keys are masked, any finite reference will do
    __m512 reference = _mm512_mask_mov_ps(now, _mm512_cmp_ps_mask(now, none, _CMP_EQ_OQ), zero);
    __m512 own = _mm512_mask_mov_ps(here, _mm512_cmp_ps_mask(here, none, _CMP_EQ_OQ), zero);
    __m512 worth = power(_mm512_mul_ps(_mm512_sub_ps(here, reference), f), kQuartic);
    _mm512_store_ps(b.keep + i, power(_mm512_mul_ps(_mm512_sub_ps(old, reference), f), kQuartic));
    _mm512_store_ps(b.shift + i, T::kMeasured ? own : reference);
    _mm512_store_ps(b.worth + i, T::kMeasured ? worth : _mm512_set1_ps(1.f));
    _mm512_store_ps(b.largest + i, now);
  }
}

template <class T>
void softmax(Block& b, long rows, long keys, long weight_step) {
  refer<T>(b, rows);
  for (long i = 0; i < rows; i++) {
    const float* score = b.score + i * kScoreStride;
    char* weight = b.weight + i * weight_step;
    float total = is_small(b.after[i], b.shift[i])
                      ? exponentials<true>(T(), score, keys, b.after[i], b.shift[i], weight)
                      : exponentials<false>(T(), score, keys, b.after[i], b.shift[i], weight);
    b.total[i] = b.total[i] * b.keep[i] + total * b.worth[i];
  }
}

// --- one tile of the weighted sum: MR rows x NB blocks of 16 columns ------------------------------------------------

struct SumTile {
  const char *weight, *values;
  long words, weight_step, sum_step;  // steps in bytes and floats
  float* sum;
  const float *keep, *worth;
  bool first;
};

DQ_INLINE void step_values(__m512& sum, __m512i weight, __m512i values) { dot2(sum, weight, values); }
DQ_INLINE void step_values(__m512i& sum, __m512i weight, __m512i values) { dot4(sum, weight, values); }
DQ_INLINE void step_values(__m256& sum, __m512i weight, __m256i values) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_castsi512_si256(weight)), "v"(values));
}
DQ_INLINE void step_values(__m256i& sum, __m512i weight, __m256i values) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_castsi512_si256(weight)), "v"(values));
}
DQ_INLINE void clear(__m512& sum) { sum = _mm512_setzero_ps(); }
DQ_INLINE void clear(__m512i& sum) { sum = _mm512_setzero_si512(); }
DQ_INLINE void clear(__m256& sum) { sum = _mm256_setzero_ps(); }
DQ_INLINE void clear(__m256i& sum) { sum = _mm256_setzero_si256(); }
DQ_INLINE __m512 as_floats(__m512 sum) { return sum; }
DQ_INLINE __m512 as_floats(__m512i sum) { return _mm512_cvtepi32_ps(sum); }
DQ_INLINE __m512 as_floats(__m256 sum) { return _mm512_castps256_ps512(sum); }
DQ_INLINE __m512 as_floats(__m256i sum) { return _mm512_cvtepi32_ps(_mm512_castsi256_si512(sum)); }

// Add 16 columns of one row to what earlier blocks of keys left.
DQ_INLINE void add_sums(const SumTile& t, int row, int block, __m512 sum) {
  float* to = t.sum + row * t.sum_step + 16 * block;
  __m512 value = _mm512_mul_ps(sum, _mm512_set1_ps(t.worth[row]));
  if (!t.first) value = _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(t.keep[row]), value);
  _mm512_store_ps(to, value);
}

// HALF: only 8 columns of the last block are there; half the work on processors that split wide vectors.
template <class T, int MR, int NB, bool HALF>
__attribute__((noinline)) void sums(const SumTile& t) {
  constexpr int WHOLE = NB - HALF;
  typename T::Sum sum[MR][WHOLE];
  typename T::HalfSum half[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) clear(sum[i][j]);
    clear(half[i]);
  }
  const char *values = t.values, *weight = t.weight;
  const long weight_step = t.weight_step;
  for (long word = 0; word < t.words; word++, values += 64 * NB, weight += 4) {
    __m512i v[WHOLE];
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) v[j] = _mm512_load_si512(values + 64 * j);
    __m256i last = HALF ? _mm256_load_si256((const __m256i*)(values + 64 * WHOLE)) : _mm256_setzero_si256();
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      __m512i p = broadcast4(weight + i * weight_step);
      DQ_UNROLL for (int j = 0; j < WHOLE; j++) step_values(sum[i][j], p, v[j]);
      if (HALF) step_values(half[i], p, last);
    }
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) add_sums(t, i, j, as_floats(sum[i][j]));
    if (HALF) add_sums(t, i, WHOLE, as_floats(half[i]));
  }
}

using SumOf = void (*)(const SumTile&);

// Most rows of a tile for each number of blocks: sums, values and a weight fill the 32 registers.
constexpr int kMostRows[kWidestChunk + 1] = {0, 8, 8, 8, 6, 5};

// tiles[rows] for rows 1 to kMostRows[NB]
template <class T, int NB, bool HALF, size_t... MR>
SumOf tile_of(long rows, std::index_sequence<MR...>) {
  static constexpr SumOf tiles[] = {sums<T, int(MR) + 1, NB, HALF>...};
  return tiles[rows - 1];
}

template <class T, int NB>
SumOf tile_of(long rows, bool half) {
  using Rows = std::make_index_sequence<kMostRows[NB]>;
  if constexpr (NB > 1) {
    if (half) return tile_of<T, NB, true>(rows, Rows());
  }
  return tile_of<T, NB, false>(rows, Rows());
}

template <class T>
SumOf tile_of(long rows, long blocks, bool half) {
  switch (blocks) {
    case 1: return tile_of<T, 1>(rows, half);
    case 2: return tile_of<T, 2>(rows, half);
    case 3: return tile_of<T, 3>(rows, half);
    case 4: return tile_of<T, 4>(rows, half);
    default: return tile_of<T, 5>(rows, half);
  }
}

template <class T>
void weigh(const Attention& a, const Layout& l, long rows, long first_key, long keys, const char* head,
           long weight_step, Block& b) {
  for (long c = 0; c < l.chunks; c++) {
    const Chunk& chunk = l.chunk[c];
    const char* values = head + l.value_chunk(c) + first_key / T::kWord * chunk.blocks * 64;
    const bool half = 16 * (chunk.first + chunk.blocks) - a.width >= 8;
    for (long i = 0, count; i < rows; i += count) {
      count = std::min(rows - i, long(kMostRows[chunk.blocks]));
      SumTile t{
          .weight = b.weight + i * weight_step,
          .values = values,
          .words = keys / T::kWord,
          .weight_step = weight_step,
          .sum_step = 16 * l.blocks,
          .sum = b.sum + i * 16 * l.blocks + 16 * chunk.first,
          .keep = b.keep + i,
          .worth = b.worth + i,
          .first = first_key == 0,
      };
      tile_of<T>(count, chunk.blocks, half)(t);
    }
  }
}

// --- a block of rows ------------------------------------------------------------------------------------------------

DQ_INLINE long query_step_of(const Layout& l) { return round_up(4 * l.words, 64); }

template <Dtype DTYPE>
void fetch_queries(Bf16, const Attention& a, const Layout& l, long index, long first, long rows, Block& b) {
  Rows q = Rows::of<DTYPE>(a.q, a.q_stride, a, index);
  for (long i = 0; i < rows; i++) {
    q.expect(first + i);
    for (long byte = 0; byte < 4 * l.words; byte += 64) {
      __m512i part = _mm512_maskz_loadu_epi16(first_halves(a.width - byte / 2), q.at(first + i) + byte);
      _mm512_store_si512(b.query + i * query_step_of(l) + byte, part);
    }
    b.after[i] = a.scale * kLog2e;
  }
}

template <Dtype DTYPE>
void fetch_queries(Int8, const Attention& a, const Layout& l, long index, long first, long rows, Block& b) {
  Rows q = Rows::of<DTYPE>(a.q, a.q_stride, a, index);
  for (long i = 0; i < rows; i++) {
    int sum;
    q.expect(first + i);
    float scale = quantize<DTYPE>(q.at(first + i), a.width, nullptr, b.query + i * query_step_of(l), &sum);
    b.start[i] = -128 * sum;
    b.after[i] = scale * a.scale * kLog2e;
  }
}

// The scale comes before the mask, and before everything where scores times the scale have another order or may be 0.
DQ_INLINE bool scaled_first(const Attention& a) { return a.mask || !(a.scale > 1e-20f && a.scale < 1e20f); }

template <class T>
void score(const Attention& a, const Layout& l, long index, long first, long rows, long key, long keys,
           const char* head, Block& b) {
  for (long i = 0; i < rows; i++) _mm512_store_ps(b.peaks + 16 * i, _mm512_set1_ps(-kInfinity));
  for (long tile = key; tile < key + keys; tile += kTile) {
    ScoreTile t;
    t.keys = head + tile * l.words * 4, t.key_scale = (const float*)(head + l.key_scale) + tile;
    t.words = l.words, t.query_step = query_step_of(l), t.valid = a.keys - tile;
    t.mask_row = a.mask_stride[2], t.mask_key = a.mask_stride[3];
    const float* mask = a.mask;
    if (mask) mask += index / a.heads * a.mask_stride[0] + index % a.heads * a.mask_stride[1] + tile * t.mask_key;
    bool general = scaled_first(a) || t.valid < kTile;
    for (long i = 0; i < rows; i += kScoreRows) {
      t.query = b.query + i * t.query_step, t.score = b.score + i * kScoreStride + tile - key,
      t.peaks = b.peaks + 16 * i;
      t.start = b.start + i, t.before = b.before + i, t.mask = mask ? mask + (first + i) * t.mask_row : nullptr;
      long count = std::min(rows - i, kScoreRows);
      using Tiles = std::make_index_sequence<kScoreRows>;
      general ? scores_of<T, true>(count, t, Tiles()) : scores_of<T, false>(count, t, Tiles());
    }
  }
}

template <class T, Dtype DTYPE>
void finish(const Attention& a, const Layout& l, long index, long first, long rows, const char* head, const Block& b) {
  Rows out = Rows::of<DTYPE>(a.out, a.out_stride, a, index);
  const float* scale = (const float*)(head + l.value_scale);
  for (long i = 0; i < rows; i++) {
    float share = b.total[i] == 0 ? 0 : 1 / b.total[i];  // 0: every key is masked
    if (!(b.largest[i] < kInfinity)) share = kNaN;
    char* to = const_cast<char*>(out.at(first + i));
    for (long c = 0; c < a.width; c += 16) {
      __m512 value = _mm512_mul_ps(_mm512_load_ps(b.sum + i * 16 * l.blocks + c), _mm512_set1_ps(share));
      if (T::kMeasured) value = _mm512_mul_ps(value, _mm512_load_ps(scale + c));
      store(to, c, DTYPE, first_lanes(a.width - c), value);
    }
  }
}

// One task: `rows` rows from `first` of head `index`, whose packed keys and values are at `head`.
template <class T, Dtype DTYPE>
void attend(const Attention& a, const Layout& l, long index, long first, long rows, const char* head, Block& b) {
  fetch_queries<DTYPE>(T(), a, l, index, first, rows, b);
  for (long i = 0; i < kRowLanes; i++) {
    b.largest[i] = -kInfinity, b.total[i] = 0, b.before[i] = 1;
    if (i < rows && scaled_first(a)) std::swap(b.before[i], b.after[i]);
  }
  for (long key = 0; key < l.padded; key += kKeyBlock) {
    long keys = std::min(kKeyBlock, l.padded - key), weight_step = keys / T::kWord * 4 + 64;
    score<T>(a, l, index, first, rows, key, keys, head, b);
    softmax<T>(b, rows, keys, weight_step);
    weigh<T>(a, l, rows, key, keys, head, weight_step, b);
  }
  finish<T, DTYPE>(a, l, index, first, rows, head, b);
}

}  // namespace
}  // namespace dq
