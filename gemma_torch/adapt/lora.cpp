#include "gemma_torch/adapt/lora.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <ostream>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/quant/quantize.h"

namespace gemma_torch {
namespace {

// "blocks.3.att.W_query" -> "model.layers.3.self_attn.q_proj"
std::string hf_module(const std::string& module) {
  const auto name = hf_name(module + ".weight");
  return name.substr(0, name.rfind('.'));
}

std::string last_part(const std::string& name) {
  return name.substr(name.rfind('.') + 1);
}

const std::vector<std::string>& projections() {
  static const auto names = LoraConfig{}.target_modules;
  return names;
}

}  // namespace

double LoraConfig::scaling() const {
  const auto r = static_cast<double>(rank);
  return alpha / (use_rslora ? std::sqrt(r) : r);
}

LoraConfig validated(LoraConfig config) {
  check(config.rank >= 1, "[lora] rank: expected at least 1, got {}", config.rank);
  check(std::isfinite(config.alpha), "[lora] alpha: expected a number, got {}", config.alpha);
  check(config.dropout >= 0 && config.dropout < 1,
        "[lora] dropout: expected at least 0 and below 1, got {}",
        config.dropout);
  check(!config.target_modules.empty(), "[lora] target_modules: expected at least one, got none");
  for (const auto& name : config.target_modules) {
    const bool known =
        std::find(projections().begin(), projections().end(), name) != projections().end();
    check(known,
          "[lora] target_modules: expected some of {}, got {}",
          fmt::join(projections(), ", "),
          name);
  }
  return config;
}

LoraLinearImpl::LoraLinearImpl(const LinearImpl& shape_of,
                               const LoraConfig& config,
                               at::Device device)
    : scaling(config.scaling()), dropout(config.dropout) {
  in_features = shape_of.in_features;
  out_features = shape_of.out_features;
  const auto options = at::TensorOptions(at::kFloat).device(device);
  lora_A = register_parameter("lora_A", at::empty({config.rank, in_features}, options));
  lora_B = register_parameter("lora_B", at::zeros({out_features, config.rank}, options));
  torch::nn::init::kaiming_uniform_(lora_A, /*a=*/std::sqrt(5.0));
}

torch::Tensor LoraLinearImpl::forward(const torch::Tensor& x) {
  const auto y = base->forward(x);
  if (narrow && x.scalar_type() != at::kFloat) {
    const auto kept = at::dropout(x, dropout, is_training()).reshape({-1, in_features});
    const auto down = at::linear(kept, lora_A.to(x.scalar_type()));
    const auto up = lora_B.to(x.scalar_type()).t();
    return at::addmm(y.view({-1, out_features}), down, up, /*beta=*/1, scaling).view(y.sizes());
  }
  const auto kept = at::dropout(x.to(at::kFloat), dropout, is_training());
  const auto update = at::linear(at::linear(kept, lora_A), lora_B) * scaling;
  return (y + update).to(y.scalar_type());  // added in float32, as PEFT does
}

void LoraLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "LoraLinear(in_features=" << in_features << ", out_features=" << out_features
         << ", rank=" << lora_A.size(0) << ")";
}

torch::Tensor LoraLinearImpl::merged_into(const LinearImpl& other) const {
  check(other.weight.defined(),
        "[lora] merge: expected a base with weights, got one without. Hint: merge a model that is "
        "not quantised, and one adapter at a time, the first attached first");
  const torch::NoGradGuard no_grad;
  const auto wide = other.weight.to(at::kFloat);
  return (wide + lora_B.matmul(lora_A) * scaling).to(other.weight.scalar_type());
}

Adapter::Adapter(Gemma3Model model, const LoraConfig& config)
    : model_(std::move(model)), config_(validated(config)) {
  std::map<std::string, int64_t> layers;  // seen of each name
  model_->for_each_linear([&](auto& owner, const std::string& name, Linear& linear) {
    if (name == "out_head") {
      return;
    }
    const auto room = name.starts_with("fc") ? "ff" : "att";
    const auto hf = hf_module(fmt::format("blocks.{}.{}.{}", layers[name]++, room, name));
    const auto& wanted = config_.target_modules;
    if (std::find(wanted.begin(), wanted.end(), last_part(hf)) != wanted.end()) {
      const auto device = model_->tok_emb->weight.device();
      auto lora = std::make_shared<LoraLinearImpl>(*linear, config_, device);
      places_.push_back({&owner, name, hf, &linear, std::move(lora)});
    }
  });
}

void Adapter::put(Place& place, std::shared_ptr<LinearImpl> linear) {
  place.before = *place.slot;
  replace_linear(*place.owner, place.name, *place.slot, std::move(linear));
  place.put = *place.slot;
}

void Adapter::attach() {
  check(places_[0].put.is_empty(), "[lora] attach: this adapter is in the model already");
  for (auto& place : places_) {
    auto& lora = *place.lora;
    lora.base.is_empty() ? void(lora.base = lora.register_module("base", *place.slot))
                         : void(lora.base = lora.replace_module("base", *place.slot));
    put(place, place.lora);
  }
}

void Adapter::merge() {
  check(places_[0].put.is_empty(), "[lora] merge: this adapter is in the model already");
  std::vector<Linear> merged;  // all of them before the first is put: whole or not at all
  for (auto& place : places_) {
    const auto weight = place.lora->merged_into(**place.slot);
    Linear linear(weight.size(1), weight.size(0), weight.options(), Init::kNone);
    linear->weight.set_data(weight);
    linear->weight.requires_grad_((*place.slot)->weight.requires_grad());
    merged.push_back(std::move(linear));
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    put(places_[i], merged[i].ptr());
  }
  merged_ = true;
}

void Adapter::detach() {
  check(!places_[0].put.is_empty(), "[lora] detach: this adapter is not in the model");
  for (const auto& place : places_) {
    check(place.slot->ptr() == place.put.ptr(),
          "[lora] detach: {} has another adapter on top of this one. Hint: detach that one first",
          place.hf);
  }
  for (auto& place : places_) {
    replace_linear(*place.owner, place.name, *place.slot, place.before.ptr());
    place.before = nullptr;
    place.put = nullptr;
  }
  merged_ = false;
}

void Adapter::set_narrow(bool narrow) {
  for (auto& place : places_) {
    place.lora->narrow = narrow;
  }
}

void Adapter::scale(double by) {
  check(!merged_, "[lora] scale: this adapter is merged into the weights. Hint: detach it first");
  for (auto& place : places_) {
    place.lora->scaling = config_.scaling() * by;
  }
}

TensorMap Adapter::tensors() const {
  TensorMap tensors;
  for (const auto& place : places_) {
    tensors.emplace(place.hf + ".lora_A.weight", place.lora->lora_A);
    tensors.emplace(place.hf + ".lora_B.weight", place.lora->lora_B);
  }
  return tensors;
}

std::vector<torch::Tensor> Adapter::parameters() const {
  std::vector<torch::Tensor> all;
  for (const auto& place : places_) {
    all.push_back(place.lora->lora_A);
    all.push_back(place.lora->lora_B);
  }
  return all;
}

}  // namespace gemma_torch
