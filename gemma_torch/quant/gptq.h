#pragma once

#include <ATen/core/Tensor.h>

#include "gemma_torch/quant/round_codes.h"

namespace gemma_torch {

/// The upper triangular U (n, n) float32 with (H + damping)^-1 = U^T U, where H (n, n) is the mean of x x^T over the
/// inputs x of a projection. Computed in float64.   Throws: Error if H is not a matrix of finite numbers.
at::Tensor inverse_factor(const at::Tensor& second_moment);

/// GPTQ: rounds a matrix (out, n) column by column, and lets the columns that are still to come make up for each
/// one's error, so that the product with inputs of that second moment changes least. A group's scale is the best of
/// some, tried when its first column is reached, errors weighted by what they will cost. Out is a multiple of 16.
/// Source: Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained transformers (2023).
Codes round_compensated(const at::Tensor& weight, const at::Tensor& factor, kernels::Format format);

}  // namespace gemma_torch
