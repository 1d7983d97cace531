// Keys and values of one head, laid out once for the products of all its rows.
//
//   keys    [tile of kTile][word][kTile keys][4 bytes]                  a word: neighbouring columns of a key
//   values  [chunk of <= kWidest blocks][word][block][kLanes columns][4 bytes]   neighbouring keys of a column
//
// Codes: k is the key minus the mean key, which shifts every score of a row alike and so leaves the softmax as it is; a
// scale per key, a scale per column of the values. Keys beyond the last: values 0, keys anything (masked later).
#pragma once
#include "attention_products.h"

namespace dq::inline DQ_LEVEL {
namespace {

constexpr long kTile = kRegisters * kLanes, kMaxWidth = 256, kVector = 4 * kLanes;
constexpr long kMaxChunks = kMaxWidth / kLanes / 2;

struct Chunk {
  long first, blocks;  // in blocks of kLanes columns
};

// Sizes of a packed head, and where its parts are.
struct Layout {
  long padded, tiles, words, blocks, value_words, spans, chunks;  // words: of a key; spans: of kKeys keys
  Chunk chunk[kMaxChunks];
  size_t values, key_scale, value_scale, mean, partial, bytes;  // offsets; the keys are at 0

  template <class T>
  Layout(T, const DqAttention& a) {
    padded = round_up(a.keys, std::max(kTile, T::kStep)), tiles = padded / kTile;
    spans = (padded + T::kKeys - 1) / T::kKeys;
    words = (a.width + T::kWord - 1) / T::kWord, blocks = (a.width + kLanes - 1) / kLanes;
    value_words = padded / T::kWord, chunks = (blocks + T::kWidest - 1) / T::kWidest;
    for (long c = 0, first = 0; c < chunks; c++) {
      chunk[c] = {.first = first, .blocks = (blocks - first + chunks - c - 1) / (chunks - c)};
      first += chunk[c].blocks;
    }
    values = tiles * words * 4 * kTile;
    key_scale = values + value_words * blocks * kVector;
    value_scale = key_scale + padded * 4;
    mean = value_scale + blocks * kVector;
    partial = mean + blocks * kVector;
    bytes = round_up(partial + spans * blocks * 2 * kVector, 64);
  }

  size_t value_chunk(long c) const { return values + chunk[c].first * value_words * kVector; }
};

// Head `index` of a tensor with strides by batch, head and token.
template <Dtype DTYPE>
Rows rows_of(const char* base, const int64_t* stride, const DqAttention& a, long index) {
  long offset = index / a.heads * stride[0] + index % a.heads * stride[1];
  constexpr long each = element_bytes(DTYPE);
  return {.first = base + offset * each, .step = stride[2] * each, .bytes = a.width * each};
}

// --- codes: what the scales need ------------------------------------------------------------------------------------

// Sum of the keys and largest magnitude of the values, per column, over one span of keys.
template <class T, Dtype DTYPE>
void measure(const DqAttention& a, const Layout& l, long index, long span, char* head) {
  Rows k = rows_of<DTYPE>(a.k, a.k_stride, a, index), v = rows_of<DTYPE>(a.v, a.v_stride, a, index);
  long first = span * T::kKeys, last = std::min(first + T::kKeys, a.keys);
  char* out = head + l.partial + span * l.blocks * 2 * kVector;
  for (long block = 0; block < l.blocks; block++) {
    Mask lanes = first_lanes(a.width - kLanes * block);
    Floats sum = every(0.f);
    Words peak = every(0);
    for (long key = first; key < last; key++) {
      if (block == 0) k.expect(key), v.expect(key);
      sum = add(sum, load(k.at(key), kLanes * block, DTYPE, lanes));
      peak = max(peak, magnitude(load(v.at(key), kLanes * block, DTYPE, lanes)));
    }
    write((float*)(out + block * 2 * kVector), sum);
    write((void*)(out + block * 2 * kVector + kVector), peak);
  }
}

// Spans together, in their order: mean key and value scales. Every packing task does it for itself, as it is little.
inline void conclude(const DqAttention& a, const Layout& l, const char* head, float* mean, float* value_scale) {
  for (long block = 0; block < l.blocks; block++) {
    Floats sum = every(0.f);
    Words peak = every(0);
    for (long span = 0; span < l.spans; span++) {
      const char* from = head + l.partial + (span * l.blocks + block) * 2 * kVector;
      sum = add(sum, read((const float*)from));
      peak = max(peak, read((const void*)(from + kVector)));
    }
    write(mean + kLanes * block, div(sum, every(float(a.keys))));
    int peaks[kLanes];
    write((void*)peaks, peak);
    for (int c = 0; c < kLanes; c++) value_scale[kLanes * block + c] = scale_of(peaks[c]);
  }
}

// `width` numbers at x, minus `mean` if there is one, to `codes` (zero up to a multiple of kLanes).
// Returns the scale; `sum` gets the sum of the codes.
template <Dtype DTYPE, class Code>
DQ_INLINE float quantize(const char* x, long width, const float* mean, Code* codes, int* sum) {
  alignas(64) float centred[kMaxWidth];
  Words peak = every(0), total = every(0);
  for (long c = 0; c < width; c += kLanes) {
    Floats v = load(x, c, DTYPE, first_lanes(width - c));
    if (mean) v = sub(v, read(mean + c));
    write(centred + c, v);
    peak = max(peak, magnitude(v));
  }
  float scale = scale_of(largest(peak));
  Floats inverse = every(1.f / scale);
  for (long c = 0; c < width; c += kLanes) {
    Words code = round(mul(read(centred + c), inverse));
    total = add(total, code);
    write_codes(codes + c, first_lanes(kLanes), code);
  }
  if (sum) *sum = sum_of(total);
  return scale;
}

// --- keys -----------------------------------------------------------------------------------------------------------

// Keys of a tile, `words_at(key of the tile, word)` giving a vector of neighbouring words of one.
template <class Source>
DQ_INLINE void lay_keys(long words, char* to, const Source& words_at) {
  for (long part = 0; part < kTile; part += kLanes, to += kVector) {
    for (long word = 0; word < words; word += kLanes) {
      Words r[kLanes];
      DQ_UNROLL for (int i = 0; i < kLanes; i++) r[i] = words_at(part + i, word);
      transpose(r);
      for (int i = 0; i < kLanes && word + i < words; i++) write((void*)(to + (word + i) * 4 * kTile), r[i]);
    }
  }
}

template <class T, Dtype DTYPE>
void pack_keys(const DqAttention& a, const Layout& l, long index, long tile, char* head, const float* mean) {
  Rows k = rows_of<DTYPE>(a.k, a.k_stride, a, index);
  const long first = tile * kTile;
  char* to = head + tile * l.words * 4 * kTile;
  if constexpr (T::kMeasured) {
    alignas(64) typename T::Code codes[kTile][kMaxWidth];
    float* scale = (float*)(head + l.key_scale) + first;
    for (long i = 0; i < kTile; i++) {
      memset(codes[i], 0, round_up(4 * l.words, kVector));
      k.expect(first + i);
      scale[i] = 0;
      if (first + i < a.keys) scale[i] = quantize<DTYPE>(k.at(first + i), a.width, mean, codes[i], nullptr);
    }
    lay_keys(l.words, to, [&](long i, long word) __attribute__((always_inline)) {
      return T::with_offset(read((const void*)(codes[i] + T::kWord * word)));
    });
  } else {
    for (long i = 0; i < kTile; i++) k.expect(first + i);
    lay_keys(l.words, to, [&](long i, long word) __attribute__((always_inline)) {
      return first + i < a.keys ? T::template words<DTYPE>(k.at(first + i), word, a.width) : every(0);
    });
  }
}

// --- values ---------------------------------------------------------------------------------------------------------

// Values of keys `first` to `last` - 1, both multiples of a word.
template <class T, Dtype DTYPE>
void pack_values(const DqAttention& a, const Layout& l, long index, long first, long last, char* head,
                 const float* inverse) {
  Rows v = rows_of<DTYPE>(a.v, a.v_stride, a, index);
  for (long c = 0; c < l.chunks; c++) {
    const Chunk& chunk = l.chunk[c];
    char* to = head + l.value_chunk(c) + first / T::kWord * chunk.blocks * kVector;
    for (long key = first; key < last; key += T::kWord) {
      if (c == 0) DQ_UNROLL for (int i = 0; i < T::kWord; i++) v.expect(key + i);
      for (long b = chunk.first; b < chunk.first + chunk.blocks; b++, to += kVector) {
        write((void*)to, T::template across<DTYPE>(v, key, a.keys, kLanes * b, a.width, inverse));
      }
    }
  }
}

// One task: a span of the keys and values of a head.
template <class T, Dtype DTYPE>
void pack(const DqAttention& a, const Layout& l, long index, long span, char* head) {
  alignas(64) float mean[kMaxWidth], scale[kMaxWidth], inverse[kMaxWidth];
  if constexpr (T::kMeasured) {
    conclude(a, l, head, mean, scale);
    for (long c = 0; c < kLanes * l.blocks; c++) inverse[c] = 1.f / scale[c];
    if (span == 0) memcpy(head + l.value_scale, scale, l.blocks * kVector);
  }
  long first = span * T::kKeys, last = std::min(first + T::kKeys, l.padded);
  for (long tile = first / kTile; tile < last / kTile; tile++) pack_keys<T, DTYPE>(a, l, index, tile, head, mean);
  pack_values<T, DTYPE>(a, l, index, first, std::min(last, round_up(a.keys, T::kWord)), head, inverse);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
