// The Python face of the native engine: the only file that knows Python's types. It checks what comes in; what it hands on
// is right.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <stdexcept>

#include "activations.h"
#include "isa.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace gulliver {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Signed = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Classes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstantRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ByteRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntRows = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int kMostThreads = 1024, kMostRows = 4096, kMostWidth = 1 << 18, kMostLength = 1 << 24;

void demand(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

const Kernels* kernels_of(const std::string& wanted) {
  std::string why;
  const Kernels* found = choose(wanted.c_str(), why);
  if (!found) throw std::invalid_argument(why);
  return found;
}

Part part_of(const Bytes& tiles, int rows, int columns, int bits, int group_size, int kind, const std::optional<Signed>& codebook) {
  demand(rows > 0 && columns > 0, "a part needs rows and columns");
  demand(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8, "bits must be 2, 3, 4, 5, 6 or 8");
  demand(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128");
  demand(kind >= kTable && kind <= kMinimums && (kind == kTable) == codebook.has_value(), "kind 0 has a codebook, 1 to 3 have none");
  demand(kind != kHalves || bits == 2 || bits == 4 || bits == 5 || bits == 8, "float16 scales go with 2, 4, 5 or 8 bits");
  demand(kind != kMinimums || bits == 4 || bits == 5, "float16 minimums go with 4 or 5 bits");
  demand(!codebook || (bits < 8 && codebook->shape(0) == size_t(1) << bits), "a codebook has 2^bits entries, bits below 8");
  Part part{};
  part.rows = rows;
  part.columns = columns;
  part.bits = bits;
  part.group_size = group_size;
  part.groups = (columns + group_size - 1) / group_size;
  part.kind = kind;
  const size_t raw = size_t(2) * part.groups * group_size * bits + size_t(16) * part.groups * side_bytes(kind) + 32;
  part.tile_bytes = (raw + 63) / 64 * 64;
  part.tiles = tiles.data();
  demand(tiles.shape(0) == size_t(rows + kTileRows - 1) / kTileRows && tiles.shape(1) == part.tile_bytes,
         "the tiles have another size than rows, columns and format need");
  for (int i = 0; i < 64; i++) part.table[i] = codebook ? uint8_t(int(codebook->data()[i % (1 << bits)]) + 128) : 0;
  return part;
}

// One model: the program, and the arrays that its pointers lead to.
class Native {
 public:
  Native(const Shape& shape, const std::string& isa, int threads, int max_rows, int cache_blocks)
      : program_(shape, kernels_of(isa), threads, max_rows, cache_blocks) {}

  int packed(const std::vector<std::tuple<Bytes, int, int, int, std::optional<Signed>>>& parts, int columns,
             const std::optional<Classes>& part_of_row) {
    auto matrix = std::make_unique<Matrix>();
    matrix->columns = columns;
    for (const auto& [tiles, rows, bits, group_size, codebook] : parts) {
      matrix->parts.push_back(part_of(tiles, rows, columns, bits, group_size, codebook ? kTable : kZeros, codebook));
      matrix->rows += rows;
      kept_.push_back(nb::cast(tiles));
    }
    demand(!parts.empty() && (parts.size() == 1) == !part_of_row, "part_of_row is needed for several parts, and only then");
    if (part_of_row) {
      demand(part_of_row->shape(0) == size_t(matrix->rows), "part_of_row must name the part of every row");
      matrix->places.resize(parts.size());
      for (int row = 0; row < matrix->rows; row++) {
        const int part = part_of_row->data()[row];
        demand(size_t(part) < parts.size() && matrix->places[part].size() < size_t(matrix->parts[part].rows),
               "part_of_row deals out other counts than the parts have rows");
        matrix->part_of.push_back(part);
        matrix->row_in_part.push_back(int(matrix->places[part].size()));
        matrix->places[part].push_back(row);
      }
      for (size_t part = 0; part < parts.size(); part++) matrix->parts[part].out_index = matrix->places[part].data();
    }
    matrices_.push_back(std::move(matrix));
    return int(matrices_.size()) - 1;
  }

  // Blocks of another tool: float16 scales, and minimums or none.
  int kept(const Bytes& tiles, int rows, int columns, int bits, int group_size, bool minimums) {
    auto matrix = std::make_unique<Matrix>();
    matrix->columns = columns;
    matrix->rows = rows;
    matrix->parts.push_back(part_of(tiles, rows, columns, bits, group_size, minimums ? kMinimums : kHalves, std::nullopt));
    kept_.push_back(nb::cast(tiles));
    matrices_.push_back(std::move(matrix));
    return int(matrices_.size()) - 1;
  }

  int plain(const Bytes& data, int kind) {
    demand(kind >= kBfloat16 && kind <= kFloat32, "kind must be 0 (bfloat16), 1 (float16) or 2 (float32)");
    const size_t item = kind == kFloat32 ? 4 : 2;
    demand(data.shape(0) > 0 && data.shape(1) > 0 && data.shape(1) % item == 0, "a row must be whole numbers of that kind");
    auto matrix = std::make_unique<Matrix>();
    matrix->rows = int(data.shape(0));
    matrix->columns = int(data.shape(1) / item);
    matrix->plain = Plain{data.data(), matrix->rows, matrix->columns, kind};
    kept_.push_back(nb::cast(data));
    matrices_.push_back(std::move(matrix));
    return int(matrices_.size()) - 1;
  }

  void rope(const Floats& frequency, float scale) {
    demand(!finished_, "the model is finished");
    demand(frequency.shape(0) * 2 == size_t(program_.shape.head_dim), "a rope has head_dim / 2 frequencies");
    program_.ropes.push_back({{frequency.data(), frequency.data() + frequency.shape(0)}, scale});
  }

  void layer(int rope, int window, const Floats& attention_norm, const Floats& mlp_norm, const std::vector<int>& qkv, int out,
             const std::vector<int>& gate_up, int down, const std::optional<Floats>& after_attention,
             const std::optional<Floats>& after_mlp, const std::optional<Floats>& query_norm,
             const std::optional<Floats>& key_norm, const std::optional<Floats>& bias) {
    const Shape& s = program_.shape;
    const int query = s.heads * s.head_dim, key = s.kv_heads * s.head_dim;
    demand(!finished_, "the model is finished");
    demand(rope >= 0 && size_t(rope) < program_.ropes.size() && window >= 0, "there is no such rope or window");
    demand(qkv.size() == 3 && gate_up.size() == 2, "qkv are three matrices, gate_up two");
    Layer layer;
    layer.rope = rope;
    layer.window = window;
    layer.attention_norm = vector_of(attention_norm, s.hidden);
    layer.mlp_norm = vector_of(mlp_norm, s.hidden);
    if (after_attention) layer.after_attention = vector_of(*after_attention, s.hidden);
    if (after_mlp) layer.after_mlp = vector_of(*after_mlp, s.hidden);
    if (query_norm) layer.query_norm = vector_of(*query_norm, s.head_dim);
    if (key_norm) layer.key_norm = vector_of(*key_norm, s.head_dim);
    if (bias) layer.bias = vector_of(*bias, query + 2 * key);
    layer.qkv = program_.product_of({matrix(qkv[0], query, s.hidden), matrix(qkv[1], key, s.hidden), matrix(qkv[2], key, s.hidden)});
    layer.out = program_.product_of({matrix(out, s.hidden, query)});
    layer.gate_up = program_.product_of({matrix(gate_up[0], s.intermediate, s.hidden), matrix(gate_up[1], s.intermediate, s.hidden)});
    layer.down = program_.product_of({matrix(down, s.hidden, s.intermediate)});
    program_.layers.push_back(std::move(layer));
  }

  void finish(int embedding, const Floats& final_norm, int head) {
    const Shape& s = program_.shape;
    demand(!program_.layers.empty() && !finished_, "a model needs layers, and is finished once");
    program_.embedding = matrix(embedding, s.vocabulary, s.hidden);
    program_.final_norm = vector_of(final_norm, s.hidden);
    program_.head = program_.product_of({matrix(head, s.vocabulary, s.hidden)});
    const double block = 2.0 * kCacheTokens * (s.head_dim + sizeof(float)) * s.kv_heads * double(program_.layers.size());
    demand(block * program_.cache_blocks < double(int64_t(1) << 46), "the cache of keys and values would pass 64 TiB; allow fewer tokens");
    try {
      program_.finish();
    } catch (const std::bad_alloc&) {
      throw std::invalid_argument("the system gives no memory for the model's cache of keys and values and its buffers; allow fewer tokens");
    }
    finished_ = true;
  }

  void hold(size_t bytes) {
    demand(finished_, "the model is not finished");
    program_.hold(bytes);
  }
  std::string isa() const { return program_.kernels->name; }

  void step(const Ints& tokens, const Ints& positions, const Ints& sequences, const IntRows& blocks, const Ints& wanted,
            nb::ndarray<float, nb::ndim<2>, nb::device::cpu> logits) {
    const size_t count = tokens.shape(0);
    demand(finished_, "the model is not finished");
    demand(count >= 1 && count <= size_t(program_.max_rows), "a step has 1 to max_rows rows");
    demand(positions.shape(0) == count && sequences.shape(0) == count, "tokens, positions and sequences differ in length");
    demand(logits.shape(0) == wanted.shape(0) && logits.shape(1) == size_t(program_.shape.vocabulary), "logits have a wrong shape");
    const int64_t stride = wanted.shape(0) > 1 ? logits.stride(0) : int64_t(logits.shape(1));
    demand(wanted.shape(0) == 0 || ((logits.shape(1) == 1 || logits.stride(1) == 1) && stride >= int64_t(logits.shape(1)) && stride < INT32_MAX),
           "logits have wrong strides");
    std::vector<Row> rows(count);
    // A copy: the caller may change its array while the step runs without the interpreter's lock.
    const std::vector<int32_t> table(blocks.data(), blocks.data() + blocks.shape(0) * blocks.shape(1));
    for (size_t i = 0; i < count; i++) {
      const int token = tokens.data()[i], position = positions.data()[i], sequence = sequences.data()[i];
      demand(token >= 0 && token < program_.shape.vocabulary, "a token is not in the vocabulary");
      demand(position >= 0 && position < program_.shape.positions, "a position is outside the context");
      demand(sequence >= 0 && size_t(sequence) < blocks.shape(0), "a row names a sequence without blocks");
      demand(size_t(position / kCacheTokens) < blocks.shape(1), "a sequence has too few blocks for its position");
      rows[i] = {token, position, table.data() + size_t(sequence) * blocks.shape(1)};
      for (int b = 0; b <= position / kCacheTokens; b++)
        demand(rows[i].blocks[b] >= 0 && rows[i].blocks[b] < program_.cache_blocks, "there is no such cache block");
    }
    std::vector<int32_t> chosen(wanted.data(), wanted.data() + wanted.shape(0));
    for (size_t i = 0; i < chosen.size(); i++)
      demand(chosen[i] >= (i ? chosen[i - 1] + 1 : 0) && size_t(chosen[i]) < count, "wanted rows must ascend, below rows");
    nb::gil_scoped_release free;
    program_.step(rows, chosen, logits.data(), int(stride));
  }

 private:
  const float* vector_of(const Floats& data, int count) {
    demand(data.shape(0) == size_t(count), "a vector has another length than the shape says");
    vectors_.emplace_back(data.data(), data.data() + count);
    return vectors_.back().data();
  }
  const Matrix* matrix(int handle, int rows, int columns) const {
    demand(handle >= 0 && size_t(handle) < matrices_.size(), "there is no such matrix");
    const Matrix* found = matrices_[handle].get();
    demand(found->rows == rows && found->columns == columns, "a weight has another shape than the model says");
    return found;
  }

  Program program_;
  bool finished_ = false;
  std::vector<std::unique_ptr<Matrix>> matrices_;
  std::deque<std::vector<float>> vectors_;
  std::vector<nb::object> kept_;
};

// Products alone, for tests: x [batch, columns] floats times a packed part, on one instruction set.
void product(const std::string& isa, const Bytes& tiles, int rows, int columns, int bits, int group_size,
             const std::optional<Signed>& codebook, const FloatRows& x, FloatRows y, std::optional<bool> minimums) {
  const Kernels* kernels = kernels_of(isa);
  const int kind = minimums ? (*minimums ? kMinimums : kHalves) : codebook ? kTable : kZeros;
  const Part part = part_of(tiles, rows, columns, bits, group_size, kind, codebook);
  const int batch = int(x.shape(0));
  demand(batch >= 1 && batch <= kMaxBatch && x.shape(1) == size_t(columns), "x must be [1 to 256, columns]");
  demand(y.shape(0) == size_t(batch) && y.shape(1) == size_t(rows), "y must be [batch, rows]");
  ActivationRoom room(batch, columns);
  for (int b = 0; b < batch; b++) room.set(kernels, batch, columns, b, x.data() + size_t(b) * columns);
  kernels->product(part, 0, int(tiles.shape(0)), room.view(batch, columns), batch, y.data(), rows, {});
}

// (code of each place, level of each place, places in a unit)
using Table = std::tuple<Classes, Floats, float>;

Levels levels_of(const Table& table) {
  const auto& [codes, entries, fine] = table;
  const size_t size = entries.shape(0);
  demand(codes.shape(0) == size && size % 2 == 1 && size <= size_t(1) << 20, "a table has an odd number of codes and as many entries");
  return {int(size), entries.data(), codes.data(), fine};
}

void choose_codes(const std::string& isa, const FloatRows& local, const ConstantRows& base, const std::optional<ConstantRows>& effect,
                  const Floats& scale, const Floats& zero, const Floats& minimum, int levels, const std::optional<Table>& table,
                  bool backwards, const ByteRows& codes) {
  const Kernels* kernels = kernels_of(isa);
  const size_t columns = local.shape(0), rows = local.shape(1);
  const auto same = [&](const auto& other) { return other.shape(0) == columns && other.shape(1) == rows; };
  demand(columns >= 1 && columns <= kMostChosen && rows <= size_t(kMostLength), "local must be [1 to 256, rows]");
  demand(same(base) && same(codes), "base and codes must have the shape of local");
  demand(!effect || (effect->shape(0) == columns && effect->shape(1) == columns), "effect must be [columns, columns]");
  demand(scale.shape(0) == rows && zero.shape(0) == rows && minimum.shape(0) == rows, "a grid has a number for each row");
  demand(table ? levels == 0 : levels >= 1 && levels <= 256, "levels must be 1 to 256, or 0 with a table");
  const Choice choice{int(columns), int(rows), backwards, local.data(), base.data(), effect ? effect->data() : nullptr, scale.data(),
                      zero.data(), minimum.data(), table ? levels_of(*table) : Levels{levels, nullptr, nullptr, 0.0f}, codes.data()};
  nb::gil_scoped_release free;
  kernels->choose_codes(choice);
}

void fit_scales(const std::string& isa, const ConstantRows& groups, const ConstantRows& importance, const Table& table, float top,
                const std::vector<float>& shrinks, int refine, const FloatVector& scales) {
  const Kernels* kernels = kernels_of(isa);
  const size_t count = groups.shape(0), columns = groups.shape(1);
  demand(columns >= 1 && columns <= kMostChosen && count <= size_t(kMostLength), "groups must be [n, 1 to 256]");
  demand((importance.shape(0) == count || importance.shape(0) == 1) && importance.shape(1) == columns, "importance must be [n or 1, columns]");
  demand(scales.shape(0) == count, "there is a scale for each group");
  const Fit fit{int(count), int(columns), groups.data(), importance.data(), importance.shape(0) == 1 ? 0 : int(columns),
                levels_of(table), top, shrinks.data(), int(shrinks.size()), refine, scales.data()};
  nb::gil_scoped_release free;
  kernels->fit_scales(fit);
}

}  // namespace
}  // namespace gulliver

NB_MODULE(_native, m) {
  using namespace gulliver;
  nb::set_leak_warnings(false);   // an engine's thread may hold a model until the process ends
  m.doc() = "The native engine: packed weights times int8 activations, and decoders lowered to them.";
  m.def("instruction_sets", [] {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    for (const auto& row : instruction_sets()) rows.emplace_back(row.name, row.kernels != nullptr, row.why);
    return rows;
  }, "(name, whether it runs here, why) of every instruction set, best first.");
  m.def("product", &product, "isa"_a, "tiles"_a, "rows"_a, "columns"_a, "bits"_a, "group_size"_a, "codebook"_a.none(), "x"_a, "y"_a,
        "minimums"_a = nb::none(),
        "y[b, row] = the packed part times x[b], with x rounded to int8 blocks of 32; for tests.\nKept blocks say whether they have minimums.");
  m.def("choose_codes", &choose_codes, "isa"_a, "local"_a.noconvert(), "base"_a, "effect"_a.none(), nb::kw_only(), "scale"_a, "zero"_a, "minimum"_a,
        "levels"_a, "table"_a.none(), "backwards"_a, "codes"_a.noconvert(),
        "Choose the codes of `local` [columns, rows], which becomes their values, one column after another.\n"
        "The levels are 0 to `levels` - 1, or those of `table`: (code of each place, level of each place, places in a unit).");
  m.def("fit_scales", &fit_scales, "isa"_a, "groups"_a, "importance"_a, nb::kw_only(), "table"_a, "top"_a, "shrinks"_a, "refine"_a,
        "scales"_a.noconvert(),
        "The scales [n] that fit groups [n, columns] with importance [n or 1, columns] on the levels of a table;\n"
        "`top` is the largest size of a level.");
  nb::class_<Native>(m, "Native", "A decoder lowered to native code.")
      .def("__init__", [](Native* self, int hidden, int heads, int kv_heads, int head_dim, int intermediate, int vocabulary,
                          int positions, float epsilon, float attention_scale, float embedding_scale, bool gelu,
                          const std::string& isa, int threads, int max_rows, int cache_blocks) {
        demand(hidden > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && intermediate > 0 && vocabulary > 0, "sizes must be positive");
        demand(head_dim > 0 && head_dim % 4 == 0 && head_dim <= kMostHeadDim, "head_dim must be a multiple of 4, at most 1024");
        demand(threads > 0 && threads <= kMostThreads, "threads must be 1 to 1024");
        demand(positions > 0 && max_rows > 0 && cache_blocks > 0, "positions, rows and blocks must be positive");
        // So that no product of two sizes leaves the range of int.
        demand(hidden <= kMostWidth && heads <= kMostWidth / head_dim && intermediate <= kMostWidth && max_rows <= kMostRows &&
                   vocabulary <= kMostLength && positions <= kMostLength, "a size is out of range");
        const Shape shape{hidden, heads, kv_heads, head_dim, intermediate, vocabulary, positions, epsilon,
                          attention_scale, embedding_scale, gelu ? Gate::gelu : Gate::silu};
        new (self) Native(shape, isa, threads, max_rows, cache_blocks);
      }, nb::kw_only(), "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "intermediate"_a, "vocabulary"_a, "positions"_a, "epsilon"_a,
         "attention_scale"_a, "embedding_scale"_a, "gelu"_a, "isa"_a, "threads"_a, "max_rows"_a, "cache_blocks"_a)
      .def("packed", &Native::packed, "parts"_a, "columns"_a, "part_of_row"_a.none())
      .def("kept", &Native::kept, "tiles"_a, "rows"_a, "columns"_a, "bits"_a, "group_size"_a, "minimums"_a)
      .def("plain", &Native::plain, "data"_a, "kind"_a)
      .def("rope", &Native::rope, "frequency"_a, "scale"_a)
      .def("layer", &Native::layer, nb::kw_only(), "rope"_a, "window"_a, "attention_norm"_a, "mlp_norm"_a, "qkv"_a, "out"_a, "gate_up"_a, "down"_a,
           "after_attention"_a.none(), "after_mlp"_a.none(), "query_norm"_a.none(), "key_norm"_a.none(), "bias"_a.none())
      .def("finish", &Native::finish, "embedding"_a, "final_norm"_a, "head"_a)
      .def("hold", &Native::hold, "bytes"_a)
      .def_prop_ro("isa", &Native::isa)
      .def("step", &Native::step, "tokens"_a, "positions"_a, "sequences"_a, "blocks"_a, "wanted"_a, "logits"_a);
}
