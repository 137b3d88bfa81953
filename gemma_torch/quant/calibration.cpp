#include "gemma_torch/quant/calibration.h"

#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

Calibration::Calibration(Gemma3Model model) : model_(std::move(model)) {
  const auto& cfg = model_->cfg;
  const auto square = [](int64_t n) { return at::zeros({n, n}, at::kFloat); };
  for (int64_t layer = 0; layer < cfg.n_layers; ++layer) {
    sums_.push_back({square(cfg.emb_dim),
                     square(cfg.n_heads * cfg.head_dim),
                     square(cfg.emb_dim),
                     square(cfg.hidden_dim)});
  }
}

void Calibration::add(const at::Tensor& ids) {
  const c10::InferenceMode inference;
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    const auto place = std::find(kSites.begin(), kSites.end(), at.site);
    if (place != kSites.end()) {
      auto& sum = sums_[static_cast<size_t>(at.layer)][static_cast<size_t>(place - kSites.begin())];
      const auto x = value.reshape({-1, sum.size(0)}).to(at::kFloat);
      sum.addmm_(x.t(), x);
    }
    return value;
  };
  model_->hidden(ids, /*cache=*/nullptr, probe);
  tokens_ += ids.numel();
}

size_t Calibration::input_of(const std::string& projection) {
  return projection == "out_proj"                     ? 1
         : projection == "fc1" || projection == "fc2" ? 2
         : projection == "fc3"                        ? 3
                                                      : 0;
}

at::Tensor Calibration::second_moment(int64_t layer, size_t input) const {
  check(tokens_ > 0, "[calibration] expected tokens, got none");
  return sums_[static_cast<size_t>(layer)][input] / static_cast<double>(tokens_);
}

}  // namespace gemma_torch
