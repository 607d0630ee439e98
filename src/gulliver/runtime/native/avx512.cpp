// AVX512-VNNI + VBMI: 16 rows in 16 lanes, 4 columns in each.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace gulliver {
namespace {

#include "choose.inc"
#include "float_ops.inc"
#include "quantize.inc"

// Eight vectors of codes or table values for 32 columns of 16 rows, from the code bytes of a group.
// `block` is the number of the 32-column block in its group; `group_size` fixes where the second plane starts.
template <int kBits, bool kUniform>
struct Codes {
  static inline __m512i value(__m512i index, __m512i table) {
    if constexpr (kUniform) return index; else return _mm512_permutexvar_epi8(index, table);
  }
  static inline void load(const uint8_t* group, int group_size, int block, __m512i table, __m512i w[8]) {
    if constexpr (kBits == 8) {
      const uint8_t* p = group + block * 512;
      for (int k = 0; k < 8; k++) w[k] = _mm512_loadu_si512(p + 64 * k);
    } else if constexpr (kBits == 2) {
      const uint8_t* p = group + block * 128;
      const __m512i mask = _mm512_set1_epi8(3);
      for (int n = 0; n < 2; n++) {
        __m512i c = _mm512_loadu_si512(p + 64 * n);
        w[4 * n + 0] = c; w[4 * n + 1] = _mm512_srli_epi16(c, 2);
        w[4 * n + 2] = _mm512_srli_epi16(c, 4); w[4 * n + 3] = _mm512_srli_epi16(c, 6);
      }
      for (int k = 0; k < 8; k++) w[k] = kUniform ? _mm512_and_si512(w[k], mask) : value(w[k], table);
    } else if constexpr (kBits == 3) {
      const uint8_t* low = group + block * 128;
      const uint8_t* high = group + group_size * kTileRows * 2 / 8 + block * 64;
      const __m512i mask = _mm512_set1_epi8(3), all = _mm512_set1_epi8(7);
      const __m512i h = _mm512_loadu_si512(high);
      for (int n = 0; n < 2; n++) {
        const __m512i c = _mm512_loadu_si512(low + 64 * n);
        for (int j = 0; j < 4; j++) {
          const int at = 4 * n + j;  // bit of h, wanted at bit 2
          const __m512i a = j == 0 ? c : _mm512_srli_epi16(c, 2 * j);
          const __m512i b = at == 2 ? h : at < 2 ? _mm512_slli_epi16(h, 2 - at) : _mm512_srli_epi16(h, at - 2);
          const __m512i mixed = _mm512_ternarylogic_epi32(mask, a, b, 0xCA);  // mask ? a : b
          w[at] = kUniform ? _mm512_and_si512(mixed, all) : value(mixed, table);
        }
      }
    } else {  // 4, 5, 6: a plane of four bits and perhaps one of one or two
      const uint8_t* low = group + block * 256;
      const __m512i mask = _mm512_set1_epi8(15);
      for (int n = 0; n < 4; n++) {
        const __m512i c = _mm512_loadu_si512(low + 64 * n);
        w[2 * n] = c; w[2 * n + 1] = _mm512_srli_epi16(c, 4);
      }
      if constexpr (kBits == 4) {
        for (int k = 0; k < 8; k++) w[k] = kUniform ? _mm512_and_si512(w[k], mask) : value(w[k], table);
      } else if constexpr (kBits == 5) {
        const __m512i all = _mm512_set1_epi8(31);
        const __m512i h = _mm512_loadu_si512(group + group_size * kTileRows * 4 / 8 + block * 64);
        for (int k = 0; k < 8; k++) {
          const __m512i b = k == 4 ? h : k < 4 ? _mm512_slli_epi16(h, 4 - k) : _mm512_srli_epi16(h, k - 4);
          const __m512i mixed = _mm512_ternarylogic_epi32(mask, w[k], b, 0xCA);
          w[k] = kUniform ? _mm512_and_si512(mixed, all) : value(mixed, table);
        }
      } else {
        const __m512i all = _mm512_set1_epi8(63);
        const uint8_t* high = group + group_size * kTileRows * 4 / 8 + block * 128;
        for (int n = 0; n < 2; n++) {
          const __m512i h = _mm512_loadu_si512(high + 64 * n);
          for (int j = 0; j < 4; j++) {
            const int k = 4 * n + j, at = 2 * j;
            const __m512i b = at == 4 ? h : at < 4 ? _mm512_slli_epi16(h, 4 - at) : _mm512_srli_epi16(h, at - 4);
            const __m512i mixed = _mm512_ternarylogic_epi32(mask, w[k], b, 0xCA);
            w[k] = kUniform ? _mm512_and_si512(mixed, all) : value(mixed, table);
          }
        }
      }
    }
  }
};

inline __m512 scales_of(const uint8_t* bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

inline __m512 halves_of(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Reading ahead by hand into the second-level cache, for one row of activations. Wide tiles of fewer than 8 bits: always, which is
// up to twice as fast. Others: only where the thread's share of a product ends and that of the next one begins; in between, the
// hardware's own prefetcher does better (docs/log.md).
constexpr ptrdiff_t kAhead = 65536, kAheadNarrow = 16384;     // bytes
constexpr int kNarrow = 850;                                  // columns

// How far ahead of a tile to read; 0: not at all.
inline ptrdiff_t ahead_of(const Part& part, const uint8_t* tile, Reading reading) {
  if (!reading.end) return 0;
  const bool wide = part.bits < 8 && part.columns > kNarrow;
  const ptrdiff_t distance = wide ? kAhead : kAheadNarrow;
  const ptrdiff_t left = ptrdiff_t(uintptr_t(reading.end) - uintptr_t(tile));    // not positive: the share goes on in another file
  if (left <= 0 || left >= distance) return wide ? distance : 0;
  return ptrdiff_t(uintptr_t(reading.then) - uintptr_t(reading.end)) + distance;
}

inline __m512 row_factors(const uint8_t* tile_end) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile_end));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// sum += four unsigned weights times the four activations at q, in each lane. The compiler would broadcast them on their own.
inline void add_dot(__m512i& sum, __m512i weights, const int32_t& q) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(q));
}

// dot * 2^(shift / 2^23), by adding to the exponents: cheaper than to multiply, since the dot products need the same units.
// (A dot product of zero becomes 2^(shift / 2^23 - 127), which no sum notices.)
inline __m512 shifted(__m512i dot, int32_t shift) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(dot)), _mm512_set1_epi32(shift)));
}

constexpr float kFraction[kEighths] = {1.0f, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f};

// A sum of blocks, which counts in units of `base`, times the factors of the rows. The factors come last: the sum is up to 2^60
// times as large as what it stands for.
inline __m512 finished(__m512 sum, float base, __m512 factors) {
  return _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(base)), factors);
}

// What stands beside the codes of group g, of 16 rows.
template <int kBits, int kKind>
struct Sides {
  __m512 scale, least;
  __m512i zero;

  inline Sides(const uint8_t* scales, int groups, int g) {
    const size_t all = size_t(kTileRows) * groups, at = size_t(kTileRows) * g;
    if constexpr (kKind == kHalves || kKind == kMinimums) scale = halves_of(scales + 2 * at);
    else scale = scales_of(scales + at);
    if constexpr (kKind == kMinimums) least = halves_of(scales + 2 * (all + at));
    if constexpr (kKind == kZeros) zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + all + at)));
    if constexpr (kKind == kHalves) zero = _mm512_set1_epi32(1 << (kBits - 1));
  }
};

// One row of activations: the sum stays in a register. `kBlocks` are those of a group.
template <int kBits, int kKind, int kBlocks>
inline __m512 tile_single(const Part& part, const uint8_t* tile, const Activations& x, ptrdiff_t ahead) {
  constexpr bool kUniform = kKind != kTable;
  const __m512i table = _mm512_loadu_si512(part.table);
  constexpr int kGroup = kBlocks * kBlock, kGroupBytes = kGroup * kTileRows * kBits / 8;
  const uint8_t* scales = tile + size_t(kGroupBytes) * part.groups;
  const int32_t* q = reinterpret_cast<const int32_t*>(x.q);
  const int32_t *x_sum = kUniform ? x.sum : x.minus, *shift = x.shift, *eighths = x.eighths;
  __m512 sum = _mm512_setzero_ps();
  for (int g = 0; g < part.groups; g++, tile += kGroupBytes) {
    const Sides<kBits, kKind> side(scales, part.groups, g);
#pragma GCC unroll 4
    for (int n = 0; n < kBlocks; n++, q += 8, x_sum++, shift++, eighths++) {
      if (ahead)
        for (int line = 0; line < kBits; line++)
          _mm_prefetch(reinterpret_cast<const char*>(tile) + ahead + 64 * (n * kBits + line), _MM_HINT_T1);
      __m512i w[8];
      Codes<kBits, kUniform>::load(tile, kGroup, n, table, w);
      __m512i even = kUniform ? _mm512_setzero_si512() : _mm512_set1_epi32(*x_sum), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int k = 0; k < 8; k += 2) {
        add_dot(even, w[k], q[k]);
        add_dot(odd, w[k + 1], q[k + 1]);
      }
      __m512i dot = _mm512_add_epi32(even, odd);
      if constexpr (kKind == kZeros) dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(side.zero, _mm512_set1_epi32(*x_sum)));
      if constexpr (kKind == kHalves) dot = _mm512_sub_epi32(dot, _mm512_set1_epi32(*x_sum * (1 << (kBits - 1))));
      const __m512 fraction = _mm512_set1_ps(kFraction[*eighths]);
      if constexpr (kKind == kMinimums)
        sum = _mm512_fmadd_ps(shifted(_mm512_set1_epi32(*x_sum), *shift), _mm512_mul_ps(side.least, fraction), sum);
      sum = _mm512_fmadd_ps(shifted(dot, *shift), _mm512_mul_ps(side.scale, fraction), sum);
    }
  }
  return finished(sum, *x.base, row_factors(scales + size_t(kTileRows) * part.groups * side_bytes(kKind)));
}

template <int kBits, int kKind>
inline __m512 tile_single(const Part& part, const uint8_t* tile, const Activations& x, Reading reading) {
  const ptrdiff_t ahead = ahead_of(part, tile, reading);
  switch (part.group_size) {
    case 32: return tile_single<kBits, kKind, 1>(part, tile, x, ahead);
    case 64: return tile_single<kBits, kKind, 2>(part, tile, x, ahead);
    default: return tile_single<kBits, kKind, 4>(part, tile, x, ahead);
  }
}

// Many rows of activations: a tile is unpacked once, to a byte a weight, for all of them.
constexpr int kChunk = 64;          // blocks that are unpacked at a time, 32 KB

struct Chunk {
  alignas(64) uint8_t weights[kChunk][8][64];     // of four columns and 16 rows each
  alignas(64) float scale[kChunk][kEighths][kTileRows];   // times 1, 1 1/8, …
  alignas(64) int32_t zero[kChunk][kTileRows];    // of codes that are not a codebook's, and have no minimum
  alignas(64) float least[kChunk][kTileRows];     // minimums
};

// Blocks first to last (not included) of a tile.
template <int kBits, int kKind>
void unpack(const Part& part, const uint8_t* tile, int first, int last, Chunk& chunk) {
  constexpr bool kUniform = kKind != kTable;
  const __m512i table = _mm512_loadu_si512(part.table);
  const int in_group = part.group_size / kBlock;
  const size_t group_bytes = size_t(part.group_size) * kTileRows * kBits / 8;
  const uint8_t* scales = tile + group_bytes * part.groups;
  for (int block = first; block < last; block++) {
    const int group = block / in_group, at = block - first;
    __m512i w[8];
    Codes<kBits, kUniform>::load(tile + group_bytes * group, part.group_size, block % in_group, table, w);
    for (int k = 0; k < 8; k++) _mm512_store_si512(chunk.weights[at][k], w[k]);
    const Sides<kBits, kKind> side(scales, part.groups, group);
    for (int e = 0; e < kEighths; e++) _mm512_store_ps(chunk.scale[at][e], _mm512_mul_ps(side.scale, _mm512_set1_ps(kFraction[e])));
    if constexpr (kKind == kZeros || kKind == kHalves) _mm512_store_si512(chunk.zero[at], side.zero);
    if constexpr (kKind == kMinimums) _mm512_store_ps(chunk.least[at], side.least);
  }
}

// Blocks first to last (not included), which the chunk holds, times kRows rows of activations from number `row` of a panel on:
// added to the sums. Four rows take turns, so that no dot product waits for the one before it.
template <int kKind, int kRows>
void multiply(const Chunk& chunk, int first, int last, const Activations& x, int row, __m512* sums) {
  __m512 sum[kRows];
#pragma GCC unroll 8
  for (int b = 0; b < kRows; b++) sum[b] = sums[b];
  size_t at = size_t(first) * kPanel + row;
  for (int block = 0; block < last - first; block++, at += kPanel) {
    const int32_t* q = reinterpret_cast<const int32_t*>(x.q + at * kBlock);
    __m512i w[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) w[k] = _mm512_load_si512(chunk.weights[block][k]);
#pragma GCC unroll 2
    for (int start = 0; start < kRows; start += 4) {
      constexpr int kMost = kRows < 4 ? kRows : 4;
      const int count = kRows - start < kMost ? kRows - start : kMost;
      __m512i dot[kMost];
#pragma GCC unroll 4
      for (int b = 0; b < count; b++) dot[b] = kKind == kTable ? _mm512_set1_epi32(x.minus[at + start + b]) : _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++)
#pragma GCC unroll 4
        for (int b = 0; b < count; b++) add_dot(dot[b], w[k], q[8 * (start + b) + k]);
#pragma GCC unroll 4
      for (int b = 0; b < count; b++) {
        const size_t place = at + start + b;
        if constexpr (kKind == kZeros || kKind == kHalves) {
          const __m512i zero = _mm512_load_si512(chunk.zero[block]);
          dot[b] = _mm512_sub_epi32(dot[b], _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.sum[place])));
        }
        if constexpr (kKind == kMinimums) {
          const __m512 least = _mm512_mul_ps(_mm512_load_ps(chunk.least[block]), _mm512_set1_ps(kFraction[x.eighths[place]]));
          sum[start + b] = _mm512_fmadd_ps(shifted(_mm512_set1_epi32(x.sum[place]), x.shift[place]), least, sum[start + b]);
        }
        const __m512 scale = _mm512_load_ps(chunk.scale[block][x.eighths[place]]);
        sum[start + b] = _mm512_fmadd_ps(shifted(dot[b], x.shift[place]), scale, sum[start + b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kRows; b++) sums[b] = sum[b];
}

using Multiply = void (*)(const Chunk&, int, int, const Activations&, int, __m512*);

template <int kKind>
constexpr Multiply kMultiply[9] = {nullptr, multiply<kKind, 1>, multiply<kKind, 2>, multiply<kKind, 3>, multiply<kKind, 4>,
                                   multiply<kKind, 5>, multiply<kKind, 6>, multiply<kKind, 7>, multiply<kKind, 8>};

// The outputs of tile t to their places.
inline void store(const Part& part, int t, __m512 value, float* line) {
  const int row = t * kTileRows, rows = part.rows - row < kTileRows ? part.rows - row : kTileRows;
  const __mmask16 keep = __mmask16((1u << rows) - 1);
  if (part.out_index) _mm512_mask_i32scatter_ps(line, keep, _mm512_maskz_loadu_epi32(keep, part.out_index + row), value, 4);
  else _mm512_mask_storeu_ps(line + row, keep, value);
}

// Eight rows of activations at a time, whose results are stored at once, to cache lines that were asked for before the product.
// Meanwhile a share of the next tile is fetched.
template <int kBits, int kKind>
void tile_product(const Part& part, int t, const Activations& x, int batch, float* y, int y_stride) {
  const uint8_t* tile = part.tiles + size_t(t) * part.tile_bytes;
  const size_t codes = size_t(part.group_size) * kTileRows * kBits / 8 * part.groups;
  const __m512 factor = row_factors(tile + codes + size_t(kTileRows) * part.groups * side_bytes(kKind));
  const int blocks = part.group_size / kBlock * part.groups;
  const size_t share = part.tile_bytes / size_t((batch + 7) / 8) + 63;
  size_t at = part.tile_bytes;
  Chunk chunk;
  __m512 sums[kMaxBatch];
  for (int start = 0; start < blocks; start += kChunk) {
    const int stop = blocks - start < kChunk ? blocks : start + kChunk;
    unpack<kBits, kKind>(part, tile, start, stop, chunk);
    for (int row = 0; row < batch; row += 8) {
      const int count = batch - row < 8 ? batch - row : 8;
      for (size_t until = at + share; stop == blocks && at < until; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(tile) + at, _MM_HINT_T1);
      for (int b = row; b < row + count; b++) {
        if (start == 0) sums[b] = _mm512_setzero_ps();
        if (!part.out_index) _mm_prefetch(reinterpret_cast<const char*>(y + size_t(b) * y_stride + t * kTileRows), _MM_HINT_T0);
      }
      kMultiply<kKind>[count](chunk, start, stop, x.from(row / kPanel * kPanel), row % kPanel, sums + row);
      if (stop < blocks) continue;
      for (int b = row; b < row + count; b++)
        store(part, t, finished(sums[b], x.base[b], factor), y + size_t(b) * y_stride);
    }
  }
}

template <int kBits, int kKind>
void product_of(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride, Reading reading) {
  const size_t codes = size_t(part.group_size) * kTileRows * kBits / 8 * part.groups;
  for (int t = first; t < last; t++) {
    if (x.side > 1) {
      tile_product<kBits, kKind>(part, t, x, batch, y, y_stride);
      continue;
    }
    const uint8_t* tile = part.tiles + size_t(t) * part.tile_bytes;
    // Codes are one long stream that the hardware fetches ahead; scales lie behind them and would be waited for.
    for (size_t line = codes; line < part.tile_bytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(tile) + part.tile_bytes + line, _MM_HINT_T0);
    store(part, t, tile_single<kBits, kKind>(part, tile, x, reading), y);
  }
}

void product(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride, Reading reading) {
  using Function = void (*)(const Part&, int, int, const Activations&, int, float*, int, Reading);
  static constexpr Function of[4][9] = {
      {nullptr, nullptr, product_of<2, kTable>, product_of<3, kTable>, product_of<4, kTable>, product_of<5, kTable>,
       product_of<6, kTable>, nullptr, nullptr},
      {nullptr, nullptr, product_of<2, kZeros>, product_of<3, kZeros>, product_of<4, kZeros>, product_of<5, kZeros>,
       product_of<6, kZeros>, nullptr, product_of<8, kZeros>},
      {nullptr, nullptr, product_of<2, kHalves>, nullptr, product_of<4, kHalves>, product_of<5, kHalves>, nullptr, nullptr,
       product_of<8, kHalves>},
      {nullptr, nullptr, nullptr, nullptr, product_of<4, kMinimums>, product_of<5, kMinimums>}};
  of[part.kind][part.bits](part, first, last, x, batch, y, y_stride, reading);
}

// The part of the maximum that not-a-number leaves alone: the second operand wins.
float largest_of_block(const float* x) {
  const __m512 low = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x)), _mm512_setzero_ps());
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + 16)), low));
}

int32_t round_block(const float* x, float by, int8_t* q) {
  const __m512 edge = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f), times = _mm512_set1_ps(by);
  __m512i part[2];
  for (int n = 0; n < 2; n++) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * n), times);
    part[n] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, least), edge));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * n), _mm512_cvtsepi32_epi8(part[n]));
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(part[0], part[1]));
}

void quantize(const float* x, int columns, int blocks, const Places& to) {
  quantize_row<largest_of_block, round_block>(x, columns, blocks, to);
}

#include "avx512_float.inc"
#include "avx512_attend.inc"

}  // namespace

const Kernels* avx512_kernels() {
  // `silu` and `row_to_bytes` are gate_silu and to_bytes of float_ops.inc, written by hand.
  static const Kernels table{"avx512-vnni", product,  plain,   quantize, row_to_bytes, attend, scores,
                             accumulate,    rms_norm, softmax, silu,     gate_gelu,    rotate,  choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace gulliver
#endif
