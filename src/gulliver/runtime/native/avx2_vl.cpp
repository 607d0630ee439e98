// The same 256 bits with AVX512's form of vpdpbusd, for processors that lack AVX-VNNI or the byte permutation that the 512-bit
// kernels need: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512vnni.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define GULLIVER_DPBUSD _mm256_dpbusd_epi32
#include "avx2.inc"

namespace gulliver {

const Kernels* avx2_vl_kernels() {
  static constexpr Kernels table{"avx2-vnni", product, plain,     quantize,  to_bytes, attend, scores, accumulate,
                                 rms_norm,    softmax, gate_silu, gate_gelu, rotate, choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* avx2_vl_kernels() { return nullptr; }
}  // namespace gulliver
#endif
