#include "gemma_torch/quant/quantize.h"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/quant/gptq.h"
#include "gemma_torch/quant/packed_linear.h"
#include "gemma_torch/quant/scanned_head.h"

namespace gemma_torch {
namespace {

constexpr int64_t kProjections = 7;  // of a layer

// Projections that read the same inputs come one after the other: their factor is made once.
class Factors {
 public:
  explicit Factors(const Calibration& calibration) : calibration_(calibration) {}

  const at::Tensor& of(int64_t layer, const std::string& projection) {
    const std::pair now{layer, Calibration::input_of(projection)};
    if (!factor_.defined() || now != made_for_) {
      factor_ = inverse_factor(calibration_.second_moment(now.first, now.second));
      made_for_ = now;
    }
    return factor_;
  }

 private:
  const Calibration& calibration_;
  at::Tensor factor_;
  std::pair<int64_t, size_t> made_for_;
};

}  // namespace

void replace_linear(torch::nn::Module& owner,
                    const std::string& name,
                    Linear& place,
                    std::shared_ptr<LinearImpl> linear) {
  owner.replace_module(name, linear);
  place = Linear(std::move(linear));
}

Formats packed_formats(Gemma3Model model) {
  Formats formats;
  size_t packed = 0, all = 0;
  model->for_each_linear([&](auto&, const std::string& name, const Linear& linear) {
    if (const auto* as_packed = dynamic_cast<const PackedLinearImpl*>(linear.get())) {
      const auto format = as_packed->packed().format;
      check(formats.emplace(name, format).first->second == format,
            "[quant] {}: expected one format in all layers, got several",
            name);
      ++packed;
    }
    ++all;
  });
  check(packed == 0 || packed == all - 1,  // all but the head
        "[quant] expected all projections packed or none, got {} of {}",
        packed,
        all - 1);
  return formats;
}

void quantize(Gemma3Model model,
              const Recipe& recipe,
              const Calibration* calibration,
              const std::function<void(int64_t, int64_t)>& on_progress) {
  check(!recipe.calibrated || calibration != nullptr,
        "[quantize] {}: expected a calibration, got none",
        recipe.name);
  check(packed_formats(model).empty(), "[quantize] expected a model in bfloat16, got a packed one");
  const at::NoGradGuard
      no_grad;  // not InferenceMode: packed tensors are parts of a model from here on
  auto scan = make_scan(model);  // while the model has its own weights
  std::optional<Factors> factors;
  if (recipe.calibrated) {
    factors.emplace(*calibration);
  }
  int64_t count = 0;
  model->for_each_linear([&](auto& owner, const std::string& name, Linear& linear) {
    if (name == "out_head") {
      auto head = std::make_shared<ScannedHeadImpl>(
          linear->in_features, linear->out_features, std::move(scan));
      head->weight = head->register_parameter("weight", linear->weight);
      replace_linear(owner, name, linear, std::move(head));
      return;
    }
    const auto layer = count++ / kProjections;
    const auto format = recipe.formats.at(name);
    const auto slice = slice_of(name, linear->in_features);
    const auto weight = linear->weight.detach();
    auto cells = recipe.calibrated
                     ? lay_out(round_compensated(weight, factors->of(layer, name), format), slice)
                     : round_matrix(weight, slice);
    replace_linear(owner,
                   name,
                   linear,
                   std::make_shared<PackedLinearImpl>(
                       linear->in_features, linear->out_features, format, slice, std::move(cells)));
    if (on_progress && count % kProjections == 0) {
      on_progress(count / kProjections, model->cfg.n_layers);
    }
  });
  if (model->cfg.tie_word_embeddings) {
    model->tie_weights();
  }
}

}  // namespace gemma_torch
