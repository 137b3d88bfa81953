#pragma once

#include <memory>
#include <string>

#include "gemma_torch/adapt/trained_set.h"
#include "gemma_torch/adapt/trainer.h"
#include "support/lines_file.h"
#include "support/small_models.h"

namespace gemma_torch::test {

struct TrainingRunShape {
  double dropout = 0.2;
  bool recompute = false;
  Ranks ranks = {};
  std::string lines = id_lines({12, 5, 9, 20, 7, 16, 4, 11, 8});
};

// A small model, its adapter and what trains it on nine lines of ids, of several ranks on this one's share.
struct TrainingRun {
  explicit TrainingRun(const TrainerOptions& options, const TrainingRunShape& shape = {})
      : file(shape.lines),
        data(file.path, nullptr, {.vocab_size = 1003}),
        model(small_models().wide),
        batches(data,
                {.rows = 2, .seed = 3, .rank = shape.ranks.rank(), .ranks = shape.ranks.size()}),
        pass(model, {.recompute = shape.recompute}) {
    torch::manual_seed(5);
    adapter = std::make_unique<Adapter>(model, LoraConfig{.rank = 3, .dropout = shape.dropout});
    adapter->attach();
    const auto trained = train_adapter(model, *adapter, /*narrow=*/true);
    trainer = std::make_unique<Trainer>(model, pass, batches, trained, options);
    trainer->join(shape.ranks);
  }

  LinesFile file;
  TrainingData data;
  Gemma3Model model;
  Batches batches;
  TrainingPass pass;
  std::unique_ptr<Adapter> adapter;
  std::unique_ptr<Trainer> trainer;
};

}  // namespace gemma_torch::test
