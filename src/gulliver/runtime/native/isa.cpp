#include "isa.h"

#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gulliver {


namespace {

struct Feature {
  const char* name;
  bool have;
};

// The kernels if this build has them and the machine every feature; `why` says which, or what is missing.
InstructionSet checked(const char* name, const Kernels* kernels, const char* processor,
                       std::initializer_list<Feature> features) {
  std::string have, lack;
  for (const Feature& feature : features) (feature.have ? have : lack) += std::string(" ") + feature.name;
  if (!lack.empty()) return {name, nullptr, "this machine lacks" + lack};
  if (!kernels) return {name, nullptr, std::string("this build has none: it needs ") + processor + " and a compiler that knows it"};
  return {name, kernels, "this machine has" + have};
}

#if defined(__x86_64__) || defined(__i386__)

bool bit(unsigned value, int number) { return value >> number & 1; }

struct Processor {
  bool fma = false, f16c = false, avx2 = false, avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false,
       avx512_vbmi = false, avx512_vnni = false, avx_vnni = false;
  bool registers256 = false, registers512 = false;  // saved by the operating system when it switches threads

  Processor() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    fma = bit(c, 12);
    f16c = bit(c, 29);
    if (bit(c, 27)) {  // xgetbv may be used
      unsigned low, high;
      __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      registers256 = (low & 0x06) == 0x06;
      registers512 = (low & 0xe6) == 0xe6;
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    avx2 = bit(b, 5);
    avx512f = bit(b, 16);
    avx512dq = bit(b, 17);
    avx512bw = bit(b, 30);
    avx512vl = bit(b, 31);
    avx512_vbmi = bit(c, 1);
    avx512_vnni = bit(c, 11);
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx_vnni = bit(a, 4);
  }
};

void add_native(std::vector<InstructionSet>& sets) {
  const Processor p;
  const char* name512 = "512-bit registers kept by the operating system";
  const char* name256 = "256-bit registers kept by the operating system";
  sets.push_back(checked("avx512-vnni", avx512_kernels(), "x86-64 with AVX512-VNNI",
                         {{"avx512f", p.avx512f}, {"avx512dq", p.avx512dq}, {"avx512bw", p.avx512bw}, {"avx512vl", p.avx512vl},
                          {"avx512_vbmi", p.avx512_vbmi}, {"avx512_vnni", p.avx512_vnni}, {name512, p.registers512}}));
  InstructionSet vnni = checked("avx2-vnni", avx2_vnni_kernels(), "x86-64 with AVX-VNNI",
                                {{"avx2", p.avx2}, {"fma", p.fma}, {"f16c", p.f16c}, {"avx_vnni", p.avx_vnni},
                                 {name256, p.registers256}});
  if (!vnni.kernels) {
    const InstructionSet other = checked("avx2-vnni", avx2_vl_kernels(), "x86-64 with AVX512-VNNI",
                                         {{"avx2", p.avx2}, {"fma", p.fma}, {"f16c", p.f16c}, {"avx512f", p.avx512f},
                                          {"avx512bw", p.avx512bw}, {"avx512vl", p.avx512vl},
                                          {"avx512_vnni", p.avx512_vnni}, {name512, p.registers512}});
    if (other.kernels) vnni = other;
  }
  sets.push_back(vnni);
  sets.push_back(checked("avx2", avx2_kernels(), "x86-64 with AVX2",
                         {{"avx2", p.avx2}, {"fma", p.fma}, {"f16c", p.f16c}, {name256, p.registers256}}));
  sets.push_back({"neon", nullptr, "this is not an Arm processor"});
}

#else

void add_native(std::vector<InstructionSet>& sets) {
  for (const char* name : {"avx512-vnni", "avx2-vnni", "avx2"}) sets.push_back({name, nullptr, "this is not an x86-64 processor"});
#if defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  const bool dot = getauxval(AT_HWCAP) & kDotProduct;
#elif defined(__APPLE__)
  const bool dot = true;
#else
  const bool dot = false;
#endif
  sets.push_back(checked("neon", neon_kernels(), "aarch64 with the dot product of Armv8.2", {{"asimddp", dot}}));
#else
  sets.push_back({"neon", nullptr, "this is not an Arm processor"});
#endif
}

#endif

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  add_native(sets);
  sets.push_back({"plain", plain_kernels(), "runs on every machine"});
  return sets;
}

const Kernels* choose(const char* wanted, std::string& why) {
  const bool best = !wanted || !*wanted || !std::strcmp(wanted, "auto");
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (best ? set.kernels != nullptr : set.name == wanted) {
      why = set.kernels ? set.why : "instruction set " + set.name + " cannot run here: " + set.why + "; choose auto";
      return set.kernels;
    }
    names += (names.empty() ? "" : ", ") + set.name;
  }
  why = "there is no instruction set " + std::string(wanted) + "; choose auto or one of " + names;
  return nullptr;
}

}  // namespace gulliver
