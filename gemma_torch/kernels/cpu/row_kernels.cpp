#include "gemma_torch/kernels/cpu/row_kernels.h"

namespace gemma_torch::kernels {

namespace generic {
extern const RowKernels kRowKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}
#endif

const RowKernels& row_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
    case Isa::kAvx512:
      return avx512::kRowKernels;
    case Isa::kAvx2:
      return avx2::kRowKernels;
#endif
    default:
      return generic::kRowKernels;
  }
}

const RowKernels& row_kernels() {
  static const RowKernels& best = row_kernels(best_isa());
  return best;
}

}  // namespace gemma_torch::kernels
