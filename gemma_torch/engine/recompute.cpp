#include "gemma_torch/engine/recompute.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

RecomputeEngine::RecomputeEngine(std::unique_ptr<Engine> inner)
    : Engine(inner->batch(), inner->capacity(), inner->vocab_size()), inner_(std::move(inner)) {}

void RecomputeEngine::check_fresh(const char* what) const {
  check(last_ > 0, "[{}] expected an append since the last reset or rewind, got none", what);
}

void RecomputeEngine::do_append(const int64_t* ids, int64_t T) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t row = 0; row < batch(); ++row) {
      ids_.push_back(ids[row * T + t]);
    }
  }
  inner_->reset(first_);
  inner_->append(at::tensor(ids_, at::kLong).view({-1, batch()}).t().contiguous());
  last_ = T;
}

at::Tensor RecomputeEngine::logits(Rows rows) {
  check_fresh("logits");
  const auto all = inner_->logits(rows);
  return rows == Rows::kLast ? all : all.narrow(/*dim=*/1, all.size(1) - last_, last_);
}

at::Tensor RecomputeEngine::log_prob(const at::Tensor& targets) {
  check_targets(targets, last_);
  const auto before = position() - last_;  // of any token: they are not asked for
  const auto padded =
      at::cat({at::zeros({batch(), before}, targets.options()), targets}, /*dim=*/1);
  return inner_->log_prob(padded).narrow(/*dim=*/1, before, last_);
}

void RecomputeEngine::do_top(int64_t k, std::vector<Candidate>& best) {
  check_fresh("top");
  const auto top = inner_->top(k);
  const auto* ids = top.ids.const_data_ptr<int64_t>();
  const auto* logits = top.logits.const_data_ptr<float>();
  best.clear();
  for (int64_t i = 0; i < top.ids.numel(); ++i) {
    best.push_back({ids[i], logits[i]});
  }
}

void RecomputeEngine::do_rewind(int64_t position) {
  check(position >= 0 && position <= this->position(),
        "[rewind] position: expected 0 to {}, got {}",
        this->position(),
        position);
  ids_.resize(static_cast<size_t>(position * batch()));
  last_ = 0;
}

void RecomputeEngine::do_reset(const at::Tensor& first) {
  ids_.clear();
  first_ = first;
  last_ = 0;
}

void RecomputeEngine::do_copy_from(const Engine& other) {
  const auto* same = dynamic_cast<const RecomputeEngine*>(&other);
  check(same != nullptr, "[copy_from] expected an engine without a cache, got one with");
  inner_->copy_from(*same->inner_);
  ids_ = same->ids_;
  first_ = same->first_;
  last_ = same->last_;
}

EngineReport RecomputeEngine::report(int64_t depth) const {
  auto report = inner_->report(depth);
  report.cached = false;
  return report;
}

}  // namespace gemma_torch
