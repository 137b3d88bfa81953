#pragma once

#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/adapt/checkpoint.h"
#include "gemma_torch/adapt/ranks.h"

namespace gemma_torch::apps {

/// What a training run works on.
struct FinetuneParts {
  Gemma3Model model{nullptr};
  TrainingPass* pass = nullptr;
  Trainer* trainer = nullptr;
  Batches* held_out = nullptr;  // null: nothing is evaluated
  Ranks ranks = {};             // that train together
};

struct FinetuneSchedule {
  std::string out = {};    // the run's folder
  int64_t eval_every = 0;  // optimiser steps; 0: at the end alone
  int64_t save_every = 0;  // 0: at the end alone
  int64_t patience = 0;    // evaluations without a better one before it ends; 0: never early
  bool resume = false;
  nlohmann::json facts = {};  // what has to be the same when a run is resumed
};

/// The best evaluation so far.
struct Best {
  int64_t step = 0;
  double loss = 0;
};

struct FinetuneSummary {
  int64_t steps = 0;
  int64_t tokens = 0;  // read by all ranks together, since the run was last begun
  double seconds = 0;  // of training, since then
  double waited = 0;   // of these, for the sums of all ranks' gradients
  double loss = 0;     // of the last step
  std::optional<Best> best = {};
  bool stopped_early = false;
};

/// Trains to the end, step by step: a line of log.jsonl for each step and evaluation, checkpoints
/// of which the last two and the best stay, and a line on the terminal. Ctrl-C keeps a checkpoint
/// and ends. At the end the model is as the best checkpoint has it, or the last where nothing is
/// evaluated. Of several ranks, rank 0 alone has the folder, tells, and has that model at the end;
/// they evaluate together, and what stops one stops all.
class FinetuneRun {
 public:
  /// Throws: Error if the folder holds a run and `resume` is off, or the run in it was made with other `facts` (naming
  /// the first that differs).
  FinetuneRun(const FinetuneParts& parts, FinetuneSchedule schedule);

  /// Throws: Error as Trainer::step and Checkpoints::save, and where it was interrupted.
  FinetuneSummary run();

 private:
  void open();
  void resume(int64_t step);
  void join();
  void log(const nlohmann::json& row);
  void trim_log(int64_t step);
  void account(const StepReport& report, double seconds);
  void show(const StepReport& report);
  void evaluate_now();
  void save();
  bool due(int64_t every) const;
  bool stopped() const;
  bool leads() const { return parts_.ranks.rank() == 0; }

  FinetuneParts parts_;
  FinetuneSchedule schedule_;
  std::optional<Checkpoints> checkpoints_;  // rank 0's, as is the log
  std::ofstream log_;
  FinetuneSummary summary_;
  int64_t worse_ = 0;  // evaluations since the best
};

}  // namespace gemma_torch::apps
