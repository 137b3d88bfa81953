#pragma once

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>
#include <string>

namespace gemma_torch {

/// Name -> tensor: safetensors files, GGUF files, goldens, adapters, captures.
using TensorMap = std::map<std::string, at::Tensor>;

/// "(2048, 640)", for messages.
inline std::string shape_str(c10::IntArrayRef sizes) {
  return fmt::format("({})", fmt::join(sizes.begin(), sizes.end(), ", "));
}

}  // namespace gemma_torch
