#pragma once

#include <ATen/core/Tensor.h>

namespace gemma_torch {

// What the modules run instead of their written-out forms where no gradient can be asked for (InferenceMode) and the
// tensors are float32 or bfloat16 on the CPU: the same numbers within rounding, in one pass. Everywhere else, under
// training, tracing and on other devices, the written-out forms run, but for the norms on CUDA.

/// Whether x is such a tensor.
bool has_kernels(const at::Tensor& x);

/// y = x W^T for one row x (1, .., 1, in) and W (out, in) of the same dtype, both contiguous: (1, .., 1, out).
/// Reads W at the speed of memory, which the general product does not.
bool is_row_product(const at::Tensor& x, const at::Tensor& weight);
at::Tensor row_product(const at::Tensor& x, const at::Tensor& weight);

/// RMSNorm over the last axis, sums in float32.
at::Tensor rms_norm_kernel(const at::Tensor& x, const at::Tensor& scale, double eps);

/// The same through LibTorch's own fused kernel, of any dtype: three kernels in place of ten where nothing but their number
/// counts, on CUDA devices.
bool has_fused_norm(const at::Tensor& x);
at::Tensor rms_norm_fused(const at::Tensor& x, const at::Tensor& scale, double eps);

/// RoPE of x (B, H, T, D) with cos and sin (T, D) float32, in float32.
at::Tensor rope_kernel(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace gemma_torch
