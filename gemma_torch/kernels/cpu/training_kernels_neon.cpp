#define GEMMA_TORCH_ISA neon
#define GEMMA_TORCH_ISA_VALUE Isa::kNeon
#include "gemma_torch/kernels/cpu/training_kernels.inl"
