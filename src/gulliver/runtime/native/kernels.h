// What every instruction set implements. One table per instruction set; `choose` picks one at run time.
//
// Packed weights stand in tiles of 16 output rows (docs/artifact.md). Activations are int8 in blocks of 32 columns:
//     x[c] = scale[c / 32] * q[c],   sum[c / 32] = sum of q over the block,   -127 <= q <= 127
// The scales of one row are its base times a power of two times 1, 1 1/8, 1 2/8, … or 1 7/8: a block's sum comes to the row's
// scale by adding to its exponent, and the eighths are in the weights' scale, of which there are eight.
// With weight code w, weight scale s (uint8), zero point z and row factor f, a block b of 32 columns adds
//     y += f * s * scale[b] * (dot(w, q) - z * sum[b])
// Where s is a float16 (kHalves), z is half of the codes there are; where a float16 minimum m stands beside it (kMinimums):
//     y += f * scale[b] * (s * dot(w, q) + m * sum[b])
// `table` holds a codebook's signed bytes with 128 added, so that the dot product may be unsigned x signed, with z = 128.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gulliver {

constexpr int kTileRows = 16;
constexpr int kBlock = 32;          // columns that share one scale of the activations
constexpr int kPad = 128;           // activations are padded with zeros to a multiple of this many columns
constexpr int kPanel = 16;          // rows of activations that stand side by side
constexpr int kMaxBatch = 256;      // rows of activations that one call of `product` takes
constexpr int kCacheTokens = 16;    // tokens of one block of the key/value cache

// The float of a float16's bits.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  uint32_t rest = uint32_t(half & 0x7fff) << 13;
  float value;
  if ((half & 0x7c00) == 0x7c00) {          // infinite or not a number
    rest = rest | sign | 0x7f800000;
    std::memcpy(&value, &rest, 4);
    return value;
  }
  std::memcpy(&value, &rest, 4);
  value *= 5.192296858534828e33f;            // 2^112: the difference of the exponents' biases, also right for subnormals
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What stands beside the codes of a group, for each row: a byte of scale, of a codebook; that and a byte of zero point; a float16
// scale; that and a float16 minimum.
constexpr int kTable = 0, kZeros = 1, kHalves = 2, kMinimums = 3;
constexpr int side_bytes(int kind) { return kind == kTable ? 1 : kind == kMinimums ? 4 : 2; }

struct Part {
  const uint8_t* tiles;             // [ceil(rows / 16), tile_bytes], any alignment
  const int32_t* out_index;         // [rows] place of each row in the output, or null when row r goes to place r
  size_t tile_bytes;
  int rows, columns, groups;        // groups = ceil(columns / group_size)
  int bits, group_size;             // 2 3 4 5 6 8; 32 64 128
  int kind;                         // kTable, kZeros, kHalves, kMinimums
  uint8_t table[64];                // codebook + 128, repeated to 64 entries
};

struct Plain {                      // a weight that is not packed, row by row
  const void* data;                 // [rows, columns] bfloat16, float16 or float32, any alignment
  int rows, columns;
  int kind;                         // kBfloat16, kFloat16, kFloat32
};
constexpr int kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2;

struct Activations {                // rows in panels of `side`, block by block; room for whole panels
  const int8_t* q;                  // [panels, blocks, side, 32]
  const float* scale;               // [panels, blocks, side]
  const int32_t *sum, *minus;       // [panels, blocks, side]; minus = -128 * sum
  const int32_t *shift, *eighths;   // [panels, blocks, side]: scale = base * 2^(shift / 2^23) * (1 + eighths / 8), shift >= 0
  const float* base;                // [panels, side]
  int side, blocks;                 // 1 for a step of one row, kPanel for more; blocks cover the columns rounded up to kPad
  // The rows from `row`, a multiple of `side`, on.
  Activations from(int row) const {
    const size_t at = size_t(row) * blocks;
    return {q + at * kBlock, scale + at, sum + at, minus + at, shift + at, eighths + at, base + row, side, blocks};
  }
};

constexpr int kEighths = 8;         // a scale has 1 to 1 7/8 times a power of two

struct Reading {                    // the weights that a thread reads run to `end`, and go on at `then`; null: unknown
  const uint8_t *end, *then;
};

struct Places {                     // where `quantize` puts one row: block b at q + 32 * side * b, and number side * b of the others
  int8_t* q;
  float* scale;
  int32_t *sum, *minus, *shift, *eighths;
  float* base;
  int side;
};

constexpr int kMostHeads = 4;       // query heads that share keys and are attended together

struct Query { float scale; int32_t sum; };     // of one query head: the scale of its int8 numbers, which includes the attention's; their sum

struct Attention {                  // query heads of one token that share their keys
  const uint8_t* cache;             // of the layer and its key head: blocks of keys [head_dim / 4][16][4] with 128 added,
  size_t block_stride;              //   values [4][head_dim][4], 16 float scales of keys, 16 of values; bytes between blocks
  const int32_t* blocks;            // numbers of the sequence's blocks
  int first, last;                  // tokens seen: positions first to last (not included)
  int head_dim;                     // a multiple of 4
  int heads;                        // 1 to kMostHeads
  const int8_t* query;              // [heads, head_dim]
  const Query* queries;             // [heads]
  float* scores;                    // room for kMostHeads times as many numbers as the positions' blocks hold
  float* out;                       // [heads, head_dim]
};

constexpr int kMostChosen = 256;    // columns that share a grid

struct Levels {                     // what codes stand for before scaling
  int size;                         // 0 to size - 1, each its own code; or places of the table below: 1 to 2^20, an odd number
  const float* entries;             // [size] the level nearest to (place - (size - 1) / 2) / fine; null: no table
  const uint8_t* codes;             // [size] their codes
  float fine;
};

// Columns of a weight that share a grid in each row: value = (level - zero) * scale - minimum. Columns are visited from the first
// to the last, or backwards; each takes the level nearest to its `local`, and what that adds to its `base` is added, times
// effect[i, j], to the `local` of every column j still to come.
struct Choice {
  int columns, rows;                // 1 to kMostChosen columns
  bool backwards;
  float* local;                     // [columns, rows]; becomes the values
  const float* base;                // [columns, rows]
  const float* effect;              // [columns, columns], or null: none
  const float *scale, *zero, *minimum;  // [rows]; a scale of 0 takes the level nearest to `zero`
  Levels levels;
  uint8_t* out;                     // [columns, rows]; not-a-number gets the lowest code
};

// Scales that fit groups of weights on the levels of a table: the best of some shrunken versions of what reaches the largest
// magnitude, then refined by least squares.
struct Fit {
  int groups, columns;              // 1 to kMostChosen columns
  const float* weights;             // [groups, columns]
  const float* importance;          // [groups, columns], or [columns] with a stride of 0
  int importance_stride;
  Levels levels;                    // with a table
  float top;                        // the largest magnitude of a level
  const float* shrinks;             // [trials]
  int trials, refine;
  float* scales;                    // [groups]
};

struct Kernels {
  const char* name;
  // Tiles first to last (not included) times 1 to kMaxBatch activations: y[b * y_stride + place of row] is set. `reading` tells
  // what may be fetched ahead.
  void (*product)(const Part&, int first, int last, const Activations&, int batch, float* y, int y_stride, Reading reading);
  // Rows first to last of a plain weight times 1 to kPanel rows of floats x[b * x_stride]: y[b * y_stride + row] is set.
  void (*plain)(const Plain&, int first, int last, const float* x, int x_stride, int batch, float* y, int y_stride);
  // One row of `columns` floats, followed by zeros, to `blocks` blocks; not-a-number becomes anything finite.
  void (*quantize)(const float* x, int columns, int blocks, const Places& to);
  // `count` floats to int8 with one scale, which is returned; not-a-number becomes -127.
  float (*to_bytes)(const float* x, int count, int8_t* out);
  void (*attend)(const Attention&);
  // The parts of `attend`, for tests; AVX512 has its own for several heads.
  // One query with a block of 16 keys: out[t] = sum over d of (keys[d / 4][t][d % 4] - 128) * q[d], d < head_dim.
  // q_sum is the sum of q, for those who multiply unsigned keys.
  void (*scores)(const int8_t* q, int32_t q_sum, const uint8_t* keys, int head_dim, int32_t* out);
  // out[d] += sum over t < 16 of weight[t] * values[t / 4][d][t % 4]. Weights are not negative, and rounded to 7 bits of the
  // block's largest one.
  void (*accumulate)(const float* weight, const int8_t* values, int head_dim, float* out);
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int count, float* out);
  float (*softmax)(float* x, int count);    // x becomes e^(x - max); returns their sum
  void (*gate_silu)(const float* gate, const float* up, int count, float* out);
  void (*gate_gelu)(const float* gate, const float* up, int count, float* out);   // the tanh form
  void (*rotate)(float* x, const float* cosine, const float* sine, int half);     // pairs (x[i], x[i + half])
  void (*choose_codes)(const Choice&);
  void (*fit_scales)(const Fit&);
};

// The table of an instruction set, or null where this build or this machine has none of it.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx2_vnni_kernels();
const Kernels* avx2_vl_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace gulliver
