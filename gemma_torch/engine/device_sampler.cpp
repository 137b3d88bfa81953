#include "gemma_torch/engine/device_sampler.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

namespace gemma_torch {
namespace {

// Beyond top_k, for the equals of the last one: bfloat16 logits have many.
constexpr int64_t kSpare = 128;

// Integers in the order of is_better(): by the logit, then by the lower id. All differ, so that the order of equals,
// which topk leaves open, never matters.
at::Tensor order_keys(const at::Tensor& logits) {
  const auto V = logits.size(1);
  const auto bits = (logits + 0.0).view(at::kInt);  // -0.0 becomes 0.0, which it equals
  const auto ordered = at::where(bits.lt(0), bits.bitwise_xor(0x7fffffff), bits);
  const auto from_last = at::arange(V - 1, -1, /*step=*/-1, logits.options().dtype(at::kLong));
  return ordered.to(at::kLong) * V + from_last;
}

}  // namespace

Ranked best_of(const at::Tensor& logits, int64_t k) {
  const auto V = logits.size(1);
  if (k == 1) {
    const auto ids = logits.argmax(/*dim=*/1, /*keepdim=*/true);
    return {ids, logits.gather(/*dim=*/1, ids)};
  }
  if (k == V) {
    const auto [values, ids] = logits.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    return {ids, values};
  }
  const auto keys = std::get<0>(order_keys(logits).topk(k, /*dim=*/1));  // the largest first
  const auto ids = (V - 1) - keys.remainder(V);
  return {ids, logits.gather(/*dim=*/1, ids)};
}

DeviceSampler::DeviceSampler(const Sampling& sampling,
                             int64_t batch,
                             int64_t vocab_size,
                             c10::Device device)
    : sampling_(sampling) {
  check_sampling(sampling);
  if (sampling.temperature > 0) {
    const bool all = sampling.top_k == 0 || 2 * sampling.top_k + kSpare > vocab_size;
    looked_at_ = all ? vocab_size : 2 * sampling.top_k + kSpare;
    temperature_ =
        at::full({}, sampling.temperature, at::TensorOptions(at::kDouble).device(device));
  }
  if (sampling.repetition_penalty != 1) {
    penalty_ =
        at::full({}, sampling.repetition_penalty, at::TensorOptions(at::kFloat).device(device));
    seen_ = at::zeros({batch, vocab_size}, at::TensorOptions(at::kBool).device(device));
  }
}

void DeviceSampler::see(const std::vector<std::vector<int64_t>>& histories) {
  if (!seen_.defined()) {
    return;
  }
  auto marks = at::zeros(seen_.sizes(), at::kBool);
  auto* mark = marks.mutable_data_ptr<bool>();
  for (const auto& row : histories) {
    for (const auto id : row) {
      mark[id] = true;
    }
    mark += seen_.size(1);
  }
  seen_.copy_(marks);
}

void DeviceSampler::append(const at::Tensor& ids) {
  if (seen_.defined()) {
    seen_.scatter_(/*dim=*/1, ids, true);
  }
}

at::Tensor DeviceSampler::penalised(const at::Tensor& logits) const {
  if (!seen_.defined()) {
    return logits;
  }
  const auto changed = at::where(logits.lt(0), logits * penalty_, logits / penalty_);
  return at::where(seen_, changed, logits);
}

// What filter() leaves of ranked logits (B, K) float64, zero for the others.
at::Tensor DeviceSampler::shares_of(const at::Tensor& logits) const {
  const auto k = sampling_.top_k > 0 ? std::min(sampling_.top_k, looked_at_) : looked_at_;
  const auto worst = logits.narrow(/*dim=*/1, k - 1, 1);
  const auto keep = [](const at::Tensor& shares, const at::Tensor& kept) {
    const auto left = shares.masked_fill(kept.logical_not(), 0);
    return left / left.sum(/*dim=*/1, /*keepdim=*/true);
  };
  const auto best = logits.narrow(/*dim=*/1, /*start=*/0, 1);
  auto shares = keep(((logits - best) / temperature_).exp(), logits.ge(worst));
  if (sampling_.top_p < 1) {
    const auto before = shares.cumsum(/*dim=*/1) - shares;
    shares = keep(shares, before.lt(sampling_.top_p));
  }
  if (sampling_.min_p > 0) {
    const auto largest = shares.narrow(/*dim=*/1, /*start=*/0, 1);
    shares = keep(shares, shares.ge(largest * sampling_.min_p));
  }
  return shares;
}

at::Tensor DeviceSampler::choose(const at::Tensor& given, const at::Tensor& places) const {
  const auto logits = penalised(given);
  const auto ranked = best_of(logits, looked_at_);
  auto chosen = ranked.ids.select(/*dim=*/1, /*index=*/0);
  if (sampling_.temperature > 0) {
    const auto shares = shares_of(ranked.logits.to(at::kDouble));
    const auto passed = shares.cumsum(/*dim=*/1).le(places.unsqueeze(1)).sum(/*dim=*/1);
    const auto last = shares.gt(0).sum(/*dim=*/1) - 1;
    // Logits that are no numbers leave no share: any index will do, but it must be one.
    const auto at = at::minimum(passed, last).clamp_min(0).unsqueeze(1);
    chosen = ranked.ids.gather(/*dim=*/1, at).squeeze(1);
    if (looked_at_ < logits.size(1)) {
      const auto worst = ranked.logits.select(/*dim=*/1, sampling_.top_k - 1);
      const auto lowest = ranked.logits.select(/*dim=*/1, looked_at_ - 1);
      chosen = chosen.masked_fill(lowest.ge(worst), -1);
    }
  }
  return chosen;
}

}  // namespace gemma_torch
