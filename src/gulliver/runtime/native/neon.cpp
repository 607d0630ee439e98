// NEON with the dot product of Armv8.2: a tile is four quarters of 4 rows in 4 lanes, 4 columns in each. Compile with
// -march=armv8.2-a+dotprod. Both sides of vdotq_s32 are signed: codes below 128 are as they are, bytes have 128 taken off.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <cmath>
#include <cstring>

namespace gulliver {
namespace {

#include "choose.inc"
#include "float_ops.inc"
#include "quantize.inc"

constexpr int kQuarters = 4, kTogether = 4;  // activations that share one load of the weights: 16 accumulators

// The zero point that signed weights are left with: of 8-bit codes 128 is taken off, a codebook has none.
template <int kBits, bool kUniform>
constexpr int kShifted = kBits == 8 || !kUniform ? 128 : 0;

inline uint8x16_t moved(uint8x16_t bytes, int left, uint8_t mask) {
  return vandq_u8(vshlq_u8(bytes, vdupq_n_s8(int8_t(left))), vdupq_n_u8(mask));
}

// Codes of columns 4 * k to 4 * k + 3 of a block of 32, for a quarter of the rows of the tile. `low` and `high` are the block's
// first bytes in the two planes.
template <int kBits>
inline uint8x16_t code_of(const uint8_t* low, const uint8_t* high, int k, int quarter) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits == 5 || kBits == 6 ? 4 : kBits;
  constexpr int kHighBits = kBits - kLowBits, kLowFields = 8 / kLowBits;
  uint8x16_t code = vld1q_u8(low + 64 * (k / kLowFields) + 16 * quarter);
  if constexpr (kBits < 8) code = moved(code, -kLowBits * (k % kLowFields), (1 << kLowBits) - 1);
  if constexpr (kHighBits > 0) {
    constexpr int kHighFields = 8 / kHighBits;
    const uint8x16_t more = vld1q_u8(high + 64 * (k / kHighFields) + 16 * quarter);
    code = vorrq_u8(code, moved(more, kLowBits - kHighBits * (k % kHighFields), ((1 << kHighBits) - 1) << kLowBits));
  }
  return code;
}

// The values of codes, with kShifted taken off.
template <int kBits, bool kUniform>
inline int8x16_t value_of(uint8x16_t code, const uint8x16x4_t& table) {
  if constexpr (kUniform && kBits < 8) return vreinterpretq_s8_u8(code);
  uint8x16_t byte = code;
  if constexpr (!kUniform && kBits <= 4) byte = vqtbl1q_u8(table.val[0], code);
  if constexpr (!kUniform && kBits == 5) byte = vqtbl2q_u8(uint8x16x2_t{{table.val[0], table.val[1]}}, code);
  if constexpr (!kUniform && kBits == 6) byte = vqtbl4q_u8(table, code);
  return vreinterpretq_s8_u8(veorq_u8(byte, vdupq_n_u8(128)));
}

// The weights of one block of 32 columns, by quarter and four columns.
template <int kBits, bool kUniform>
struct Weights {
  int8x16_t at[kQuarters][8];

  inline Weights(const uint8_t* group, int group_size, int block, const uint8x16x4_t& table) {
    constexpr int kLowBits = kBits == 3 ? 2 : kBits == 5 || kBits == 6 ? 4 : kBits;
    constexpr int kLowBytes = kBlock * kTileRows * kLowBits / 8, kHighBytes = kBlock * kTileRows * (kBits - kLowBits) / 8;
    const uint8_t* low = group + block * kLowBytes;
    const uint8_t* high = group + size_t(group_size) / kBlock * kLowBytes + block * kHighBytes;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < kQuarters; quarter++) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++)
        at[quarter][k] = value_of<kBits, kUniform>(code_of<kBits>(low, high, k, quarter), table);
    }
  }
};

// total[c][quarter] = dot products of one block with activations c = 0 .. kCount - 1, which stand side by side.
template <int kCount, class Block>
inline void dots(const Block& weights, const int8_t* q, int32x4_t total[][kQuarters]) {
  for (int c = 0; c < kCount; c++)
    for (int quarter = 0; quarter < kQuarters; quarter++) total[c][quarter] = vdupq_n_s32(0);
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; c++) {
      int32_t word;
      std::memcpy(&word, q + c * kBlock + 4 * k, 4);
      const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word));
#pragma GCC unroll 4
      for (int quarter = 0; quarter < kQuarters; quarter++)
        total[c][quarter] = vdotq_s32(total[c][quarter], weights.at[quarter][k], four);
    }
  }
}

struct GroupScales {
  float32x4_t scale[kQuarters], least[kQuarters];
  int32x4_t zero[kQuarters];
};

inline void bytes_to_int(const uint8_t* bytes, int32x4_t out[kQuarters]) {
  const uint8x16_t all = vld1q_u8(bytes);
  const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_u8(vget_high_u8(all));
  out[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low)));
  out[1] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low)));
  out[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high)));
  out[3] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)));
}

inline float32x4_t halves_to_float(const uint8_t* from) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
}

// What stands beside the codes of group g.
template <int kBits, int kKind>
inline void sides_of(const Part& part, const uint8_t* scales, int g, GroupScales& group) {
  constexpr bool kUniform = kKind != kTable;
  const size_t all = size_t(kTileRows) * part.groups, at = size_t(kTileRows) * g;
  if constexpr (kKind == kTable || kKind == kZeros) {
    int32x4_t scale[kQuarters];
    bytes_to_int(scales + at, scale);
    for (int quarter = 0; quarter < kQuarters; quarter++) group.scale[quarter] = vcvtq_f32_s32(scale[quarter]);
  }
  if constexpr (kKind == kZeros) bytes_to_int(scales + all + at, group.zero);
  for (int quarter = 0; quarter < kQuarters; quarter++) {
    const size_t row = at + 4 * quarter;
    if constexpr (kKind == kHalves || kKind == kMinimums) group.scale[quarter] = halves_to_float(scales + 2 * row);
    if constexpr (kKind == kMinimums) group.least[quarter] = halves_to_float(scales + 2 * (all + row));
    if constexpr (kKind != kZeros) group.zero[quarter] = vdupq_n_s32(kKind == kHalves ? 1 << (kBits - 1) : 0);
    if constexpr (kUniform) group.zero[quarter] = vsubq_s32(group.zero[quarter], vdupq_n_s32(kShifted<kBits, kUniform>));
  }
}

// One block of weights times kCount activations from number `first` on: added to sum[c][quarter].
template <int kBits, int kKind, int kCount>
inline void add_block(const Weights<kBits, kKind != kTable>& weights, const GroupScales& group, const Activations& x, int first,
                      int block, float32x4_t sum[][kQuarters]) {
  int32x4_t total[kCount][kQuarters];
  dots<kCount>(weights, x.q + (size_t(block) * x.side + first) * kBlock, total);
  for (int c = 0; c < kCount; c++) {
    const size_t place = size_t(block) * x.side + first + c;
    const float32x4_t by = vdupq_n_f32(x.scale[place]);
    for (int quarter = 0; quarter < kQuarters; quarter++) {
      int32x4_t dot = total[c][quarter];
      if constexpr (kKind != kTable) dot = vmlsq_s32(dot, group.zero[quarter], vdupq_n_s32(x.sum[place]));
      float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(dot), group.scale[quarter]);
      if constexpr (kKind == kMinimums) scaled = vfmaq_n_f32(scaled, group.least[quarter], float(x.sum[place]));
      sum[c][quarter] = vfmaq_f32(sum[c][quarter], scaled, by);
    }
  }
}

template <int kBits, int kKind>
void tile_product(const Part& part, const uint8_t* tile, const Activations& x, int batch, float32x4_t out[][kQuarters]) {
  constexpr bool kUniform = kKind != kTable;
  uint8x16x4_t table;
  for (int n = 0; n < 4; n++) table.val[n] = vld1q_u8(part.table + 16 * n);
  const int blocks = part.group_size / kBlock;
  const size_t group_bytes = size_t(part.group_size) * kTileRows * kBits / 8;
  const uint8_t* scales = tile + group_bytes * part.groups;
  for (int b = 0; b < batch; b++)
    for (int quarter = 0; quarter < kQuarters; quarter++) out[b][quarter] = vdupq_n_f32(0.0f);
  for (int g = 0; g < part.groups; g++) {
    GroupScales group;
    sides_of<kBits, kKind>(part, scales, g, group);
    for (int n = 0; n < blocks; n++) {
      const Weights<kBits, kUniform> weights(tile + g * group_bytes, part.group_size, n, table);
      const int at = g * blocks + n;
      int b = 0;
      for (; b + kTogether <= batch; b += kTogether) add_block<kBits, kKind, kTogether>(weights, group, x, b, at, out + b);
      for (; b < batch; b++) add_block<kBits, kKind, 1>(weights, group, x, b, at, out + b);
    }
  }
  const uint8_t* factors = scales + size_t(kTileRows) * part.groups * side_bytes(kKind);
  for (int quarter = 0; quarter < kQuarters; quarter++) {
    const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(factors + 8 * quarter));
    const float32x4_t factor = vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
    for (int b = 0; b < batch; b++) out[b][quarter] = vmulq_f32(out[b][quarter], factor);
  }
}

void store(const Part& part, int row, const float32x4_t value[kQuarters], float* line) {
  float lanes[kTileRows];
  for (int quarter = 0; quarter < kQuarters; quarter++) vst1q_f32(lanes + 4 * quarter, value[quarter]);
  const int rows = part.rows - row < kTileRows ? part.rows - row : kTileRows;
  if (!part.out_index) std::memcpy(line + row, lanes, sizeof(float) * size_t(rows));
  else for (int r = 0; r < rows; r++) line[part.out_index[row + r]] = lanes[r];
}

template <int kBits, int kKind>
void product_of(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride) {
  float32x4_t out[kPanel][kQuarters];
  for (int t = first; t < last; t++) {
    const uint8_t* tile = part.tiles + size_t(t) * part.tile_bytes;
    if (batch == 1) tile_product<kBits, kKind>(part, tile, x, 1, out);  // a constant: the loops over activations vanish
    else tile_product<kBits, kKind>(part, tile, x, batch, out);
    for (int b = 0; b < batch; b++) store(part, t * kTileRows, out[b], y + size_t(b) * y_stride);
  }
}

void product(const Part& part, int first, int last, const Activations& x, int batch, float* y, int y_stride, Reading) {
  using Function = void (*)(const Part&, int, int, const Activations&, int, float*, int);
  static constexpr Function of[4][9] = {
      {nullptr, nullptr, product_of<2, kTable>, product_of<3, kTable>, product_of<4, kTable>, product_of<5, kTable>,
       product_of<6, kTable>, nullptr, nullptr},
      {nullptr, nullptr, product_of<2, kZeros>, product_of<3, kZeros>, product_of<4, kZeros>, product_of<5, kZeros>,
       product_of<6, kZeros>, nullptr, product_of<8, kZeros>},
      {nullptr, nullptr, product_of<2, kHalves>, nullptr, product_of<4, kHalves>, product_of<5, kHalves>, nullptr, nullptr,
       product_of<8, kHalves>},
      {nullptr, nullptr, nullptr, nullptr, product_of<4, kMinimums>, product_of<5, kMinimums>}};
  for (int row = 0; row < batch; row += kPanel)
    of[part.kind][part.bits](part, first, last, x.from(row), batch - row < kPanel ? batch - row : kPanel, y + size_t(row) * y_stride, y_stride);
}

float largest_of_block(const float* x) {
  float32x4_t most = vdupq_n_f32(0.0f);
  for (int n = 0; n < 8; n++) most = vmaxnmq_f32(vabsq_f32(vld1q_f32(x + 4 * n)), most);  // skips NaN
  return vmaxnmvq_f32(most);
}

int32_t round_block(const float* x, float by, int8_t* q) {
  int32x4_t total = vdupq_n_s32(0);
  int16x4_t part[8];
  for (int n = 0; n < 8; n++) {
    const float32x4_t scaled = vmulq_f32(vld1q_f32(x + 4 * n), vdupq_n_f32(by));
    const int32x4_t whole = vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(scaled, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f)));
    total = vaddq_s32(total, whole);
    part[n] = vmovn_s32(whole);
  }
  for (int n = 0; n < 4; n++) vst1_s8(q + 8 * n, vmovn_s16(vcombine_s16(part[2 * n], part[2 * n + 1])));
  return vaddvq_s32(total);
}

void quantize(const float* x, int columns, int blocks, const Places& to) {
  quantize_row<largest_of_block, round_block>(x, columns, blocks, to);
}

void scores(const int8_t* q, int32_t, const uint8_t* keys, int head_dim, int32_t* out) {
  int32x4_t total[kQuarters];
  for (auto& lanes : total) lanes = vdupq_n_s32(0);
  for (int d = 0; d < head_dim; d += 4) {
    int32_t word;
    std::memcpy(&word, q + d, 4);
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word));
    for (int quarter = 0; quarter < kQuarters; quarter++) {
      const uint8x16_t key = veorq_u8(vld1q_u8(keys + size_t(d) * kCacheTokens + 16 * quarter), vdupq_n_u8(128));
      total[quarter] = vdotq_s32(total[quarter], vreinterpretq_s8_u8(key), four);
    }
  }
  for (int quarter = 0; quarter < kQuarters; quarter++) vst1q_s32(out + 4 * quarter, total[quarter]);
}

// The weights have 7 bits, so that they are signed bytes too. head_dim is a multiple of 4.
void accumulate(const float* weight, const int8_t* values, int head_dim, float* out) {
  uint8_t rounded[kCacheTokens];
  const float scale = weigh(weight, rounded);
  int8x16_t four[kCacheTokens / 4];
  for (int n = 0; n < kCacheTokens / 4; n++) {
    int32_t word;
    std::memcpy(&word, rounded + 4 * n, 4);
    four[n] = vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  for (int d = 0; d < head_dim; d += 4) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int n = 0; n < kCacheTokens / 4; n++)
      sum = vdotq_s32(sum, vld1q_s8(values + 4 * (size_t(n) * head_dim + d)), four[n]);
    vst1q_f32(out + d, vfmaq_f32(vld1q_f32(out + d), vcvtq_f32_s32(sum), vdupq_n_f32(scale)));
  }
}

#include "attend.inc"
void attend(const Attention& a) { attend_with<scores, accumulate>(a); }

}  // namespace

const Kernels* neon_kernels() {
  static constexpr Kernels table{"neon",   product, plain,     quantize,  to_bytes, attend, scores, accumulate,
                                 rms_norm, softmax, gate_silu, gate_gelu, rotate, choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace gulliver
#endif
