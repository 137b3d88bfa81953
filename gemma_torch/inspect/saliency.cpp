#include "gemma_torch/inspect/saliency.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

constexpr int64_t kHeadRows = 32;  // of logits at a time
// The gradient of one row alone is a product of a vector, which sums the vocabulary in float32 one after the other and
// loses 1 part in 1,000 of it; that of several rows sums in blocks.
constexpr int64_t kLeastRows = 4;

at::Tensor gradient_of(const at::Tensor& y, const at::Tensor& x, const at::Tensor& dy) {
  return torch::autograd::grad({y}, {x}, {dy})[0];
}

// What the head makes of the last norm's output, and the gradient there.
class Head {
 public:
  Head(Gemma3Model model, const at::Tensor& ids, const SaliencyTarget& target)
      : model_(std::move(model)), target_(target) {
    const auto T = ids.size(1);
    const bool loss = target.of == Explained::kLoss;
    check_tokens("saliency",
                 target.tokens,
                 loss ? std::pair<size_t, size_t>{0, 0} : std::pair<size_t, size_t>{1, 2},
                 model_->cfg.vocab_size);
    first_ = loss ? 0 : checked_position("saliency", target.position, T);
    count_ = loss ? T - 1 : 1;
    check(count_ > 0, "[saliency] loss: expected at least 2 tokens, got 1");
    if (loss) {
      next_ = ids[0].narrow(/*dim=*/0, 1, count_).cpu();
    }
  }

  // h (B, T, E) -> values (B), gradient (B, T, E). Few rows of logits are held at a time.
  EmbeddingGradient operator()(const at::Tensor& h) {
    const auto B = h.size(0), E = h.size(2);
    const auto rows = h.narrow(/*dim=*/1, first_, count_).reshape({B * count_, E}).detach();
    auto slopes = at::zeros_like(rows);
    auto values = at::zeros_like(rows.select(/*dim=*/1, 0), at::kDouble);
    for (int64_t start = 0; start < rows.size(0); start += kHeadRows) {
      const auto n = std::min(kHeadRows, rows.size(0) - start);
      auto leaf = at::zeros({std::max(n, kLeastRows), E}, rows.options());
      leaf.narrow(/*dim=*/0, 0, n).copy_(rows.narrow(/*dim=*/0, start, n));
      leaf.requires_grad_();
      const auto logits = model_->out_head(leaf).narrow(/*dim=*/0, 0, n).to(at::kFloat);
      const auto value = values_of(logits, start);  // (n)
      slopes.narrow(/*dim=*/0, start, n)
          .copy_(gradient_of(value.sum(), leaf, {}).narrow(/*dim=*/0, 0, n));
      values.narrow(/*dim=*/0, start, n).copy_(value.detach());
    }
    auto gradient = at::zeros_like(h);
    gradient.narrow(/*dim=*/1, first_, count_).copy_(slopes.view({B, count_, E}));
    return {values.view({B, count_}).sum(/*dim=*/1).cpu(), gradient};
  }

 private:
  // (n, V) -> (n); the rows start .. of all those of the batch.
  at::Tensor values_of(const at::Tensor& logits, int64_t start) const {
    // The sum over the vocabulary in float64, on the CPU: in float32 it moves small gradients by 1 part in 1,000.
    const auto x = target_.of == Explained::kLogit
                       ? logits
                       : logits.to(at::kCPU, at::kDouble).log_softmax(/*dim=*/-1);
    if (target_.of == Explained::kLoss) {
      const auto rows = at::arange(start, start + logits.size(0), next_.options()) % count_;
      const auto next = next_.index_select(/*dim=*/0, rows);
      return -x.gather(/*dim=*/1, next.unsqueeze(1)).squeeze(1) / count_;
    }
    const auto first = x.select(/*dim=*/1, target_.tokens[0]);
    return target_.tokens.size() == 1 ? first : first - x.select(/*dim=*/1, target_.tokens[1]);
  }

  Gemma3Model model_;
  const SaliencyTarget& target_;
  int64_t first_ = 0, count_ = 1;  // positions whose logits matter
  at::Tensor next_;                // (count) the tokens that follow them, of a loss
};

}  // namespace

EmbeddingGradient embedding_gradient(Gemma3Model model,
                                     const std::vector<int64_t>& ids,
                                     const SaliencyTarget& target,
                                     const at::Tensor& embeddings) {
  const auto input = prompt_row("saliency", ids, model);
  Head head(model, input, target);
  const auto T = input.size(1), E = model->cfg.emb_dim;
  check(embeddings.dim() == 3 && embeddings.size(1) == T && embeddings.size(2) == E,
        "[saliency] embeddings: expected (B, {}, {}), got {}",
        T,
        E,
        shape_str(embeddings.sizes()));
  const at::AutoGradMode with_gradients(true);
  const auto leaf = embeddings.detach().clone().requires_grad_();
  const Probe substitute = [&](const At& at, const at::Tensor& x) {
    return at.site == Site::kEmbed ? leaf : x;
  };
  const auto h = model->hidden(input.expand({leaf.size(0), T}), /*cache=*/nullptr, substitute);
  auto found = head(h);
  found.gradient = gradient_of(h, leaf, found.gradient);
  return found;
}

at::Tensor embeddings_of(Gemma3Model model, const std::vector<int64_t>& ids) {
  const auto input = prompt_row("saliency", ids, model);
  const at::NoGradGuard no_grad;
  at::Tensor embed;
  const Probe look = [&](const At& at, const at::Tensor& x) {
    embed = at.site == Site::kEmbed ? x[0] : embed;
    return x;
  };
  model->hidden(input, /*cache=*/nullptr, look);
  return embed;
}

Saliency gradient_times_input(Gemma3Model model,
                              const std::vector<int64_t>& ids,
                              const SaliencyTarget& target) {
  Saliency found{.embed = embeddings_of(model, ids)};
  const auto at = embedding_gradient(model, ids, target, found.embed.unsqueeze(0));
  found.value = at.values.item<double>();
  found.gradient = at.gradient[0];
  const auto wide = found.gradient.to(at::kCPU, at::kDouble);
  found.scores = (wide * found.embed.to(at::kCPU, at::kDouble)).sum(/*dim=*/1);
  found.norms = wide.norm(/*p=*/2, /*dim=*/1);
  return found;
}

}  // namespace gemma_torch
