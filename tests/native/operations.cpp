// The other operations of every instruction set that this machine has, at all small and some large sizes, compared with sums
// in double. All memory has its exact size.
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "reference.h"

using namespace gulliver;

namespace {

std::mt19937 generator(7);
int failures = 0;

void demand(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "operations: %s\n", what.c_str());
  failures++;
}

float drawn(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

// An array of exact size, on the heap.
template <class T>
struct Array {
  Exact memory;
  T* at;
  int count;
  Array(int count, const std::function<T()>& draw)
      : memory(nullptr, sizeof(T) * size_t(count)), at(memory.template as<T>()), count(count) {
    for (int i = 0; i < count; i++) at[i] = draw();
  }
};

void close(const std::string& what, const float* got, const std::vector<double>& wanted, double relative, double absolute) {
  for (size_t i = 0; i < wanted.size(); i++)
    if (!(std::fabs(got[i] - wanted[i]) <= relative * std::fabs(wanted[i]) + absolute))
      return demand(false, what + ", number " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                               std::to_string(wanted[i]));
}

int8_t any_byte() { return int8_t(int(generator() % 255) - 127); }

void check_scores(const Kernels& kernels, int head_dim) {
  const Array<int8_t> q(head_dim, any_byte);
  const Array<uint8_t> keys(head_dim * kCacheTokens, [] { return uint8_t(generator() % 4 ? generator() : generator() % 2 ? 255 : 0); });
  Array<int32_t> out(kCacheTokens, [] { return -1; });
  int32_t q_sum = 0;
  for (int d = 0; d < head_dim; d++) q_sum += q.at[d];
  kernels.scores(q.at, q_sum, keys.at, head_dim, out.at);
  for (int t = 0; t < kCacheTokens; t++) {
    int32_t dot = 0;
    for (int d = 0; d < head_dim; d++) dot += (keys.at[d / 4 * 64 + 4 * t + d % 4] - 128) * q.at[d];
    demand(dot == out.at[t], std::string("scores, ") + kernels.name + ", head_dim " + std::to_string(head_dim));
  }
}

// What is gathered from 16 values with weights of 7 bits may differ by half a step of each weight.
double half_steps(const float* weight) {
  float most = 0;
  for (int t = 0; t < kCacheTokens; t++) most = std::fmax(most, weight[t]);
  return most / 127 * 0.5001;
}

void check_accumulate(const Kernels& kernels, int head_dim) {
  Array<float> weight(kCacheTokens, [] { return generator() % 3 ? drawn(0, 2) : 0.0f; });
  const Array<int8_t> values(kCacheTokens * head_dim, [] { return int8_t(generator()); });
  Array<float> sum(head_dim, [] { return drawn(-1, 1); });
  const std::vector<float> before(sum.at, sum.at + head_dim);
  kernels.accumulate(weight.at, values.at, head_dim, sum.at);
  for (int d = 0; d < head_dim; d++) {
    double wanted = before[d], slack = 1e-3;
    for (int t = 0; t < kCacheTokens; t++) {
      const int value = values.at[4 * (t / 4 * head_dim + d) + t % 4];
      wanted += double(weight.at[t]) * value;
      slack += half_steps(weight.at) * std::abs(value);
    }
    demand(std::fabs(sum.at[d] - wanted) <= slack, std::string("accumulate, ") + kernels.name + ", head_dim " + std::to_string(head_dim));
  }
}

void check_to_bytes(const Kernels& kernels, int count) {
  for (const float size : {1.0f, 1e-33f, 1e30f}) {
    Array<float> x(count, [&] { return drawn(-size, size); });
    const bool strange = size == 1.0f && count % 5 == 0;
    if (strange) x.at[count / 2] = std::nanf("");
    Array<int8_t> out(count, [] { return int8_t(99); });
    const float scale = kernels.to_bytes(x.at, count, out.at);
    float most = 0;
    for (int i = 0; i < count; i++) most = x.at[i] > most ? x.at[i] : -x.at[i] > most ? -x.at[i] : most;
    bool right = std::isfinite(scale) && (most < 1e-30f ? scale == 0 : std::fabs(scale * 127 - most) <= 1e-6f * most);
    for (int i = 0; i < count; i++) {
      const bool number = !std::isnan(x.at[i]);
      right &= out.at[i] >= -127 && (number ? std::fabs(double(out.at[i]) * scale - x.at[i]) <= 0.5001 * scale + 1e-30 : out.at[i] == -127);
    }
    demand(right, std::string("to_bytes, ") + kernels.name + ", " + std::to_string(count) + " floats of size " + std::to_string(size));
  }
}

// One head's answer against sums in double.
void compare_attend(const std::string& what, const uint8_t* cache, size_t block_bytes, const int32_t* places, int first, int last,
                    int head_dim, const int8_t* query, float query_scale, const float* out) {
  const int blocks = (last + kCacheTokens - 1) / kCacheTokens;
  const size_t values_at = size_t(kCacheTokens) * head_dim, scales_at = 2 * values_at;
  std::vector<double> weight, wanted(size_t(head_dim), 0.0), slack(size_t(head_dim), 0.0);
  double most = -1e30, total = 0;
  for (int pass = 0; pass < 2; pass++) {
    for (int t = first; t < last; t++) {
      const uint8_t* block = cache + block_bytes * size_t(places[t / kCacheTokens]);
      float scale;
      std::memcpy(&scale, block + scales_at + 4 * (t % kCacheTokens), 4);
      double dot = 0;
      for (int d = 0; d < head_dim; d++) dot += (block[d / 4 * 64 + 4 * (t % kCacheTokens) + d % 4] - 128) * query[d];
      const double score = dot * scale * query_scale;
      if (pass == 0) most = std::fmax(most, score);
      else weight.push_back(std::exp(score - most)), total += weight.back();
    }
  }
  for (int b = first / kCacheTokens; b < blocks; b++) {
    const uint8_t* block = cache + block_bytes * size_t(places[b]);
    float by[kCacheTokens] = {};
    for (int t = 0; t < kCacheTokens; t++) {
      const int at = b * kCacheTokens + t;
      float scale;
      std::memcpy(&scale, block + scales_at + 4 * (kCacheTokens + t), 4);
      if (at >= first && at < last) by[t] = float(weight[size_t(at - first)] / total * scale);
    }
    for (int d = 0; d < head_dim; d++)
      for (int t = 0; t < kCacheTokens; t++) {
        const int value = int8_t(block[values_at + 4 * (t / 4 * size_t(head_dim) + d) + t % 4]);
        wanted[d] += double(by[t]) * value;
        slack[d] += half_steps(by) * std::abs(value);
      }
  }
  for (int d = 0; d < head_dim; d++)
    demand(std::fabs(out[d] - wanted[d]) <= slack[d] + 1e-5, what + ", head_dim " +
           std::to_string(head_dim) + ", tokens " + std::to_string(first) + " to " + std::to_string(last) + ", number " +
           std::to_string(d) + " is " + std::to_string(out[d]) + ", not " + std::to_string(wanted[d]));
}

// A cache of some blocks with random bytes, of which a sequence has a few in any order.
void check_attend(const Kernels& kernels, int head_dim, int first, int last, int heads) {
  const int blocks = (last + kCacheTokens - 1) / kCacheTokens, all = blocks + 2;
  const size_t values_at = size_t(kCacheTokens) * head_dim, scales_at = 2 * values_at, block_bytes = scales_at + 8 * kCacheTokens;
  Array<uint8_t> cache(int(block_bytes) * all, [] { return uint8_t(generator()); });
  const Array<int32_t> places(blocks, [n = blocks + 1]() mutable { return n--; });
  for (int b = -2; b < blocks; b++)
    for (int n = 0; n < 2 * kCacheTokens; n++) {
      const int left = last - b * kCacheTokens;
      const float scale = b >= 0 && n % kCacheTokens < left ? drawn(0.001f, 0.01f) : std::nanf("");  // not in use
      std::memcpy(cache.at + block_bytes * size_t(b < 0 ? b + 2 : places.at[b]) + scales_at + 4 * n, &scale, 4);
    }
  const Array<int8_t> query(head_dim * heads, any_byte);
  Array<float> scores(blocks * kCacheTokens * heads, [] { return 7.0f; }), out(head_dim * heads, [] { return 7.0f; });
  Array<Query> queries(heads, [] { return Query{0.01f, 0}; });
  for (int i = 0; i < head_dim * heads; i++) queries.at[i / head_dim].sum += query.at[i];
  for (int h = 0; h < heads; h++) queries.at[h].scale += 0.002f * float(h);
  kernels.attend({cache.at, block_bytes, places.at, first, last, head_dim, heads, query.at, queries.at, scores.at, out.at});
  for (int h = 0; h < heads; h++)
    compare_attend(std::string("attend, ") + kernels.name + ", head " + std::to_string(h) + " of " + std::to_string(heads), cache.at,
                   block_bytes, places.at, first, last, head_dim, query.at + h * head_dim, queries.at[h].scale, out.at + h * head_dim);
}

void check_attention(const Kernels& kernels) {
  for (int head_dim = 4; head_dim <= 264; head_dim += 4) {
    check_scores(kernels, head_dim);
    check_accumulate(kernels, head_dim);
  }
  for (const int head_dim : {4, 8, 36, 64, 80, 128, 256})
    for (const int last : {1, 2, 15, 16, 17, 33, 100})
      for (const int first : {0, 1, 16, 31})
        if (first < last) check_attend(kernels, head_dim, first, last, 1 + (head_dim / 4 + first + last) % kMostHeads);
  for (int count = 1; count <= 130; count++) check_to_bytes(kernels, count);
}

void check_float(const Kernels& kernels, int count) {
  const std::string at = std::string(kernels.name) + ", " + std::to_string(count) + " floats";
  const float size = count % 3 == 0 ? 100.0f : 4.0f;
  const Array<float> x(count, [&] { return drawn(-size, size); }), weight(count, [] { return drawn(-2, 2); });
  Array<float> out(count, [] { return 0.0f; });
  double squares = 0, most = x.at[0], total = 0;
  for (int i = 0; i < count; i++) squares += double(x.at[i]) * x.at[i], most = std::fmax(most, x.at[i]);
  std::vector<double> norm, power, silu, gelu;
  for (int i = 0; i < count; i++) {
    const double v = x.at[i], by = weight.at[i];
    norm.push_back(v / std::sqrt(squares / count + 1e-5f) * by);
    power.push_back(std::exp(v - most));
    total += power.back();
    silu.push_back(v / (1 + std::exp(-v)) * by);
    gelu.push_back(0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))) * by);
  }
  kernels.rms_norm(x.at, weight.at, 1e-5f, count, out.at);
  close("rms_norm, " + at, out.at, norm, 1e-5, 1e-7);
  kernels.gate_silu(x.at, weight.at, count, out.at);
  close("gate_silu, " + at, out.at, silu, 1e-5, 1e-30);
  kernels.gate_gelu(x.at, weight.at, count, out.at);
  close("gate_gelu, " + at, out.at, gelu, 1e-5, 1e-5);
  Array<float> scores(count, [] { return 0.0f; });
  std::memcpy(scores.at, x.at, 4 * size_t(count));
  const float sum = kernels.softmax(scores.at, count);
  close("softmax, " + at, scores.at, power, 1e-5, 1e-37);
  close("the sum of softmax, " + at, &sum, {total}, 1e-5, 0);
}

void check_rotate(const Kernels& kernels, int half) {
  Array<float> x(2 * half, [] { return drawn(-3, 3); });
  const Array<float> cosine(half, [] { return drawn(-1, 1); }), sine(half, [] { return drawn(-1, 1); });
  std::vector<double> wanted(size_t(2) * half);
  for (int i = 0; i < half; i++) {
    wanted[i] = double(x.at[i]) * cosine.at[i] - double(x.at[i + half]) * sine.at[i];
    wanted[i + half] = double(x.at[i + half]) * cosine.at[i] + double(x.at[i]) * sine.at[i];
  }
  kernels.rotate(x.at, cosine.at, sine.at, half);
  close(std::string("rotate, ") + kernels.name, x.at, wanted, 1e-5, 1e-6);
}

double plain_value(const uint8_t* data, int kind, size_t at) {
  if (kind == kFloat32) {
    float value;
    std::memcpy(&value, data + 4 * at, 4);
    return value;
  }
  const int half = data[2 * at] | data[2 * at + 1] << 8;
  const int fields = kind == kBfloat16 ? 7 : 10, bias = kind == kBfloat16 ? 127 : 15;
  const int exponent = (half & 0x7fff) >> fields, fraction = half & ((1 << fields) - 1);
  const double size = exponent ? std::ldexp(fraction + (1 << fields), exponent - bias - fields) : std::ldexp(fraction, 1 - bias - fields);
  return half & 0x8000 ? -size : size;
}

void check_plain(const Kernels& kernels, int kind, int rows, int columns, int batch) {
  const size_t shift = generator() % 2, width = kind == kFloat32 ? 4 : 2;  // any alignment
  Exact memory(nullptr, shift + width * size_t(rows) * columns);
  for (size_t i = 0; i < size_t(rows) * columns; i++) {
    uint32_t bits = uint32_t(generator());
    if (kind == kFloat32) bits = (bits & 0x80ffffff) | 0x3f000000;
    if (kind == kBfloat16) bits = (bits & 0x807f) | 0x3f00;
    if (kind == kFloat16) bits &= i % 5 ? 0xbfff : 0x83ff;  // below 2, or subnormal
    std::memcpy(memory.as() + shift + width * i, &bits, width);
  }
  const Plain weight{memory.as() + shift, rows, columns, kind};
  const int first = rows > 2 ? 1 : 0, y_stride = rows + 3;
  const Array<float> x(batch * columns, [] { return drawn(-1, 1); });
  Array<float> y(batch * y_stride, [] { return 12345.0f; });
  kernels.plain(weight, first, rows, x.at, columns, batch, y.at, y_stride);
  for (int b = 0; b < batch; b++) {
    std::vector<double> wanted(size_t(y_stride), 12345.0);
    for (int row = first; row < rows; row++) {
      wanted[row] = 0;
      for (int i = 0; i < columns; i++)
        wanted[row] += plain_value(memory.as() + shift, kind, size_t(row) * columns + i) * x.at[b * columns + i];
    }
    close(std::string("plain, ") + kernels.name + ", kind " + std::to_string(kind), y.at + size_t(b) * y_stride, wanted, 1e-6, 1e-6 * columns);
  }
}

// A codebook of whole numbers as a table of places, half a unit apart.
struct Codebook {
  std::vector<int> entries;
  Array<float> level;
  Array<uint8_t> code;
  Codebook(int reach, int levels) : level(4 * reach + 1, [] { return 0.0f; }), code(4 * reach + 1, [] { return uint8_t(0); }) {
    for (int n = 0; n < levels; n++) entries.push_back(-reach + 2 * reach * n / (levels - 1));
    for (int place = 0; place <= 4 * reach; place++) {
      for (int n = 1; n < levels; n++)
        if (place - 2 * reach > entries[n - 1] + entries[n]) code.at[place] = uint8_t(n);
      level.at[place] = float(entries[code.at[place]]);
    }
  }
  Levels view() const { return {level.count, level.at, code.at, 2.0f}; }
  double nearest(double x) const {
    double found = entries[0];
    for (const int one : entries) found = std::fabs(x - one) < std::fabs(x - found) ? one : found;
    return found;
  }
};

void check_choose(const Kernels& kernels, int columns, int rows, bool backwards, const Codebook* table, bool passing) {
  const std::string at = std::string("choose_codes, ") + kernels.name + ", " + std::to_string(columns) + " x " + std::to_string(rows);
  const int top = 15;
  Array<float> local(columns * rows, [] { return drawn(-8, 8); });
  const Array<float> base(columns * rows, [] { return drawn(-8, 8); }), effect(columns * columns, [] { return drawn(-0.1f, 0.1f); });
  const Array<float> zero(rows, [&] { return table ? 0.0f : float(generator() % 16); }), minimum(rows, [] { return drawn(0, 1); });
  const Array<float> scale(rows, [] { return generator() % 20 ? drawn(0.1f, 1.0f) : 0.0f; });
  Array<uint8_t> out(columns * rows, [] { return uint8_t(255); });
  const int strange = rows > 3 ? rows / 2 : rows;  // a row that is not finite
  if (strange < rows) {
    local.at[strange] = std::nanf("");
    local.at[(columns - 1) * rows + strange] = -HUGE_VALF;
  }
  std::vector<double> x(local.at, local.at + columns * rows);
  kernels.choose_codes({columns, rows, backwards, local.at, base.at, passing ? effect.at : nullptr, scale.at, zero.at, minimum.at,
                        table ? table->view() : Levels{top + 1, nullptr, nullptr, 0.0f}, out.at});
  for (int row = 0; row < rows; row++)
    for (int n = 0; n < columns; n++) {
      const int i = backwards ? columns - 1 - n : n, place = i * rows + row, code = out.at[place];
      const double by = scale.at[row], scaled = by != 0 ? (x[place] + minimum.at[row]) / by + zero.at[row] : zero.at[row];
      if (code > top) return demand(false, at + ": a code that there is not");
      if (row == strange) continue;
      const double level = table ? table->entries[code] : code, best = table ? table->nearest(scaled) : std::fmin(std::fmax(std::nearbyint(scaled), 0), top);
      const double value = (level - zero.at[row]) * by - minimum.at[row];
      if (std::fabs(scaled - level) > std::fabs(scaled - best) + 1e-3 || std::fabs(value - local.at[place]) > 1e-4)
        return demand(false, at + ": code " + std::to_string(code) + " for " + std::to_string(scaled));
      if (!passing) continue;
      for (int j = backwards ? 0 : i + 1; j < (backwards ? i : columns); j++)
        x[size_t(j) * rows + row] += double(effect.at[i * columns + j]) * (local.at[place] - base.at[place]);
    }
}

void check_fit(const Kernels& kernels, int columns, int groups, const Codebook& table, bool shared) {
  const Array<float> x(groups * columns, [] { return drawn(-3, 3); }), d(shared ? columns : groups * columns, [] { return drawn(0.1f, 2); });
  const Array<float> shrinks(3, [by = 1.2f]() mutable { return by -= 0.2f; });
  Array<float> scales(groups, [] { return -1.0f; });
  const float top = float(table.entries.back());
  kernels.fit_scales({groups, columns, x.at, d.at, shared ? 0 : columns, table.view(), top, shrinks.at, 3, 0, scales.at});
  for (int n = 0; n < groups; n++) {
    double peak = 0, least = HUGE_VAL, found = HUGE_VAL;
    for (int i = 0; i < columns; i++) peak = std::fmax(peak, std::fabs(x.at[n * columns + i]));
    for (int trial = 0; trial <= 3; trial++) {
      const double scale = trial < 3 ? peak * shrinks.at[trial] / top : scales.at[n];
      double error = 0;
      for (int i = 0; i < columns; i++) {
        const double one = x.at[n * columns + i], off = table.nearest(one / scale) * scale - one;
        error += off * off * d.at[shared ? i : n * columns + i];
      }
      if (trial == 3) found = error;
      else least = std::fmin(least, error);
    }
    demand(found <= least * 1.001 + 1e-9, std::string("fit_scales, ") + kernels.name + ", " + std::to_string(columns) + " columns");
  }
}

void check_codes(const Kernels& kernels) {
  const Codebook table(127, 16);
  for (const int columns : {1, 2, 3, 4, 5, 16, 33, 64, 127, 256})
    for (const int rows : {1, 15, 64, 67, 200})
      for (const bool backwards : {false, true})
        for (const bool passing : {false, true}) {
          check_choose(kernels, columns, rows, backwards, &table, passing);
          check_choose(kernels, columns, rows, backwards, nullptr, passing);
          check_fit(kernels, columns, rows / 4 + 1, table, passing);
        }
}

void check_choice() {
  std::string why;
  const Kernels* best = choose("auto", why);
  demand(best && !why.empty() && choose(nullptr, why) == best && choose("", why) == best, "auto chooses nothing");
  demand(choose("plain", why) == plain_kernels(), "plain cannot be forced");
  demand(!choose("avx3", why) && why.find("avx512-vnni, avx2-vnni, avx2, neon, plain") != std::string::npos, "no list of names: " + why);
  int first = 1;
  for (const auto& set : instruction_sets()) {
    demand(choose(set.name.c_str(), why) == set.kernels, set.name + " cannot be forced");
    demand(!set.why.empty() && (set.kernels || why.find(set.why) != std::string::npos), set.name + " lacks a reason");
    demand(!set.kernels || set.name == set.kernels->name, set.name + " is called otherwise by its kernels");
    if (set.kernels && first-- == 1) demand(set.kernels == best, "the first that runs is not the choice");
  }
}

}  // namespace

int main() {
  check_choice();
  int sets = 0;
  for (const auto& set : instruction_sets()) {
    if (!set.kernels) continue;
    sets++;
    check_attention(*set.kernels);
    check_codes(*set.kernels);
    for (int count = 1; count <= 200; count++) check_float(*set.kernels, count);
    for (const int count : {576, 1024, 1537, 8192}) check_float(*set.kernels, count);
    for (int half = 1; half <= 64; half++) check_rotate(*set.kernels, half);
    for (const int kind : {kBfloat16, kFloat16, kFloat32})
      for (const int columns : {1, 3, 16, 31, 100, 512, 513, 1100})
        for (const int batch : {1, 3, 16}) check_plain(*set.kernels, kind, 1 + columns % 7, columns, batch);
  }
  if (failures) return 1;
  std::printf("all operations of %d instruction sets agree with the reference\n", sets);
}
