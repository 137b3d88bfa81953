#pragma once

#include <functional>
#include <vector>

#include "gemma_torch/adapt/batches.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

struct TrainingPassOptions {
  /// Keeps each block's input alone and runs the block again when its gradients are due (activation checkpointing):
  /// a third more work in the blocks, a fraction of the memory.
  bool recompute = false;
  /// Runs the modules' own forward on the CPU too.
  bool written_out = false;
};

/// Told of a block whose parameters' gradients this pass has completed, from the last layer down.
using OnBlock = std::function<void(int64_t layer)>;

/// Runs a model for training: the same modules and numbers as Gemma3Model::forward and autograd, block by block, with
/// steps that keep little and a head whose logits never exist together. A parameter with requires_grad gets its
/// gradient; blocks below the first such one keep nothing. On the CPU, in float32 or bfloat16, blocks are made of the
/// steps in training_ops.h around the model's Linears; elsewhere they run the modules' own forward.
class TrainingPass {
 public:
  /// Throws: Error if the head has no weight (quantised models).
  explicit TrainingPass(Gemma3Model model, const TrainingPassOptions& options = {});

  /// Gradients go to these rows (S) int64 of the tied embedding alone, into `gradient` (S, E); the weight itself then
  /// takes none.
  void limit_embedding(const at::Tensor& rows, const at::Tensor& gradient);

  /// Adds `factor` times the gradient of the summed loss to .grad of the parameters. Returns that sum over the batch's
  /// targets, -ln p in nats, not multiplied. A batch without targets adds nothing.
  double backward(const TrainingBatch& batch, double factor, const OnBlock& on_block = {});

  /// -ln p of each target, (N) float64, in nats, without gradients.
  at::Tensor losses(const TrainingBatch& batch);

 private:
  struct Shared;
  struct Step {  // of a pass: a block's input and output, while its gradients are due
    int64_t layer;
    at::Tensor input, output;
    at::Tensor random;  // the generator's state before it, where it is run again
  };

  Shared share(const TrainingBatch& batch) const;
  at::Tensor embed(const at::Tensor& ids) const;
  at::Tensor block(int64_t layer, const at::Tensor& x, const Shared& shared) const;
  at::Tensor attention(GroupedQueryAttentionImpl& att,
                       const at::Tensor& x,
                       const Shared& shared) const;
  Step run(int64_t layer, const at::Tensor& x, const Shared& shared, bool wants_input) const;
  at::Tensor back(Step& step, const at::Tensor& slope, const Shared& shared) const;
  at::Tensor head_back(const at::Tensor& x,
                       const TrainingBatch& batch,
                       double factor,
                       double& loss);
  void embedding_back(const at::Tensor& ids, const at::Tensor& slope);
  at::Tensor norm(const RMSNorm& norm, const at::Tensor& x) const;

  Gemma3Model model_;
  TrainingPassOptions options_;
  bool kernels_ = false;
  at::Tensor rows_, rows_gradient_, place_of_;  // of the embedding, where it is limited
};

}  // namespace gemma_torch
