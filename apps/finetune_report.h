#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gemma_torch/adapt/training_data.h"
#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// What a model writes after some examples' prompts, greedily, at most 48 tokens: an array of {"prompt", "expected",
/// "text"}. The model is run as it stands, an attached adapter with it.
nlohmann::json write_samples(const Pretrained& loaded, const TrainingData& data, int64_t count);

/// What a page tells of a training run.
struct FinetunePage {
  std::string title = {};
  std::vector<nlohmann::json> log = {};    // lines of log.jsonl
  nlohmann::json before = {}, after = {};  // of write_samples
};

/// Loss, learning rate and gradient norm over steps, samples before and after.
std::string finetune_page(const FinetunePage& page);

}  // namespace gemma_torch::apps
