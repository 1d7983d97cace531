// Keys and values of one head, laid out once for the dot products of all its rows.
//
//   keys    [tile of 64][word][64 keys][4 bytes]          a word: 2 bf16, or 4 bytes k + 128, of neighbouring columns
//   values  [chunk of <= 5 blocks][word][block][16 columns][4 bytes]   2 bf16, or 4 signed bytes, of neighbouring keys
//
// Eight bits: k is the key minus the mean key, which shifts every score of a row alike and so leaves the softmax as it
// is; a scale per key, a scale per column of the values. Keys beyond the last: values 0, keys anything (masked later).
#pragma once
#include "attention_vector.h"

namespace dq {

// Arguments of dq_attention: q, out (batch, heads, rows, width), k, v (batch, heads, keys, width), last dimension
// contiguous. Strides in elements. Rows whose keys are all masked by -inf are zero.
struct Attention {
  const char *q, *k, *v;
  char* out;
  const float* mask;  // added to the scaled scores, or null
  int64_t batch, heads, rows, keys, width;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // by Axis
  int64_t mask_stride[4];                                        // batch, head, row, key (0 or 1)
  Dtype dtype;
  int32_t int8;  // products of bytes, else of bf16, which needs BF16
  float scale;
};

namespace {

constexpr long kTile = 64, kKeyBlock = 512, kMaxWidth = 256, kMaxChunks = 4, kWidestChunk = 5, kAhead = 8;

enum Axis { BATCH, HEAD, TOKEN };

// The two precisions. kWord: elements in 4 bytes. kMeasured: a pass over keys and values comes before packing.
struct Bf16 {
  using Sum = __m512;
  using HalfSum = __m256;
  static constexpr long kWord = 2;
  static constexpr bool kMeasured = false;
};
struct Int8 {
  using Sum = __m512i;
  using HalfSum = __m256i;
  static constexpr long kWord = 4;
  static constexpr bool kMeasured = true;
};

struct Chunk {
  long first, blocks;  // in blocks of 16 columns
};

// Sizes of a packed head, and where its parts are.
struct Layout {
  long padded, tiles, words, blocks, value_words, spans, chunks;  // words: of a key; spans: of kKeyBlock keys
  Chunk chunk[kMaxChunks];
  size_t values, key_scale, value_scale, mean, partial, bytes;  // offsets; the keys are at 0

  Layout(const Attention& a, long word) {
    padded = round_up(a.keys, kTile), tiles = padded / kTile, spans = (padded + kKeyBlock - 1) / kKeyBlock;
    words = (a.width + word - 1) / word, blocks = (a.width + 15) / 16, value_words = padded / word;
    chunks = (blocks + kWidestChunk - 1) / kWidestChunk;
    for (long c = 0, first = 0; c < chunks; c++) {
      chunk[c] = {.first = first, .blocks = (blocks - first + chunks - c - 1) / (chunks - c)};
      first += chunk[c].blocks;
    }
    values = tiles * words * 256;
    key_scale = values + value_words * blocks * 64;
    value_scale = key_scale + padded * 4;
    mean = value_scale + blocks * 64;
    partial = mean + blocks * 64;
    bytes = partial + spans * blocks * 128;
  }

  size_t value_chunk(long c) const { return values + chunk[c].first * value_words * 64; }
};

// Where head `index` of a tensor starts, and its bytes from token to token.
struct Rows {
  const char* first;
  long step, bytes;

  template <Dtype DTYPE>
  static Rows of(const char* base, const int64_t* stride, const Attention& a, long index) {
    long offset = index / a.heads * stride[BATCH] + index % a.heads * stride[HEAD];
    constexpr long each = element_bytes(DTYPE);
    return {.first = base + offset * each, .step = stride[TOKEN] * each, .bytes = a.width * each};
  }
  const char* at(long token) const { return first + token * step; }
  // Tokens of a head are far apart, often a page: what comes soon is fetched now, whether it exists or not.
  void expect(long token) const {
    for (long byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at(token + kAhead) + byte);
  }
};

// --- eight bits: what the scales need -------------------------------------------------------------------------------

// Sum of the keys and largest magnitude of the values, per column, over one span of keys.
template <Dtype DTYPE>
void measure(const Attention& a, const Layout& l, long index, long span, char* head) {
  Rows k = Rows::of<DTYPE>(a.k, a.k_stride, a, index), v = Rows::of<DTYPE>(a.v, a.v_stride, a, index);
  long first = span * kKeyBlock, last = std::min(first + kKeyBlock, a.keys);
  char* out = head + l.partial + span * l.blocks * 128;
  for (long block = 0; block < l.blocks; block++) {
    __mmask16 lanes = first_lanes(a.width - 16 * block);
    __m512 sum = _mm512_setzero_ps();
    __m512i peak = _mm512_setzero_si512();
    for (long key = first; key < last; key++) {
      if (block == 0) k.expect(key), v.expect(key);
      sum = _mm512_add_ps(sum, load(k.at(key), 16 * block, DTYPE, lanes));
      peak = _mm512_max_epi32(peak, magnitude(load(v.at(key), 16 * block, DTYPE, lanes)));
    }
    _mm512_store_ps(out + block * 128, sum);
    _mm512_store_si512(out + block * 128 + 64, peak);
  }
}

// Spans together, in their order: mean key and value scales. Every packing task does it for itself, as it is little.
void conclude(const Attention& a, const Layout& l, const char* head, float* mean, float* value_scale) {
  for (long block = 0; block < l.blocks; block++) {
    __m512 sum = _mm512_setzero_ps();
    __m512i peak = _mm512_setzero_si512();
    for (long span = 0; span < l.spans; span++) {
      const char* from = head + l.partial + (span * l.blocks + block) * 128;
      sum = _mm512_add_ps(sum, _mm512_load_ps(from));
      peak = _mm512_max_epi32(peak, _mm512_load_si512(from + 64));
    }
    _mm512_store_ps(mean + 16 * block, _mm512_div_ps(sum, _mm512_set1_ps(float(a.keys))));
    alignas(64) int peaks[16];
    _mm512_store_si512(peaks, peak);
    for (int c = 0; c < 16; c++) value_scale[16 * block + c] = scale_of(peaks[c]);
  }
}

// `width` numbers at x, minus `mean` if there is one, to bytes at `codes` (zero up to a multiple of 16).
// Returns the scale; `sum` gets the sum of the codes.
template <Dtype DTYPE>
DQ_INLINE float quantize(const char* x, long width, const float* mean, char* codes, int* sum) {
  alignas(64) float centred[kMaxWidth];
  __m512i peak = _mm512_setzero_si512(), total = _mm512_setzero_si512();
  for (long c = 0; c < width; c += 16) {
    __mmask16 lanes = first_lanes(width - c);
    __m512 v = load(x, c, DTYPE, lanes);
    if (mean) v = _mm512_maskz_sub_ps(lanes, v, _mm512_load_ps(mean + c));
    _mm512_store_ps(centred + c, v);
    peak = _mm512_max_epi32(peak, magnitude(v));
  }
  float scale = scale_of(_mm512_reduce_max_epi32(peak));
  __m512 inverse = _mm512_set1_ps(1.f / scale);
  for (long c = 0; c < width; c += 16) {
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(centred + c), inverse));
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128((__m128i*)(codes + c), _mm512_cvtsepi32_epi8(code));
  }
  if (sum) *sum = _mm512_reduce_add_epi32(total);
  return scale;
}

// --- keys -----------------------------------------------------------------------------------------------------------

// 16 keys of `words` words, `step` bytes apart, into their quarter of a tile. Only `bytes` of each are read.
DQ_INLINE void pack_words(const char* from, long step, long keys, long bytes, long words, char* to) {
  for (long word = 0; word < words; word += 16) {
    __m512i r[16];
    __mmask32 halves = first_halves(bytes / 2 - 2 * word);
    DQ_UNROLL for (int i = 0; i < 16; i++) {
      r[i] = i < keys ? _mm512_maskz_loadu_epi16(halves, from + i * step + 4 * word) : _mm512_setzero_si512();
    }
    transpose16(r);
    for (int i = 0; i < 16 && word + i < words; i++) _mm512_store_si512(to + (word + i) * 256, r[i]);
  }
}

template <Dtype DTYPE>
void pack_keys(Bf16, const Attention& a, const Layout& l, long index, long tile, char* head, const float*) {
  Rows k = Rows::of<DTYPE>(a.k, a.k_stride, a, index);
  char* to = head + tile * l.words * 256;
  for (long quarter = 0; quarter < 4; quarter++) {
    long key = tile * kTile + 16 * quarter;
    DQ_UNROLL for (int i = 0; i < 16; i++) k.expect(key + i + 8);
    pack_words(k.at(key), k.step, a.keys - key, 2 * a.width, l.words, to + 64 * quarter);
  }
}

template <Dtype DTYPE>
void pack_keys(Int8, const Attention& a, const Layout& l, long index, long tile, char* head, const float* mean) {
  Rows k = Rows::of<DTYPE>(a.k, a.k_stride, a, index);
  alignas(64) char codes[kTile][kMaxWidth];
  float* scale = (float*)(head + l.key_scale) + tile * kTile;
  const __m512i offset = _mm512_set1_epi8(char(128));
  for (long i = 0; i < kTile; i++) {
    long key = tile * kTile + i;
    scale[i] = 0;
    for (long c = 0; c < 4 * l.words; c += 64) _mm512_store_si512(codes[i] + c, _mm512_setzero_si512());
    k.expect(key);
    if (key < a.keys) scale[i] = quantize<DTYPE>(k.at(key), a.width, mean, codes[i], nullptr);
    for (long c = 0; c < 4 * l.words; c += 64) {
      _mm512_store_si512(codes[i] + c, _mm512_xor_si512(_mm512_load_si512(codes[i] + c), offset));
    }
  }
  char* to = head + tile * l.words * 256;
  for (long quarter = 0; quarter < 4; quarter++) {
    pack_words(codes[16 * quarter], kMaxWidth, 16, kMaxWidth, l.words, to + 64 * quarter);
  }
}

// --- values ---------------------------------------------------------------------------------------------------------

// 16 columns of the neighbouring keys `key`, ... as one vector of words.
template <Dtype DTYPE>
DQ_INLINE __m512i value_word(Bf16, const Rows& v, long key, long keys, long column, __mmask16 lanes, const float*) {
  __m256i pair[2];
  DQ_UNROLL for (int i = 0; i < 2; i++) {
    pair[i] = _mm256_maskz_loadu_epi16(key + i < keys ? lanes : __mmask16(0), v.at(key + i) + 2 * column);
  }
  __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(pair[1]), 16);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(pair[0]), high);
}

template <Dtype DTYPE>
DQ_INLINE __m512i value_word(Int8, const Rows& v, long key, long keys, long column, __mmask16 lanes,
                             const float* inverse) {
  __m512i word = _mm512_setzero_si512();
  DQ_UNROLL for (int i = 3; i >= 0; i--) {
    __m512 x = load(v.at(key + i), column, DTYPE, key + i < keys ? lanes : __mmask16(0));
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_load_ps(inverse + column)));
    word = _mm512_or_si512(_mm512_slli_epi32(word, 8), _mm512_and_si512(code, _mm512_set1_epi32(0xff)));
  }
  return word;
}

// Values of keys `first` to `last` - 1, both multiples of a word.
template <class T, Dtype DTYPE>
void pack_values(const Attention& a, const Layout& l, long index, long first, long last, char* head,
                 const float* inverse) {
  Rows v = Rows::of<DTYPE>(a.v, a.v_stride, a, index);
  for (long c = 0; c < l.chunks; c++) {
    const Chunk& chunk = l.chunk[c];
    char* to = head + l.value_chunk(c) + first / T::kWord * chunk.blocks * 64;
    for (long key = first; key < last; key += T::kWord) {
      if (c == 0) DQ_UNROLL for (int i = 0; i < T::kWord; i++) v.expect(key + i);
      for (long column = 16 * chunk.first; column < 16 * (chunk.first + chunk.blocks); column += 16, to += 64) {
        __mmask16 lanes = first_lanes(a.width - column);
        _mm512_store_si512(to, value_word<DTYPE>(T(), v, key, a.keys, column, lanes, inverse));
      }
    }
  }
}

// One task: a span of the keys and values of a head.
template <class T, Dtype DTYPE>
void pack(const Attention& a, const Layout& l, long index, long span, char* head) {
  alignas(64) float mean[kMaxWidth], scale[kMaxWidth], inverse[kMaxWidth];
  if (T::kMeasured) {
    conclude(a, l, head, mean, scale);
    for (long c = 0; c < 16 * l.blocks; c++) inverse[c] = 1.f / scale[c];
    if (span == 0) memcpy(head + l.value_scale, scale, l.blocks * 64);
  }
  long first = span * kKeyBlock, last = std::min(first + kKeyBlock, l.padded);
  for (long tile = first / kTile; tile < last / kTile; tile++) pack_keys<DTYPE>(T(), a, l, index, tile, head, mean);
  pack_values<T, DTYPE>(a, l, index, first, last, head, inverse);
}

}  // namespace
}  // namespace dq
