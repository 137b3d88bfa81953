#pragma once

#include "gemma_torch/engine/hidden_engine.h"

namespace gemma_torch {

/// Runs the modules as they are, kernel by kernel, on any device and dtype.
class EagerEngine : public HiddenEngine {
 public:
  EagerEngine(Gemma3Model model, const EngineOptions& options);

  EngineReport report(int64_t depth) const override;

 private:
  at::Tensor run(const at::Tensor& ids) override;
  at::Tensor head(const at::Tensor& x) override;
  at::Tensor observed(at::Tensor logits, int64_t end) override;

  Gemma3Model model_;
  Probe probe_;
};

/// Bytes of the weights that a step of one token reads: all but the embedding, or that too where it is the head.
int64_t step_bytes(Gemma3Model model);

}  // namespace gemma_torch
