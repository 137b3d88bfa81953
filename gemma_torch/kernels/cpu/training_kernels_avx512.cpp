#define GEMMA_TORCH_ISA avx512
#define GEMMA_TORCH_ISA_VALUE Isa::kAvx512
#include "gemma_torch/kernels/cpu/training_kernels.inl"
