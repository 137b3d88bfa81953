#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch::kernels {

namespace generic {
extern const FusedKernels kFusedKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const FusedKernels kFusedKernels;
}
namespace avx512 {
extern const FusedKernels kFusedKernels;
}
namespace amx {
void begin();
void end();
void gemm_bf16(const Bf16* a,
               int64_t a_stride,
               const Bf16* const panels[2],
               int64_t k,
               float* c,
               int64_t c_stride,
               bool add);
}  // namespace amx
#elif defined(__aarch64__)
namespace neon {
extern const FusedKernels kFusedKernels;
}
#endif

const FusedKernels& fused_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return avx2::kFusedKernels;
    case Isa::kAvx512:
      return avx512::kFusedKernels;
    case Isa::kAmx: {
      static const FusedKernels with_tiles = [] {
        auto kernels = avx512::kFusedKernels;
        kernels.isa = Isa::kAmx;
        kernels.gemm = {amx::begin, amx::end, amx::gemm_bf16, kernels.gemm.f32};
        return kernels;
      }();
      return with_tiles;
    }
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon::kFusedKernels;
#endif
    default:
      return generic::kFusedKernels;
  }
}

}  // namespace gemma_torch::kernels
