#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// What a low-rank adapter is. Names are PEFT's, where r stands for rank and lora_ before the next two.
struct LoraConfig {
  int64_t rank = 16;
  double alpha = 32;
  double dropout = 0;       // share of the inputs set to zero while training
  bool use_rslora = false;  // scaled by alpha / sqrt(rank) instead of alpha / rank
  std::vector<std::string> target_modules = {
      "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

  double scaling() const;
};

/// Throws: Error naming the field for a rank below 1, a dropout outside [0, 1), an alpha that is no
/// number, no target, or one that is no projection of a layer. The head and the embedding, which are
/// one parameter in this model, take no adapter.
LoraConfig validated(LoraConfig config);

/// y = base(x) + scaling * B A dropout(x).   Source: Hu et al. 2021; products and casts as in PEFT.
class LoraLinearImpl : public LinearImpl {
 public:
  /// A is drawn as torch.nn.Linear draws, B is zero, so that nothing changes before training.
  LoraLinearImpl(const LinearImpl& shape_of, const LoraConfig& config, at::Device device);

  torch::Tensor forward(const torch::Tensor& x) override;  // (..., in) -> (..., out), dtype of base
  void pretty_print(std::ostream& stream) const override;

  /// The weight of `other` and this adapter in one, (out, in), in the dtype of that weight: added in
  /// float32, rounded once. Throws: Error where `other` holds codes or an adapter, not a weight.
  torch::Tensor merged_into(const LinearImpl& other) const;

  Linear base{nullptr};
  torch::Tensor lora_A, lora_B;  // (rank, in), (out, rank) float32
  double scaling = 1;
  double dropout = 0;
  bool narrow = false;  // A's and B's products in the dtype of x, which is faster in training
};

/// Low-rank matrices beside the projections of one model. Adapters may be attached on top of each
/// other; the last attached is the first to be detached. Parameters of the model are not changed.
class Adapter {
 public:
  /// Draws from torch's generator. Throws: Error as validated().
  Adapter(Gemma3Model model, const LoraConfig& config);

  void attach();  // every pass of the model goes through it
  void merge();   // the same in plain Linears, for engines that know no adapters: rounded once
  /// The model as it was before, bit for bit: the same modules and weights.
  void detach();

  /// Multiplies what it adds from here on, beside alpha. Throws: Error while it is merged.
  void scale(double by);

  /// Products of A and B in the model's dtype (true) or in float32, as PEFT does (false: so it begins).
  void set_narrow(bool narrow);

  const LoraConfig& config() const { return config_; }

  /// Matrices by what they adapt: "model.layers.0.self_attn.q_proj.lora_A.weight". They share memory.
  TensorMap tensors() const;

  /// The same as a list, A before B, in the order of the model: what an optimiser steps.
  std::vector<torch::Tensor> parameters() const;

 private:
  struct Place {
    torch::nn::Module* owner;
    std::string name;  // "W_query"
    std::string hf;    // "model.layers.0.self_attn.q_proj"
    Linear* slot;      // of the model
    std::shared_ptr<LoraLinearImpl> lora;
    Linear before{nullptr}, put{nullptr};  // while attached or merged
  };

  void put(Place& place, std::shared_ptr<LinearImpl> linear);

  Gemma3Model model_;
  LoraConfig config_;
  std::vector<Place> places_;
  bool merged_ = false;
};

}  // namespace gemma_torch
