#include "gemma_torch/inspect/lens.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

// The residual stream (T, E) at each depth.
std::vector<at::Tensor> depths_of(Gemma3Model& model, const at::Tensor& ids) {
  std::vector<at::Tensor> depths;
  const Probe probe = [&](const At& at, const at::Tensor& x) {
    if (at.site == Site::kEmbed || at.site == Site::kResidPost) {
      depths.push_back(x[0]);
    }
    return x;
  };
  model->hidden(ids, /*cache=*/nullptr, probe);
  return depths;
}

at::Tensor targets_of(const std::vector<int64_t>& ids, const std::vector<int64_t>& asked) {
  const auto T = static_cast<int64_t>(ids.size());
  if (!asked.empty()) {
    return at::tensor(asked, at::kLong).unsqueeze(0).repeat({T, 1});
  }
  const auto next = at::full({T, 1}, -1, at::kLong);
  next.narrow(/*dim=*/0, 0, T - 1)
      .copy_(at::tensor(ids, at::kLong).narrow(0, 1, T - 1).view({-1, 1}));
  return next;
}

Lens empty_lens(int64_t N, int64_t K, const at::Tensor& targets) {
  const auto T = targets.size(0), M = targets.size(1);
  return {.top_ids = at::zeros({N, T, K}, at::kLong),
          .top_logits = at::zeros({N, T, K}),
          .top_log_probs = at::zeros({N, T, K}),
          .targets = targets,
          .target_log_probs = at::full({N, T, M}, std::numeric_limits<float>::quiet_NaN()),
          .target_ranks = at::zeros({N, T, M}, at::kLong),
          .kl = at::zeros({N, T}, at::kDouble)};
}

// Distributions of a few positions; `final` is what the last depth says of them.
class Reader {
 public:
  Reader(Gemma3Model& model, Lens& lens) : model_(model), lens_(lens) {}

  at::Tensor logits(const at::Tensor& x) {  // (R, E) -> (R, V)
    return model_->out_head(model_->final_norm(x.unsqueeze(0)))[0].to(at::kFloat);
  }

  void begin(int64_t start, const at::Tensor& x) {
    start_ = start;
    rows_ = x.size(0);
    final_ = logits(x).log_softmax(/*dim=*/-1);
    final_probs_ = final_.exp();
  }

  void read(int64_t depth, const at::Tensor& x) {
    const auto z = logits(x);
    const auto log_probs = z.log_softmax(/*dim=*/-1);
    const auto [values, top] = z.topk(lens_.top_ids.size(2), /*dim=*/-1);
    put(lens_.top_ids, depth, top);
    put(lens_.top_logits, depth, values);
    put(lens_.top_log_probs, depth, log_probs.gather(/*dim=*/-1, top));
    put(lens_.kl,
        depth,
        (final_ - log_probs).mul_(final_probs_).sum(/*dim=*/-1, false, at::kDouble));
    const auto asked = lens_.targets.narrow(/*dim=*/0, start_, rows_).to(z.device());  // (R, M)
    const auto present = asked.ge(0);
    const auto ids = asked.clamp_min(0);
    put(lens_.target_log_probs,
        depth,
        log_probs.gather(/*dim=*/-1, ids)
            .masked_fill(present.logical_not(), std::numeric_limits<double>::quiet_NaN()));
    const auto own = z.gather(/*dim=*/-1, ids);
    for (int64_t m = 0; m < ids.size(1); ++m) {
      const auto above = z.gt(own.narrow(/*dim=*/1, m, 1)).sum(/*dim=*/-1);  // (R)
      const auto rank = (above + 1) * present.select(/*dim=*/1, m);
      put(lens_.target_ranks.select(/*dim=*/2, m), depth, rank);
    }
  }

 private:
  void put(const at::Tensor& whole, int64_t depth, const at::Tensor& rows) const {
    whole[depth].narrow(/*dim=*/0, start_, rows_).copy_(rows);
  }

  Gemma3Model& model_;
  Lens& lens_;
  int64_t start_ = 0, rows_ = 0;
  at::Tensor final_, final_probs_;  // (R, V)
};

}  // namespace

Lens logit_lens(Gemma3Model model, const std::vector<int64_t>& ids, const LensOptions& options) {
  const auto input = prompt_row("lens", ids, model);
  const auto V = model->cfg.vocab_size;
  check_tokens("lens", options.targets, {0, static_cast<size_t>(V)}, V);
  check(
      options.top >= 1 && options.top <= V, "[lens] top: expected 1 to {}, got {}", V, options.top);
  check(options.rows >= 1, "[lens] rows: expected at least 1, got {}", options.rows);
  const at::NoGradGuard no_grad;
  const auto depths = depths_of(model, input);
  const auto N = static_cast<int64_t>(depths.size()), T = input.size(1);
  auto lens = empty_lens(N, options.top, targets_of(ids, options.targets));
  Reader reader(model, lens);
  for (int64_t start = 0, done = 0; start < T; start += options.rows) {
    const auto rows = std::min(options.rows, T - start);
    reader.begin(start, depths.back().narrow(/*dim=*/0, start, rows));
    for (int64_t depth = 0; depth < N; ++depth) {
      reader.read(depth, depths[static_cast<size_t>(depth)].narrow(/*dim=*/0, start, rows));
      done += rows;
      check(!options.on_progress || options.on_progress(done, N * T),
            "[lens] stopped after {} of {} rows, nothing was written",
            done,
            N * T);
    }
  }
  return lens;
}

}  // namespace gemma_torch
