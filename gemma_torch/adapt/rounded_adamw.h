#pragma once

#include <ATen/core/Tensor.h>

namespace gemma_torch {

struct RoundedStep {
  double learning_rate, beta1, beta2, eps, weight_decay;
  double factor;   // of gradients
  int64_t step;    // from 1
  int64_t stream;  // which tensor of several: each draws its own chance
};

struct RoundedTensors {
  at::Tensor parameter, exp_avg, exp_avg_sq;  // contiguous, bfloat16, of one shape
  at::Tensor gradient;                        // float32 or bfloat16, of that shape
};

/// One AdamW step without master copies: in float32, whose results are rounded by chance to a
/// neighbour in bfloat16, so that they are right in the mean. The chance is a hash of step, stream
/// and place: the same step always ends in the same bits, on any number of threads.
/// Throws: Error for other dtypes or shapes.   Source: stochastic rounding, Gupta et al. 2015.
void step_rounded(const RoundedTensors& tensors, const RoundedStep& step);

/// The same in PyTorch's operations, on any device; where float32 roundings differ, now and then the
/// other neighbour.
void step_rounded_written_out(const RoundedTensors& tensors, const RoundedStep& step);

}  // namespace gemma_torch
