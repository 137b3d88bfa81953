#include "gemma_torch/engine/eager.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/kernels/cpu/row_kernels.h"

namespace gemma_torch {
namespace {

// Rows of logits formed at a time where all positions are scored: 64 of 262,144 floats are 64 MiB.
constexpr int64_t kScoredRows = 64;

KvCacheOptions cache_options(const Gemma3Model& model, const EngineOptions& options) {
  const auto& weight = model->tok_emb->weight;
  return {.batch = options.batch,
          .capacity = options.capacity,
          .chunk = options.chunk,
          .device = weight.device(),
          .dtype = options.kv_dtype.value_or(weight.scalar_type())};
}

}  // namespace

EagerEngine::EagerEngine(Gemma3Model model, const EngineOptions& options)
    : Engine(options.batch, options.capacity, model->cfg.vocab_size),
      model_(std::move(model)),
      cache_(model_->cfg, cache_options(model_, options)),
      probe_(options.probe) {}

void EagerEngine::do_append(const int64_t* given, int64_t T) {
  const c10::InferenceMode inference;
  const auto ids = at::from_blob(const_cast<int64_t*>(given), {batch(), T}, at::kLong);
  forget_last();
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < T; start += cache_.options().chunk) {
    const auto length = std::min(cache_.options().chunk, T - start);
    const auto part = ids.narrow(/*dim=*/1, start, length).to(cache_.options().device);
    parts.push_back(model_->hidden(part, &cache_, probe_));
  }
  hidden_ = parts.size() == 1 ? parts[0] : at::cat(parts, /*dim=*/1);
}

at::Tensor EagerEngine::logits(Rows rows) {
  check(hidden_.defined(), "[logits] expected an append since the last reset or rewind, got none");
  if (rows == Rows::kLast && last_logits_.defined()) {
    return last_logits_;
  }
  const c10::InferenceMode inference;
  const auto x = rows == Rows::kAll ? hidden_ : hidden_.narrow(/*dim=*/1, hidden_.size(1) - 1, 1);
  const auto end = cache_.position();
  const auto positions = probe_ ? at::arange(end - x.size(1), end) : at::Tensor();
  auto logits = tap(probe_, {Site::kLogits, -1, positions}, model_->out_head(x)).to(at::kFloat);
  if (rows == Rows::kLast) {
    last_logits_ = logits;
  }
  return logits;
}

at::Tensor EagerEngine::log_prob(const at::Tensor& targets) {
  check(hidden_.defined(),
        "[log_prob] expected an append since the last reset or rewind, got none");
  check(targets.dim() == 2 && targets.size(0) == hidden_.size(0) &&
            targets.size(1) == hidden_.size(1),
        "[log_prob] targets: expected ({}, {}), got {}",
        hidden_.size(0),
        hidden_.size(1),
        shape_str(targets.sizes()));
  const c10::InferenceMode inference;
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < targets.size(1); start += kScoredRows) {
    const auto length = std::min(kScoredRows, targets.size(1) - start);
    const auto x = hidden_.narrow(/*dim=*/1, start, length);
    const auto wanted = targets.narrow(/*dim=*/1, start, length).to(x.device()).unsqueeze(-1);
    const auto scores = model_->out_head(x).to(at::kFloat);  // sums of 262,144 terms need float32
    const auto chosen = scores.gather(/*dim=*/-1, wanted).squeeze(-1);
    parts.push_back((chosen - scores.logsumexp(/*dim=*/-1)).to(at::kCPU));
  }
  return at::cat(parts, /*dim=*/1);
}

EngineReport EagerEngine::report(int64_t depth) const {
  auto model = model_;
  int64_t bytes = cache_.bytes_seen(depth);
  for (const auto& parameter : model->parameters()) {
    bytes += static_cast<int64_t>(parameter.nbytes());  // the embedding counts as the head
  }
  if (model->out_head->weight.data_ptr() != model->tok_emb->weight.data_ptr()) {
    bytes -= static_cast<int64_t>(model->tok_emb->weight.nbytes());
  }
  return {"eager",
          kernels::isa_name(kernels::row_kernels().isa),
          dtype_name(model->tok_emb->weight.scalar_type()),
          at::get_num_threads(),
          bytes};
}

void EagerEngine::do_rewind(int64_t position) {
  cache_.rewind(position);
  forget_last();
}

void EagerEngine::do_reset(const at::Tensor& first) {
  cache_.reset(first);
  forget_last();
}

void EagerEngine::forget_last() {
  hidden_ = at::Tensor();
  last_logits_ = at::Tensor();
}

void EagerEngine::do_copy_from(const Engine& other) {
  const auto* eager = dynamic_cast<const EagerEngine*>(&other);
  check(eager != nullptr, "[copy_from] expected an eager engine, got another kind");
  cache_.copy_from(eager->cache_);
  hidden_ = eager->hidden_;
  last_logits_ = eager->last_logits_;
}

}  // namespace gemma_torch
