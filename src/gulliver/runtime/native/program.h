// A decoder lowered to records with raw pointers; one call of `step` runs it for the rows (tokens) of a batch.
//
// With one row, every thread keeps the residual stream and the activations for itself and repeats the cheap work on them
// (add, norm, quantize), which saves barriers. With more rows, the cheap work is split between threads by rows.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pages.h"
#include "pool.h"

namespace gulliver {

struct Matrix {                     // a weight [rows, columns]: packed parts, or one plain array
  int rows = 0, columns = 0;
  std::vector<Part> parts;          // empty when plain
  Plain plain{};
  std::vector<std::vector<int32_t>> places;  // out_index of each part, when there is more than one
  std::vector<int32_t> part_of, row_in_part; // of each row, when there is more than one part
  size_t bytes() const;
  bool packed() const { return !parts.empty(); }
};

struct Piece { int matrix, part, first, last; };   // tiles of a part (or rows of a plain weight), done by one thread

struct Product {                                   // several matrices with one input; outputs stand side by side
  std::vector<const Matrix*> matrices;
  std::vector<int> at;                             // where each one's rows begin in the output
  std::vector<Piece> pieces;
  std::vector<Reading> readings;                   // one for each thread, while it works on its own pieces
  int rows = 0;
};

enum class Gate { silu, gelu };

struct Layer {
  const float *attention_norm = nullptr, *mlp_norm = nullptr;     // [hidden]
  const float *after_attention = nullptr, *after_mlp = nullptr;   // [hidden], or null: norm of what joins the stream
  const float *query_norm = nullptr, *key_norm = nullptr;         // [head_dim], or null
  const float* bias = nullptr;                                    // of q, k, v in one row, or null
  int rope = 0;                                                   // which frequencies
  int window = 0;                                                 // keys seen, 0: all
  Product qkv, out, gate_up, down;
};

struct Shape {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocabulary = 0, positions = 0;
  float epsilon = 0, attention_scale = 0, embedding_scale = 1;
  Gate gate = Gate::silu;
};

struct Rope {
  std::vector<float> frequency;     // [head_dim / 2]
  float scale = 1;                  // of cosines and sines
};

// The pieces of a product that a thread begins with: a run of neighbours, because one long read is what memory gives fastest
// (two threads that take turns in small pieces reach less than half). The owner takes from the front, a thread that has
// nothing left of its own from the back.
class alignas(64) Share {
 public:
  void set(uint32_t first, uint32_t last) { range_.store(uint64_t(first) << 32 | last, std::memory_order_relaxed); }
  int take(bool front) {            // the number of a piece, or -1
    uint64_t range = range_.load(std::memory_order_relaxed);
    while (true) {
      const uint32_t first = uint32_t(range >> 32), last = uint32_t(range);
      if (first >= last) return -1;
      const uint64_t left = front ? uint64_t(first + 1) << 32 | last : uint64_t(first) << 32 | (last - 1);
      if (range_.compare_exchange_weak(range, left, std::memory_order_relaxed)) return int(front ? first : last - 1);
    }
  }

 private:
  std::atomic<uint64_t> range_{0};
};

constexpr int kMostHeadDim = 1024;

struct Row {                        // one token; rows of one sequence stand together, positions ascending
  int32_t token, position;
  const int32_t* blocks;            // numbers of the cache blocks of its sequence
};

class Program {
 public:
  Program(const Shape& shape, const Kernels* kernels, int threads, int max_rows, int cache_blocks);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  Product product_of(const std::vector<const Matrix*>& matrices) const;
  void finish();                    // after layers and head are set: makes the buffers
  // Logits of the wanted rows (numbers ascending) go to logits [wanted, vocabulary], whose rows are `stride` floats apart.
  void step(const std::vector<Row>& rows, const std::vector<int32_t>& wanted, float* logits, int stride);
  // Keep the head and as many layers as go into `bytes` in memory: the pages of other layers, and of an embedding that is not
  // the head, are given back after use. Only for weights in mapped files.
  void hold(size_t bytes);
  size_t cache_bytes() const { return cache_bytes_; }

  const Shape shape;
  const int max_rows, cache_blocks;
  const Kernels* const kernels;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  const Matrix* embedding = nullptr;
  const float* final_norm = nullptr;
  Product head;

 private:
  struct Mine;
  struct Span { char* start; size_t length; };
  void work(int thread);
  void divide(Mine& mine, int count);
  void together() { if (count_ > 1) pool_->barrier().wait(); }   // with one row every thread did all of it
  void open(Mine& mine, const float* norm, const float* after, bool add);
  void product(const Product& product, float* y, int y_stride, Mine& mine);
  void piece(const Product& product, const Piece& piece, float* y, int y_stride, const Mine& mine, Reading reading) const;
  void link_readings();             // tells every product where its threads go on reading
  // The first of `total` things in a thread's share; the share ends where the next thread's begins.
  size_t share_of(size_t total, size_t thread) const { return total * thread / size_t(pool_->size()); }
  template <class Do>
  void share(Mine& mine, Do&& work);   // work(number, whether it was dealt to this thread) for every number that `deal` dealt next
  void deal();
  void attention(int number, Mine& mine);
  void prepare_head(const Layer& layer, int row, int head, float* x);
  // Query heads first_head to last_head (not included), which share keys, of row `row` of the step; the answer goes to place `at`.
  void attend(const Layer& layer, int number, int row, int at, int first_head, int last_head, Mine& mine);
  // Heads that share keys are attended together, a few at a time; one by one where a single row has to keep all threads busy.
  int together_of() const { return count_ == 1 ? 1 : std::min(shape.heads / shape.kv_heads, kMostHeads); }
  int items_of_group() const { return (shape.heads / shape.kv_heads + together_of() - 1) / together_of(); }
  void embed(int token, float* out) const;
  void evict(size_t layer);
  static size_t spans_of(const Matrix& matrix, std::vector<Span>& spans);   // returns the bytes of the matrix
  uint8_t* block(int layer, int head, int number) const;

  const std::shared_ptr<Pool> pool_;              // shared with other programs
  uint8_t* cache_ = nullptr;
  size_t cache_bytes_ = 0, block_bytes_ = 0, block_stride_ = 0;   // of one layer and head; from block to block
  const std::vector<Row>* rows_ = nullptr;
  const std::vector<int32_t>* wanted_ = nullptr;
  int count_ = 0, logits_stride_ = 0;
  float* logits_ = nullptr;
  int width_ = 0, wide_ = 0;                      // of q, k, v together; of the widest input of a product
  Array<float> qkv_, attended_, gate_up_, added_, angles_;
  std::vector<Query> queries_;
  std::vector<int8_t> query_;
  std::vector<std::unique_ptr<Mine>> mine_;       // of each thread; the last one is shared by all when there are more rows
  std::vector<Share> shares_;                     // of each product of a step, one for each thread
  std::vector<std::vector<Span>> spans_;          // pages of each layer's weights that may be given back
  std::vector<Span> outer_;                       // of the embedding, given back after a step
  size_t held_ = SIZE_MAX;                        // layers from this one on are given back after use
};

}  // namespace gulliver
