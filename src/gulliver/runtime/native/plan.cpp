// What is settled before the first step: how the work of a product is divided, where each thread goes on reading, and which
// weights stay in memory.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "program.h"

namespace gulliver {
namespace {

constexpr size_t kLeastPiece = 8 << 10, kMostPiece = 96 << 10;  // bytes of weights in a piece of work
constexpr int kPiecesPerThread = 8;

// Where a piece begins (or ends) in memory.
const uint8_t* place_of(const Product& product, const Piece& piece, bool end) {
  const Matrix& matrix = *product.matrices[piece.matrix];
  const size_t at = size_t(end ? piece.last : piece.first);
  if (matrix.packed()) return matrix.parts[piece.part].tiles + at * matrix.parts[piece.part].tile_bytes;
  return static_cast<const uint8_t*>(matrix.plain.data) + at * (matrix.bytes() / size_t(matrix.rows));
}

}  // namespace

size_t Matrix::bytes() const {
  if (!packed()) return size_t(rows) * columns * (plain.kind == kFloat32 ? 4 : 2);
  size_t total = 0;
  for (const Part& part : parts) total += size_t((part.rows + kTileRows - 1) / kTileRows) * part.tile_bytes;
  return total;
}

Product Program::product_of(const std::vector<const Matrix*>& matrices) const {
  Product product;
  product.matrices = matrices;
  size_t total = 0;
  for (const Matrix* matrix : matrices) total += matrix->bytes();
  const size_t wish = std::clamp(total / size_t(pool_->size() * kPiecesPerThread), kLeastPiece, kMostPiece);
  for (size_t number = 0; number < matrices.size(); number++) {
    const Matrix& matrix = *matrices[number];
    product.at.push_back(product.rows);
    product.rows += matrix.rows;
    const int parts = matrix.packed() ? int(matrix.parts.size()) : 1;
    for (int part = 0; part < parts; part++) {
      const size_t unit = matrix.packed() ? matrix.parts[part].tile_bytes : matrix.bytes() / matrix.rows;
      const int units = matrix.packed() ? (matrix.parts[part].rows + kTileRows - 1) / kTileRows : matrix.rows;
      const int step = int(std::max<size_t>(1, wish / std::max<size_t>(unit, 1)));
      for (int first = 0; first < units; first += step)
        product.pieces.push_back({int(number), part, first, std::min(units, first + step)});
    }
  }
  return product;
}

void Program::link_readings() {
  std::vector<Product*> order;
  for (Layer& layer : layers)
    for (Product* product : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) order.push_back(product);
  order.push_back(&head);
  const size_t threads = size_t(pool_->size());
  auto first_of = [&](const Product& product, size_t thread) { return share_of(product.pieces.size(), thread); };
  for (size_t number = 0; number < order.size(); number++) {
    Product &product = *order[number], &next = *order[(number + 1) % order.size()];
    product.readings.assign(threads, {});
    for (size_t thread = 0; thread < threads; thread++) {
      const size_t stop = first_of(product, thread + 1), go_on = first_of(next, thread);
      if (stop == first_of(product, thread) || go_on == first_of(next, thread + 1)) continue;     // fewer pieces than threads
      product.readings[thread] = {place_of(product, product.pieces[stop - 1], true), place_of(next, next.pieces[go_on], false)};
    }
  }
}

// The whole pages of a matrix: those at its ends may hold other weights, too.
size_t Program::spans_of(const Matrix& matrix, std::vector<Span>& spans) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  auto add = [&](const void* data, size_t length) {
    const uintptr_t start = (uintptr_t(data) + page - 1) / page * page, stop = (uintptr_t(data) + length) / page * page;
    if (stop > start) spans.push_back({reinterpret_cast<char*>(start), size_t(stop - start)});
  };
  if (!matrix.packed()) add(matrix.plain.data, matrix.bytes());
  for (const Part& part : matrix.parts) add(part.tiles, size_t((part.rows + kTileRows - 1) / kTileRows) * part.tile_bytes);
  return matrix.bytes();
}

void Program::hold(size_t bytes) {
  spans_.clear();
  outer_.clear();
  held_ = SIZE_MAX;
  std::vector<size_t> sizes;
  for (const Layer& layer : layers) {
    sizes.push_back(0);
    spans_.emplace_back();
    for (const Product* product : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
      for (const Matrix* matrix : product->matrices) sizes.back() += spans_of(*matrix, spans_.back());
  }
  const Matrix* last = head.matrices[0];
  if (embedding != last) spans_of(*embedding, outer_);   // a step touches few of its rows, all steps together all of them
  size_t kept = last->bytes();
  for (size_t number = 0; number < sizes.size() && held_ == SIZE_MAX; number++) {
    kept += sizes[number];
    if (kept > bytes) held_ = number;
  }
}

// After a layer's use: ask for the pages of the next one that is not held, and give back its own.
void Program::evict(size_t layer) {
  if (held_ == SIZE_MAX) return;
  size_t ahead = layer + 2 < layers.size() ? layer + 2 : held_;
  if (ahead < held_) ahead = held_;
  for (const Span& span : spans_[ahead]) madvise(span.start, span.length, MADV_WILLNEED);
  if (layer < held_) return;
  for (const Span& span : spans_[layer]) madvise(span.start, span.length, MADV_DONTNEED);
}

}  // namespace gulliver
