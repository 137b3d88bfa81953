#include "gemma_torch/adapt/trainer.h"

#include <ATen/Context.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
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

// Dropout of one step on one of several ranks: drawn from a seed of its own, which comes out of the generator that all
// ranks hold alike. Afterwards that one goes on, so that its state is all that a checkpoint needs.
class OwnDropout {
 public:
  OwnDropout(const Ranks& ranks, const Gemma3Model& model) : generator_(generator_of(model)) {
    if (ranks.size() > 1) {
      const auto options = at::TensorOptions(at::kLong).device(generator_.device());
      const auto seeds = at::randint(int64_t{1} << 32, {ranks.size()}, options);
      shared_ = generator_.get_state();
      generator_.set_current_seed(static_cast<uint64_t>(seeds[ranks.rank()].item<int64_t>()));
    }
  }
  ~OwnDropout() {
    if (shared_.defined()) {
      generator_.set_state(shared_);
    }
  }
  OwnDropout(const OwnDropout&) = delete;
  OwnDropout& operator=(const OwnDropout&) = delete;

 private:
  at::Generator generator_;
  at::Tensor shared_;
};

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

Evaluation combined(const Evaluation& own, const Ranks& ranks) {
  if (ranks.size() == 1) {
    return own;
  }
  const auto targets = static_cast<double>(own.targets);
  std::vector<double> sums = {own.loss * targets, targets};
  ranks.sum(sums);
  return {sums[0] / std::max(sums[1], 1.0), static_cast<int64_t>(sums[1])};
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

void Trainer::join(const Ranks& ranks) {
  const auto& dealt = batches_->options();
  check(dealt.ranks == ranks.size() && dealt.rank == ranks.rank(),
        "[trainer] batches: expected those of rank {} of {}, got {} of {}",
        ranks.rank(),
        ranks.size(),
        dealt.rank,
        dealt.ranks);
  if (ranks.size() == 1) {
    return;
  }
  ranks_ = ranks;
  auto state = this->state();
  for (auto& [name, tensor] : state) {
    tensor = tensor.cpu().contiguous();
    ranks.broadcast(tensor);
  }
  load(std::move(state));
  exchange_ = std::make_unique<GradientExchange>(ranks, model_, optimizer_.trained());
}

void Trainer::fail_at(const std::string& what, double got, const std::vector<int64_t>& own) {
  optimizer_.clear_gradients();
  auto lines = ranks_.gather(fmt::format("{}", fmt::join(own, ", ")));
  std::erase(lines, "");
  fail(
      "[trainer] step {}: {}: expected a finite number, got {} (lines {} of {}). Hint: a lower "
      "--learning-rate, or go on from the last checkpoint with --resume",
      optimizer_.steps() + 1,
      what,
      got,
      fmt::join(lines, ", "),
      batches_->data().path());
}

// Adds this rank's loss to the report, and gradients of all ranks to .grad.
void Trainer::run_batches(const std::vector<TrainingBatch>& batches, StepReport& report) {
  const OwnDropout dropout(ranks_, model_);
  const auto share = 1.0 / static_cast<double>(report.targets);
  for (const auto& batch : batches) {
    OnBlock on_block;
    if (exchange_ && &batch == &batches.back()) {
      on_block = [this](int64_t layer) { exchange_->block_done(layer); };
    }
    report.loss += pass_->backward(batch, share, on_block) * share;
  }
  if (exchange_) {
    const auto start = std::chrono::steady_clock::now();
    exchange_->finish();
    report.waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

// This rank's batches of a step and their lines; the report counts those of all ranks.
std::vector<TrainingBatch> Trainer::take_batches(StepReport& report, std::vector<int64_t>& lines) {
  std::vector<TrainingBatch> batches;
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
  if (ranks_.size() > 1) {
    std::vector<double> sums = {static_cast<double>(report.tokens),
                                static_cast<double>(report.targets)};
    ranks_.sum(sums);
    report.tokens = static_cast<int64_t>(sums[0]);
    report.targets = static_cast<int64_t>(sums[1]);
  }
  return batches;
}

StepReport Trainer::step() {
  model_->train();
  StepReport report{.step = optimizer_.steps() + 1, .epoch = batches_->position().epoch};
  std::vector<int64_t> lines;
  const auto batches = take_batches(report, lines);
  run_batches(batches, report);
  std::vector<double> loss = {report.loss};
  ranks_.sum(loss);
  const bool own_is_finite = std::isfinite(report.loss);
  report.loss = loss[0];
  if (!std::isfinite(report.loss)) {
    fail_at("loss", report.loss, own_is_finite ? std::vector<int64_t>() : lines);
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
