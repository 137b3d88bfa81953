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

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kGeneric:
      return true;
  }
  return false;
}

const RowKernels& row_kernels(Isa isa) {
  return isa == Isa::kAvx512 ? avx512::kRowKernels
         : isa == Isa::kAvx2 ? avx2::kRowKernels
                             : generic::kRowKernels;
}
#else
bool has_isa(Isa isa) {
  return isa == Isa::kGeneric;
}
const RowKernels& row_kernels(Isa) {
  return generic::kRowKernels;
}
#endif

const RowKernels& row_kernels() {
  static const RowKernels& best = row_kernels(has_isa(Isa::kAvx512) ? Isa::kAvx512
                                              : has_isa(Isa::kAvx2) ? Isa::kAvx2
                                                                    : Isa::kGeneric);
  return best;
}

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "generic";
}

}  // namespace gemma_torch::kernels
