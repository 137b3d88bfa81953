#include "gemma_torch/inspect/divergence.h"

#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

Estimate estimate(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  double sum = 0, squares = 0;
  for (const auto value : values) {
    sum += value;
  }
  const auto mean = sum / n;
  for (const auto value : values) {
    squares += (value - mean) * (value - mean);
  }
  return {mean, n > 1 ? std::sqrt(squares / n / (n - 1)) : 0};
}

template <typename Value>
std::vector<double> of_each(const std::vector<PositionDivergence>& positions, Value value) {
  std::vector<double> values;
  for (const auto& position : positions) {
    values.push_back(value(position));
  }
  return values;
}

double percentile(const std::vector<double>& sorted, double share) {
  const auto place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const auto above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

KlSummary summarize_kl(std::vector<double> values) {
  KlSummary kl;
  kl.mean = estimate(values);
  std::sort(values.begin(), values.end());
  kl.median = percentile(values, 0.5);
  kl.p90 = percentile(values, 0.90);
  kl.p95 = percentile(values, 0.95);
  kl.p99 = percentile(values, 0.99);
  kl.max = values.back();
  return kl;
}

double delta_p(const PositionDivergence& at) {
  return std::exp(at.other_log_prob) - std::exp(at.reference_log_prob);
}

int64_t count_positions(const std::vector<std::vector<int64_t>>& texts) {
  int64_t total = 0;
  for (const auto& text : texts) {
    const auto tokens = static_cast<int64_t>(text.size());
    check(tokens >= 2, "[divergence] text: expected at least 2 tokens, got {}", tokens);
    total += tokens - 1;
  }
  check(total > 0, "[divergence] expected texts, got none");
  return total;
}

}  // namespace

at::Tensor log_normalized(const at::Tensor& logits) {
  auto log_p = logits - logits.amax(/*dim=*/-1, /*keepdim=*/true);
  const auto total = log_p.exp().sum(/*dim=*/-1, /*keepdim=*/true, at::kDouble);
  return log_p.sub_(total.log().to(at::kFloat));
}

at::Tensor log_probabilities(Engine& engine) {
  const auto log_p = log_normalized(engine.logits(Rows::kAll).squeeze(/*dim=*/0).to(at::kCPU));
  // One logit that is no number makes its whole row so.
  check(!log_p.select(/*dim=*/1, 0).isnan().any().item<bool>(),
        "[divergence] logits: expected numbers, got NaN");
  return log_p;
}

std::vector<PositionDivergence> diverge(const at::Tensor& log_p,
                                        const at::Tensor& log_q,
                                        const at::Tensor& next) {
  const auto kl = (log_p - log_q).mul_(log_p.exp()).sum(/*dim=*/1, /*keepdim=*/false, at::kDouble);
  const auto same = log_p.argmax(/*dim=*/1).eq(log_q.argmax(/*dim=*/1));
  const auto of_next = [&](const at::Tensor& x) {
    return x.gather(/*dim=*/1, next.unsqueeze(1)).squeeze(1).to(at::kDouble);
  };
  const auto p = of_next(log_p), q = of_next(log_q);
  std::vector<PositionDivergence> found;
  for (int64_t i = 0; i < kl.size(0); ++i) {
    found.push_back({kl.const_data_ptr<double>()[i],
                     p.const_data_ptr<double>()[i],
                     q.const_data_ptr<double>()[i],
                     same.const_data_ptr<bool>()[i]});
  }
  return found;
}

Divergence summarize(const std::vector<PositionDivergence>& positions) {
  check(!positions.empty(), "[divergence] expected positions, got none");
  using Position = PositionDivergence;
  const auto mean_of = [&](auto value) { return estimate(of_each(positions, value)); };
  Divergence found;
  found.positions = static_cast<int64_t>(positions.size());
  found.kl = summarize_kl(of_each(positions, [](const Position& at) { return at.kl; }));
  found.same_top = mean_of([](const Position& at) { return at.same_top ? 1.0 : 0.0; });
  found.delta_p = mean_of(delta_p);
  const auto square = mean_of([](const Position& at) { return delta_p(at) * delta_p(at); });
  const auto root = std::sqrt(square.value);
  found.rms_delta_p = {root, root > 0 ? square.error / (2 * root) : 0};
  found.reference_nll = mean_of([](const Position& at) { return -at.reference_log_prob; });
  found.other_nll = mean_of([](const Position& at) { return -at.other_log_prob; });
  found.nll_difference =
      mean_of([](const Position& at) { return at.reference_log_prob - at.other_log_prob; });
  return found;
}

Divergence compare_distributions(Engine& reference,
                                 Engine& other,
                                 const std::vector<std::vector<int64_t>>& texts,
                                 const std::function<void(int64_t, int64_t)>& on_progress) {
  const c10::InferenceMode inference;
  const auto total = count_positions(texts);
  check(reference.batch() == 1 && other.batch() == 1,
        "[divergence] engines: expected a batch of 1, got {} and {}",
        reference.batch(),
        other.batch());
  std::vector<PositionDivergence> found;
  for (const auto& text : texts) {
    const auto ids = at::tensor(text, at::kLong);
    reference.reset();
    other.reset();
    for (int64_t begin = 0; begin + 1 < ids.size(0); begin += kDivergenceRows) {
      const auto count = std::min(kDivergenceRows, ids.size(0) - 1 - begin);
      const auto part = ids.narrow(/*dim=*/0, begin, count).unsqueeze(0);
      reference.append(part);
      other.append(part);
      const auto rows = diverge(log_probabilities(reference),
                                log_probabilities(other),
                                ids.narrow(/*dim=*/0, begin + 1, count));
      found.insert(found.end(), rows.begin(), rows.end());
      if (on_progress) {
        on_progress(static_cast<int64_t>(found.size()), total);
      }
    }
  }
  return summarize(found);
}

}  // namespace gemma_torch
