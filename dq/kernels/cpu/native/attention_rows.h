// A block of rows against one packed head: scores, softmax, weighted sum of the values, a block of keys at a time.
//
//   s = q k^T,  p = 2^((s - m) f),  o = sum_j p_j v_j / sum_j p_j     m: largest s of the row so far, f = scale log2 e
//
// When a later block of keys has a larger score, what was summed before is multiplied by 2^((old - new m) f). Codes: p
// is rounded to 0 .. 255 under the largest score of its own block of keys, and its sum is one of integers. No row
// depends on how rows are cut into blocks, so the number of threads changes no bit.
#pragma once
#include "attention_pack.h"

namespace dq::inline DQ_LEVEL {
namespace {

constexpr long kRowBlock = 24, kRowLanes = 32;  // rows of a task, and rounded up to whole vectors
constexpr long kScoreRows = 6;                  // of a tile of scores
constexpr long kMostKeys = 512;                 // of a block
constexpr long kScoreStride = kMostKeys + 16;   // floats; not a power of two, whose rows would share cache sets
constexpr long kWeightStride = kMostKeys * 2 + 64;  // bytes, at most; numbers of 4 bytes take the place of the scores

struct Block {  // the working memory of a thread
  alignas(64) char query[kRowBlock * 4 * kMaxWidth];
  alignas(64) float score[kRowBlock * kScoreStride];
  alignas(64) char weight[kRowBlock * kWeightStride];
  alignas(64) float sum[kRowBlock * kMaxWidth];
  alignas(64) float peaks[kRowBlock * kLanes];  // largest score so far in each lane
  alignas(64) float unused[kScoreRows * kLanes];  // the same of scores that a mask is still to change
  // per row: factor on scores before the mask and after, 1 and f or f and 1; the m of a block of keys; the largest m;
  // denominator; 2^((old - new m) f); what p of the block is worth; minus the offset times the sum of the row's codes
  alignas(64) float before[kRowLanes], after[kRowLanes], shift[kRowLanes], largest[kRowLanes], total[kRowLanes];
  alignas(64) float keep[kRowLanes], worth[kRowLanes];
  int start[kRowLanes];

  template <class T>
  char* weights() {
    return T::kWord == 1 ? (char*)score : weight;
  }
};

template <class T>
long weight_step_of(long keys) {
  return T::kWord == 1 ? 4 * kScoreStride : round_up(keys, T::kStep) / T::kWord * 4 + 64;
}

// --- one tile of scores: MR rows x NJ vectors of keys ---------------------------------------------------------------

struct ScoreTile {
  const char* query;       // (rows, words) packed words
  const char* keys;        // (words, kTile keys)
  const float* key_scale;  // (kTile,), codes only
  long words, query_step;  // step in bytes
  float *score, *peaks;
  const int* start;
};

DQ_INLINE void begin(Floats& sum, const ScoreTile&, int) { sum = every(0.f); }
DQ_INLINE void begin(Words& sum, const ScoreTile& t, int row) { sum = every(t.start[row]); }
DQ_INLINE Floats value_of(Floats sum, const ScoreTile&, int) { return sum; }
DQ_INLINE Floats value_of(Words sum, const ScoreTile& t, int j) {
  return mul(to_floats(sum), read(t.key_scale + kLanes * j));
}

template <class T, int MR, int NJ>
__attribute__((noinline)) void scores(const ScoreTile& t) {
  typename T::Sum sum[MR][NJ];
  DQ_UNROLL for (int i = 0; i < MR; i++) DQ_UNROLL for (int j = 0; j < NJ; j++) begin(sum[i][j], t, i);
  const char *keys = t.keys, *query = t.query;
  const long query_step = t.query_step;
  for (long word = 0; word < t.words; word++, keys += 4 * kTile, query += 4) {
    Words k[NJ];
    DQ_UNROLL for (int j = 0; j < NJ; j++) k[j] = read((const void*)(keys + kVector * j));
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      Words q = broadcast4(query + i * query_step);
      DQ_UNROLL for (int j = 0; j < NJ; j++) T::step(sum[i][j], k[j], q);
    }
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    Floats peak = read(t.peaks + kLanes * i);
    DQ_UNROLL for (int j = 0; j < NJ; j++) {
      Floats score = value_of(sum[i][j], t, j);
      peak = max(peak, score);
      write(t.score + i * kScoreStride + kLanes * j, score);
    }
    write(t.peaks + kLanes * i, peak);
  }
}

using ScoresOf = void (*)(const ScoreTile&);

template <class T, int NJ, size_t... MR>
ScoresOf scores_of(long rows, std::index_sequence<MR...>) {
  static constexpr ScoresOf tiles[] = {scores<T, int(MR) + 1, NJ>...};
  return tiles[rows - 1];
}

// For `keys` keys of a tile, rounded up to what the exponentials take at a time.
template <class T, int NJ = T::kStep / kLanes>
ScoresOf scores_of(long rows, long keys) {
  if constexpr (NJ < kRegisters) {
    if (keys > NJ * kLanes) return scores_of<T, std::min(NJ + int(T::kStep / kLanes), kRegisters)>(rows, keys);
  }
  return scores_of<T, std::min(NJ, kRegisters)>(rows, std::make_index_sequence<kScoreRows>());
}

// --- masks ----------------------------------------------------------------------------------------------------------

struct Bias {
  const float* mask;  // of the row and its first key, or null
  long step;          // from key to key: 0 or 1
  float factor;       // of the scores, before the mask
};

// Scores from key `first` on times their factor plus mask times log2 e, and -inf beyond `keys`, up to `padded`; `peaks`
// become the largest in each lane, of them and those before. A finite mask stays finite: rows masked everywhere by the
// smallest number are averages, rows masked everywhere by -inf are zero.
inline void apply(const Bias& bias, float* score, long first, long keys, long padded, float* peaks) {
  const Floats factor = every(bias.factor), off = every(-kInfinity);
  Floats peak = read(peaks);
  for (long key = first; key < padded; key += kLanes) {
    Mask lanes = first_lanes(keys - key);
    Floats s = mul(read(score + key), factor);
    if (bias.mask) {
      Floats m = bias.step ? read(bias.mask + key, lanes) : every(*bias.mask);
      m = chosen(max(every(-2e38f), m), off, equal(m, off));  // NaN stays: max gives its second
      s = multiply_add(m, every(kLog2e), s);
    }
    s = chosen(off, s, lanes);
    peak = chosen(max(s, peak), s, nan_lanes(s));
    write(score + key, s);
  }
  write(peaks, peak);
}

// --- softmax --------------------------------------------------------------------------------------------------------

// Exponents (s - m) f + top of a vector of scores. Small: m f was rounded once for the row, which saves an operation
// here and moves every exponent of a block of keys by up to an ulp of it: too much for sums in fp32 alone.
struct Exponent {
  Floats factor, shift, top, product;
  Exponent(float f, float m, float top)
      : factor(every(f)), shift(every(m)), top(every(top)), product(every(top - m * f)) {}
};

DQ_INLINE bool is_small(float f, float m) { return std::fabs(m * f) < 1024; }

template <bool SMALL>
DQ_INLINE Floats exponent(const Exponent& e, const float* score) {
  Floats s = read(score);
  return SMALL ? multiply_add(s, e.factor, e.product) : multiply_add(sub(s, e.shift), e.factor, e.top);
}

// p of one row, to words of its product; returns their sum.
template <class T, bool SMALL>
DQ_INLINE float exponentials(const float* score, long keys, float factor, float shift, char* weight) {
  constexpr int count = T::kStep / kLanes;
  const Exponent e(factor, shift, T::kMeasured ? kLog2Of255 : 0);
  typename T::Sum total;
  clear(total);
  for (long key = 0; key < keys; key += T::kStep, weight += 4 * T::kStep / T::kWord) {
    Floats p[count];
    DQ_UNROLL for (int j = 0; j < count; j++) {
      p[j] = power(exponent<SMALL>(e, score + key + kLanes * j), T::kFit);
    }
    T::weights(p, total, weight);
  }
  return sum_of(total);
}

// The largest scores of a block of keys, into references and factors of every row.
template <class T>
void refer(Block& b, long rows) {
  alignas(64) float peak[kRowLanes] = {};
  for (long i = 0; i < rows; i++) {
    Floats lanes = read(b.peaks + kLanes * i);
    peak[i] = any(nan_lanes(lanes)) ? kNaN : largest(lanes);
  }
  const Floats none = every(-kInfinity), zero = every(0.f);
  for (long i = 0; i < rows; i += kLanes) {
    Floats here = read(peak + i), old = read(b.largest + i), f = read(b.after + i);
    Floats now = chosen(max(here, old), here, nan_lanes(here));
    // where all keys are masked, any finite reference will do
    Floats reference = chosen(now, zero, equal(now, none)), own = chosen(here, zero, equal(here, none));
    write(b.keep + i, power(mul(sub(old, reference), f), kQuintic));
    write(b.worth + i, T::kMeasured ? power(mul(sub(here, reference), f), kQuintic) : every(1.f));
    write(b.shift + i, T::kMeasured ? own : reference);
    write(b.largest + i, now);
  }
}

template <class T>
void softmax(Block& b, long rows, long keys) {
  refer<T>(b, rows);
  for (long i = 0; i < rows; i++) {
    const float* score = b.score + i * kScoreStride;
    char* weight = b.weights<T>() + i * weight_step_of<T>(keys);
    float total = T::kWord > 1 && is_small(b.after[i], b.shift[i])
                      ? exponentials<T, true>(score, keys, b.after[i], b.shift[i], weight)
                      : exponentials<T, false>(score, keys, b.after[i], b.shift[i], weight);
    b.total[i] = b.total[i] * b.keep[i] + total * b.worth[i];
  }
}

// --- one tile of the weighted sum: MR rows x NB blocks of kLanes columns --------------------------------------------

struct SumTile {
  const char *weight, *values;
  long words, weight_step, sum_step;  // steps in bytes and floats
  float* sum;
  const float *keep, *worth;
  bool first;
};

// Add kLanes columns of one row to what earlier blocks of keys left.
DQ_INLINE void add_sums(const SumTile& t, int row, int block, Floats sum) {
  float* to = t.sum + row * t.sum_step + kLanes * block;
  Floats value = mul(sum, every(t.worth[row]));
  if (!t.first) value = multiply_add(read(to), every(t.keep[row]), value);
  write(to, value);
}

// HALF: only half the columns of the last block are there.
template <class T, int MR, int NB, bool HALF>
__attribute__((noinline)) void sums(const SumTile& t) {
  constexpr int WHOLE = NB - HALF;
  typename T::Sum sum[MR][WHOLE];
  typename T::HalfSum half[MR];
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) clear(sum[i][j]);
    if constexpr (HALF) half[i] = (typename T::HalfSum)low_half(every(0));
  }
  const char *values = t.values, *weight = t.weight;
  const long weight_step = t.weight_step;
  for (long word = 0; word < t.words; word++, values += kVector * NB, weight += 4) {
    Words v[WHOLE];
    HalfWords last;
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) v[j] = read((const void*)(values + kVector * j));
    if constexpr (HALF) last = read_half(values + kVector * WHOLE);
    DQ_UNROLL for (int i = 0; i < MR; i++) {
      Words p = broadcast4(weight + i * weight_step);
      DQ_UNROLL for (int j = 0; j < WHOLE; j++) T::step(sum[i][j], p, v[j]);
      if constexpr (HALF) T::step(half[i], low_half(p), last);
    }
  }
  DQ_UNROLL for (int i = 0; i < MR; i++) {
    DQ_UNROLL for (int j = 0; j < WHOLE; j++) add_sums(t, i, j, as_floats(sum[i][j]));
    if constexpr (HALF) add_sums(t, i, WHOLE, as_floats(whole(half[i])));
  }
}

using SumOf = void (*)(const SumTile&);

// Most rows of a tile for each number of blocks: sums, values and a weight fill the 16 or 32 registers.
constexpr int most_rows(long blocks) {
  constexpr int wide[] = {0, 8, 8, 8, 6, 5}, narrow[] = {0, 8, 6, 4};
  return kLanes == 16 ? wide[blocks] : narrow[blocks];
}

// tiles[rows] for rows 1 to most_rows(NB)
template <class T, int NB, bool HALF, size_t... MR>
SumOf tile_of(long rows, std::index_sequence<MR...>) {
  static constexpr SumOf tiles[] = {sums<T, int(MR) + 1, NB, HALF>...};
  return tiles[rows - 1];
}

template <class T, int NB>
SumOf tile_of(long rows, bool half) {
  using Rows = std::make_index_sequence<most_rows(NB)>;
  if constexpr (kHalves && NB > 1) {
    if (half) return tile_of<T, NB, true>(rows, Rows());
  }
  return tile_of<T, NB, false>(rows, Rows());
}

template <class T, int NB = 1>
SumOf tile_of(long rows, long blocks, bool half) {
  if constexpr (NB < T::kWidest) {
    if (blocks > NB) return tile_of<T, NB + 1>(rows, blocks, half);
  }
  return tile_of<T, NB>(rows, half);
}

template <class T>
void weigh(const DqAttention& a, const Layout& l, long rows, long first_key, long keys, const char* head, Block& b) {
  const long weight_step = weight_step_of<T>(keys);
  for (long c = 0; c < l.chunks; c++) {
    const Chunk& chunk = l.chunk[c];
    const char* values = head + l.value_chunk(c) + first_key / T::kWord * chunk.blocks * kVector;
    const bool half = kLanes * (chunk.first + chunk.blocks) - a.width >= kLanes / 2;
    for (long i = 0, count; i < rows; i += count) {
      count = std::min(rows - i, long(most_rows(chunk.blocks)));
      SumTile t{
          .weight = b.weights<T>() + i * weight_step,
          .values = values,
          .words = (keys + T::kWord - 1) / T::kWord,
          .weight_step = weight_step,
          .sum_step = kLanes * l.blocks,
          .sum = b.sum + i * kLanes * l.blocks + kLanes * chunk.first,
          .keep = b.keep + i,
          .worth = b.worth + i,
          .first = first_key == 0,
      };
      tile_of<T>(count, chunk.blocks, half)(t);
    }
  }
}

// --- a block of rows ------------------------------------------------------------------------------------------------

DQ_INLINE long query_step_of(const Layout& l) { return round_up(4 * l.words, kVector); }

template <class T, Dtype DTYPE>
void fetch_queries(const DqAttention& a, const Layout& l, long index, long first, long rows, Block& b) {
  Rows q = rows_of<DTYPE>(a.q, a.q_stride, a, index);
  for (long i = 0; i < rows; i++) {
    char* to = b.query + i * query_step_of(l);
    q.expect(first + i);
    b.after[i] = a.scale * kLog2e;
    if constexpr (T::kMeasured) {
      int sum;
      b.after[i] *= quantize<DTYPE>(q.at(first + i), a.width, nullptr, (typename T::Code*)to, &sum);
      b.start[i] = -T::kOffset * sum;
    } else {
      for (long word = 0; word < l.words; word += kLanes) {
        write((void*)(to + 4 * word), T::template words<DTYPE>(q.at(first + i), word, a.width));
      }
    }
  }
}

// The scale comes before the mask, and before everything where scores times the scale have another order or may be 0.
DQ_INLINE bool scaled_first(const DqAttention& a) { return a.mask || !(a.scale > 1e-20f && a.scale < 1e20f); }

// Scores of the `keys` keys from `key` on, and of what fills them up to the exponentials' step, which get -inf.
template <class T>
void score(const DqAttention& a, const Layout& l, long index, long first, long rows, long key, long keys,
           const char* head, Block& b) {
  const long padded = round_up(keys, T::kStep), plain = scaled_first(a) ? 0 : keys / kTile * kTile;
  for (long i = 0; i < rows; i++) write(b.peaks + kLanes * i, every(-kInfinity));
  for (long tile = 0; tile < padded; tile += kTile) {
    ScoreTile t;
    t.keys = head + (key + tile) * l.words * 4, t.key_scale = (const float*)(head + l.key_scale) + key + tile;
    t.words = l.words, t.query_step = query_step_of(l);
    for (long i = 0; i < rows; i += kScoreRows) {
      t.query = b.query + i * t.query_step, t.start = b.start + i;
      t.score = b.score + i * kScoreStride + tile;
      t.peaks = tile < plain ? b.peaks + kLanes * i : b.unused;
      scores_of<T>(std::min(rows - i, kScoreRows), keys - tile)(t);
    }
  }
  if (plain == padded) return;
  const float* mask = a.mask;
  if (mask) mask += index / a.heads * a.mask_stride[0] + index % a.heads * a.mask_stride[1];
  for (long i = 0; i < rows; i++) {
    Bias bias{.mask = nullptr, .step = a.mask_stride[3], .factor = b.before[i]};
    if (mask) bias.mask = mask + (first + i) * a.mask_stride[2] + key * bias.step;
    apply(bias, b.score + i * kScoreStride, plain, keys, padded, b.peaks + kLanes * i);
  }
}

template <class T, Dtype DTYPE>
void finish(const DqAttention& a, const Layout& l, long index, long first, long rows, const char* head,
            const Block& b) {
  Rows out = rows_of<DTYPE>(a.out, a.out_stride, a, index);
  const float* scale = (const float*)(head + l.value_scale);
  for (long i = 0; i < rows; i++) {
    float share = b.total[i] == 0 ? 0 : 1 / b.total[i];  // 0: every key is masked
    if (!(b.largest[i] < kInfinity)) share = kNaN;
    char* to = const_cast<char*>(out.at(first + i));
    for (long c = 0; c < a.width; c += kLanes) {
      Floats value = mul(read(b.sum + i * kLanes * l.blocks + c), every(share));
      if (T::kMeasured) value = mul(value, read(scale + c));
      store(to, c, DTYPE, first_lanes(a.width - c), value);
    }
  }
}

// One task: `rows` rows from `first` of head `index`, whose packed keys and values are at `head`.
template <class T, Dtype DTYPE>
void attend(const DqAttention& a, const Layout& l, long index, long first, long rows, const char* head, Block& b) {
  fetch_queries<T, DTYPE>(a, l, index, first, rows, b);
  for (long i = 0; i < kRowLanes; i++) {
    b.largest[i] = -kInfinity, b.total[i] = 0, b.before[i] = 1;
    if (i < rows && scaled_first(a)) std::swap(b.before[i], b.after[i]);
  }
  for (long key = 0; key < a.keys; key += T::kKeys) {
    long keys = std::min(T::kKeys, a.keys - key);
    score<T>(a, l, index, first, rows, key, keys, head, b);
    softmax<T>(b, rows, keys);
    weigh<T>(a, l, rows, key, keys, head, b);
  }
  finish<T, DTYPE>(a, l, index, first, rows, head, b);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
