#pragma once

#include <array>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// What enters the projections of a model while it reads text: the mean of x x^T over all tokens.
class Calibration {
 public:
  /// Room for the sums: 24 MB a layer of the 270M model.
  explicit Calibration(Gemma3Model model);

  /// Runs the model over ids (B, T) int64. Throws: Error as Gemma3Model does.
  void add(const at::Tensor& ids);

  int64_t tokens() const { return tokens_; }

  /// Which of a layer's four inputs a projection reads, named as in a block ("W_query").
  static size_t input_of(const std::string& projection);

  /// (n, n) float32 of such an input, of n numbers a token.
  at::Tensor second_moment(int64_t layer, size_t input) const;

 private:
  // W_query, W_key, W_value; out_proj; fc1, fc2; fc3
  static constexpr std::array<Site, 4> kSites = {
      Site::kAttnIn, Site::kZ, Site::kMlpIn, Site::kMlpAct};

  Gemma3Model model_;
  std::vector<std::array<at::Tensor, kSites.size()>> sums_;  // by layer
  int64_t tokens_ = 0;
};

}  // namespace gemma_torch
