#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "gemma_torch/base/fingerprint.h"
#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// Of a model's weights: each tensor's name, shape and first 2,048 numbers.
std::string fingerprint(const Gemma3Model& model);

/// {weights, dtype, device}: what numbers out of the modules depend on, for the header of a file
/// that a later run goes on with.
nlohmann::json numbers_json(const Pretrained& loaded);

}  // namespace gemma_torch::apps
