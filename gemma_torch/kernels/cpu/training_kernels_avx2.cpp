#define GEMMA_TORCH_ISA avx2
#define GEMMA_TORCH_ISA_VALUE Isa::kAvx2
#include "gemma_torch/kernels/cpu/training_kernels.inl"
