// AVX2 with AVX-VNNI, its form of vpdpbusd: -mavx2 -mfma -mf16c -mavxvnni.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#define GULLIVER_DPBUSD _mm256_dpbusd_avx_epi32
#include "avx2.inc"

namespace gulliver {

const Kernels* avx2_vnni_kernels() {
  static constexpr Kernels table{"avx2-vnni", product, plain,     quantize,  to_bytes, attend, scores, accumulate,
                                 rms_norm,    softmax, gate_silu, gate_gelu, rotate, choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* avx2_vnni_kernels() { return nullptr; }
}  // namespace gulliver
#endif
