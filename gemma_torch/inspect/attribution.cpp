#include "gemma_torch/inspect/attribution.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/inspect/prompt_row.h"
#include "gemma_torch/inspect/site_table.h"

namespace gemma_torch {
namespace {

constexpr int64_t kHeadRows = 16'384;  // of the head, in float64 at a time

at::Tensor wide(const at::Tensor& x) {
  return x.to(at::kCPU, at::kDouble);
}

// How a norm scales each channel of x (E), its divisor held: norm(x) = x * scales(norm, x).
at::Tensor scales(const RMSNorm& norm, const at::Tensor& x) {
  return (1.0 + wide(norm->scale)) * (wide(x).square().mean() + norm->eps).rsqrt();
}

// (E): the product with it of what final_norm gives is the target.
at::Tensor direction(const Gemma3Model& model, const AttributionTarget& target) {
  const auto& weight = model->out_head->weight;
  check(weight.defined(), "[attribute] head: expected a plain weight, got a packed one");
  const auto u = wide(weight[target.tokens[0]]);
  if (target.tokens.size() == 2) {
    return u - wide(weight[target.tokens[1]]);
  }
  if (!target.less_mean) {
    return u;
  }
  auto sum = at::zeros_like(u);
  for (int64_t row = 0; row < weight.size(0); row += kHeadRows) {
    const auto rows = std::min(kHeadRows, weight.size(0) - row);
    sum += wide(weight.narrow(/*dim=*/0, row, rows)).sum(/*dim=*/0);
  }
  return u - sum / weight.size(0);
}

double value_of(const at::Tensor& logits, const AttributionTarget& target) {  // (V)
  const auto logit = [&](size_t i) { return logits[target.tokens[i]].item<double>(); };
  if (target.tokens.size() == 2) {
    return logit(0) - logit(1);
  }
  return target.less_mean ? logit(0) - wide(logits).mean().item<double>() : logit(0);
}

// Sites without an axis of heads before that of tokens, at one position of a run: name -> (..).
TensorMap values_at(Gemma3Model& model, const at::Tensor& ids, int64_t position) {
  TensorMap values;
  const Probe probe = [&](const At& at, const at::Tensor& x) {
    if (site_axis(at.site, "T") == 1) {
      values[site_name(at.site, at.layer)] = wide(x.select(/*dim=*/1, position)[0]);
    }
    return x;
  };
  model->hidden(ids, /*cache=*/nullptr, probe);
  return values;
}

const at::Tensor& plain_weight(const Linear& linear) {
  check(linear->weight.defined(),
        "[attribute] weights: expected plain ones, got packed ones. Hint: the folder that was "
        "quantised, or --quant none");
  return linear->weight;
}

// One block, where a product with u (E) of what it adds to the residual stream is its part.
class BlockParts {
 public:
  BlockParts(TransformerBlockImpl& block, int64_t layer, const TensorMap& values)
      : block_(block), layer_(layer), values_(values) {}

  const at::Tensor& value(Site site) const { return values_.at(site_name(site, layer_)); }

  // z (H, D) times what its channels are worth: W^T v, v being what those of attn_proj are.
  at::Tensor heads(const at::Tensor& u) const {
    const auto v = u * scales(block_.post_attention_layernorm, value(Site::kAttnProj));
    const auto worth = wide(plain_weight(block_.att->out_proj)).t().mv(v);  // (H * D)
    const auto& z = value(Site::kZ);
    return (z * worth.view(z.sizes())).sum(/*dim=*/-1);  // (H)
  }

  at::Tensor neurons(const at::Tensor& u) const {
    const auto v = u * scales(block_.post_feedforward_layernorm, value(Site::kMlpProj));
    return value(Site::kMlpAct) * wide(plain_weight(block_.ff->fc3)).t().mv(v);  // (F)
  }

 private:
  TransformerBlockImpl& block_;
  int64_t layer_;
  const TensorMap& values_;
};

Attribution empty_attribution(const Gemma3Config& cfg) {
  const auto parts = [&](c10::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); };
  return {.attn = parts({cfg.n_layers}),
          .heads = parts({cfg.n_layers, cfg.n_heads}),
          .mlp = parts({cfg.n_layers}),
          .neurons = parts({cfg.n_layers, cfg.hidden_dim}),
          .activations = parts({cfg.n_layers, cfg.hidden_dim})};
}

}  // namespace

double Attribution::sum() const {
  return embed + (heads.sum() + neurons.sum()).item<double>();
}

double Attribution::coarse_residual() const {
  return value - embed - (attn.sum() + mlp.sum()).item<double>();
}

Attribution attribute_logit(Gemma3Model model,
                            const std::vector<int64_t>& ids,
                            const AttributionTarget& target) {
  const auto input = prompt_row("attribute", ids, model);
  const auto& cfg = model->cfg;
  check_tokens("attribute", target.tokens, {1, 2}, cfg.vocab_size);
  check(!target.less_mean || target.tokens.size() == 1,
        "[attribute] mean: expected one token to take the mean from, got two");
  const auto position = checked_position("attribute", target.position, input.size(1));
  const at::NoGradGuard no_grad;
  const auto head = direction(model, target);
  const auto values = values_at(model, input, position);
  const auto last = values.at(site_name(Site::kResidPost, cfg.n_layers - 1));
  const auto u = head * scales(model->final_norm, last);

  auto found = empty_attribution(cfg);
  const auto norm =
      values.at(site_name(Site::kFinalNorm, -1)).to(model->out_head->weight.options());
  found.value = value_of(model->out_head(norm.view({1, 1, -1}))[0][0], target);
  found.embed = u.dot(values.at(site_name(Site::kEmbed, -1))).item<double>();
  for (int64_t layer = 0; layer < cfg.n_layers; ++layer) {
    auto& block = model->blocks->at<TransformerBlockImpl>(static_cast<size_t>(layer));
    const BlockParts parts(block, layer, values);
    found.attn[layer] = u.dot(parts.value(Site::kAttnOut));
    found.heads[layer].copy_(parts.heads(u));
    found.mlp[layer] = u.dot(parts.value(Site::kMlpOut));
    found.neurons[layer].copy_(parts.neurons(u));
    found.activations[layer].copy_(parts.value(Site::kMlpAct));
  }
  return found;
}

}  // namespace gemma_torch
