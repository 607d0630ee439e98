// Portable C++: no instruction set is assumed. The inner loop is a sum of products of 16-bit integers over the columns of one
// row, which compilers know how to vectorize everywhere.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace gulliver {
namespace {

#include "choose.inc"
#include "float_ops.inc"
#include "quantize.inc"

// Weight less zero point (or the codebook's value) for a block of 32 columns, row by row.
using Block = int16_t[kTileRows][kBlock];

// The codes of a block as they stand in the planes: of columns 4 * k to 4 * k + 3, byte 4 * row + c.
using Codes = uint8_t[kBlock / 4][64];

// Adds one plane's fields, each of kWidth bits and put kShift bits up.
template <int kWidth, int kShift>
void add_plane(const uint8_t* plane, Codes& codes) {
  constexpr int kFields = 8 / kWidth, kMask = (1 << kWidth) - 1;
  for (int k = 0; k < kBlock / 4; k++) {
    const uint8_t* chunk = plane + 64 * (k / kFields);
    const int shift = kWidth * (k % kFields);
    for (int i = 0; i < 64; i++) codes[k][i] |= uint8_t(((chunk[i] >> shift) & kMask) << kShift);
  }
}

// The codes of block number `block` of a group.
void codes_of(const uint8_t* group, int group_size, int block, int bits, Codes& codes) {
  std::memset(codes, 0, sizeof codes);
  const int low_bits = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;
  const uint8_t* low = group + size_t(block) * low_bits * 64;
  const uint8_t* high = group + size_t(group_size) * low_bits * 2 + size_t(block) * (bits - low_bits) * 64;
  if (low_bits == 2) add_plane<2, 0>(low, codes);
  if (low_bits == 4) add_plane<4, 0>(low, codes);
  if (low_bits == 8) add_plane<8, 0>(low, codes);
  if (bits == 3) add_plane<1, 2>(high, codes);
  if (bits == 5) add_plane<1, 4>(high, codes);
  if (bits == 6) add_plane<2, 4>(high, codes);
}

// Codes to values, and rows apart. `zeros` are the group's, of a uniform part.
void values_of(const Part& part, const Codes& codes, const uint8_t* zeros, Block& weights) {
  for (int row = 0; row < kTileRows; row++) {
    uint8_t line[kBlock];
    for (int k = 0; k < kBlock / 4; k++) std::memcpy(line + 4 * k, codes[k] + 4 * row, 4);
    if (part.kind == kTable)
      for (int c = 0; c < kBlock; c++) line[c] = part.table[line[c]];
    const int16_t zero = zeros ? zeros[row] : part.kind == kTable ? 128 : part.kind == kHalves ? 1 << (part.bits - 1) : 0;
    for (int c = 0; c < kBlock; c++) weights[row][c] = int16_t(line[c] - zero);
  }
}

float factor_of(const uint8_t* bytes) {
  const uint32_t bits = uint32_t(bytes[0]) << 16 | uint32_t(bytes[1]) << 24;
  float factor;
  std::memcpy(&factor, &bits, 4);
  return factor;
}

// out[b][row] += scale * dot(weights of the row, activations b) + least * sum of the activations, for one block.
void add_block(const Block& weights, const float* scales, const float* least, const Activations& x, int batch, int block,
               float out[][kTileRows]) {
  for (int b = 0; b < batch; b++) {
    const size_t place = size_t(block) * x.side + b;
    int16_t q[kBlock];
    for (int c = 0; c < kBlock; c++) q[c] = x.q[place * kBlock + c];
    for (int row = 0; row < kTileRows; row++) {
      int32_t dot = 0;
      for (int c = 0; c < kBlock; c++) dot += int32_t(weights[row][c]) * int32_t(q[c]);
      out[b][row] += (float(dot) * scales[row] + least[row] * float(x.sum[place])) * x.scale[place];
    }
  }
}

// The scales and minimums of a group, of all rows.
void sides_of(const Part& part, const uint8_t* scales, int g, float* scale, float* least) {
  const bool halves = part.kind == kHalves || part.kind == kMinimums;
  for (int row = 0; row < kTileRows; row++) {
    const size_t at = size_t(kTileRows) * g + row;
    uint16_t half = 0, second = 0;
    if (halves) std::memcpy(&half, scales + 2 * at, 2);
    if (part.kind == kMinimums) std::memcpy(&second, scales + 2 * (size_t(kTileRows) * part.groups + at), 2);
    scale[row] = halves ? half_to_float(half) : float(scales[at]);
    least[row] = half_to_float(second);
  }
}

void tile_product(const Part& part, const uint8_t* tile, const Activations& x, int batch, float out[][kTileRows]) {
  const size_t group_bytes = size_t(part.group_size) * kTileRows * part.bits / 8;
  const uint8_t* scales = tile + group_bytes * part.groups;
  const uint8_t* zeros = scales + size_t(kTileRows) * part.groups;
  const int blocks = part.group_size / kBlock;
  std::memset(out, 0, sizeof(float) * kTileRows * size_t(batch));
  for (int g = 0; g < part.groups; g++) {
    float scale[kTileRows], least[kTileRows];
    sides_of(part, scales, g, scale, least);
    for (int n = 0; n < blocks; n++) {
      Codes codes;
      Block weights;
      codes_of(tile + g * group_bytes, part.group_size, n, part.bits, codes);
      values_of(part, codes, part.kind == kZeros ? zeros + size_t(kTileRows) * g : nullptr, weights);
      add_block(weights, scale, least, x, batch, g * blocks + n, out);
    }
  }
  const uint8_t* factors = scales + size_t(kTileRows) * part.groups * side_bytes(part.kind);
  for (int row = 0; row < kTileRows; row++)
    for (int b = 0; b < batch; b++) out[b][row] *= factor_of(factors + 2 * row);
}

void panel_product(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride) {
  float out[kPanel][kTileRows];
  for (int t = first; t < last; t++) {
    tile_product(part, part.tiles + size_t(t) * part.tile_bytes, x, batch, out);
    for (int r = 0; r < kTileRows && t * kTileRows + r < part.rows; r++) {
      const int row = t * kTileRows + r, place = part.out_index ? part.out_index[row] : row;
      for (int b = 0; b < batch; b++) y[size_t(b) * y_stride + place] = out[b][r];
    }
  }
}

void product(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride, Reading) {
  for (int row = 0; row < batch; row += kPanel)
    panel_product(part, first, last, x.from(row), batch - row < kPanel ? batch - row : kPanel, y + size_t(row) * y_stride, y_stride);
}

float largest_of_block(const float* x) {
  float most = 0.0f;
  for (int i = 0; i < kBlock; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  return most;
}

int32_t round_block(const float* x, float by, int8_t* q) {
  int32_t total = 0;
  for (int i = 0; i < kBlock; i++) {
    float scaled = x[i] * by;
    scaled = scaled > -127.0f ? scaled : -127.0f;
    scaled = scaled < 127.0f ? scaled : 127.0f;
    const float shifted = scaled + 12582912.0f;  // 1.5 * 2^23: the unit is the last bit, rounded to even
    q[i] = int8_t(bits_of(shifted) - 0x4b400000);
    total += q[i];
  }
  return total;
}

void quantize(const float* x, int columns, int blocks, const Places& to) {
  quantize_row<largest_of_block, round_block>(x, columns, blocks, to);
}

#include "attend.inc"
void attend(const Attention& a) { attend_with<scores_plain, accumulate_plain>(a); }

}  // namespace

const Kernels* plain_kernels() {
  static constexpr Kernels table{"plain",  product, plain,     quantize,  to_bytes, attend, scores_plain, accumulate_plain,
                                 rms_norm, softmax, gate_silu, gate_gelu, rotate, choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver
