// Weights of a convolution: a panel of 64 output channels, laid out for the dot product in cache (panel.h).
//
//   rows (64, channels, taps), packed  ->  words [64 / kTile][taps][channels / codes of a word][kTile]
#pragma once
#include "panel.h"

namespace dq::inline DQ_LEVEL {
namespace {

constexpr long kPart = 128;  // channels whose taps are taken apart at a time: kLanes rows of them stay in L1

// 16 channels of up to 8 taps: byte t of rows k to k + 15, which are `taps` apart, becomes 16 neighbours in out[t].
DQ_INLINE void turn_taps(const int8_t* from, long taps, long count, int8_t* out) {
  __m128i a[8], b[8];
  DQ_UNROLL for (int i = 0; i < 8; i++) {
    a[i] = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)(from + i * taps)),
                             _mm_loadl_epi64((const __m128i*)(from + (i + 8) * taps)));
  }
  DQ_UNROLL for (int i = 0; i < 4; i++) b[i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
  if (count == 1) {
    __m128i even = _mm_unpacklo_epi8(b[0], b[2]), odd = _mm_unpacklo_epi8(b[1], b[3]);
    return _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi8(even, odd));
  }
  DQ_UNROLL for (int i = 0; i < 4; i++) b[4 + i] = _mm_unpackhi_epi8(a[i], a[i + 4]);
  DQ_UNROLL for (int i = 0; i < 8; i += 4) {  // taps i to i + 3
    __m128i part[4] = {_mm_unpacklo_epi8(b[i], b[i + 2]), _mm_unpacklo_epi8(b[i + 1], b[i + 3]),
                       _mm_unpackhi_epi8(b[i], b[i + 2]), _mm_unpackhi_epi8(b[i + 1], b[i + 3])};
    a[i] = _mm_unpacklo_epi8(part[0], part[1]);
    a[i + 1] = _mm_unpackhi_epi8(part[0], part[1]);
    a[i + 2] = _mm_unpacklo_epi8(part[2], part[3]);
    a[i + 3] = _mm_unpackhi_epi8(part[2], part[3]);
  }
  for (long t = 0; t < count; t++) _mm_storeu_si128((__m128i*)(out + t * kPart), a[t]);
}

// (channels, taps) -> (taps, kPart), one row of codes. Reads whole steps: 15 channels and 8 bytes beyond the end.
void take_apart(const int8_t* row, long channels, long taps, int8_t* out) {
  for (long k = 0; k < channels; k += 16) {
    for (long t = 0; t < taps; t += 8) {
      turn_taps(row + k * taps + t, taps, std::min(8l, taps - t), out + t * kPart + k);
    }
  }
}

// Where output t finds its bytes in input register r, when 64 channels of `taps` taps are read as `taps` registers.
struct Pick {
  int8_t index[64];
  __mmask64 wanted;
  char unused[56];  // 64-byte steps
};

constexpr long kMostTaps = 32;  // tables of more would not stay in cache

void lay_picks(long taps, Pick* picks) {
  memset((void*)picks, 0, taps * taps * sizeof(Pick));
  for (long t = 0; t < taps; t++) {
    for (long k = 0; k < 64; k++) {
      Pick& pick = picks[t * taps + (k * taps + t) / 64];
      pick.index[k] = int8_t((k * taps + t) % 64);
      pick.wanted |= 1ull << k;
    }
  }
}

// The same, 64 channels at a time: output t takes the bytes at t, t + taps, ... out of `taps` registers.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void take_apart(const int8_t* row, long channels, long taps,
                                                                       int8_t* out, const Pick* picks) {
  for (long first = 0; first < channels; first += 64) {
    __m512i in[kMostTaps];
    for (long r = 0; r < taps; r++) in[r] = _mm512_loadu_si512(row + first * taps + 64 * r);
    for (long t = 0; t < taps; t++) {
      __m512i gathered = _mm512_setzero_si512();
      for (long r = 0; r < taps; r++) {
        const Pick& pick = picks[t * taps + r];
        gathered = _mm512_mask_permutexvar_epi8(gathered, pick.wanted, _mm512_load_si512(pick.index), in[r]);
      }
      _mm512_storeu_si512(out + t * kPart + first, gathered);
    }
  }
}

// Room of a thread for a panel and what leads to it.
struct Workshop {
  long taps;
  const Pick* picks;  // or null: the processor lacks the instruction, or there are too many taps
  int8_t* plain;      // one row of codes, kPart channels
  int8_t* rows;       // (kLanes, taps, kPart)
  static bool permutes(long taps) { return kLanes == 16 && taps <= kMostTaps && __builtin_cpu_supports("avx512vbmi"); }
  static size_t table(long taps) { return permutes(taps) ? taps * taps * sizeof(Pick) : 0; }
  static size_t bytes(long taps) { return table(taps) + (kLanes + 1) * taps * kPart + 64; }
  Workshop(long taps, void* place) : taps(taps), picks(permutes(taps) ? (Pick*)place : nullptr) {
    plain = (int8_t*)place + table(taps);
    rows = plain + taps * kPart + 64;
    if (picks) lay_picks(taps, (Pick*)place);
  }
};

// Channels first to first + kPart of kLanes rows (those beyond `there` are 0) into the words of their tile.
template <class Dot>
void lay_part(const Workshop& shop, const Weight& w, const int8_t* codes, long there, long first, long channels,
              int8_t* out) {
  const long taps = shop.taps, count = std::min(kPart, channels - first);
  for (long i = 0; i < std::min(there, kLanes); i++) {
    const int8_t* row = codes + i * w.row_bytes;
    long k = 0;
    for (; k < count * taps; k += sizeof(Words)) {
      write(shop.plain + k, row_codes(row, first * taps + k, channels * taps, w.bits));
    }
    for (; k < round_up(count, 16) * taps; k += sizeof(Words)) write(shop.plain + k, every(0));
    int8_t* to = shop.rows + i * taps * kPart;
    shop.picks ? take_apart(shop.plain, count, taps, to, shop.picks) : take_apart(shop.plain, count, taps, to);
  }
  const long padded = round_up(channels, 4);
  for (long t = 0; t < taps; t++) {
    int8_t* to = out + (t * padded + first) / Dot::kCodes * 4 * kTile;
    lay_block<Dot>(shop.rows + t * kPart, taps * kPart, there, count, 8, to);
  }
}

// The panel of output channels from n on. w.columns: taps times channels rounded up to 4.
template <class Dot>
void lay_panel(const Workshop& shop, const Weight& w, long channels, long n, const Panel& p) {
  for (long i = 0; i < kWide; i += kLanes) {
    const int8_t* codes = w.codes + (n + i) * w.row_bytes;
    const long there = w.outputs - n - i;
    if (shop.taps == 1) {
      lay_block<Dot>(codes, w.row_bytes, there, channels, w.bits, from(p, i).codes);
      continue;
    }
    for (long first = 0; first < channels; first += kPart) {
      lay_part<Dot>(shop, w, codes, there, first, channels, from(p, i).codes);
    }
  }
  lay_sums<Dot>(p, w.columns, w.columns, 1);
  lay_vectors(p, w, n);
}

}  // namespace
}  // namespace dq::inline DQ_LEVEL
