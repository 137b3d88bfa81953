#include "gemma_torch/adapt/cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "gemma_torch/adapt/training_ops.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch {
namespace {

constexpr int64_t kLogitsBytes = int64_t{128} << 20;
constexpr int64_t kMostKept = 8;  // beyond one token in so many the full product is as fast

// body(row) for rows 0 .. n - 1.
template <typename Body>
void in_parallel(int64_t n, const Body& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (auto row = begin; row < end; ++row) {
      body(row);
    }
  });
}

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
  in_parallel(logits.size(0), [&](int64_t row) {
    loss[row] = logits.scalar_type() == at::kFloat
                    ? row_loss<float>(logits, row, target[row], by)
                    : row_loss<kernels::Bf16>(logits, row, target[row], by);
  });
  return losses;
}

// The gradient of a bfloat16 head at its input by the tokens that matter (see kLeftOut).
class KeptHead {
 public:
  KeptHead(const at::Tensor& weight, int64_t rows)
      : weight_(weight),
        own_({at::get_num_threads(), weight.size(0) + 64}, weight.device()),
        all_({rows, weight.size(0) / kMostKept}, weight.device()),
        sums_(at::empty({rows, weight.size(1)}, all_.slopes.options())),
        kept_(static_cast<size_t>(rows)) {}

  // Writes `slope` (n, E) and returns the summed loss, in nats; nothing where too many tokens matter.
  std::optional<double> backward(const at::Tensor& logits,
                                 const at::Tensor& targets,
                                 double factor,
                                 at::Tensor& slope) {
    const auto n = logits.size(0), V = logits.size(1);
    const auto* rows = static_cast<const kernels::Bf16*>(logits.const_data_ptr());
    const auto* target = targets.const_data_ptr<int64_t>();
    std::vector<double> losses(static_cast<size_t>(n));
    std::atomic<int64_t> taken = 0;
    in_parallel(n, [&](int64_t row) {
      auto kept = own_.from(at::get_thread_num() * own_.tokens.size(1));
      losses[row] = head().keep(rows + row * V, V, target[row], static_cast<float>(factor), kept);
      kept_[row] = moved(kept, taken.fetch_add(kept.count));
    });
    if (taken > all_.tokens.numel()) {
      return std::nullopt;
    }
    multiply(slope);
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }

 private:
  struct Lists {
    at::Tensor tokens, slopes;
    Lists(c10::IntArrayRef shape, at::Device device)
        : tokens(at::empty(shape, at::TensorOptions(device).dtype(at::kInt))),
          slopes(at::empty(shape, at::TensorOptions(device).dtype(at::kFloat))) {}
    kernels::KeptTokens from(int64_t start) const {
      return {
          tokens.mutable_data_ptr<int32_t>() + start, slopes.mutable_data_ptr<float>() + start, 0};
    }
  };

  // A list's copy from `start` on of the lists of all rows, if it fits there.
  kernels::KeptTokens moved(const kernels::KeptTokens& list, int64_t start) const {
    if (start + list.count > all_.tokens.numel()) {
      return {};
    }
    auto copy = all_.from(start);
    copy.count = list.count;
    std::copy(list.tokens, list.tokens + list.count, copy.tokens);
    std::copy(list.slopes, list.slopes + list.count, copy.slopes);
    return copy;
  }

  static const kernels::HeadTraining& head() {
    return kernels::training_kernels(kernels::best_isa()).head;
  }

  void multiply(at::Tensor& slope) {
    const auto n = slope.size(0), E = slope.size(1);
    const auto share = at::divup(n, at::get_num_threads());
    in_parallel(at::divup(n, share), [&](int64_t part) {
      const auto first = part * share;
      head().product(kept_.data() + first,
                     std::min(share, n - first),
                     {static_cast<const kernels::Bf16*>(weight_.const_data_ptr()),
                      weight_.size(0),
                      E,
                      sums_.mutable_data_ptr<float>() + first * E,
                      static_cast<kernels::Bf16*>(slope.mutable_data_ptr()) + first * E});
    });
  }

  at::Tensor weight_;
  Lists own_, all_;  // the list that a thread makes, and those of all rows one after the other
  at::Tensor sums_;
  std::vector<kernels::KeptTokens> kept_;
};

int64_t rows_of_a_piece(const at::Tensor& hidden, const at::Tensor& weight) {
  const auto row = weight.size(0) * static_cast<int64_t>(hidden.element_size());
  return std::clamp<int64_t>(kLogitsBytes / row, 1, std::max<int64_t>(hidden.size(0), 1));
}

// visit(rows' start, their number, logits) of a few rows at a time, in one piece of memory.
template <typename Visit>
void in_pieces(const at::Tensor& hidden, const at::Tensor& weight, const Visit& visit) {
  const auto N = hidden.size(0), V = weight.size(0);
  const auto rows = rows_of_a_piece(hidden, weight);
  const auto room = at::empty({rows, V}, hidden.options());
  const auto weight_t = weight.detach().t();
  for (int64_t start = 0; start < N; start += rows) {
    const auto n = std::min(rows, N - start);
    auto logits = room.narrow(/*dim=*/0, 0, n);
    at::mm_out(logits, hidden.narrow(/*dim=*/0, start, n), weight_t);
    visit(start, n, logits);
  }
}

void add_weight_gradient(const at::Tensor& logits,
                         const at::Tensor& hidden,
                         const HeadWeightGradient& of) {
  const auto wanted = of.rows.defined() ? logits.index_select(/*dim=*/1, of.rows) : logits;
  of.into.scalar_type() == hidden.scalar_type() ? of.into.addmm_(wanted.t(), hidden)
                                                : of.into.add_(wanted.t().mm(hidden));
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
  std::optional<KeptHead> kept;
  if (has_training_kernels(hidden) && hidden.scalar_type() == at::kBFloat16) {
    kept.emplace(weight.detach().contiguous(), rows_of_a_piece(hidden, weight));
  }
  in_pieces(hidden, weight, [&](int64_t start, int64_t n, at::Tensor& logits) {
    const auto rows = targets.narrow(/*dim=*/0, start, n);
    auto slope = found.hidden.narrow(/*dim=*/0, start, n);
    const auto loss = kept ? kept->backward(logits, rows, factor, slope) : std::nullopt;
    if (loss && !weight_gradient.into.defined()) {
      found.loss += *loss;
      return;
    }
    found.loss += losses_of(logits, rows, factor).sum().item<double>();
    if (!loss) {
      at::mm_out(slope, logits, weight.detach());
    }
    if (weight_gradient.into.defined()) {
      add_weight_gradient(logits, hidden.narrow(/*dim=*/0, start, n), weight_gradient);
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
