#include "gemma_torch/adapt/gradient_exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <unordered_map>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr int64_t kBucket = int64_t{1} << 20;  // float32 values
constexpr size_t kMostUnderWay = 16;

}  // namespace

GradientExchange::GradientExchange(const Ranks& ranks,
                                   Gemma3Model model,
                                   std::vector<TrainedTensor> trained)
    : ranks_(ranks), trained_(std::move(trained)) {
  const auto layers = static_cast<size_t>(model->cfg.n_layers);
  std::unordered_map<const void*, size_t> group_of;
  for (size_t layer = 0; layer < layers; ++layer) {
    for (const auto& parameter : model->blocks->ptr(layer)->parameters()) {
      group_of.emplace(parameter.unsafeGetTensorImpl(), layers - 1 - layer);
    }
  }
  groups_.resize(layers + 1);
  for (size_t i = 0; i < trained_.size(); ++i) {
    const auto& tensor = trained_[i];
    const auto found = group_of.find(tensor.parameter.unsafeGetTensorImpl());
    groups_[found == group_of.end() ? layers : found->second].push_back(i);
    const auto numbers = tensor.rows.defined() ? tensor.gradient.numel() : tensor.parameter.numel();
    bytes_ += numbers * static_cast<int64_t>(sizeof(float));
  }
}

void GradientExchange::block_done(int64_t layer) {
  send_groups(groups_.size() - 1 - static_cast<size_t>(layer));
  while (!under_way_.empty() && under_way_.front().sum.done()) {
    take_back();
  }
}

void GradientExchange::finish() {
  send_groups(groups_.size());
  send_bucket();
  while (!under_way_.empty()) {
    take_back();
  }
  sent_ = 0;
}

void GradientExchange::send_groups(size_t until) {
  const at::NoGradGuard no_grad;
  for (; sent_ < until; ++sent_) {
    for (const auto i : groups_[sent_]) {
      auto& tensor = trained_[i];
      if (!tensor.rows.defined() && !tensor.parameter.grad().defined()) {
        tensor.parameter.mutable_grad() = at::zeros_like(tensor.parameter.detach());
      }
      put(tensor.rows.defined() ? tensor.gradient : tensor.parameter.grad());
    }
  }
}

void GradientExchange::put(const at::Tensor& gradient) {
  const auto flat = gradient.view({-1});
  int64_t n = 0;
  for (int64_t start = 0; start < flat.numel(); start += n) {
    if (filling_.used == kBucket) {
      send_bucket();
    }
    if (!filling_.values.defined()) {
      filling_.values = spare_.empty() ? at::empty({kBucket}, at::kFloat) : spare_.back();
      spare_.resize(spare_.size() - std::min<size_t>(1, spare_.size()));
    }
    n = std::min(kBucket - filling_.used, flat.numel() - start);
    const auto piece = flat.narrow(/*dim=*/0, start, n);
    filling_.values.narrow(/*dim=*/0, filling_.used, n).copy_(piece);
    filling_.pieces.push_back({piece, filling_.used});
    filling_.used += n;
  }
}

void GradientExchange::send_bucket() {
  if (filling_.used == 0) {
    return;
  }
  if (under_way_.size() == kMostUnderWay) {
    take_back();
  }
  filling_.sum = ranks_.start_sum(filling_.values.narrow(/*dim=*/0, 0, filling_.used));
  under_way_.push_back(std::move(filling_));
  filling_ = {};
}

void GradientExchange::take_back() {
  const at::NoGradGuard no_grad;
  auto& bucket = under_way_.front();
  bucket.sum.wait();
  for (const auto& [gradient, start] : bucket.pieces) {
    gradient.copy_(bucket.values.narrow(/*dim=*/0, start, gradient.numel()));
  }
  spare_.push_back(bucket.values);
  under_way_.pop_front();
}

}  // namespace gemma_torch
