// Which instruction sets this build and this machine have.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace gulliver {

struct InstructionSet {
  std::string name;        // "avx512-vnni", "avx2-vnni", "avx2", "neon" or "plain"
  const Kernels* kernels;  // null when it cannot run here
  std::string why;         // what lets it run, or what is missing
};

// All of them, best first.
std::vector<InstructionSet> instruction_sets();

// The kernels called `wanted`, or the best for null, "" or "auto"; `why` is set to the reason. Null, and `why` an error text,
// when there is no such instruction set or this machine cannot run it.
const Kernels* choose(const char* wanted, std::string& why);

}  // namespace gulliver
