// The room for the activations of a product, and its division into panels.
#pragma once
#include "kernels.h"
#include "pages.h"

namespace gulliver {

class ActivationRoom {
 public:
  // Room for `rows` rows of up to `columns` numbers.
  ActivationRoom(int rows, int columns) {
    const size_t numbers = size_t(panelled(rows)) * blocks_of(columns);
    q_.resize(numbers * kBlock);
    for (auto* one : {&sum_, &minus_, &shift_, &eighths_}) one->resize(numbers);
    scale_.resize(numbers);
    base_.resize(size_t(panelled(rows)));
  }
  // Where the kernels find `rows` rows of `columns` numbers.
  Activations view(int rows, int columns) const {
    return {q_.data(), scale_.data(), sum_.data(), minus_.data(), shift_.data(), eighths_.data(), base_.data(), side_of(rows), blocks_of(columns)};
  }
  // Makes x row number `row` of them.
  void set(const Kernels* kernels, int rows, int columns, int row, const float* x) {
    const int side = side_of(rows), blocks = blocks_of(columns);
    const size_t at = size_t(row / side) * blocks * side + row % side;
    kernels->quantize(x, columns, blocks, {q_.data() + at * kBlock, scale_.data() + at, sum_.data() + at, minus_.data() + at,
                                           shift_.data() + at, eighths_.data() + at, base_.data() + row, side});
  }

 private:
  static int blocks_of(int columns) { return (columns + kPad - 1) / kPad * (kPad / kBlock); }
  static int side_of(int rows) { return rows == 1 ? 1 : kPanel; }
  static int panelled(int rows) { return (rows + side_of(rows) - 1) / side_of(rows) * side_of(rows); }
  Array<int8_t> q_;
  Array<float> scale_, base_;
  Array<int32_t> sum_, minus_, shift_, eighths_;
};

}  // namespace gulliver
