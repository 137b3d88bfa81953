#pragma once

#include <ATen/core/Tensor.h>

namespace gemma_torch {

// Steps of a block for training on the CPU: each keeps only what its gradient needs and runs in one pass over rows.
// Differentiable once. Float32 or bfloat16 on the CPU; sums in float32 either way.

/// Whether x is such a tensor.
bool has_training_kernels(const at::Tensor& x);

/// RMSNorm over the last axis: x (..., N), scale (N) zero-centred -> (..., N).
at::Tensor norm_op(const at::Tensor& x, const at::Tensor& scale, double eps);

/// RoPE of heads laid out as products give them: x (B, T, H, D), cos and sin (T, D) float32 -> (B, T, H, D).
at::Tensor rope_op(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

/// gelu(gate) * up, gelu with tanh, of two tensors of one shape.
at::Tensor gelu_mul_op(const at::Tensor& gate, const at::Tensor& up);

/// Softmax attention of queries that see runs of keys: token t of row b sees keys oldest[b, t] .. t.
/// Shapes:  q (B, T, H, D), k and v (B, T, G, D), oldest (B or 1, T) int64 -> (B, T, H, D).
/// `scale` multiplies the scores.
at::Tensor attention_op(const at::Tensor& q,
                        const at::Tensor& k,
                        const at::Tensor& v,
                        const at::Tensor& oldest,
                        double scale);

}  // namespace gemma_torch
