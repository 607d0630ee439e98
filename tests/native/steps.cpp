// Whole steps of small random decoders in every way that work is divided, for the sanitizers of addresses and threads: 1, 2
// and 4 threads; steps of 1, 2, 7 and 40 rows of two sequences; all, some or no rows wanted. Whatever the division, the
// logits must be those of one thread that takes the tokens one by one, to the last bit. The same of two models whose steps are
// asked for at once, while a third one comes and goes.
//
//     steps [INSTRUCTION SET]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "program.h"
#include "reference.h"

using namespace gulliver;

namespace {

constexpr int kTokens = 44, kMaxRows = 40;
constexpr float kUntouched = 12345.0f;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "steps: %s\n", what.c_str());
  std::exit(1);
}

// The weights of one model; a Program only points at them.
class Model {
 public:
  Model(const char* label, Shape made, int window, bool extras, uint32_t seed)
      : name(label), shape(made), window_(window), extras_(extras), random_(seed) {
    const int query = shape.heads * shape.head_dim, key = shape.kv_heads * shape.head_dim;
    for (int number = 0; number < 3; number++) {
      Layer layer;
      layer.attention_norm = vector(shape.hidden, 1.0f);
      layer.mlp_norm = vector(shape.hidden, 1.0f);
      if (extras) {
        layer.after_attention = vector(shape.hidden, 1.0f);
        layer.after_mlp = vector(shape.hidden, 1.0f);
        layer.query_norm = vector(shape.head_dim, 1.0f);
        layer.key_norm = vector(shape.head_dim, 1.0f);
        layer.bias = vector(query + 2 * key, 0.0f);
      }
      layer.window = number == 1 ? 0 : window_;
      layers_.push_back(layer);
      inputs_.push_back({{packed(query, shape.hidden), packed(key, shape.hidden), plain(key, shape.hidden)},
                         {packed(shape.hidden, query)},
                         {packed(shape.intermediate, shape.hidden), packed(shape.intermediate, shape.hidden)},
                         {number ? packed(shape.hidden, shape.intermediate) : plain(shape.hidden, shape.intermediate)}});
    }
    embedding_ = extras ? plain(shape.vocabulary, shape.hidden) : packed(shape.vocabulary, shape.hidden);
    final_norm_ = vector(shape.hidden, 1.0f);
  }

  std::unique_ptr<Program> program(const Kernels* kernels, int threads, int cache_blocks) const {
    auto made = std::make_unique<Program>(shape, kernels, threads, kMaxRows, cache_blocks);
    Rope rope;
    for (int i = 0; i < shape.head_dim / 2; i++)
      rope.frequency.push_back(std::pow(10000.0f, -2.0f * float(i) / float(shape.head_dim)));
    made->ropes = {rope};
    for (size_t number = 0; number < layers_.size(); number++) {
      Layer layer = layers_[number];
      layer.qkv = made->product_of(inputs_[number][0]);
      layer.out = made->product_of(inputs_[number][1]);
      layer.gate_up = made->product_of(inputs_[number][2]);
      layer.down = made->product_of(inputs_[number][3]);
      made->layers.push_back(layer);
    }
    made->embedding = embedding_;
    made->final_norm = final_norm_;
    made->head = made->product_of({embedding_});
    made->finish();
    return made;
  }

  const char* const name;
  const Shape shape;

 private:
  float unit() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_); }

  const float* vector(int count, float around) {
    floats_.emplace_back(size_t(count));
    for (float& value : floats_.back()) value = around + 0.2f * unit();
    return floats_.back().data();
  }

  const Matrix* plain(int rows, int columns) {
    matrices_.emplace_back();
    Matrix& made = matrices_.back();
    floats_.emplace_back(size_t(rows) * columns);
    for (float& value : floats_.back()) value = unit() * 1.7f / std::sqrt(float(columns));
    made.rows = rows;
    made.columns = columns;
    made.plain = {floats_.back().data(), rows, columns, kFloat32};
    return &made;
  }

  // One or, now and then, two parts of any format, whose rows take turns.
  const Matrix* packed(int rows, int columns) {
    matrices_.emplace_back();
    Matrix& made = matrices_.back();
    made.rows = rows;
    made.columns = columns;
    const int parts = matrices_.size() % 3 == 0 && rows > 1 ? 2 : 1;
    made.places.resize(parts > 1 ? 2 : 0);
    for (int row = 0; row < rows && parts > 1; row++) {
      made.part_of.push_back(row % 2);
      made.row_in_part.push_back(row / 2);
      made.places[size_t(row % 2)].push_back(row);
    }
    for (int number = 0; number < parts; number++)
      made.parts.push_back(part((rows + parts - 1 - number) / parts, columns));
    for (size_t number = 0; number < made.places.size(); number++)
      made.parts[number].out_index = made.places[number].data();
    return &made;
  }

  Part part(int rows, int columns) {
    constexpr int kBits[] = {2, 3, 4, 5, 6, 8}, kGroups[] = {32, 64, 128};
    Part made{};
    made.rows = rows;
    made.columns = columns;
    made.bits = kBits[random_() % 6];
    made.group_size = kGroups[random_() % 3];
    made.groups = (columns + made.group_size - 1) / made.group_size;
    made.kind = made.bits == 8 || random_() % 2 ? gulliver::kZeros : gulliver::kTable;
    made.tile_bytes = reference::tile_bytes(made);
    const int levels = 1 << made.bits;
    for (int i = 0; i < 64; i++) made.table[i] = uint8_t((made.kind == gulliver::kZeros) ? 0 : 64 + 128 * (i % levels) / levels);
    bytes_.emplace_back(made.tile_bytes * size_t((rows + kTileRows - 1) / kTileRows));
    for (uint8_t& byte : bytes_.back()) byte = uint8_t(random_());
    const size_t zeros = reference::scales_at(made) + size_t(16) * made.groups;
    const float spread = (made.kind == gulliver::kZeros) ? float(levels) / 3.5f : 37.0f;
    const float factor = 1.0f / (128.0f * spread * std::sqrt(float(columns)));
    uint32_t bits;
    std::memcpy(&bits, &factor, 4);
    for (size_t tile = 0; tile < bytes_.back().size(); tile += made.tile_bytes) {
      uint8_t* at = bytes_.back().data() + tile + zeros;
      if ((made.kind == gulliver::kZeros)) std::memset(at, levels / 2, size_t(16) * made.groups);
      if ((made.kind == gulliver::kZeros)) at += size_t(16) * made.groups;
      for (int lane = 0; lane < 16; lane++) at[2 * lane] = uint8_t(bits >> 16), at[2 * lane + 1] = uint8_t(bits >> 24);
    }
    made.tiles = bytes_.back().data();
    return made;
  }

  const int window_;
  const bool extras_;
  std::mt19937 random_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<uint8_t>> bytes_;
  std::deque<Matrix> matrices_;
  std::vector<Layer> layers_;
  std::vector<std::vector<std::vector<const Matrix*>>> inputs_;
  const Matrix* embedding_ = nullptr;
  const float* final_norm_ = nullptr;
};

using Answers = std::map<std::pair<int, int>, std::vector<float>>;   // (sequence, position) -> logits

// Feeds two sequences in steps of `size` rows; a row is wanted with a chance of `wanted` in 4.
Answers answers(Program& program, int size, int wanted, uint32_t seed) {
  std::mt19937 random(seed);
  const int vocabulary = program.shape.vocabulary, stride = vocabulary + 3;
  const int blocks = (kTokens + kCacheTokens - 1) / kCacheTokens;
  std::vector<int32_t> numbers[2];
  for (int b = 0; b < blocks; b++) numbers[0].push_back(2 * b + 1), numbers[1].push_back(2 * b);
  int done[2] = {0, 0};
  Answers found;
  while (done[0] < kTokens || done[1] < kTokens) {
    std::vector<Row> rows;
    std::vector<std::pair<int, int>> names;
    std::vector<int32_t> chosen;
    for (int sequence = 0; sequence < 2; sequence++) {
      const int most = sequence == 0 ? (size + 1) / 2 : size - int(rows.size());
      for (int n = 0; n < most && done[sequence] < kTokens; n++, done[sequence]++) {
        const int position = done[sequence];
        if (int(random() % 4) < wanted) chosen.push_back(int32_t(rows.size()));
        rows.push_back({(7 * position + 13 * sequence + position * position) % vocabulary, position, numbers[sequence].data()});
        names.emplace_back(sequence, position);
      }
    }
    std::vector<float> logits(chosen.size() * size_t(stride), kUntouched);
    program.step(rows, chosen, logits.data(), stride);
    for (size_t n = 0; n < chosen.size(); n++) {
      const float* row = logits.data() + n * size_t(stride);
      found[names[size_t(chosen[n])]].assign(row, row + vocabulary);
      for (int i = vocabulary; i < stride; i++)
        if (row[i] != kUntouched) fail("a step wrote beside its logits");
    }
  }
  return found;
}

void compare(const std::string& what, const Answers& found, const Answers& right) {
  for (const auto& [name, logits] : found)
    for (size_t i = 0; i < logits.size(); i++)
      if (logits[i] != right.at(name)[i])
        fail(what + ": sequence " + std::to_string(name.first) + ", position " + std::to_string(name.second) + ", token " +
             std::to_string(i) + ": " + std::to_string(logits[i]) + ", not " + std::to_string(right.at(name)[i]));
}

int check(const InstructionSet& set, const Model& model) {
  const int blocks = 2 * ((kTokens + kCacheTokens - 1) / kCacheTokens);
  const Answers right = answers(*model.program(set.kernels, 1, blocks), 1, 4, 1);
  if (right.size() != 2 * kTokens) fail("a token got no answer");
  for (const auto& [name, logits] : right)
    for (const float value : logits)
      if (!std::isfinite(value) || std::fabs(value) > 100.0f) fail(std::string(model.name) + ": strange logits");
  int runs = 0;
  for (const int threads : {1, 2, 4}) {
    const auto program = model.program(set.kernels, threads, blocks);
    for (const int size : {1, 2, 7, kMaxRows})
      for (const int wanted : {4, 1, 0}) {
        const std::string what = set.name + ", " + model.name + ", " + std::to_string(threads) + " threads, steps of " +
                                 std::to_string(size);
        compare(what, answers(*program, size, wanted, uint32_t(++runs)), right);
      }
  }
  return runs;
}

int check_at_once(const InstructionSet& set, const Model& one, const Model& other) {
  const int blocks = 2 * ((kTokens + kCacheTokens - 1) / kCacheTokens);
  const Answers right = answers(*one.program(set.kernels, 1, blocks), 1, 4, 1);
  const Answers right_other = answers(*other.program(set.kernels, 1, blocks), 1, 4, 1);
  const int pairs[][2] = {{1, 1}, {2, 2}, {1, 2}, {4, 2}};
  for (const auto& threads : pairs) {
    const auto program = one.program(set.kernels, threads[0], blocks), second = other.program(set.kernels, threads[1], blocks);
    const std::string what = set.name + ", two models of " + std::to_string(threads[0]) + " and " + std::to_string(threads[1]) +
                             " threads at once: ";
    std::thread beside([&] {
      for (const int size : {1, 7, kMaxRows}) compare(what + other.name, answers(*second, size, 4, 1), right_other);
    });
    for (const int size : {7, 1, kMaxRows}) {
      compare(what + one.name, answers(*program, size, 4, 1), right);
      compare(what + "a third one", answers(*other.program(set.kernels, threads[0], blocks), kMaxRows, 4, 1), right_other);
    }
    beside.join();
  }
  return int(std::size(pairs));
}

Shape shape_of(int hidden, int heads, int kv_heads, int head_dim, int intermediate, int positions) {
  Shape shape;
  shape.hidden = hidden, shape.heads = heads, shape.kv_heads = kv_heads, shape.head_dim = head_dim;
  shape.intermediate = intermediate, shape.vocabulary = 71, shape.positions = positions;
  shape.epsilon = 1e-6f, shape.attention_scale = 1.0f / std::sqrt(float(head_dim));
  return shape;
}

}  // namespace

int main(int count, char** arguments) {
  Shape gelu = shape_of(40, 4, 2, 20, 56, kTokens);     // the last positions lie at the end of the buffer of scores
  gelu.gate = Gate::gelu;
  gelu.embedding_scale = 1.5f;
  const Model models[] = {{"windows, norms and biases", gelu, 19, true, 1},
                          {"heads of 64", shape_of(96, 3, 1, 64, 136, kTokens + 5), 0, false, 2},
                          {"one head of 4", shape_of(8, 1, 1, 4, 12, kTokens), 1, false, 3},
                          {"seven heads share keys", shape_of(40, 7, 1, 16, 72, kTokens), 21, false, 4},
                          {"eight heads of 128 share keys", shape_of(64, 16, 2, 128, 40, kTokens), 0, false, 5}};
  int runs = 0, sets = 0;
  for (const auto& set : instruction_sets()) {
    const bool chosen = set.kernels && (count < 2 || set.name == arguments[1]);
    std::printf("%-12s %s\n", set.name.c_str(), chosen ? "tested" : set.why.c_str());
    if (!chosen) continue;
    sets++;
    for (const Model& model : models) runs += check(set, model);
    runs += check_at_once(set, models[0], models[1]);
  }
  if (!sets) fail("nothing to test");
  std::printf("%d runs on %d instruction sets give the same logits, however they are divided\n", runs, sets);
}
