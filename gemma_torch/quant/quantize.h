#pragma once

#include <functional>

#include "gemma_torch/model/gemma3.h"
#include "gemma_torch/quant/calibration.h"
#include "gemma_torch/quant/recipe.h"

namespace gemma_torch {

/// Puts `linear` in the place of a Linear that for_each_linear visits.
void replace_linear(torch::nn::Module& owner,
                    const std::string& name,
                    Linear& place,
                    std::shared_ptr<LinearImpl> linear);

/// The formats of a model's packed projections; empty where none is. Throws: Error where layers differ.
Formats packed_formats(Gemma3Model model);

/// Rounds the projections of a bfloat16 model on the CPU: each becomes a PackedLinear, and the head a ScannedHead. The
/// embedding and the norms stay as they are.
/// Throws: Error if the model is another, or `calibration` is missing (null) where the recipe needs it.
void quantize(Gemma3Model model,
              const Recipe& recipe,
              const Calibration* calibration,
              const std::function<void(int64_t layers, int64_t of)>& on_progress = {});

}  // namespace gemma_torch
