#include "gemma_torch/inspect/perplexity.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

std::vector<TokenScore> score_tokens(Engine& engine,
                                     const std::vector<int64_t>& ids,
                                     const WindowOptions& options) {
  std::vector<TokenScore> scores;
  run_windows(engine, ids, options, [&](int64_t first, int64_t count) {
    const std::vector<int64_t> wanted(ids.begin() + first, ids.begin() + first + count);
    const auto found = engine.log_prob(at::tensor(wanted, at::kLong).view({1, -1}));
    for (int64_t i = 0; i < count; ++i) {
      scores.push_back(
          {first + i, wanted[static_cast<size_t>(i)], found.const_data_ptr<float>()[i]});
    }
  });
  return scores;
}

double mean_nll(const std::vector<TokenScore>& scores) {
  check(!scores.empty(), "[perplexity] scores: expected at least one, got none");
  double sum = 0;
  for (const auto& score : scores) {
    sum -= score.log_prob;
  }
  return sum / static_cast<double>(scores.size());
}

}  // namespace gemma_torch
