#pragma once

#include <functional>
#include <memory>
#include <string>

#include "gemma_torch/adapt/adamw.h"
#include "gemma_torch/adapt/batches.h"
#include "gemma_torch/adapt/gradient_exchange.h"
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

/// Of all ranks together.
struct StepReport {
  int64_t step = 0;      // from 1
  int64_t epoch = 0;     // from 0, of the step's first batch
  double loss = 0;       // mean over the step's targets, nats
  double grad_norm = 0;  // before it is clipped
  double learning_rate = 0;
  int64_t tokens = 0, targets = 0;
  double waited = 0;  // seconds of this rank, after its own gradients, for all ranks' sums
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

/// The same over what all ranks evaluated.
Evaluation combined(const Evaluation& own, const Ranks& ranks);

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

  /// From here on every step is taken with other ranks, which are as many as the batches are dealt
  /// to: each runs its own batches, and all step along the sum of their gradients. Begins from rank
  /// 0's state. Dropout differs between ranks.
  void join(const Ranks& ranks);

  /// One optimiser step over options.accumulate batches: the mean loss over all their targets together.
  /// Throws: Error on all ranks alike, before any parameter changes, if loss or gradient are not
  /// finite, naming the step and lines.
  StepReport step();

  bool done() const { return optimizer_.steps() >= options_.steps; }
  int64_t steps() const { return optimizer_.steps(); }
  const TrainerOptions& options() const { return options_; }
  /// Of gradients that a step sums over ranks, in float32; 0 alone.
  int64_t exchanged_bytes() const { return exchange_ ? exchange_->bytes() : 0; }

  /// All that the next step depends on: parameters trained, moments, the generator of dropout, the place in the data.
  TensorMap state() const;
  /// Throws: Error naming what does not fit.
  void load(TensorMap state);

 private:
  std::vector<TrainingBatch> take_batches(StepReport& report, std::vector<int64_t>& lines);
  void run_batches(const std::vector<TrainingBatch>& batches, StepReport& report);
  [[noreturn]] void fail_at(const std::string& what, double got, const std::vector<int64_t>& lines);

  Gemma3Model model_;
  TrainingPass* pass_;
  Batches* batches_;
  AdamW optimizer_;
  TrainerOptions options_;
  Ranks ranks_;
  std::unique_ptr<GradientExchange> exchange_;  // null: alone
};

}  // namespace gemma_torch
