#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common.h"
#include "finetune_run.h"
#include "gemma_torch/adapt/lora.h"
#include "gemma_torch/adapt/trainer.h"

namespace gemma_torch::apps {

struct FinetuneFlags {
  ModelOptions model = {};
  std::string data = {}, eval_data = {};
  ExampleOptions examples = {};
  LoraConfig lora = {};
  std::optional<double> alpha = {};
  std::string from = {};  // an adapter's folder to begin with
  bool full = false;
  std::vector<std::string> train = {};  // globs of parameters
  bool sparse_embedding = false;
  std::string from_scratch = {},
              tokenizer = {};  // a config.json, and what a new model reads with it
  bool plain_text = false;     // data and eval_data are whole texts
  BatchOptions batches = {};
  bool in_order = false;
  TrainerOptions trainer = {};
  std::optional<double> learning_rate = {};
  std::string schedule = "linear";
  std::string optimizer_dtype = "float32";
  int64_t epochs = 1;
  int64_t max_steps = 0;
  TrainingPassOptions pass = {};
  std::optional<uint64_t> seed = {};
  FinetuneSchedule run = {};
  int64_t samples = 3;
  bool json = false;

  bool trains_weights() const { return full || !train.empty() || !from_scratch.empty(); }
};

void add_finetune_flags(CLI::App& command, FinetuneFlags& flags);

/// Throws: CLI::Error for a flag that is missing, Error for flags that do not go together or are out of range.
void check_usage(const FinetuneFlags& flags);

}  // namespace gemma_torch::apps
