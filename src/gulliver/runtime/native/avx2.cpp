// AVX2 with FMA and F16C: -mavx2 -mfma -mf16c.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "avx2.inc"

namespace gulliver {

const Kernels* avx2_kernels() {
  static constexpr Kernels table{"avx2",   product, plain,     quantize,  to_bytes, attend, scores, accumulate,
                                 rms_norm, softmax, gate_silu, gate_gelu, rotate, choose_codes, fit_scales};
  return &table;
}

}  // namespace gulliver

#else
namespace gulliver {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace gulliver
#endif
