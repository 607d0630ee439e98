// The slow, obvious versions that the kernels are compared with: one weight at a time, straight from the rules of the layout
// (docs/artifact.md, "Packed weights"), sums in double.
#pragma once
#include <cmath>
#include <cstring>
#include <algorithm>
#include <limits>
#include <utility>

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
  return (scales_at(part) + size_t(16) * part.groups * (part.kind == gulliver::kZeros ? 2 : 1) + 32 + 63) / 64 * 64;
}

// Codebook value, or code less zero point.
inline int level(const Part& part, const uint8_t* tile, int lane, int column) {
  const int q = code(part, tile, lane, column);
  if (part.kind != gulliver::kZeros) return int(part.table[q]) - 128;
  return q - tile[scales_at(part) + size_t(16) * (part.groups + column / part.group_size) + lane];
}

inline float factor(const Part& part, const uint8_t* tile, int lane) {
  const uint8_t* bytes = tile + scales_at(part) + size_t(16) * part.groups * (part.kind == gulliver::kZeros ? 2 : 1) + 2 * lane;
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

// Where block `block` of the activations b stands.
inline size_t place(const Activations& x, int b, int block) {
  return (size_t(b / x.side) * x.blocks + block) * x.side + b % x.side;
}

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
      dot += int64_t(level(part, tile, lane, column)) * x.q[place(x, b, first / 32) * 32 + column % 32];
    const double by_x = x.scale[place(x, b, first / 32)];
    const double scale = tile[scales_at(part) + size_t(16) * (first / part.group_size) + lane];
    const double term = double(dot) * scale * by_x;
    sum.value += term;
    sum.size += std::fabs(term) + std::ldexp(scale * by_x, -100);  // what nothing may become where exponents are added
    sum.most += std::fabs(term) + (std::fabs(double(dot)) + scale) * by_x;
  }
  return {sum.value * by, sum.size * std::fabs(by), sum.most};
}

// The contract of Kernels::quantize, with the rule for what is not an ordinary number. The row's largest number decides the
// scale of its block, the other blocks halve it while their own numbers fit, at most 40 times and never to a subnormal number,
// and then take as few eighths on top as they need.
inline void quantize(const float* x, int columns, int blocks, const gulliver::Places& to) {
  auto largest = [&](int first, int last) {
    float most = 0.0f;
    for (int i = first; i < last && i < columns; i++)
      if (!std::isnan(x[i])) most = std::fmax(most, std::fabs(x[i]));
    most = std::fmin(most, std::numeric_limits<float>::max());
    return most;
  };
  const float most = largest(0, columns), top = most < 1e-30f ? 0.0f : most / 127.0f;
  // {exponent below the top's, eighths}
  auto scale_of = [&](float wanted) -> std::pair<int, int> {
    const int most_halvings = std::min(40, std::ilogb(top) + 125);
    if (wanted >= top) return {0, 0};
    if (wanted == 0.0f) return {most_halvings, 0};
    int halvings = std::ilogb(top) - std::ilogb(wanted);
    const volatile float one_over = 1.0f / std::ldexp(top, -std::ilogb(top));
    const volatile float ratio = std::ldexp(wanted, -std::ilogb(wanted)) * one_over;
    if (ratio < 1.0f) halvings++;
    int eighths = int(std::ceil((double(ratio < 1.0f ? 2 * ratio : ratio) - 1) * 8));
    if (eighths == 8) halvings--, eighths = 0;
    if (halvings <= 0) return {0, 0};
    if (halvings > most_halvings) return {most_halvings, 0};
    return {halvings, eighths};
  };
  const int lowest = top > 0 ? scale_of(0.0f).first : 0;
  *to.base = std::ldexp(top, -lowest);
  for (int b = 0; b < blocks; b++) {
    const int at = b * to.side;
    const auto [halvings, eighths] = top > 0 ? scale_of(largest(32 * b, 32 * b + 32) / 127.0f) : std::pair(0, 0);
    to.scale[at] = std::ldexp(top, -halvings) * (1.0f + float(eighths) / 8);
    to.shift[at] = (lowest - halvings) << 23;
    to.eighths[at] = eighths;
    to.sum[at] = 0;
    for (int i = 0; i < 32; i++) {
      const int column = 32 * b + i;
      const volatile float over = 8.0f / float(8 + eighths), inverse = top > 0 ? std::ldexp(127.0f / most, halvings) * over : 0.0f;
      const volatile float scaled = column < columns ? x[column] * inverse : 0.0f;  // volatile: rounded before what follows
      const bool number = !std::isnan(scaled) || top == 0;
      const float within = std::fmin(std::fmax(scaled, -127.0f), 127.0f);
      to.q[32 * at + i] = top == 0 ? 0 : number ? int8_t(std::nearbyint(within)) : -127;
      to.sum[at] += to.q[32 * at + i];
    }
    to.minus[at] = -128 * to.sum[at];
  }
}

}  // namespace reference
