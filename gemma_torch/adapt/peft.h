#pragma once

#include <string>

#include "gemma_torch/adapt/lora.h"

namespace gemma_torch {

/// Writes an adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors in a new
/// folder, whole or not at all. `base` is noted as base_model_name_or_path.
/// Throws: Error if the folder exists and is not empty, or cannot be written.
void save_adapter(const Adapter& adapter, const std::string& folder, const std::string& base);

/// An adapter from such a folder, detached.
/// Strict: a setting of PEFT's that would change the numbers and is not known here is refused by
/// name; every tensor is used once, every target has both matrices, and shapes fit.
/// Throws: Error naming folder, file, field or tensor.
Adapter load_adapter(Gemma3Model model, const std::string& folder);

}  // namespace gemma_torch
