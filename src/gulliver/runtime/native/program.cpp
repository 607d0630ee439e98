#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "activations.h"

namespace gulliver {
namespace {

// Floats of a row of outputs, an odd number of cache lines: a power of two would put all rows in the same few cache sets.
int apart(int columns) {
  const int stride = (columns + 15) / 16 * 16;
  return stride % 32 ? stride : stride + 16;
}

// bfloat16 to float; `from` has any alignment.
void widen(const char* from, int count, float* out) {
  for (int i = 0; i < count; i++) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

// One row of a packed part, column by column.
void unpack_row(const Part& part, int row, float* out) {
  const uint8_t* tile = part.tiles + size_t(row / kTileRows) * part.tile_bytes;
  const int lane = row % kTileRows, low_bits = part.bits >= 4 ? (part.bits == 8 ? 8 : 4) : 2, high_bits = part.bits - low_bits;
  const size_t group_bytes = size_t(part.group_size) * kTileRows * part.bits / 8;
  const uint8_t* scales = tile + group_bytes * part.groups;
  const bool halves = part.kind == kHalves || part.kind == kMinimums;
  const uint8_t* second = scales + size_t(kTileRows) * part.groups * (halves ? 2 : 1);   // zero points or minimums
  const uint8_t* factors = scales + size_t(kTileRows) * part.groups * side_bytes(part.kind);
  const uint32_t bits = uint32_t(factors[2 * lane] | factors[2 * lane + 1] << 8) << 16;
  float factor;
  std::memcpy(&factor, &bits, 4);
  auto half_at = [&](const uint8_t* from, int g) {
    uint16_t half;
    std::memcpy(&half, from + 2 * (size_t(kTileRows) * g + lane), 2);
    return half_to_float(half);
  };
  auto field = [&](const uint8_t* plane, int width, int column) {
    const int in_chunk = 32 / width, chunk = column / in_chunk, at = column % in_chunk;
    return plane[64 * chunk + 4 * lane + at % 4] >> (width * (at / 4)) & ((1 << width) - 1);
  };
  for (int g = 0, column = 0; g < part.groups; g++) {
    const uint8_t* group = tile + g * group_bytes;
    const uint8_t* high = group + size_t(part.group_size) * kTileRows * low_bits / 8;
    const float scale = factor * (halves ? half_at(scales, g) : float(scales[kTileRows * g + lane]));
    const int zero = part.kind == kZeros ? second[kTileRows * g + lane] : part.kind == kTable ? 128 : part.kind == kHalves ? 1 << (part.bits - 1) : 0;
    const float least = part.kind == kMinimums ? factor * half_at(second, g) : 0.0f;
    for (int i = 0; i < part.group_size && column < part.columns; i++, column++) {
      int code = field(group, low_bits, i);
      if (high_bits) code |= field(high, high_bits, i) << low_bits;
      out[column] = scale * float((part.kind == kTable ? part.table[code] : code) - zero) + least;
    }
  }
}

}  // namespace

// What a thread needs for its own work, or all of them together.
struct Program::Mine {
  Array<float> stream, normed, floats;
  std::unique_ptr<float[]> scores;  // not cleared: most of a long context is never used
  ActivationRoom input;             // of a product: what `floats` holds, in int8
  int columns = 0, turn = 0, thread = 0, count = 0, first = 0, last = 0;
  Mine* shared = nullptr;           // where activations and the stream are: itself with one row, the common one with more

  Mine(int rows, int hidden, int wide, int positions) : input(rows, wide) {
    stream.resize(size_t(rows) * hidden);
    normed.resize(hidden);
    floats.resize(size_t(rows) * wide);
    scores.reset(new float[size_t(positions + 2 * kCacheTokens) * kMostHeads]);
  }
  // One row of the shared floats to int8.
  void quantize(const Kernels* kernels, int row) {
    shared->input.set(kernels, count, columns, row, shared->floats.data() + size_t(row) * columns);
  }
};

Program::Program(const Shape& s, const Kernels* k, int threads, int rows, int blocks)
    : shape(s), max_rows(rows), cache_blocks(blocks), kernels(k), pool_(Pool::of(threads)) {
  width_ = apart((s.heads + 2 * s.kv_heads) * s.head_dim);
  wide_ = std::max({s.hidden, s.heads * s.head_dim, s.intermediate});
}

Program::~Program() {
  if (cache_) munmap(cache_, cache_bytes_);
}

void Program::finish() {
  block_bytes_ = size_t(2) * kCacheTokens * shape.head_dim + 2 * kCacheTokens * sizeof(float);
  block_stride_ = block_bytes_ * shape.kv_heads * layers.size();
  cache_bytes_ = block_stride_ * cache_blocks;
  void* memory = mmap(nullptr, cache_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  cache_ = static_cast<uint8_t*>(memory);
#if defined(MADV_HUGEPAGE)
  madvise(memory, cache_bytes_, MADV_HUGEPAGE);   // a step touches every layer's part of every block: many small pages otherwise
#endif
  qkv_.resize(size_t(max_rows) * width_);
  query_.resize(size_t(max_rows) * shape.heads * shape.head_dim);
  queries_.resize(size_t(max_rows) * shape.heads);
  attended_.resize(size_t(max_rows) * shape.heads * shape.head_dim);
  gate_up_.resize(size_t(max_rows) * apart(2 * shape.intermediate));
  added_.resize(size_t(max_rows) * apart(shape.hidden));
  angles_.resize(ropes.size() * max_rows * shape.head_dim);
  for (int thread = 0; thread < pool_->size(); thread++) {
    mine_.push_back(std::make_unique<Mine>(1, shape.hidden, wide_, shape.positions));
    mine_.back()->thread = thread;
  }
  mine_.push_back(std::make_unique<Mine>(max_rows, shape.hidden, wide_, 0));
  shares_ = std::vector<Share>((layers.size() * 5 + 1) * pool_->size());
  link_readings();
}

uint8_t* Program::block(int layer, int head, int number) const {
  return cache_ + block_stride_ * number + block_bytes_ * (size_t(layer) * shape.kv_heads + head);
}

void Program::embed(int token, float* out) const {
  const Matrix& matrix = *embedding;
  if (!matrix.packed()) {
    const size_t at = size_t(token) * matrix.columns;
    if (matrix.plain.kind == kBfloat16) {
      widen(static_cast<const char*>(matrix.plain.data) + 2 * at, matrix.columns, out);
    } else if (matrix.plain.kind == kFloat32) {
      std::memcpy(out, static_cast<const char*>(matrix.plain.data) + 4 * at, 4 * size_t(matrix.columns));
    } else {                        // as a product of a column with 1: slow, but float16 is rare
      const float one = 1.0f;
      const Plain row{static_cast<const char*>(matrix.plain.data) + 2 * at, matrix.columns, 1, kFloat16};
      kernels->plain(row, 0, matrix.columns, &one, 1, 1, out, 0);
    }
  } else if (matrix.parts.size() == 1) {
    unpack_row(matrix.parts[0], token, out);
  } else {
    unpack_row(matrix.parts[matrix.part_of[token]], matrix.row_in_part[token], out);
  }
  if (shape.embedding_scale != 1.0f)
    for (int i = 0; i < matrix.columns; i++) out[i] *= shape.embedding_scale;
}

template <class Do>
void Program::share(Mine& mine, Do&& work) {
  const int threads = pool_->size();
  Share* shares = shares_.data() + size_t(mine.turn++) * threads;
  for (int number = shares[mine.thread].take(true); number >= 0; number = shares[mine.thread].take(true)) work(number, true);
  for (int other = 1; other < threads; other++) {
    Share& victim = shares[(mine.thread + other) % threads];
    for (int number = victim.take(false); number >= 0; number = victim.take(false)) work(number, false);
  }
}

void Program::product(const Product& product, float* y, int y_stride, Mine& mine) {
  share(mine, [&](int number, bool own) {
    piece(product, product.pieces[number], y, y_stride, mine, own ? product.readings[mine.thread] : Reading{});
  });
}

// Many rows of activations pass over one piece of weights, which stays in the cache.
void Program::piece(const Product& product, const Piece& piece, float* y, int y_stride, const Mine& mine, Reading reading) const {
  const Mine& in = *mine.shared;
  const Matrix& matrix = *product.matrices[piece.matrix];
  const int count = mine.count, most = matrix.packed() ? kMaxBatch : kPanel;
  for (int first = 0; first < count; first += most) {
    const int batch = std::min(most, count - first);
    float* out = y + size_t(first) * y_stride + product.at[piece.matrix];
    if (matrix.packed()) {
      const Activations some = in.input.view(count, mine.columns).from(first);
      kernels->product(matrix.parts[piece.part], piece.first, piece.last, some, batch, out, y_stride, reading);
    } else {
      const float* x = in.floats.data() + size_t(first) * mine.columns;
      kernels->plain(matrix.plain, piece.first, piece.last, x, mine.columns, batch, out, y_stride);
    }
  }
}

// Adds the last product to the stream, norms it and makes it int8: the input of the next product.
void Program::open(Mine& mine, const float* norm, const float* after, bool add) {
  Mine& in = *mine.shared;
  const int hidden = shape.hidden;
  mine.columns = hidden;
  for (int row = mine.first; row < mine.last; row++) {
    float* h = in.stream.data() + size_t(row) * hidden;
    if (add) {
      const float* more = added_.data() + size_t(row) * apart(hidden);
      if (after) {
        kernels->rms_norm(more, after, shape.epsilon, hidden, mine.normed.data());
        more = mine.normed.data();
      }
      for (int i = 0; i < hidden; i++) h[i] += more[i];
    }
    kernels->rms_norm(h, norm, shape.epsilon, hidden, in.floats.data() + size_t(row) * hidden);
    mine.quantize(kernels, row);
  }
  together();
}

// A head of q or k: norm, rotate.
void Program::prepare_head(const Layer& layer, int row, int head, float* x) {
  const int half = shape.head_dim / 2;
  const bool query = head < shape.heads;
  const float* weight = query ? layer.query_norm : layer.key_norm;
  if (weight) kernels->rms_norm(x, weight, shape.epsilon, shape.head_dim, x);
  const float* angles = angles_.data() + (size_t(layer.rope) * max_rows + row) * shape.head_dim;
  kernels->rotate(x, angles, angles + half, half);
}

void Program::attention(int number, Mine& mine) {
  const Layer& layer = layers[number];
  const int dim = shape.head_dim, all = shape.heads + shape.kv_heads, threads = pool_->size();
  alignas(64) int8_t bytes[kMostHeadDim];
  const int first_item = int(int64_t(count_) * all * mine.thread / threads);
  const int last_item = int(int64_t(count_) * all * (mine.thread + 1) / threads);
  for (int item = first_item; item < last_item; item++) {
    const int row = item / all, head = item % all;
    float* x = qkv_.data() + size_t(row) * width_ + head * dim;
    if (layer.bias)
      for (int i = 0; i < dim; i++) x[i] += layer.bias[head * dim + i];
    prepare_head(layer, row, head, x);
    if (head < shape.heads) {
      Query& query = queries_[size_t(row) * shape.heads + head];
      int8_t* q = query_.data() + (size_t(row) * shape.heads + head) * dim;
      query.scale = kernels->to_bytes(x, dim, q) * shape.attention_scale;
      query.sum = 0;
      for (int d = 0; d < dim; d++) query.sum += q[d];
      continue;
    }
    const int kv = head - shape.heads, position = (*rows_)[row].position, at = position % kCacheTokens;
    uint8_t* where = block(number, kv, (*rows_)[row].blocks[position / kCacheTokens]);
    float* scales = reinterpret_cast<float*>(where + size_t(2) * kCacheTokens * dim);
    scales[at] = kernels->to_bytes(x, dim, bytes);
    for (int d = 0; d < dim; d += 4) {                // four numbers of a head stand together
      for (int c = 0; c < 4; c++) bytes[d + c] = int8_t(bytes[d + c] ^ -128);
      std::memcpy(where + d * kCacheTokens + 4 * at, bytes + d, 4);
    }
    float* v = qkv_.data() + size_t(row) * width_ + (all + kv) * dim;
    if (layer.bias)
      for (int i = 0; i < dim; i++) v[i] += layer.bias[(all + kv) * dim + i];
    scales[kCacheTokens + at] = kernels->to_bytes(v, dim, bytes);
    uint8_t* values = where + size_t(kCacheTokens) * dim + size_t(at / 4) * 4 * dim + at % 4;   // four tokens stand together
    for (int d = 0; d < dim; d++) values[4 * d] = uint8_t(bytes[d]);
  }
  pool_->barrier().wait();
  const std::vector<int32_t>& wanted = *wanted_;
  const bool last = number + 1 == int(layers.size());
  if (last) {                       // whose logits are not wanted has done its part: the others move up
    divide(mine, int(wanted.size()));
    Mine& in = *mine.shared;
    float* stream = in.stream.data();
    if (mine.thread == 0)
      for (int k = 0; k < mine.count; k++)
        if (wanted[k] != k) std::copy_n(stream + size_t(wanted[k]) * shape.hidden, shape.hidden, stream + size_t(k) * shape.hidden);
  }
  // The heads that share keys follow each other, then the rows: keys stay near.
  const int group = shape.heads / shape.kv_heads, items = items_of_group(), each = together_of();
  share(mine, [&](int item, bool) {
    const int at = item / items % mine.count, kv = item / items / mine.count, first = item % items * each;
    attend(layer, number, last ? wanted[at] : at, at, kv * group + first, kv * group + std::min(first + each, group), mine);
  });
  pool_->barrier().wait();
}

void Program::attend(const Layer& layer, int number, int row, int at, int first_head, int last_head, Mine& mine) {
  const int dim = shape.head_dim, kv = first_head / (shape.heads / shape.kv_heads);
  const Row& who = (*rows_)[row];
  const size_t place = size_t(row) * shape.heads + first_head;
  const int last = who.position + 1, first = layer.window && last > layer.window ? last - layer.window : 0;
  kernels->attend({block(number, kv, 0), block_stride_, who.blocks, first, last, dim, last_head - first_head, query_.data() + place * dim,
                   queries_.data() + place, mine.scores.get(), attended_.data() + (size_t(at) * shape.heads + first_head) * dim});
}

// From here on a step has `count` rows, which the cheap work divides between the threads: whole panels where there are enough,
// so that two threads seldom write to one cache line.
void Program::divide(Mine& mine, int count) {
  const bool alone = count_ == 1;
  const int threads = pool_->size(), unit = count >= kPanel * threads ? kPanel : 1, units = (count + unit - 1) / unit;
  mine.count = count;
  mine.first = alone ? 0 : int(share_of(size_t(units), size_t(mine.thread))) * unit;
  mine.last = alone ? count : std::min(count, int(share_of(size_t(units), size_t(mine.thread) + 1)) * unit);
}

void Program::work(int thread) {
  Mine& mine = *mine_[thread];
  Mine& in = count_ == 1 ? mine : *mine_.back();
  mine.shared = &in;
  mine.turn = 0;
  divide(mine, count_);
  const int hidden = shape.hidden, query = shape.heads * shape.head_dim, middle = shape.intermediate;
  for (int row = mine.first; row < mine.last; row++) embed((*rows_)[row].token, in.stream.data() + size_t(row) * hidden);
  const float* after = nullptr;
  for (size_t number = 0; number < layers.size(); number++) {
    const Layer& layer = layers[number];
    open(mine, layer.attention_norm, after, number > 0);
    product(layer.qkv, qkv_.data(), width_, mine);
    pool_->barrier().wait();
    attention(int(number), mine);
    if (mine.count == 0) return;    // the cache is filled, and no logits are wanted

    mine.columns = query;
    for (int row = mine.first; row < mine.last; row++) {
      std::memcpy(in.floats.data() + size_t(row) * query, attended_.data() + size_t(row) * query, sizeof(float) * query);
      mine.quantize(kernels, row);
    }
    together();
    product(layer.out, added_.data(), apart(hidden), mine);
    pool_->barrier().wait();

    open(mine, layer.mlp_norm, layer.after_attention, true);
    product(layer.gate_up, gate_up_.data(), apart(2 * middle), mine);
    pool_->barrier().wait();

    mine.columns = middle;
    for (int row = mine.first; row < mine.last; row++) {
      const float* gate = gate_up_.data() + size_t(row) * apart(2 * middle);
      (shape.gate == Gate::silu ? kernels->gate_silu : kernels->gate_gelu)(gate, gate + middle, middle,
                                                                             in.floats.data() + size_t(row) * middle);
      mine.quantize(kernels, row);
    }
    together();
    product(layer.down, added_.data(), apart(hidden), mine);
    pool_->barrier().wait();
    if (thread == 0) evict(number);
    after = layer.after_mlp;
  }
  open(mine, final_norm, after, true);
  product(head, logits_, logits_stride_, mine);
}

// Every thread's share of each product of a step, in the order in which `work` comes to them.
void Program::deal() {
  const int threads = pool_->size();
  Share* shares = shares_.data();
  auto divide = [&](size_t total) {
    for (int thread = 0; thread < threads; thread++)
      (shares++)->set(uint32_t(share_of(total, size_t(thread))), uint32_t(share_of(total, size_t(thread) + 1)));
  };
  for (const Layer& layer : layers) {
    divide(layer.qkv.pieces.size());
    divide((&layer == &layers.back() ? wanted_->size() : size_t(count_)) * shape.kv_heads * items_of_group());
    for (const Product* product : {&layer.out, &layer.gate_up, &layer.down}) divide(product->pieces.size());
  }
  divide(head.pieces.size());
}

void Program::step(const std::vector<Row>& rows, const std::vector<int32_t>& wanted, float* logits, int stride) {
  rows_ = &rows;
  wanted_ = &wanted;
  logits_ = logits;
  logits_stride_ = stride;
  count_ = int(rows.size());
  const int half = shape.head_dim / 2;
  for (size_t kind = 0; kind < ropes.size(); kind++)
    for (int row = 0; row < count_; row++) {
      float* angles = angles_.data() + (kind * max_rows + row) * shape.head_dim;
      for (int i = 0; i < half; i++) {
        const float angle = float(rows[row].position) * ropes[kind].frequency[i];
        angles[i] = std::cos(angle) * ropes[kind].scale;
        angles[half + i] = std::sin(angle) * ropes[kind].scale;
      }
    }
  deal();
  pool_->run([this](int thread) { work(thread); });
  for (const Span& span : outer_) madvise(span.start, span.length, MADV_DONTNEED);
}

}  // namespace gulliver
