// Random packed tensors through every instruction set that this machine has, compared with the slow reference.
//
//     fuzz COUNT [SEED [INSTRUCTION SET]]
//
// Built with the address and undefined-behaviour sanitizers (tests/native/Makefile). A tensor has a random format, ragged
// rows and columns, random bytes everywhere (also in padding, scales and factors, which may be not-a-number), a random range
// of tiles, 1 to 256 activations and, at times, scattered output rows. All memory has its exact size. One tensor in three is
// made so that float sums are exact: there every instruction set must give the same bits, also where all codes are the largest.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "reference.h"

using namespace gulliver;

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ * 0x2545f4914f6cdd1du;
  }
  int below(int limit) { return int((bits() >> 33) % uint64_t(limit)); }
  int from(int first, int last) { return first + below(last - first + 1); }
  bool one_in(int count) { return below(count) == 0; }
  float unit() { return float(int64_t(bits() >> 40)) / float(1 << 23) - 1.0f; }
  template <class... T>
  int of(T... choices) { const int all[] = {choices...}; return all[below(int(sizeof...(choices)))]; }

 private:
  uint64_t state_;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  std::exit(1);
}

std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", value);
  return digits;
}

struct Case {
  Part part{};
  int tiles = 0, batch = 0, first = 0, last = 0, y_stride = 0;
  bool exact = false, extreme = false;  // all codes and activations at an end of their range
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line, "%c%dg%d, %d rows, %d columns, batch %d, tiles %d to %d%s%s", part.kind == gulliver::kZeros ? 'u' : 'c',
                  part.bits, part.group_size, part.rows, part.columns, batch, first, last, part.out_index ? ", scattered" : "",
                  exact ? ", exact" : "");
    return line;
  }
};

Case random_case(Random& random) {
  Case made;
  Part& part = made.part;
  part.bits = random.of(2, 3, 4, 5, 6, 8);
  part.kind = part.bits == 8 || random.one_in(2) ? gulliver::kZeros : gulliver::kTable;
  part.group_size = random.of(32, 64, 128);
  part.rows = random.one_in(4) ? random.from(1, 50) : random.from(1, 17);
  part.columns = random.one_in(60) ? random.from(1900, 2300) : random.one_in(16) ? random.from(1, 512) : random.one_in(3) ? random.from(1, 160) : random.from(1, 40);
  part.groups = (part.columns + part.group_size - 1) / part.group_size;
  part.tile_bytes = reference::tile_bytes(part);
  for (int i = 0; i < 64; i++) part.table[i] = i < 1 << part.bits ? uint8_t(random.bits()) : part.table[i - (1 << part.bits)];
  made.tiles = (part.rows + kTileRows - 1) / kTileRows;
  made.batch = random.one_in(400) ? random.from(71, kMaxBatch) : random.one_in(40) ? random.from(17, 70) : random.one_in(3) ? random.from(1, kPanel + 2) : random.from(1, 4);
  made.extreme = random.one_in(10);
  made.exact = made.extreme || random.one_in(3);
  made.first = random.one_in(4) ? random.below(made.tiles) : 0;
  made.last = random.one_in(4) ? random.from(made.first, made.tiles) : made.tiles;
  made.y_stride = part.rows + random.below(20);
  return made;
}

// Random bytes; for exact sums scales of 0 or 1 and factors of 1/4 to 4.
void fill_tiles(Random& random, const Case& of, uint8_t* tiles) {
  const Part& part = of.part;
  const size_t bytes = part.tile_bytes * of.tiles;
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random.bits();
    std::memcpy(tiles + i, &word, std::min<size_t>(8, bytes - i));
  }
  if (of.extreme) std::memset(tiles, random.of(0, 255), bytes);
  if (!of.exact) return;
  const size_t scales = reference::scales_at(part), factors = scales + size_t(16) * part.groups * (part.kind == gulliver::kZeros ? 2 : 1);
  for (int t = 0; t < of.tiles; t++) {
    uint8_t* tile = tiles + part.tile_bytes * t;
    for (int i = 0; i < 16 * part.groups; i++) tile[scales + i] = of.extreme ? 1 : tile[scales + i] & 1;
    for (int lane = 0; lane < 16; lane++) {
      const uint16_t factor = uint16_t((125 + random.below(5)) << 7);
      tile[factors + 2 * lane] = uint8_t(factor);
      tile[factors + 2 * lane + 1] = uint8_t(factor >> 8);
    }
  }
}

void fill_floats(Random& random, float* x, int count) {
  const float size = std::ldexp(1.0f, random.from(-20, 20));
  const bool strange = random.one_in(8);
  const float rare[] = {std::nanf(""), INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f, -0.0f, 1e-31f};
  for (int i = 0; i < count; i++) x[i] = strange && random.one_in(6) ? rare[random.below(8)] : random.unit() * size;
}

using Sets = std::vector<InstructionSet>;

// Activations in memory of its exact size.
struct Inputs {
  int side, blocks;
  size_t rows, numbers;
  Exact q, scale, sum, minus, shift, eighths, base;

  Inputs(Guarded* guards, int batch, int columns)
      : side(batch == 1 ? 1 : kPanel), blocks((columns + kPad - 1) / kPad * (kPad / kBlock)),
        rows(size_t((batch + side - 1) / side * side)), numbers(rows * size_t(blocks)),
        q(guards, numbers * kBlock), scale(guards ? guards + 1 : nullptr, 4 * numbers), sum(guards ? guards + 2 : nullptr, 4 * numbers),
        minus(guards ? guards + 3 : nullptr, 4 * numbers), shift(guards ? guards + 4 : nullptr, 4 * numbers),
        eighths(guards ? guards + 5 : nullptr, 4 * numbers), base(guards ? guards + 6 : nullptr, 4 * rows) {
    std::memset(q.as(), 77, numbers * kBlock);
    for (Exact* one : {&scale, &sum, &minus, &shift, &eighths}) std::memset(one->as(), 77, 4 * numbers);
    std::memset(base.as(), 77, 4 * rows);
  }
  Places places(int row) {
    const size_t at = size_t(row / side) * blocks * side + row % side;
    return {q.as<int8_t>() + at * kBlock, scale.as<float>() + at, sum.as<int32_t>() + at, minus.as<int32_t>() + at,
            shift.as<int32_t>() + at, eighths.as<int32_t>() + at, base.as<float>() + row, side};
  }
  Activations view() {
    return {q.as<int8_t>(), scale.as<float>(), sum.as<int32_t>(), minus.as<int32_t>(), shift.as<int32_t>(), eighths.as<int32_t>(), base.as<float>(), side, blocks};
  }
  bool same(Inputs& other) {
    return !std::memcmp(q.as(), other.q.as(), numbers * kBlock) && !std::memcmp(scale.as(), other.scale.as(), 4 * numbers) &&
           !std::memcmp(sum.as(), other.sum.as(), 4 * numbers) && !std::memcmp(minus.as(), other.minus.as(), 4 * numbers) &&
           !std::memcmp(shift.as(), other.shift.as(), 4 * numbers) && !std::memcmp(eighths.as(), other.eighths.as(), 4 * numbers) && !std::memcmp(base.as(), other.base.as(), 4 * rows);
  }
  // Scales with which sums of floats are exact: eighths, up to 2^`most`.
  void scale_plainly(int most) {
    for (size_t i = 0; i < numbers; i++) {
      const int up = most ? int(i * 7 % size_t(most)) : 0, part = most ? int(i * 5 % kEighths) : 0;
      scale.as<float>()[i] = std::ldexp(1.0f + float(part) / kEighths, up);
      shift.as<int32_t>()[i] = up << 23;
      eighths.as<int32_t>()[i] = part;
    }
    for (size_t i = 0; i < rows; i++) base.as<float>()[i] = 1.0f;
  }
};

// Every set's `quantize` must give the reference's bytes, and write nothing else. x: [batch, columns].
void check_quantize(const Sets& sets, const std::vector<float>& x, int batch, int columns, Inputs& wanted, Guarded* guards) {
  for (const auto& set : sets) {
    Inputs mine(guards ? guards + 1 : nullptr, batch, columns);
    for (int row = 0; row < batch; row++) {
      Exact line(guards, 4 * size_t(columns));
      std::memcpy(line.as(), x.data() + size_t(row) * columns, 4 * size_t(columns));
      set.kernels->quantize(line.as<float>(), columns, mine.blocks, mine.places(row));
    }
    if (!mine.same(wanted)) fail(set.name + ": quantize differs, " + std::to_string(columns) + " columns");
  }
}

bool near(float got, reference::Sum wanted, bool exact) {
  if (exact) return got == float(wanted.value) || (wanted.value == 0.0 && std::fabs(got) < 1e-25f);  // see `shifted` in avx512.cpp
  if (wanted.most > 3.4e38) return true;  // a float overflows on the way, or not: it depends on the order of the sum
  if (!std::isfinite(wanted.value)) return !std::isfinite(got);
  if (wanted.size > 3.4e38) return true;
  return std::fabs(double(got) - wanted.value) <= 4e-6 * wanted.size + 1e-42;
}

constexpr float kUntouched = 12345.0f;

void check_product(const Sets& sets, const Case& of, const Activations& x, const std::vector<reference::Sum>& wanted,
                   Guarded* guard) {
  const Part& part = of.part;
  const size_t size = size_t(of.batch) * of.y_stride;
  for (const auto& set : sets) {
    Exact y_memory(guard, 4 * size);
    float* y = y_memory.as<float>();
    std::fill(y, y + size, kUntouched);
    // Fetching ahead must not matter, even to places that are not there.
    const uint8_t* end = part.tiles + part.tile_bytes * size_t(of.last);
    const Reading reading = size % 2 ? Reading{} : Reading{end, part.tiles};
    const int head = of.batch > kPanel && size % 3 ? kPanel : of.batch;      // a large step comes in several calls
    set.kernels->product(part, of.first, of.last, x, head, y, of.y_stride, reading);
    if (head < of.batch)
      set.kernels->product(part, of.first, of.last, x.from(head), of.batch - head, y + size_t(head) * of.y_stride, of.y_stride, reading);
    for (int b = 0; b < of.batch; b++) {
      float* line = y + size_t(b) * of.y_stride;
      for (int row = 0; row < part.rows; row++) {
        float& got = line[part.out_index ? part.out_index[row] : row];
        const bool asked = row >= of.first * kTileRows && row < of.last * kTileRows;
        const reference::Sum sum = asked ? wanted[size_t(b) * part.rows + row] : reference::Sum{kUntouched, 0, 0};
        if (!near(got, sum, of.exact || !asked))
          fail(set.name + ": " + of.text() + ": row " + std::to_string(row) + " of " + std::to_string(b) + " is " +
               text(got) + ", not " + text(sum.value));
        got = kUntouched;
      }
      for (int i = 0; i < of.y_stride; i++)
        if (line[i] != kUntouched) fail(set.name + ": " + of.text() + ": wrote outside its rows");
    }
  }
}

void try_tensor(Random& random, const Sets& sets, Guarded* all_guards) {
  Case of = random_case(random);
  Part& part = of.part;
  Guarded* guards = random.one_in(2) ? all_guards : nullptr;
  auto guard = [&](int n) { return guards ? guards + n : nullptr; };
  const size_t shift = guards ? 0 : size_t(random.below(64));
  Exact tiles(guard(0), shift + part.tile_bytes * of.tiles);
  fill_tiles(random, of, tiles.as() + shift);
  part.tiles = tiles.as() + shift;

  Exact places(guard(1), 4 * size_t(part.rows));
  if (random.one_in(4)) {
    std::vector<int32_t> order(size_t(of.y_stride));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[size_t(random.below(int(i) + 1))]);
    std::memcpy(places.as(), order.data(), 4 * size_t(part.rows));
    part.out_index = places.as<int32_t>();
  }

  Inputs inputs(guards ? guards + 2 : nullptr, of.batch, part.columns);
  std::vector<float> x(size_t(of.batch) * part.columns);
  for (int b = 0; b < of.batch; b++) {
    float* row = x.data() + size_t(b) * part.columns;
    fill_floats(random, row, part.columns);
    if (of.extreme) std::fill(row, row + part.columns, random.one_in(2) ? 1.0f : -1.0f);
    reference::quantize(row, part.columns, inputs.blocks, inputs.places(b));
  }
  check_quantize(sets, x, of.batch, part.columns, inputs, guards ? guards + 10 : nullptr);
  if (of.exact) inputs.scale_plainly(!of.extreme && part.kind != gulliver::kZeros && part.columns <= 64 ? random.below(3) : 0);   // within 24 bits

  std::vector<reference::Sum> wanted(size_t(of.batch) * part.rows);
  for (int row = of.first * kTileRows; row < std::min(part.rows, of.last * kTileRows); row++)
    for (int b = 0; b < of.batch; b++) wanted[size_t(b) * part.rows + row] = reference::product(part, row, inputs.view(), b);
  check_product(sets, of, inputs.view(), wanted, guard(9));
}

}  // namespace

int main(int count, char** arguments) {
  const long tensors = count > 1 ? std::atol(arguments[1]) : 20000;
  const uint64_t seed = count > 2 ? uint64_t(std::atoll(arguments[2])) : 1;
  Sets sets;
  for (const auto& set : instruction_sets()) {
    const bool chosen = set.kernels && (count <= 3 || set.name == arguments[3]);
    std::printf("%-12s %s\n", set.name.c_str(), chosen ? "tested" : set.why.c_str());
    if (chosen) sets.push_back(set);
  }
  if (sets.empty() || tensors < 1) fail("nothing to test");
  const auto guards = std::make_unique<Guarded[]>(18);
  for (long n = 0; n < tensors; n++) {
    Random random(seed * 1000003 + uint64_t(n));
    try_tensor(random, sets, guards.get());
  }
  std::printf("%ld tensors on %zu instruction sets agree with the reference\n", tensors, sets.size());
}
