#include "gemma_torch/adapt/trainer.h"

#include <ATen/Context.h>
#include <ATen/ops/tensor.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr char kRandom[] = "random_state";
constexpr char kPosition[] = "data_position";  // (epoch, batch)

TrainerOptions validated(const TrainerOptions& options) {
  const auto at_least = [](const char* name, int64_t got, int64_t least) {
    check(got >= least, "[trainer] {}: expected at least {}, got {}", name, least, got);
  };
  at_least("steps", options.steps, 1);
  at_least("accumulate", options.accumulate, 1);
  at_least("warmup", options.warmup, 0);
  check(options.warmup <= options.steps,
        "[trainer] warmup: expected at most the {} steps, got {}",
        options.steps,
        options.warmup);
  check(std::isfinite(options.learning_rate) && options.learning_rate > 0,
        "[trainer] learning_rate: expected a number above 0, got {}",
        options.learning_rate);
  check(std::isfinite(options.max_grad_norm) && options.max_grad_norm >= 0,
        "[trainer] max_grad_norm: expected a number of at least 0, got {}",
        options.max_grad_norm);
  return options;
}

at::Tensor take(TensorMap& state, const std::string& name) {
  const auto found = state.find(name);
  check(found != state.end(), "[trainer] state: expected {}, it is not there", name);
  const auto tensor = found->second;
  state.erase(found);
  return tensor;
}

at::Generator generator_of(const Gemma3Model& model) {
  return at::globalContext().defaultGenerator(model->tok_emb->weight.device());
}

}  // namespace

Evaluation evaluate(Gemma3Model model,
                    TrainingPass& pass,
                    Batches& batches,
                    const std::function<bool()>& keep_on) {
  const bool was_training = model->is_training();
  model->eval();
  batches.seek({});
  double sum = 0;
  Evaluation found;
  while (batches.upcoming().epoch == 0) {
    const auto batch = batches.next();
    sum += pass.losses(batch).sum().item<double>();
    found.targets += batch.targets.numel();
    check(!keep_on || keep_on(), "[evaluate] stopped");
  }
  model->train(was_training);
  found.loss = sum / static_cast<double>(std::max<int64_t>(found.targets, 1));
  return found;
}

Trainer::Trainer(Gemma3Model model,
                 TrainingPass& pass,
                 Batches& batches,
                 std::vector<TrainedTensor> trained,
                 const TrainerOptions& options)
    : model_(std::move(model)),
      pass_(&pass),
      batches_(&batches),
      optimizer_(std::move(trained), options.adamw),
      options_(validated(options)) {}

void Trainer::fail_at(const std::string& what, double got, const std::vector<int64_t>& lines) {
  optimizer_.clear_gradients();
  fail(
      "[trainer] step {}: {}: expected a finite number, got {} (lines {} of {}). Hint: a lower "
      "--learning-rate, or go on from the last checkpoint with --resume",
      optimizer_.steps() + 1,
      what,
      got,
      fmt::join(lines, ", "),
      batches_->data().path());
}

StepReport Trainer::step() {
  model_->train();
  StepReport report{.step = optimizer_.steps() + 1, .epoch = batches_->position().epoch};
  std::vector<TrainingBatch> batches;
  std::vector<int64_t> lines;
  for (int64_t i = 0; i < options_.accumulate; ++i) {
    if (options_.epochs > 0 && batches_->upcoming().epoch >= options_.epochs) {
      break;  // the last step is as long as is left
    }
    batches.push_back(batches_->next());
    report.tokens += batches.back().tokens;
    report.targets += batches.back().targets.numel();
    for (const auto example : batches.back().examples) {
      lines.push_back(batches_->data().line(example));
    }
  }
  const auto share = 1.0 / static_cast<double>(report.targets);
  for (const auto& batch : batches) {
    report.loss += pass_->backward(batch, share) * share;
  }
  if (!std::isfinite(report.loss)) {
    fail_at("loss", report.loss, lines);
  }
  report.grad_norm = optimizer_.gradient_norm();
  if (!std::isfinite(report.grad_norm)) {
    fail_at("gradient norm", report.grad_norm, lines);
  }
  const auto most = options_.max_grad_norm;
  // As torch.nn.utils.clip_grad_norm_ computes it.
  const auto factor = most > 0 ? std::min(1.0, most / (report.grad_norm + 1e-6)) : 1.0;
  report.learning_rate =
      options_.learning_rate *
      schedule_factor(options_.schedule, optimizer_.steps(), options_.warmup, options_.steps);
  optimizer_.step(report.learning_rate, factor);
  return report;
}

TensorMap Trainer::state() const {
  auto state = optimizer_.state();
  state.emplace(kRandom, generator_of(model_).get_state());
  const auto at = batches_->position();
  state.emplace(kPosition, at::tensor({at.epoch, at.batch}, at::kLong));
  return state;
}

void Trainer::load(TensorMap state) {
  const auto random = take(state, kRandom);
  const auto position = take(state, kPosition);
  check(position.numel() == 2 && position.scalar_type() == at::kLong,
        "[trainer] state: {}: expected epoch and batch, got {}",
        kPosition,
        shape_str(position.sizes()));
  optimizer_.load(state);
  auto generator = generator_of(model_);
  generator.set_state(random.clone());
  batches_->seek({position[0].item<int64_t>(), position[1].item<int64_t>()});
}

}  // namespace gemma_torch
