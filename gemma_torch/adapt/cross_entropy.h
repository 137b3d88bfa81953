#pragma once

#include <ATen/core/Tensor.h>

namespace gemma_torch {

/// What is wanted of the gradient of an output head's weight (V, E).
struct HeadWeightGradient {
  at::Tensor rows;  // (S) int64, the rows wanted; undefined: all
  at::Tensor into;  // (S or V, E), added to; undefined: none is wanted
};

struct HeadGradient {
  double loss = 0;    // sum over rows of -ln p(target), in nats
  at::Tensor hidden;  // (N, E), in the dtype of hidden
};

/// Cross-entropy of an output head and its gradient, a few rows of logits at a time: the (N, V) logits never exist
/// together. Logits are rounded to the dtype of the weights, as the model's own; all else is in float32.
/// Shapes:  hidden (N, E), weight (V, E), targets (N) int64.   Units: `factor` multiplies gradients,
/// not the loss. In bfloat16 on the CPU, tokens that have together at most 2^-9 of a row's
/// probability are left out of the gradient of hidden, and the others summed in float32: on real
/// text that takes half as much from it as rounding gradients to bfloat16 does, and a quarter of
/// the full product's time. Where more than an eighth of all tokens matter, the full product is
/// made. Takes 192 MiB beside its inputs, or what one row of logits takes. Records nothing for
/// autograd.
/// Throws: Error if shapes or dtypes do not fit, or a target is no row of the weight.
HeadGradient cross_entropy(const at::Tensor& hidden,
                           const at::Tensor& weight,
                           const at::Tensor& targets,
                           double factor,
                           const HeadWeightGradient& weight_gradient = {});

/// The loss alone, of each row: (N) float64, nats. Shapes and throws as above.
at::Tensor cross_entropy_loss(const at::Tensor& hidden,
                              const at::Tensor& weight,
                              const at::Tensor& targets);

}  // namespace gemma_torch
