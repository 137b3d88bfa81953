#include "gemma_torch/adapt/training_pass.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "gemma_torch/adapt/cross_entropy.h"
#include "gemma_torch/adapt/training_ops.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

const Probe kNoProbe;

bool is_trained(const torch::nn::Module& module) {
  const auto parameters = module.parameters();
  return std::any_of(parameters.begin(), parameters.end(), [](const at::Tensor& parameter) {
    return parameter.requires_grad();
  });
}

at::Tensor gradient_room(const at::Tensor& parameter) {
  auto& gradient = parameter.mutable_grad();
  if (!gradient.defined()) {
    gradient = at::zeros_like(parameter.detach());
  }
  return gradient;
}

at::Tensor random_state(const at::Tensor& x) {
  return at::globalContext().defaultGenerator(x.device()).get_state();
}
void set_random_state(const at::Tensor& x, const at::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(x.device());
  generator.set_state(state);
}

TransformerBlockImpl& block_of(const Gemma3Model& model, int64_t layer) {
  return model.ptr()->blocks->at<TransformerBlockImpl>(static_cast<size_t>(layer));
}

}  // namespace

// What the blocks of one pass share.
struct TrainingPass::Shared {
  BlockInput in;
  at::Tensor oldest_global, oldest_local;  // (B or 1, T) int64, the first token that each one sees
};

TrainingPass::TrainingPass(Gemma3Model model, const TrainingPassOptions& options)
    : model_(std::move(model)), options_(options) {
  check(model_->out_head->weight.defined(),
        "[training] head: expected a weight, got a head without one. Hint: train the model as it "
        "was before it was quantised");
  kernels_ = !options_.written_out && has_training_kernels(model_->tok_emb->weight);
}

void TrainingPass::limit_embedding(const at::Tensor& rows, const at::Tensor& gradient) {
  check(model_->out_head->weight.is_same(model_->tok_emb->weight),
        "[training] embedding rows: expected a tied head, got one of its own");
  const auto& weight = model_->tok_emb->weight;
  check(!weight.requires_grad(),
        "[training] embedding rows: expected a weight without a gradient of its own");
  rows_ = rows;
  rows_gradient_ = gradient;
  place_of_ = at::full({weight.size(0)}, -1, rows.options());
  place_of_.index_copy_(/*dim=*/0, rows, at::arange(rows.size(0), rows.options()));
}

TrainingPass::Shared TrainingPass::share(const TrainingBatch& batch) const {
  const auto at = training_placement(batch.ids, batch.first);
  const auto own = at.positions.unsqueeze(0);
  const auto first = batch.first.defined() ? at::minimum(batch.first, own) : at::zeros_like(own);
  const auto window = (own - (model_->cfg.sliding_window - 1)).clamp_min(0);
  return {model_->block_input(at, /*cache=*/nullptr, kNoProbe),
          first.contiguous(),
          at::maximum(first, window).contiguous()};
}

at::Tensor TrainingPass::embed(const at::Tensor& ids) const {
  return at::embedding(model_->tok_emb->weight.detach(), ids) * model_->emb_scale();
}

at::Tensor TrainingPass::norm(const RMSNorm& norm, const at::Tensor& x) const {
  return kernels_ ? norm_op(x, norm->scale, norm->eps) : RMSNorm(norm)->forward(x);
}

at::Tensor TrainingPass::attention(GroupedQueryAttentionImpl& att,
                                   const at::Tensor& x,
                                   const Shared& shared) const {
  const auto& angles = att.sliding ? shared.in.local : shared.in.global;
  const auto& oldest = att.sliding ? shared.oldest_local : shared.oldest_global;
  const auto heads = [&](const at::Tensor& y) {
    return y.view({x.size(0), x.size(1), -1, att.head_dim});  // (B, T, H or G, D)
  };
  auto q = heads(att.W_query(x));
  auto k = heads(att.W_key(x));
  const auto v = heads(att.W_value(x));
  q = rope_op(att.q_norm ? norm(att.q_norm, q) : q, angles.cos, angles.sin);
  k = rope_op(att.k_norm ? norm(att.k_norm, k) : k, angles.cos, angles.sin);
  return att.out_proj(attention_op(q, k, v, oldest, att.scaling).flatten(/*start_dim=*/2));
}

at::Tensor TrainingPass::block(int64_t layer, const at::Tensor& x, const Shared& shared) const {
  auto& block = block_of(model_, layer);
  if (!kernels_) {
    return block.forward(x, shared.in, layer);
  }
  const auto attn = attention(*block.att, norm(block.input_layernorm, x), shared);
  const auto mid = x + norm(block.post_attention_layernorm, attn);
  const auto m = norm(block.pre_feedforward_layernorm, mid);
  const auto act = gelu_mul_op(block.ff->fc1(m), block.ff->fc2(m));
  return mid + norm(block.post_feedforward_layernorm, block.ff->fc3(act));
}

TrainingPass::Step TrainingPass::run(int64_t layer,
                                     const at::Tensor& x,
                                     const Shared& shared,
                                     bool wants_input) const {
  Step step{layer, x.detach().requires_grad_(wants_input), {}, {}};
  if (options_.recompute) {
    step.random = random_state(x);
  }
  const at::AutoGradMode with_gradients(!options_.recompute);
  step.output = block(layer, step.input, shared);
  return step;
}

at::Tensor TrainingPass::back(Step& step, const at::Tensor& slope, const Shared& shared) const {
  if (options_.recompute) {
    const at::AutoGradMode with_gradients(true);
    set_random_state(step.input, step.random);  // the same dropout as the first time
    step.output = block(step.layer, step.input, shared);
  }
  torch::autograd::backward({step.output}, {slope});
  step.output.reset();
  return step.input.grad();
}

at::Tensor TrainingPass::head_back(const at::Tensor& x,
                                   const TrainingBatch& batch,
                                   double factor,
                                   double& loss) {
  const auto scored = x.flatten(0, 1).index_select(/*dim=*/0, batch.scored).requires_grad_();
  at::Tensor h;
  {
    const at::AutoGradMode with_gradients(true);
    h = norm(model_->final_norm, scored);
  }
  const auto& weight = model_->out_head->weight;
  const HeadWeightGradient wanted{rows_,
                                  rows_.defined()          ? rows_gradient_
                                  : weight.requires_grad() ? gradient_room(weight)
                                                           : at::Tensor()};
  const auto found = cross_entropy(h, weight, batch.targets, factor, wanted);
  loss = found.loss;
  torch::autograd::backward({h}, {found.hidden});
  auto slope = at::zeros_like(x);
  slope.view({-1, x.size(2)}).index_copy_(/*dim=*/0, batch.scored, scored.grad());
  return slope;
}

void TrainingPass::embedding_back(const at::Tensor& ids, const at::Tensor& slope) {
  const auto rows = slope.flatten(0, 1) * model_->emb_scale();
  if (!rows_.defined()) {
    gradient_room(model_->tok_emb->weight).index_add_(/*dim=*/0, ids.flatten(), rows);
    return;
  }
  const auto places = place_of_.index_select(/*dim=*/0, ids.flatten());
  const auto known = places.ge(0);  // padding may be none of the rows, and has no gradient
  rows_gradient_.index_add_(
      /*dim=*/0, places.clamp_min(0), rows.to(rows_gradient_.scalar_type()) * known.unsqueeze(1));
}

double TrainingPass::backward(const TrainingBatch& batch, double factor, const OnBlock& on_block) {
  if (batch.targets.numel() == 0) {
    return 0;
  }
  const at::NoGradGuard no_grad;
  const bool trains_embedding = rows_.defined() || model_->tok_emb->weight.requires_grad();
  const auto shared = share(batch);
  std::vector<Step> steps;
  auto x = embed(batch.ids);
  bool wants_input = trains_embedding;
  for (int64_t layer = 0; layer < model_->cfg.n_layers; ++layer) {
    const bool wants_block = is_trained(block_of(model_, layer));
    if (wants_input || wants_block) {
      steps.push_back(run(layer, x, shared, wants_input));
      x = steps.back().output.detach();
      if (options_.recompute) {
        steps.back().output.reset();
      }
    } else {
      x = block(layer, x, shared);
    }
    wants_input = wants_input || wants_block;
  }
  const auto random = random_state(x);
  double loss = 0;
  auto slope = head_back(x, batch, factor, loss);
  x.reset();
  for (; !steps.empty(); steps.pop_back()) {
    slope = back(steps.back(), slope, shared);
    if (on_block) {
      on_block(steps.back().layer);
    }
  }
  if (options_.recompute) {
    set_random_state(batch.ids, random);
  }
  if (trains_embedding) {
    embedding_back(batch.ids, slope);
  }
  return loss;
}

at::Tensor TrainingPass::losses(const TrainingBatch& batch) {
  const at::NoGradGuard no_grad;
  const auto shared = share(batch);
  auto x = embed(batch.ids);
  for (int64_t layer = 0; layer < model_->cfg.n_layers; ++layer) {
    x = block(layer, x, shared);
  }
  const auto scored = x.flatten(0, 1).index_select(/*dim=*/0, batch.scored);
  const auto h = norm(model_->final_norm, scored);
  return cross_entropy_loss(h, model_->out_head->weight, batch.targets);
}

}  // namespace gemma_torch
