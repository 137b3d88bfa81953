#include "gemma_torch/inspect/divergence.h"

#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr int64_t kPart = 32;  // positions at once

at::Tensor log_probabilities(Engine& engine, const at::Tensor& ids) {
  engine.append(ids);
  return engine.logits(Rows::kAll).to(at::kCPU).squeeze(0).log_softmax(-1);
}

double sum_of(const at::Tensor& x) {
  return x.sum(at::kDouble).item<double>();
}

}  // namespace

Divergence compare_distributions(Engine& reference,
                                 Engine& other,
                                 const std::vector<std::vector<int64_t>>& texts,
                                 const std::function<void(int64_t, int64_t)>& on_progress) {
  const c10::InferenceMode inference;
  int64_t total = 0;
  for (const auto& text : texts) {
    const auto tokens = static_cast<int64_t>(text.size());
    check(tokens >= 2, "[divergence] text: expected at least 2 tokens, got {}", tokens);
    total += tokens - 1;
  }
  check(total > 0, "[divergence] expected texts, got none");
  check(reference.batch() == 1 && other.batch() == 1,
        "[divergence] engines: expected a batch of 1, got {} and {}",
        reference.batch(),
        other.batch());
  Divergence sums;
  for (const auto& text : texts) {
    const auto ids = at::tensor(text, at::kLong);
    reference.reset();
    other.reset();
    for (int64_t begin = 0; begin + 1 < ids.size(0); begin += kPart) {
      const auto count = std::min(kPart, ids.size(0) - 1 - begin);
      const auto part = ids.narrow(/*dim=*/0, begin, count).unsqueeze(0);
      const auto next = ids.narrow(/*dim=*/0, begin + 1, count).unsqueeze(1);
      const auto p = log_probabilities(reference, part), q = log_probabilities(other, part);
      sums.mean_kl += sum_of(p.exp().mul_(p - q));
      sums.same_top += sum_of(p.argmax(-1).eq(q.argmax(-1)));
      sums.reference_nll -= sum_of(p.gather(1, next));
      sums.other_nll -= sum_of(q.gather(1, next));
      sums.positions += count;
      if (on_progress) {
        on_progress(sums.positions, total);
      }
    }
  }
  const auto n = static_cast<double>(sums.positions);
  return {sums.positions,
          sums.mean_kl / n,
          sums.same_top / n,
          sums.reference_nll / n,
          sums.other_nll / n};
}

}  // namespace gemma_torch
