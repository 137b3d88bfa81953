#include "gemma_torch/adapt/cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>

#include <algorithm>

#include "gemma_torch/adapt/training_ops.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch {
namespace {

constexpr int64_t kLogitsBytes = int64_t{128} << 20;

void check_fit(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  check(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
            targets.dim() == 1 && targets.size(0) == hidden.size(0),
        "[cross_entropy] expected hidden (N, E), weight (V, E), targets (N), got {}, {}, {}",
        shape_str(hidden.sizes()),
        shape_str(weight.sizes()),
        shape_str(targets.sizes()));
  check(hidden.scalar_type() == weight.scalar_type(),
        "[cross_entropy] hidden: expected the weight's dtype {}, got {}",
        c10::toString(weight.scalar_type()),
        c10::toString(hidden.scalar_type()));
  if (targets.numel() > 0) {
    const auto least = targets.min().item<int64_t>(), most = targets.max().item<int64_t>();
    check(least >= 0 && most < weight.size(0),
          "[cross_entropy] targets: expected 0 .. {}, got {}",
          weight.size(0) - 1,
          least < 0 ? least : most);
  }
}

template <typename T>
double row_loss(at::Tensor& logits, int64_t row, int64_t target, float factor) {
  const auto& kernels = kernels::training_kernels(kernels::best_isa());
  const auto V = logits.size(1);
  if constexpr (std::is_same_v<T, float>) {
    return kernels.f32.cross_entropy(logits.mutable_data_ptr<float>() + row * V, V, target, factor);
  } else {
    auto* data = static_cast<kernels::Bf16*>(logits.mutable_data_ptr()) + row * V;
    return kernels.bf16.cross_entropy(data, V, target, factor);
  }
}

// losses (n) of logits (n, V), which become their gradient.
at::Tensor losses_of(at::Tensor& logits, const at::Tensor& targets, double factor) {
  if (!has_training_kernels(logits)) {
    auto log_p = logits.log_softmax(/*dim=*/1, at::kFloat);
    const auto losses = -log_p.gather(/*dim=*/1, targets.unsqueeze(1)).squeeze(1).to(at::kDouble);
    auto slope = log_p.exp_();
    slope.scatter_add_(/*dim=*/1, targets.unsqueeze(1), (-at::ones_like(slope.narrow(1, 0, 1))));
    logits.copy_(slope.mul_(factor));
    return losses;
  }
  auto losses = at::empty({logits.size(0)}, logits.options().dtype(at::kDouble));
  auto* loss = losses.mutable_data_ptr<double>();
  const auto* target = targets.const_data_ptr<int64_t>();
  const auto by = static_cast<float>(factor);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (auto row = begin; row < end; ++row) {
      loss[row] = logits.scalar_type() == at::kFloat
                      ? row_loss<float>(logits, row, target[row], by)
                      : row_loss<kernels::Bf16>(logits, row, target[row], by);
    }
  });
  return losses;
}

// visit(rows' start, their number, logits) of a few rows at a time, in one piece of memory.
template <typename Visit>
void in_pieces(const at::Tensor& hidden, const at::Tensor& weight, const Visit& visit) {
  const auto N = hidden.size(0), V = weight.size(0);
  const auto itemsize = static_cast<int64_t>(hidden.element_size());
  const auto rows = std::clamp<int64_t>(kLogitsBytes / (V * itemsize), 1, std::max<int64_t>(N, 1));
  const auto room = at::empty({rows, V}, hidden.options());
  const auto weight_t = weight.detach().t();
  for (int64_t start = 0; start < N; start += rows) {
    const auto n = std::min(rows, N - start);
    auto logits = room.narrow(/*dim=*/0, 0, n);
    at::mm_out(logits, hidden.narrow(/*dim=*/0, start, n), weight_t);
    visit(start, n, logits);
  }
}

}  // namespace

HeadGradient cross_entropy(const at::Tensor& given,
                           const at::Tensor& weight,
                           const at::Tensor& targets,
                           double factor,
                           const HeadWeightGradient& weight_gradient) {
  check_fit(given, weight, targets);
  const at::NoGradGuard no_grad;
  const auto hidden = given.detach();
  HeadGradient found{.hidden = at::empty_like(hidden)};
  in_pieces(hidden, weight, [&](int64_t start, int64_t n, at::Tensor& logits) {
    found.loss +=
        losses_of(logits, targets.narrow(/*dim=*/0, start, n), factor).sum().item<double>();
    auto slope = found.hidden.narrow(/*dim=*/0, start, n);
    at::mm_out(slope, logits, weight.detach());
    if (weight_gradient.into.defined()) {
      const auto& rows = weight_gradient.rows;
      const auto wanted = rows.defined() ? logits.index_select(/*dim=*/1, rows) : logits;
      const auto part = hidden.narrow(/*dim=*/0, start, n);
      const auto& into = weight_gradient.into;
      into.scalar_type() == hidden.scalar_type() ? into.addmm_(wanted.t(), part)
                                                 : into.add_(wanted.t().mm(part));
    }
  });
  return found;
}

at::Tensor cross_entropy_loss(const at::Tensor& given,
                              const at::Tensor& weight,
                              const at::Tensor& targets) {
  check_fit(given, weight, targets);
  const at::NoGradGuard no_grad;
  const auto hidden = given.detach();
  auto losses = at::empty({hidden.size(0)}, targets.options().dtype(at::kDouble));
  in_pieces(hidden, weight, [&](int64_t start, int64_t n, at::Tensor& logits) {
    losses.narrow(/*dim=*/0, start, n)
        .copy_(losses_of(logits, targets.narrow(/*dim=*/0, start, n), /*factor=*/1));
  });
  return losses;
}

}  // namespace gemma_torch
