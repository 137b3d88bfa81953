#include "gemma_torch/engine/hidden_engine.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <bit>
#include <typeinfo>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// Rows of logits formed at a time where all positions are scored: 64 of 262,144 floats are 64 MiB.
constexpr int64_t kScoredRows = 64;

}  // namespace

KvCacheOptions cache_options(const EngineOptions& options, const at::Tensor& weight, bool fixed) {
  return {.batch = options.batch,
          .capacity = options.capacity,
          .chunk = options.chunk,
          .device = weight.device(),
          .dtype = options.kv_dtype.value_or(weight.scalar_type()),
          .fixed = fixed};
}

at::Tensor sent(const at::Tensor& tensor, c10::Device device) {
  // A copy from memory that the system may page out makes the host wait.
  return device.is_cuda() ? tensor.pin_memory().to(device, /*non_blocking=*/true)
                          : tensor.to(device);
}

int64_t pass_length(int64_t left, int64_t chunk, bool few_shapes) {
  const auto most = std::min(left, chunk);
  return few_shapes ? static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most))) : most;
}

std::string kernels_name(c10::Device device, std::string isa) {
  return device.is_cuda() ? "cuda" : device.is_mps() ? "mps" : std::move(isa);
}

HiddenEngine::HiddenEngine(const Gemma3Config& cfg, const KvCacheOptions& options)
    : Engine(options.batch, options.capacity, cfg.vocab_size), cache_(cfg, options) {}

void HiddenEngine::do_append(const int64_t* given, int64_t T) {
  const c10::InferenceMode inference;
  const auto& how = cache_.options();
  const auto ids =
      sent(at::from_blob(const_cast<int64_t*>(given), {batch(), T}, at::kLong), how.device);
  set_hidden({});
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < T;) {
    const auto length = pass_length(T - start, how.chunk, how.device.is_mps());
    parts.push_back(run(ids.narrow(/*dim=*/1, start, length)));
    start += length;
  }
  set_hidden(parts.size() == 1 ? parts[0] : at::cat(parts, /*dim=*/1));
}

at::Tensor HiddenEngine::logits(Rows rows) {
  check(hidden_.defined(), "[logits] expected an append since the last reset or rewind, got none");
  if (rows == Rows::kLast && last_logits_.defined()) {
    return last_logits_;
  }
  const c10::InferenceMode inference;
  const auto x = rows == Rows::kAll ? hidden_ : hidden_.narrow(/*dim=*/1, hidden_.size(1) - 1, 1);
  auto logits = observed(head(x), cache_.position()).to(at::kFloat);
  if (rows == Rows::kLast) {
    last_logits_ = logits;
  }
  return logits;
}

at::Tensor HiddenEngine::log_prob(const at::Tensor& targets) {
  check_targets(targets, hidden_.defined() ? hidden_.size(1) : 0);
  const c10::InferenceMode inference;
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < targets.size(1); start += kScoredRows) {
    const auto length = std::min(kScoredRows, targets.size(1) - start);
    const auto x = hidden_.narrow(/*dim=*/1, start, length);
    const auto wanted = targets.narrow(/*dim=*/1, start, length).to(x.device()).unsqueeze(-1);
    const auto scores = head(x).to(at::kFloat);  // sums of 262,144 terms need float32
    const auto chosen = scores.gather(/*dim=*/-1, wanted).squeeze(-1);
    parts.push_back((chosen - scores.logsumexp(/*dim=*/-1)).to(at::kCPU));
  }
  return at::cat(parts, /*dim=*/1);
}

void HiddenEngine::do_rewind(int64_t position) {
  cache_.rewind(position);
  set_hidden({});
}

void HiddenEngine::do_reset(const at::Tensor& first) {
  cache_.reset(first);
  set_hidden({});
}

void HiddenEngine::set_hidden(at::Tensor hidden) {
  hidden_ = std::move(hidden);
  last_logits_ = at::Tensor();
}

void HiddenEngine::do_copy_from(const Engine& other) {
  const auto* same = dynamic_cast<const HiddenEngine*>(&other);
  check(same != nullptr && typeid(other) == typeid(*this),
        "[copy_from] expected an engine of this kind, got another");
  cache_.copy_from(same->cache_);
  hidden_ = same->hidden_;
  last_logits_ = same->last_logits_;
}

}  // namespace gemma_torch
