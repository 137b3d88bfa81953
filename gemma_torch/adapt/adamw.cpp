#include "gemma_torch/adapt/adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "gemma_torch/adapt/rounded_adamw.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;  // numbers whose gradients are widened at a time
constexpr char kSteps[] = "steps";
constexpr char kRows[] = ".rows";

// visit(first row, rows) of a few rows at a time: what is widened meanwhile stays small.
template <typename Visit>
void by_rows(const at::Tensor& x, const Visit& visit) {
  const auto rows = x.size(0);
  const auto piece = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, x.numel() / rows));
  for (int64_t start = 0; start < rows; start += piece) {
    visit(start, std::min(piece, rows - start));
  }
}

}  // namespace

AdamW::AdamW(std::vector<TrainedTensor> trained, const AdamWOptions& options)
    : trained_(std::move(trained)), options_(options) {
  check(!trained_.empty(), "[adamw] expected at least one tensor to train, got none");
  check(options.beta1 >= 0 && options.beta1 < 1 && options.beta2 >= 0 && options.beta2 < 1,
        "[adamw] betas: expected at least 0 and below 1, got {} and {}",
        options.beta1,
        options.beta2);
  check(options.eps >= 0, "[adamw] eps: expected at least 0, got {}", options.eps);
  check(options.weight_decay >= 0,
        "[adamw] weight_decay: expected at least 0, got {}",
        options.weight_decay);
  check(options.state == at::kFloat || options.state == at::kBFloat16,
        "[adamw] state: expected float32 or bfloat16, got {}",
        c10::toString(options.state));
  const at::NoGradGuard no_grad;
  for (const auto& tensor : trained_) {
    const auto dtype = tensor.parameter.scalar_type();
    check(dtype == at::kFloat || dtype == at::kBFloat16,
          "[adamw] {}: expected float32 or bfloat16, got {}",
          tensor.name,
          c10::toString(dtype));
    check(options.state == at::kFloat || dtype == at::kBFloat16,
          "[adamw] {}: expected bfloat16, as the state is to be, got {}",
          tensor.name,
          c10::toString(dtype));
    auto master = tensor.parameter.detach();
    if (tensor.rows.defined()) {
      master = master.index_select(/*dim=*/0, tensor.rows);
    }
    master = master.to(options.state);
    slots_.push_back({master, at::zeros_like(master), at::zeros_like(master)});
  }
}

at::Tensor AdamW::gradient_of(const TrainedTensor& tensor) const {
  return tensor.rows.defined() ? tensor.gradient : tensor.parameter.grad();
}

double AdamW::gradient_norm() const {
  double squares = 0;
  for (const auto& tensor : trained_) {
    const auto gradient = gradient_of(tensor);
    if (gradient.defined()) {
      by_rows(gradient, [&](int64_t start, int64_t n) {
        const auto part = gradient.narrow(/*dim=*/0, start, n);
        const auto norm = part.norm(/*p=*/2, at::kFloat).item<double>();
        squares += norm * norm;
      });
    }
  }
  return std::sqrt(squares);
}

void AdamW::step_wide(size_t index,
                      const at::Tensor& gradient,
                      double learning_rate,
                      double factor) {
  const auto& slot = slots_[index];
  const auto steps = at::full({}, static_cast<double>(steps_), slot.master.options());
  by_rows(slot.master, [&](int64_t start, int64_t n) {
    auto slope = gradient.narrow(/*dim=*/0, start, n).to(at::kFloat);
    slope = factor == 1 ? slope : slope.mul(factor);
    at::_fused_adamw_({slot.master.narrow(/*dim=*/0, start, n)},
                      {slope},
                      {slot.exp_avg.narrow(/*dim=*/0, start, n)},
                      {slot.exp_avg_sq.narrow(/*dim=*/0, start, n)},
                      /*max_exp_avg_sqs=*/{},
                      {steps},
                      learning_rate,
                      options_.beta1,
                      options_.beta2,
                      trained_[index].decays ? options_.weight_decay : 0.0,
                      options_.eps,
                      /*amsgrad=*/false,
                      /*maximize=*/false);
  });
}

void AdamW::step(double learning_rate, double factor) {
  const at::NoGradGuard no_grad;
  ++steps_;
  for (size_t i = 0; i < trained_.size(); ++i) {
    const auto gradient = gradient_of(trained_[i]);
    if (!gradient.defined()) {
      continue;
    }
    if (options_.state == at::kFloat) {
      step_wide(i, gradient, learning_rate, factor);
    } else {
      step_rounded({slots_[i].master, slots_[i].exp_avg, slots_[i].exp_avg_sq, gradient},
                   {.learning_rate = learning_rate,
                    .beta1 = options_.beta1,
                    .beta2 = options_.beta2,
                    .eps = options_.eps,
                    .weight_decay = trained_[i].decays ? options_.weight_decay : 0.0,
                    .factor = factor,
                    .step = steps_,
                    .stream = static_cast<int64_t>(i)});
    }
    publish(i);
  }
  clear_gradients();
}

void AdamW::publish(size_t index) {
  const auto& tensor = trained_[index];
  auto parameter = tensor.parameter.detach();
  const auto& master = slots_[index].master;
  if (tensor.rows.defined()) {
    parameter.index_copy_(/*dim=*/0, tensor.rows, master.to(parameter.scalar_type()));
  } else if (!master.is_alias_of(parameter)) {
    parameter.copy_(master);
  }
}

void AdamW::clear_gradients() {
  for (auto& tensor : trained_) {
    tensor.rows.defined() ? void(tensor.gradient.zero_()) : tensor.parameter.mutable_grad().reset();
  }
}

TensorMap AdamW::state() const {
  TensorMap state;
  for (size_t i = 0; i < trained_.size(); ++i) {
    const auto& name = trained_[i].name;
    state.emplace(name, slots_[i].master);
    state.emplace(name + ".exp_avg", slots_[i].exp_avg);
    state.emplace(name + ".exp_avg_sq", slots_[i].exp_avg_sq);
    if (trained_[i].rows.defined()) {
      state.emplace(name + kRows, trained_[i].rows);
    }
  }
  state.emplace(kSteps, at::full({1}, steps_, at::TensorOptions(at::kLong)));
  return state;
}

void AdamW::load(const TensorMap& given) {
  const at::NoGradGuard no_grad;
  const auto own = state();
  for (const auto& [name, tensor] : own) {
    const auto found = given.find(name);
    check(found != given.end(), "[adamw] state: expected {}, it is not there", name);
    check(found->second.sizes() == tensor.sizes() &&
              found->second.scalar_type() == tensor.scalar_type(),
          "[adamw] state: {}: expected {} {}, got {} {}",
          name,
          c10::toString(tensor.scalar_type()),
          shape_str(tensor.sizes()),
          c10::toString(found->second.scalar_type()),
          shape_str(found->second.sizes()));
    check(!name.ends_with(kRows) || at::equal(tensor, found->second.to(tensor.device())),
          "[adamw] state: {}: expected the rows that are trained, got others",
          name);
  }
  for (const auto& [name, tensor] : given) {
    check(
        own.contains(name), "[adamw] state: {}: expected only what is trained, got this too", name);
  }
  for (const auto& [name, tensor] : own) {
    tensor.copy_(given.at(name));
  }
  steps_ = given.at(kSteps).item<int64_t>();
  for (size_t i = 0; i < trained_.size(); ++i) {
    publish(i);
  }
}

double schedule_factor(Schedule schedule, int64_t step, int64_t warmup, int64_t total) {
  if (step < warmup) {
    return static_cast<double>(step) / static_cast<double>(warmup);
  }
  if (schedule == Schedule::kConstant) {
    return 1;
  }
  const auto left = static_cast<double>(std::max<int64_t>(total - step, 0)) /
                    static_cast<double>(std::max<int64_t>(total - warmup, 1));
  return schedule == Schedule::kLinear ? left : 0.5 * (1 + std::cos(std::numbers::pi * (1 - left)));
}

}  // namespace gemma_torch
