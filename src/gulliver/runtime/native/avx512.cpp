// AVX512-VNNI + VBMI: 16 rows in 16 lanes, 4 columns in each.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace gulliver {
namespace {

#include "float_ops.inc"

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

// Reading ahead by hand, 16 KB into the second-level cache. Measured: a third to twice as fast for wide tiles of few bits at
// batch 1, a fifth slower for narrow ones and 8 bits, where the hardware's own prefetcher keeps up.
constexpr int kAhead = 16384, kNarrow = 1100;   // bytes; columns

inline __m512 row_factors(const uint8_t* tile_end) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile_end));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// One row of activations: the sum stays in a register. `kBlocks` are those of a group.
template <int kBits, bool kUniform, int kBlocks>
inline __m512 tile_single(const Part& part, const uint8_t* tile, const Activations& x, bool ahead) {
  const __m512i table = _mm512_loadu_si512(part.table);
  constexpr int kGroup = kBlocks * kBlock, kGroupBytes = kGroup * kTileRows * kBits / 8;
  const uint8_t* scales = tile + size_t(kGroupBytes) * part.groups;
  const uint8_t* zeros = scales + kTileRows * part.groups;
  const int32_t* q = reinterpret_cast<const int32_t*>(x.q);
  const float* x_scale = x.scale;
  const int32_t* x_sum = x.sum;
  __m512 sum = _mm512_setzero_ps();
  for (int g = 0; g < part.groups; g++, tile += kGroupBytes) {
    const __m512 scale = scales_of(scales + kTileRows * g);
    __m512i zero;
    if constexpr (kUniform) zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + kTileRows * g)));
#pragma GCC unroll 4
    for (int n = 0; n < kBlocks; n++, q += 8, x_scale++, x_sum++) {
      if (ahead)
        for (int line = 0; line < kBits; line++)
          _mm_prefetch(reinterpret_cast<const char*>(tile) + n * 64 * kBits + kAhead + 64 * line, _MM_HINT_T1);
      __m512i w[8];
      Codes<kBits, kUniform>::load(tile, kGroup, n, table, w);
      __m512i even = _mm512_setzero_si512(), odd = even;
#pragma GCC unroll 4
      for (int k = 0; k < 8; k += 2) {
        even = _mm512_dpbusd_epi32(even, w[k], _mm512_set1_epi32(q[k]));
        odd = _mm512_dpbusd_epi32(odd, w[k + 1], _mm512_set1_epi32(q[k + 1]));
      }
      const __m512i total = _mm512_set1_epi32(*x_sum);
      __m512i offset;
      if constexpr (kUniform) offset = _mm512_mullo_epi32(zero, total);
      else offset = _mm512_slli_epi32(total, 7);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(even, odd), offset));
      sum = _mm512_fmadd_ps(_mm512_mul_ps(dot, scale), _mm512_set1_ps(*x_scale), sum);
    }
  }
  return _mm512_mul_ps(sum, row_factors((kUniform ? zeros : scales) + kTileRows * part.groups));
}

template <int kBits, bool kUniform>
inline __m512 tile_single(const Part& part, const uint8_t* tile, const Activations& x) {
  const bool ahead = kBits < 8 && part.columns > kNarrow;
  switch (part.group_size) {
    case 32: return tile_single<kBits, kUniform, 1>(part, tile, x, ahead);
    case 64: return tile_single<kBits, kUniform, 2>(part, tile, x, ahead);
    default: return tile_single<kBits, kUniform, 4>(part, tile, x, ahead);
  }
}

template <int kBits, bool kUniform, int kBatch>
void tile_product(const Part& part, const uint8_t* tile, const Activations& x, int batch, __m512* out) {
  const __m512i table = _mm512_loadu_si512(part.table);
  const int blocks = part.group_size / kBlock, x_blocks = x.stride / kBlock;
  const size_t group_bytes = size_t(part.group_size) * kTileRows * kBits / 8;
  const uint8_t* scales = tile + group_bytes * part.groups;
  const uint8_t* zeros = scales + kTileRows * part.groups;
  const int count = kBatch ? kBatch : batch;
  __m512 sum[kBatch ? kBatch : kMaxBatch];
  for (int b = 0; b < count; b++) sum[b] = _mm512_setzero_ps();
  for (int g = 0; g < part.groups; g++) {
    const uint8_t* group = tile + g * group_bytes;
    const __m512 scale = scales_of(scales + kTileRows * g);
    __m512i zero;
    if constexpr (kUniform) zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + kTileRows * g)));
    for (int n = 0; n < blocks; n++) {
      const int at = g * blocks + n;
      __m512i w[8];
      Codes<kBits, kUniform>::load(group, part.group_size, n, table, w);
#pragma GCC unroll 4
      for (int b = 0; b < count; b++) {
        const int32_t* q = reinterpret_cast<const int32_t*>(x.q + size_t(b) * x.stride + at * kBlock);
        const __m512i total = _mm512_set1_epi32(x.sum[b * x_blocks + at]);
        __m512i even = _mm512_setzero_si512(), odd = even;
#pragma GCC unroll 4
        for (int k = 0; k < 8; k += 2) {
          even = _mm512_dpbusd_epi32(even, w[k], _mm512_set1_epi32(q[k]));
          odd = _mm512_dpbusd_epi32(odd, w[k + 1], _mm512_set1_epi32(q[k + 1]));
        }
        __m512i offset;
        if constexpr (kUniform) offset = _mm512_mullo_epi32(zero, total);
        else offset = _mm512_slli_epi32(total, 7);
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(even, odd), offset));
        sum[b] = _mm512_fmadd_ps(_mm512_mul_ps(dot, scale), _mm512_set1_ps(x.scale[b * x_blocks + at]), sum[b]);
      }
    }
  }
  const uint8_t* factors = (kUniform ? zeros : scales) + kTileRows * part.groups;
  const __m512 factor = row_factors(factors);
  for (int b = 0; b < count; b++) out[b] = _mm512_mul_ps(sum[b], factor);
}

template <int kBits, bool kUniform>
void product_of(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride) {
  __m512 out[kMaxBatch];
  const size_t codes = size_t(part.group_size) * kTileRows * kBits / 8 * part.groups;
  for (int t = first; t < last; t++) {
    const uint8_t* tile = part.tiles + size_t(t) * part.tile_bytes;
    // Codes are one long stream that the hardware fetches ahead; scales lie behind them and would be waited for.
    for (size_t line = codes; line < part.tile_bytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(tile) + part.tile_bytes + line, _MM_HINT_T0);
    switch (batch) {
      case 1: out[0] = tile_single<kBits, kUniform>(part, tile, x); break;
      case 2: tile_product<kBits, kUniform, 2>(part, tile, x, batch, out); break;
      case 4: tile_product<kBits, kUniform, 4>(part, tile, x, batch, out); break;
      case 8: tile_product<kBits, kUniform, 8>(part, tile, x, batch, out); break;
      case 16: tile_product<kBits, kUniform, 16>(part, tile, x, batch, out); break;
      default: tile_product<kBits, kUniform, 0>(part, tile, x, batch, out);
    }
    const int row = t * kTileRows, rows = part.rows - row < kTileRows ? part.rows - row : kTileRows;
    const __mmask16 keep = __mmask16((1u << rows) - 1);
    for (int b = 0; b < batch; b++) {
      float* line = y + size_t(b) * y_stride;
      if (part.out_index) {
        const __m512i place = _mm512_maskz_loadu_epi32(keep, part.out_index + row);
        _mm512_mask_i32scatter_ps(line, keep, place, out[b], 4);
      } else {
        _mm512_mask_storeu_ps(line + row, keep, out[b]);
      }
    }
  }
}

void product(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride) {
#define CASE(bits) \
  case bits: \
    part.uniform ? product_of<bits, true>(part, first, last, x, batch, y, y_stride) \
                 : product_of<bits, false>(part, first, last, x, batch, y, y_stride); \
    break;
  switch (part.bits) { CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    case 8: product_of<8, true>(part, first, last, x, batch, y, y_stride); break; }
#undef CASE
}

constexpr float kLargest = 3.402823466e38f, kSmallest = 1e-30f;

void quantize(const float* x, int columns, int stride, int8_t* q, float* scale, int32_t* sum) {
  for (int at = 0; at < stride; at += kBlock) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (at < columns) {
      const int left = columns - at < kBlock ? columns - at : kBlock;
      const uint32_t keep = left == 32 ? 0xffffffffu : (1u << left) - 1;
      low = _mm512_maskz_loadu_ps(__mmask16(keep), x + at);
      high = _mm512_maskz_loadu_ps(__mmask16(keep >> 16), x + at + 16);
    }
    // Not-a-number counts as nothing in the maximum (the second operand wins) and ends as -127.
    const __m512 size = _mm512_max_ps(_mm512_abs_ps(high), _mm512_max_ps(_mm512_abs_ps(low), _mm512_setzero_ps()));
    const float largest = _mm512_reduce_max_ps(size), most = largest > kLargest ? kLargest : largest < kSmallest ? 0.0f : largest;
    const __m512 by = _mm512_set1_ps(most > 0.0f ? 127.0f / most : 0.0f), edge = _mm512_set1_ps(127.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(low, by), _mm512_sub_ps(_mm512_setzero_ps(), edge)), edge));
    const __m512i b = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(high, by), _mm512_sub_ps(_mm512_setzero_ps(), edge)), edge));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + at), _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + at + 16), _mm512_cvtsepi32_epi8(b));
    scale[at / kBlock] = most / 127.0f;
    sum[at / kBlock] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  }
}

#include "avx512_attend.inc"

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels table{"avx512-vnni", product,  plain,   quantize,  to_bytes,  attend, scores,
                             accumulate,    rms_norm, softmax, gate_silu, gate_gelu, rotate};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace gulliver
#endif
