#pragma once

#include <ATen/ops/max.h>
#include <ATen/ops/zeros.h>

#include <nlohmann/json.hpp>
#include <string>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch::test {

// float32 sums in another order: 2^-24 of values up to about 30, over some hundred operations.
inline constexpr double kFloatTolerance = 1e-4;

inline std::string golden_path(const std::string& name) {
  return GEMMA_TORCH_GOLDEN_DIR "/" + name;
}

inline nlohmann::json golden_json(const std::string& name) {
  return nlohmann::json::parse(read_file(golden_path(name)));
}

/// A tiny model of tests/reference/make_tiny_goldens.py, with what transformers computed.
struct Tiny {
  TensorMap want;
  Gemma3Config config;

  explicit Tiny(const std::string& name)
      : want(load_safetensors(golden_path(name))),
        config(parse_config(
            nlohmann::json::parse(load_safetensors_metadata(golden_path(name)).at("config")))) {}

  TensorMap weights() const {
    TensorMap found;
    for (const auto& [key, tensor] : want) {
      if (key.starts_with("model.") || key == "lm_head.weight") {
        found.emplace(key, tensor.clone());
      }
    }
    return found;
  }

  Gemma3Model model(c10::ScalarType dtype = c10::kFloat) const {
    auto cfg = config;
    cfg.dtype = dtype;
    return build_model(cfg, weights(), c10::kCPU, "golden");
  }
};

inline double max_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace gemma_torch::test
