#pragma once

#include <string>
#include <vector>

#include "gemma_torch/adapt/adamw.h"
#include "gemma_torch/adapt/lora.h"

namespace gemma_torch {

/// What an optimiser steps of a model with an attached adapter: its matrices alone, under PEFT's names. Weights of the
/// model are frozen. `narrow`: in training their products are in the model's dtype, not in float32.
std::vector<TrainedTensor> train_adapter(Gemma3Model model, Adapter& adapter, bool narrow);

/// What an optimiser steps of a model whose parameters' names in Hugging Face's spelling match one of the globs (* any
/// text, dots too, ? one character, [0-5] a range); the others are frozen. Norms, which have one axis, do not decay.
/// Throws: Error naming a glob that matches none, or a model whose projections are packed.
std::vector<TrainedTensor> train_parameters(Gemma3Model model,
                                            const std::vector<std::string>& globs);

}  // namespace gemma_torch
