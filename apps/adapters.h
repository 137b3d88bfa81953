#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch::apps {

void add_adapter_flag(CLI::App& command, std::vector<std::string>& adapters);

/// An adapter of --lora: DIR or DIR=SCALE.
struct AdapterSpec {
  std::string folder = {};
  double scale = 1;
};

/// Throws: Error for a scale that is no number. A folder whose name holds "=" is taken whole where
/// it exists.
AdapterSpec parse_adapter(const std::string& text);

/// Adapts a model with the folders of --lora, one on top of the other. Attached, they add in float32
/// beside the weights, as PEFT does; merged, they become the weights, rounded to their dtype, which
/// every engine can run. Which of the two is said on standard error.
/// Throws: Error as load_adapter, and where weights that are codes should be merged.
void add_adapters(Gemma3Model model, const std::vector<std::string>& adapters, bool merged);

}  // namespace gemma_torch::apps
