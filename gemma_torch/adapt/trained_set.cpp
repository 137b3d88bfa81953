#include "gemma_torch/adapt/trained_set.h"

#include <fnmatch.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/quant/quantize.h"

namespace gemma_torch {
namespace {

void freeze(Gemma3Model& model) {
  for (auto& parameter : model->parameters()) {
    parameter.requires_grad_(false);
  }
}

}  // namespace

std::vector<TrainedTensor> train_adapter(Gemma3Model model, Adapter& adapter, bool narrow) {
  freeze(model);
  adapter.set_narrow(narrow);
  std::vector<TrainedTensor> trained;
  for (const auto& [name, tensor] : adapter.tensors()) {
    trained.push_back({.name = name, .parameter = tensor});
    tensor.requires_grad_(true);
  }
  return trained;
}

std::vector<TrainedTensor> train_parameters(Gemma3Model model,
                                            const std::vector<std::string>& globs) {
  check(packed_formats(model).empty(),
        "[train] expected weights, got a quantised model. Hint: train the model it was made from");
  freeze(model);
  std::vector<bool> used(globs.size(), false);
  std::vector<TrainedTensor> trained;
  for (const auto& item : model->named_parameters()) {
    const auto name = hf_name(item.key());
    bool wanted = false;
    for (size_t i = 0; i < globs.size(); ++i) {
      if (::fnmatch(globs[i].c_str(), name.c_str(), FNM_NOESCAPE) == 0) {
        wanted = used[i] = true;
      }
    }
    if (wanted) {
      item.value().requires_grad_(true);
      trained.push_back(
          {.name = name, .parameter = item.value(), .decays = item.value().dim() > 1});
    }
  }
  for (size_t i = 0; i < globs.size(); ++i) {
    check(used[i],
          "[train] expected names of parameters, or globs that match some, got \"{}\". Hint: "
          "'model.layers.1[0-7].*', '*.mlp.*', '*norm.weight', 'model.embed_tokens.weight'",
          globs[i]);
  }
  return trained;
}

}  // namespace gemma_torch
