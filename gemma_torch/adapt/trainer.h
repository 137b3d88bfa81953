#pragma once

#include <functional>
#include <string>

#include "gemma_torch/adapt/adamw.h"
#include "gemma_torch/adapt/batches.h"
#include "gemma_torch/adapt/training_pass.h"

namespace gemma_torch {

struct TrainerOptions {
  AdamWOptions adamw = {};
  double learning_rate = 2e-4;
  Schedule schedule = Schedule::kLinear;
  int64_t warmup = 0;        // optimiser steps
  int64_t steps = 1;         // optimiser steps in all
  int64_t epochs = 0;        // the last step ends with this many; 0: steps alone decide
  int64_t accumulate = 1;    // batches of one step
  double max_grad_norm = 1;  // gradients are shortened to it; 0: as they are
};

struct StepReport {
  int64_t step = 0;      // from 1
  int64_t epoch = 0;     // from 0, of the step's first batch
  double loss = 0;       // mean over the step's targets, nats
  double grad_norm = 0;  // before it is clipped
  double learning_rate = 0;
  int64_t tokens = 0, targets = 0;
};

struct Evaluation {
  double loss = 0;  // mean over targets, nats
  int64_t targets = 0;
};

/// Mean loss over one epoch of `batches`, from its start, in evaluation mode. `keep_on` is asked after each batch.
/// Throws: Error if it answers false.
Evaluation evaluate(Gemma3Model model,
                    TrainingPass& pass,
                    Batches& batches,
                    const std::function<bool()>& keep_on = {});

/// The training loop: AdamW over what is trained, batch after batch. The same options, data, seeds, dtype and number of
/// threads give the same bits, whether or not a run was cut by state() and load().
class Trainer {
 public:
  /// Throws: Error naming the option that is out of range.
  Trainer(Gemma3Model model,
          TrainingPass& pass,
          Batches& batches,
          std::vector<TrainedTensor> trained,
          const TrainerOptions& options);

  /// One optimiser step over options.accumulate batches: the mean loss over all their targets together.
  /// Throws: Error, before any parameter changes, if loss or gradient are not finite, naming the step and lines.
  StepReport step();

  bool done() const { return optimizer_.steps() >= options_.steps; }
  int64_t steps() const { return optimizer_.steps(); }
  const TrainerOptions& options() const { return options_; }

  /// All that the next step depends on: parameters trained, moments, the generator of dropout, the place in the data.
  TensorMap state() const;
  /// Throws: Error naming what does not fit.
  void load(TensorMap state);

 private:
  [[noreturn]] void fail_at(const std::string& what, double got, const std::vector<int64_t>& lines);

  Gemma3Model model_;
  TrainingPass* pass_;
  Batches* batches_;
  AdamW optimizer_;
  TrainerOptions options_;
};

}  // namespace gemma_torch
