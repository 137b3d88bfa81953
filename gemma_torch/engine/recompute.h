#pragma once

#include <memory>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// No cache, as in the plain notebook: with each append another engine starts from nothing and runs the whole sequence.
class RecomputeEngine : public Engine {
 public:
  /// `inner` must be empty.
  explicit RecomputeEngine(std::unique_ptr<Engine> inner);

  at::Tensor logits(Rows rows) override;
  at::Tensor log_prob(const at::Tensor& targets) override;
  int64_t position() const override { return static_cast<int64_t>(ids_.size()) / batch(); }
  EngineReport report(int64_t depth) const override;
  std::vector<KernelTime> profile() const override { return inner_->profile(); }
  void reset_profile() override { inner_->reset_profile(); }

 private:
  void do_append(const int64_t* ids, int64_t T) override;
  void do_top(int64_t k, std::vector<Candidate>& best) override;
  void do_rewind(int64_t position) override;
  void do_reset(const at::Tensor& first) override;
  void do_copy_from(const Engine& other) override;

  void check_fresh(const char* what) const;

  std::unique_ptr<Engine> inner_;
  std::vector<int64_t> ids_;  // (position, B): a token of every row, then the next of every row
  at::Tensor first_;          // (B) or undefined
  int64_t last_ = 0;          // tokens of the last append; 0 after reset and rewind
};

}  // namespace gemma_torch
