#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/inspect/saliency.h"

namespace gemma_torch {

struct IntegrationOptions {
  at::Tensor baseline = {};  // (E) or (T, E): the embeddings that the path starts from
  bool keep_first = true;    // the first token (the BOS) stays itself on all of the path
  double tolerance = 0.005;  // of the completeness error
  int64_t steps = 512;       // gradients at most; at least kFewestSteps
  int64_t tokens = 256;      // of one pass: as many points of the path as fit
  /// Told of the gradients computed and of `steps`; false stops.
  std::function<bool(int64_t done, int64_t most)> on_progress = {};

  static constexpr int64_t kFewestSteps = 17;  // eight intervals of three points each
};

struct IntegratedGradients {
  double value = 0, baseline = 0;  // of the target at either end of the path
  at::Tensor scores = {};          // (T) float64
  int64_t steps = 0;               // gradients computed

  /// How far the scores' sum is from value - baseline, as a share of that.
  double completeness_error() const;
};

/// Integrated gradients (Sundararajan and others, 2017): of each token, its way from the baseline
/// times the mean gradient along the straight line to its embedding.
///
/// The mean is Simpson's rule, on intervals that are halved where they are wrong: the target's
/// values at their ends tell what an interval's integral has to be. This ends once the errors of
/// all intervals, none set off against another, are within the tolerance, or at `steps`. From zeros
/// in the place of every token it may not end before: the norms make the target jump near them.
/// Memory: as embedding_gradient, of `tokens` tokens (or one row, if that is longer).
/// Throws: as embedding_gradient; Error for a baseline of another shape, fewer steps than
///         kFewestSteps, tokens below 1, a path of no length; where it was stopped.
IntegratedGradients integrated_gradients(Gemma3Model model,
                                         const std::vector<int64_t>& ids,
                                         const SaliencyTarget& target,
                                         const IntegrationOptions& options);

}  // namespace gemma_torch
