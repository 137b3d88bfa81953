#pragma once

#include <nlohmann/json.hpp>

#include "finetune_flags.h"
#include "gemma_torch/adapt/training_data.h"
#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// What decides the numbers of a run, by which a resumed one is told from another.
nlohmann::json facts_of(const FinetuneFlags& flags,
                        const Pretrained& loaded,
                        const TrainingData& data);

/// Throws: Error on all ranks if one of them works on something else than rank 0, naming it.
void check_alike(const nlohmann::json& facts);

}  // namespace gemma_torch::apps
