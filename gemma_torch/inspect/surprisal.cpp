#include "gemma_torch/inspect/surprisal.h"

#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <numbers>

#include "gemma_torch/inspect/divergence.h"

namespace gemma_torch {

std::vector<TokenSurprisal> surprisals(Engine& engine,
                                       const std::vector<int64_t>& ids,
                                       WindowOptions options) {
  const c10::InferenceMode inference;
  options.step = kDivergenceRows;
  std::vector<TokenSurprisal> found;
  run_windows(engine, ids, options, [&](int64_t first, int64_t count) {
    const std::vector<int64_t> wanted(ids.begin() + first, ids.begin() + first + count);
    const auto log_p = log_probabilities(engine);  // (count, V)
    const auto own = log_p.gather(/*dim=*/1, at::tensor(wanted, at::kLong).unsqueeze(1));
    const auto ranks = log_p.gt(own).sum(/*dim=*/1);
    const auto entropy = log_p.exp().mul_(log_p).sum(/*dim=*/1, /*keepdim=*/false, at::kDouble);
    for (int64_t i = 0; i < count; ++i) {
      const double log_prob = own.const_data_ptr<float>()[i];
      found.push_back({.score = {first + i, wanted[static_cast<size_t>(i)], log_prob},
                       .bits = -log_prob / std::numbers::ln2,
                       .entropy_bits = -entropy.const_data_ptr<double>()[i] / std::numbers::ln2,
                       .rank = ranks.const_data_ptr<int64_t>()[i] + 1});
    }
  });
  return found;
}

}  // namespace gemma_torch
