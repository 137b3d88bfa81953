#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch::kernels {

namespace generic {
extern const TrainingKernels kTrainingKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TrainingKernels kTrainingKernels;
}
namespace avx512 {
extern const TrainingKernels kTrainingKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const TrainingKernels kTrainingKernels;
}
#endif

const TrainingKernels& training_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
    case Isa::kAvx512:
      return avx512::kTrainingKernels;
    case Isa::kAvx2:
      return avx2::kTrainingKernels;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon::kTrainingKernels;
#endif
    default:
      return generic::kTrainingKernels;
  }
}

}  // namespace gemma_torch::kernels
