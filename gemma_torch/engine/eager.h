#pragma once

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// Runs the modules as they are, kernel by kernel, on any device and dtype.
class EagerEngine : public Engine {
 public:
  EagerEngine(Gemma3Model model, const EngineOptions& options);

  at::Tensor logits(Rows rows) override;
  at::Tensor log_prob(const at::Tensor& targets) override;
  int64_t position() const override { return cache_.position(); }
  EngineReport report(int64_t depth) const override;
  const KvCache& cache() const { return cache_; }

 private:
  void do_append(const int64_t* ids, int64_t T) override;
  void do_rewind(int64_t position) override;
  void do_reset(const at::Tensor& first) override;
  void do_copy_from(const Engine& other) override;

  void forget_last();

  Gemma3Model model_;
  KvCache cache_;
  Probe probe_;
  at::Tensor hidden_;       // (B, T, E) of the last append; undefined after reset and rewind
  at::Tensor last_logits_;  // (B, 1, V) once asked for: every row of a batch asks anew
};

}  // namespace gemma_torch
