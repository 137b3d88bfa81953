#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <vector>

#include "gemma_torch/base/tensor_map.h"

namespace gemma_torch {

/// A parameter that an optimiser steps, or rows of one.
struct TrainedTensor {
  std::string name = {};     // Hugging Face's or PEFT's
  at::Tensor parameter;      // float32 or bfloat16
  bool decays = true;        // weight decay; off for norms
  at::Tensor rows = {};      // (S) int64 of a (V, E) parameter; undefined: all of it
  at::Tensor gradient = {};  // (S, E) float32, of such rows; otherwise the parameter's own .grad
};

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.01;
  /// Of moments and of what is stepped. float32: a bfloat16 parameter has a float32 master copy, of which it is the
  /// rounded image. bfloat16: a bfloat16 parameter is stepped itself, see step_rounded().
  at::ScalarType state = at::kFloat;
};

/// AdamW with decoupled weight decay, in float32 through PyTorch's fused kernel.   Source: Loshchilov and Hutter 2019.
class AdamW {
 public:
  /// Throws: Error for no tensor, a beta outside [0, 1), an eps or weight_decay below 0, another
  /// dtype, a float32 parameter with a bfloat16 state.
  AdamW(std::vector<TrainedTensor> trained, const AdamWOptions& options);

  /// Euclidean norm of all gradients together; one that is not there counts as zero.
  double gradient_norm() const;

  /// One step along `factor` times the gradients, which are cleared. A tensor without a gradient stays as it is.
  void step(double learning_rate, double factor = 1);

  void clear_gradients();

  /// Master copies (parameters where there are none), moments, rows and the number of steps, by
  /// name: they share memory.
  TensorMap state() const;
  /// Takes over such a state, parameters too. Throws: Error naming the tensor that is missing, left over, or of
  /// another shape or dtype, or of other rows.
  void load(const TensorMap& state);

  const std::vector<TrainedTensor>& trained() const { return trained_; }
  int64_t steps() const { return steps_; }

 private:
  struct Slot {
    at::Tensor master;  // (the parameter itself where it is whole and of the state's dtype)
    at::Tensor exp_avg, exp_avg_sq;
  };

  at::Tensor gradient_of(const TrainedTensor& tensor) const;  // undefined: none yet
  void step_wide(size_t index, const at::Tensor& gradient, double learning_rate, double factor);
  void publish(size_t index);  // master -> parameter

  std::vector<TrainedTensor> trained_;
  std::vector<Slot> slots_;
  AdamWOptions options_;
  int64_t steps_ = 0;
};

enum class Schedule { kConstant, kLinear, kCosine };

/// Factor of the learning rate for optimiser step `step` (from 0) of `total`: from 0 up in `warmup`
/// steps, then constant, or down to 0 along a line or half a cosine, as in transformers'
/// get_{linear,cosine}_schedule_with_warmup.
double schedule_factor(Schedule schedule, int64_t step, int64_t warmup, int64_t total);

}  // namespace gemma_torch
