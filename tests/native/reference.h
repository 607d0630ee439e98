// The slow, obvious versions that the kernels are compared with: one weight at a time, straight from the rules of the layout
// (docs/artifact.md, "Packed weights"), sums in double.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace reference {

using gulliver::Activations;
using gulliver::Part;

inline int plane_width(int bits, int plane) {
  switch (bits) {
    case 3: return plane == 0 ? 2 : plane == 1 ? 1 : 0;
    case 5: return plane == 0 ? 4 : plane == 1 ? 1 : 0;
    case 6: return plane == 0 ? 4 : plane == 1 ? 2 : 0;
    default: return plane == 0 ? bits : 0;
  }
}

inline int code(const Part& part, const uint8_t* tile, int lane, int column) {
  const int group = column / part.group_size, inside = column % part.group_size;
  size_t start = size_t(group) * part.group_size * 16 * part.bits / 8;
  int code = 0, shift = 0;
  for (int plane = 0; plane_width(part.bits, plane) > 0; plane++) {
    const int width = plane_width(part.bits, plane), in_chunk = 32 / width;
    const int chunk = inside / in_chunk, position = inside % in_chunk, field = position / 4, c = position % 4;
    const int byte = tile[start + size_t(64) * chunk + 4 * lane + c];
    code |= ((byte >> (width * field)) & ((1 << width) - 1)) << shift;
    start += size_t(part.group_size) * 16 * width / 8;
    shift += width;
  }
  return code;
}

inline size_t scales_at(const Part& part) { return size_t(part.groups) * part.group_size * 16 * part.bits / 8; }

inline size_t tile_bytes(const Part& part) {
  return (scales_at(part) + size_t(16) * part.groups * (part.uniform ? 2 : 1) + 32 + 63) / 64 * 64;
}

// Codebook value, or code less zero point.
inline int level(const Part& part, const uint8_t* tile, int lane, int column) {
  const int q = code(part, tile, lane, column);
  if (!part.uniform) return int(part.table[q]) - 128;
  return q - tile[scales_at(part) + size_t(16) * (part.groups + column / part.group_size) + lane];
}

inline float factor(const Part& part, const uint8_t* tile, int lane) {
  const uint8_t* bytes = tile + scales_at(part) + size_t(16) * part.groups * (part.uniform ? 2 : 1) + 2 * lane;
  const uint32_t bits = uint32_t(bytes[0]) << 16 | uint32_t(bytes[1]) << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Sum {
  double value;   // of all terms, times the row's factor
  double size;    // the same of the terms' sizes: what rounding errors are measured against
  double most;    // of all that may come up on the way, in whatever order the factors of a term are multiplied
};

// One row of the part times the activations b.
inline Sum product(const Part& part, int row, const Activations& x, int b) {
  const uint8_t* tile = part.tiles + size_t(row / 16) * part.tile_bytes;
  const int lane = row % 16;
  const double by = factor(part, tile, lane);
  Sum sum{0.0, 0.0, 0.0};
  for (int first = 0; first < part.columns; first += 32) {
    const int last = first + 32 < part.columns ? first + 32 : part.columns;
    int64_t dot = 0;
    for (int column = first; column < last; column++)
      dot += int64_t(level(part, tile, lane, column)) * x.q[size_t(b) * x.stride + column];
    const double by_x = x.scale[size_t(b) * (x.stride / 32) + first / 32];
    const double scale = tile[scales_at(part) + size_t(16) * (first / part.group_size) + lane];
    const double term = double(dot) * scale * by_x;
    sum.value += term;
    sum.size += std::fabs(term);
    sum.most += std::fabs(term) + (std::fabs(double(dot)) + scale) * by_x;
  }
  return {sum.value * by, sum.size * std::fabs(by), sum.most};
}

// The contract of Kernels::quantize, with the rule for what is not an ordinary number.
inline void quantize(const float* x, int columns, int stride, int8_t* q, float* scale, int32_t* sum) {
  for (int first = 0; first < stride; first += 32) {
    float most = 0.0f;
    for (int i = first; i < first + 32 && i < columns; i++)
      if (!std::isnan(x[i])) most = std::fmax(most, std::fabs(x[i]));
    most = std::fmin(most, std::numeric_limits<float>::max());
    if (most < 1e-30f) most = 0.0f;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    scale[first / 32] = most / 127.0f;
    sum[first / 32] = 0;
    for (int i = first; i < first + 32; i++) {
      const volatile float scaled = i < columns ? x[i] * inverse : 0.0f;  // volatile: rounded before what follows
      q[i] = std::isnan(scaled) ? -127 : int8_t(std::nearbyint(std::fmin(std::fmax(scaled, -127.0f), 127.0f)));
      sum[first / 32] += q[i];
    }
  }
}

}  // namespace reference
