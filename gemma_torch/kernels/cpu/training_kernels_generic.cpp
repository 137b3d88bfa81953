#define GEMMA_TORCH_ISA generic
#define GEMMA_TORCH_ISA_VALUE Isa::kGeneric
#include "gemma_torch/kernels/cpu/training_kernels.inl"
