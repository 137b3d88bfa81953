#include "gemma_torch/model/gemma3.h"

#include <ATen/Functions.h>
#include <torch/nn/init.h>

#include <cmath>
#include <limits>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/model/inference.h"

namespace gemma_torch {

// ---- cell 8

FeedForwardImpl::FeedForwardImpl(const Gemma3Config& cfg,
                                 const torch::TensorOptions& options,
                                 Init init) {
  fc1 = register_module("fc1", Linear(cfg.emb_dim, cfg.hidden_dim, options, init));
  fc2 = register_module("fc2", Linear(cfg.emb_dim, cfg.hidden_dim, options, init));
  fc3 = register_module("fc3", Linear(cfg.hidden_dim, cfg.emb_dim, options, init));
}

torch::Tensor FeedForwardImpl::forward(const torch::Tensor& x,
                                       const BlockInput& in,
                                       int64_t layer) {
  const auto x_fc1 = tap(in.probe, {Site::kGate, layer, in.positions}, fc1(x));
  const auto x_fc2 = tap(in.probe, {Site::kUp, layer, in.positions}, fc2(x));
  const auto act = at::gelu(x_fc1, /*approximate=*/"tanh") * x_fc2;
  return fc3(tap(in.probe, {Site::kMlpAct, layer, in.positions}, act));
}

// ---- cell 9

RMSNormImpl::RMSNormImpl(int64_t emb_dim, double epsilon, const torch::TensorOptions& options)
    : eps(epsilon) {
  scale = register_parameter("scale", at::zeros({emb_dim}, options));
}

torch::Tensor RMSNormImpl::forward(const torch::Tensor& x) {
  if (has_kernels(x) && x.scalar_type() == scale.scalar_type()) {
    return rms_norm_kernel(x, scale, eps);
  }
  if (has_fused_norm(x)) {
    return rms_norm_fused(x, scale, eps);
  }
  // In float32, as Hugging Face does: squares of bfloat16 sums lose too much.
  const auto x_f = x.to(torch::kFloat32);
  const auto var = x_f.pow(2).mean(/*dim=*/-1, /*keepdim=*/true);
  const auto x_norm = x_f * torch::rsqrt(var + eps);
  const auto out = x_norm * (1.0 + scale.to(torch::kFloat32));
  return out.to(x.scalar_type());
}

// ---- cell 10

std::pair<torch::Tensor, torch::Tensor> compute_rope_params(const torch::Tensor& positions,
                                                            int64_t head_dim,
                                                            double theta_base,
                                                            double scaling) {
  check(head_dim % 2 == 0,
        "[compute_rope_params] head_dim: expected an even number, got {}",
        head_dim);
  const auto options = positions.options().dtype(torch::kFloat32);
  const auto exponents = at::arange(0, head_dim, /*step=*/2, options) / head_dim;
  const auto inv_freq = 1.0 / at::pow(theta_base, exponents) / scaling;
  const auto half = positions.to(torch::kFloat32).unsqueeze(1) * inv_freq.unsqueeze(0);  // (T, D/2)
  const auto angles = at::cat({half, half}, /*dim=*/1);                                  // (T, D)
  return {angles.cos(), angles.sin()};
}

torch::Tensor apply_rope(const torch::Tensor& x,
                         const torch::Tensor& cos,
                         const torch::Tensor& sin) {
  const auto head_dim = x.size(-1);
  if (head_dim % 2 != 0 || cos.size(0) != x.size(2)) {  // twice a layer: no text is made in vain
    fail("[apply_rope] cos: expected ({}, {}) with an even last size, got {}",
         x.size(2),
         head_dim,
         shape_str(cos.sizes()));
  }
  if (has_kernels(x)) {
    return rope_kernel(x, cos, sin);
  }
  const auto x1 = x.narrow(/*dim=*/-1, /*start=*/0, head_dim / 2);
  const auto x2 = x.narrow(/*dim=*/-1, /*start=*/head_dim / 2, head_dim / 2);
  const auto rotated = at::cat({-x2, x1}, /*dim=*/-1);
  const auto x_rotated = x * cos + rotated * sin;  // float32: cos and sin are
  return x_rotated.to(x.scalar_type());
}

// ---- cell 11

GroupedQueryAttentionImpl::GroupedQueryAttentionImpl(const Gemma3Config& cfg,
                                                     const torch::TensorOptions& options,
                                                     Init init)
    : num_heads(cfg.n_heads),
      num_kv_groups(cfg.n_kv_groups),
      head_dim(cfg.head_dim),
      scaling(std::pow(static_cast<double>(cfg.query_pre_attn_scalar), -0.5)) {
  const auto d_out = num_heads * head_dim;
  const auto d_kv = num_kv_groups * head_dim;
  W_query = register_module("W_query", Linear(cfg.emb_dim, d_out, options, init));
  W_key = register_module("W_key", Linear(cfg.emb_dim, d_kv, options, init));
  W_value = register_module("W_value", Linear(cfg.emb_dim, d_kv, options, init));
  out_proj = register_module("out_proj", Linear(d_out, cfg.emb_dim, options, init));
  if (cfg.qk_norm) {
    q_norm = register_module("q_norm", RMSNorm(head_dim, cfg.rms_norm_eps, options));
    k_norm = register_module("k_norm", RMSNorm(head_dim, cfg.rms_norm_eps, options));
  }
}

torch::Tensor GroupedQueryAttentionImpl::forward(const torch::Tensor& x,
                                                 const BlockInput& in,
                                                 int64_t layer) {
  const auto& input = sliding ? in.local : in.global;
  const auto at = [&](Site site) { return At{site, layer, in.positions}; };
  const auto b = x.size(0);
  auto queries = W_query(x).view({b, -1, num_heads, head_dim}).transpose(1, 2);     // (B, H, T, D)
  auto keys = W_key(x).view({b, -1, num_kv_groups, head_dim}).transpose(1, 2);      // (B, G, T, D)
  auto values = W_value(x).view({b, -1, num_kv_groups, head_dim}).transpose(1, 2);  // (B, G, T, D)
  queries = tap(in.probe, at(Site::kQ), q_norm ? q_norm(queries) : queries);
  keys = tap(in.probe, at(Site::kK), k_norm ? k_norm(keys) : keys);
  values = tap(in.probe, at(Site::kV), values);

  queries = tap(in.probe, at(Site::kRotQ), apply_rope(queries, input.cos, input.sin));
  keys = tap(in.probe, at(Site::kRotK), apply_rope(keys, input.cos, input.sin));
  if (in.cache != nullptr) {
    std::tie(keys, values) =
        in.cache->layer(layer).update(keys, values, input.stored);  // (B, G, S, D)
  }

  // The notebook repeats every key and value for the heads of its group. Stacking those heads' queries instead
  // gives the same products without the copies: (B, G, H/G * T, D).
  const auto stacked = (queries * scaling).reshape({b, num_kv_groups, -1, head_dim});
  // T and S are never named, so that a trace serves any of them.
  const auto heads = num_heads / num_kv_groups;
  auto attn_scores = at::matmul(stacked, keys.transpose(2, 3));               // (B, G, H/G * T, S)
  attn_scores = attn_scores.unflatten(/*dim=*/2, {heads, -1}).flatten(1, 2);  // (B, H, T, S)
  attn_scores = tap(in.probe, at(Site::kScores), attn_scores);
  attn_scores = attn_scores.masked_fill(input.hidden, -std::numeric_limits<double>::infinity());
  // Sums in float32 whatever the dtype: PyTorch's kernels widen bfloat16 inside and round once, at the end.
  auto attn_weights = at::softmax(attn_scores, /*dim=*/-1);
  attn_weights = tap(in.probe, at(Site::kPattern), attn_weights);

  auto context =
      attn_weights.unflatten(/*dim=*/1, {num_kv_groups, heads}).flatten(2, 3).matmul(values);
  context = context.view({b, num_heads, -1, head_dim}).transpose(1, 2);  // (B, T, H, D)
  context = tap(in.probe, at(Site::kZ), context);
  return out_proj(context.reshape({b, -1, num_heads * head_dim}));
}

// ---- cell 12

TransformerBlockImpl::TransformerBlockImpl(const Gemma3Config& cfg,
                                           LayerType type,
                                           const torch::TensorOptions& options,
                                           Init init)
    : attn_type(type) {
  const auto norm = [&](const char* name) {
    return register_module(name, RMSNorm(cfg.emb_dim, cfg.rms_norm_eps, options));
  };
  att = register_module("att", GroupedQueryAttention(cfg, options, init));
  att->sliding = type == LayerType::kSlidingAttention;
  ff = register_module("ff", FeedForward(cfg, options, init));
  input_layernorm = norm("input_layernorm");
  post_attention_layernorm = norm("post_attention_layernorm");
  pre_feedforward_layernorm = norm("pre_feedforward_layernorm");
  post_feedforward_layernorm = norm("post_feedforward_layernorm");
}

torch::Tensor TransformerBlockImpl::forward(torch::Tensor x, const BlockInput& in, int64_t layer) {
  const auto at = [&](Site site) { return At{site, layer, in.positions}; };
  // Shortcut connection for the attention block
  auto shortcut = tap(in.probe, at(Site::kResidPre), x);
  x = tap(in.probe, at(Site::kAttnIn), input_layernorm(shortcut));
  auto x_attn = tap(in.probe, at(Site::kAttnProj), att(x, in, layer));
  x_attn = tap(in.probe, at(Site::kAttnOut), post_attention_layernorm(x_attn));
  x = tap(in.probe, at(Site::kResidMid), shortcut + x_attn);

  // Shortcut connection for the feed-forward block
  shortcut = x;
  auto x_ffn = tap(in.probe, at(Site::kMlpIn), pre_feedforward_layernorm(x));
  x_ffn = tap(in.probe, at(Site::kMlpProj), ff(x_ffn, in, layer));
  x_ffn = tap(in.probe, at(Site::kMlpOut), post_feedforward_layernorm(x_ffn));
  return tap(in.probe, at(Site::kResidPost), shortcut + x_ffn);
}

// ---- cell 13

torch::Tensor create_mask(const torch::Tensor& positions,
                          const torch::Tensor& stored,
                          const torch::Tensor& first,
                          int64_t window) {
  // mask_global: the future (j > i). far_past: i - j >= window, or left of the row's first token.
  const auto i = positions.unsqueeze(0);  // (1, T)
  auto oldest = window > 0 ? (i - (window - 1)).clamp_min(0) : at::zeros_like(i);
  oldest = first.defined() ? at::maximum(oldest, first) : oldest;  // (B or 1, T)
  oldest = at::minimum(oldest, i);                                 // itself always
  const auto far_past = stored < oldest.unsqueeze(-1);             // (B or 1, T, S)
  const auto future = stored > i.unsqueeze(-1);                    // (1, T, S)
  return (far_past | future).unsqueeze(1);                         // (B or 1, 1, T, S)
}

Gemma3ModelImpl::Gemma3ModelImpl(const Gemma3Config& config, const torch::Device& device, Init init)
    : cfg(validated(config)) {
  const auto options = torch::TensorOptions(cfg.dtype).device(device);
  auto embedding = at::empty({cfg.vocab_size, cfg.emb_dim}, options);
  if (init == Init::kReference) {
    torch::nn::init::normal_(embedding);
  }
  tok_emb = register_module(
      "tok_emb",
      torch::nn::Embedding(
          torch::nn::EmbeddingOptions(cfg.vocab_size, cfg.emb_dim)._weight(embedding)));
  blocks = register_module("blocks", torch::nn::ModuleList());
  for (const auto attn_type : cfg.layer_types) {
    blocks->push_back(TransformerBlock(cfg, attn_type, options, init));
  }
  final_norm = register_module("final_norm", RMSNorm(cfg.emb_dim, cfg.rms_norm_eps, options));
  out_head = register_module("out_head", Linear(cfg.emb_dim, cfg.vocab_size, options, init));
}

double Gemma3ModelImpl::emb_scale() const {
  const double scale = std::sqrt(static_cast<double>(cfg.emb_dim));
  // transformers keeps the factor in the weights' dtype: 25.25 instead of 25.298 in bfloat16.
  const bool rounded = cfg.round_emb_scale && tok_emb->weight.scalar_type() == torch::kBFloat16;
  return rounded ? static_cast<double>(c10::BFloat16(static_cast<float>(scale))) : scale;
}

torch::Tensor Gemma3ModelImpl::embed(const torch::Tensor& input_ids) {
  return tok_emb(input_ids) * emb_scale();
}

torch::Tensor Gemma3ModelImpl::hidden(const torch::Tensor& input_ids,
                                      KvCache* cache,
                                      const Probe& probe) {
  check(input_ids.dim() == 2,
        "[Gemma3Model] ids: expected (B, T), got {}",
        shape_str(input_ids.sizes()));
  check(cache == nullptr || !torch::GradMode::is_enabled() || !tok_emb->weight.requires_grad(),
        "[Gemma3Model] a cache holds no gradients. Hint: torch::NoGradGuard, or pass no cache");
  const auto T = input_ids.size(1);
  Placement at;
  if (cache != nullptr) {
    at = cache->place(T);
  } else {
    at.positions = at::arange(T, input_ids.options().dtype(torch::kLong));
    at.global.positions = at.local.positions = at.positions;
  }
  const auto x = hidden(input_ids, at, cache, probe);
  if (cache != nullptr) {
    cache->advance(T);
  }
  return x;
}

BlockInput Gemma3ModelImpl::block_input(const Placement& at,
                                        KvCache* cache,
                                        const Probe& probe) const {
  const auto [cos_global, sin_global] =
      compute_rope_params(at.positions, cfg.head_dim, cfg.rope_base, cfg.rope_scaling);
  const auto [cos_local, sin_local] =
      compute_rope_params(at.positions, cfg.head_dim, cfg.rope_local_base);
  const auto mask_global = create_mask(at.positions, at.global.positions, at.first, /*window=*/0);
  const auto mask_local =
      create_mask(at.positions, at.local.positions, at.first, cfg.sliding_window);
  return {at.positions,
          {cos_global, sin_global, mask_global, at.global},
          {cos_local, sin_local, mask_local, at.local},
          cache,
          probe};
}

torch::Tensor Gemma3ModelImpl::hidden(const torch::Tensor& input_ids,
                                      const Placement& at,
                                      KvCache* cache,
                                      const Probe& probe) {
  const auto in = block_input(at, cache, probe);
  auto x = tap(probe, {Site::kEmbed, -1, at.positions}, embed(input_ids));
  for (int64_t layer = 0; layer < cfg.n_layers; ++layer) {
    x = blocks->at<TransformerBlockImpl>(static_cast<size_t>(layer)).forward(x, in, layer);
  }
  return tap(probe, {Site::kFinalNorm, -1, at.positions}, final_norm(x));
}

torch::Tensor Gemma3ModelImpl::forward(const torch::Tensor& input_ids,
                                       KvCache* cache,
                                       const Probe& probe) {
  const auto x = hidden(input_ids, cache, probe);
  const auto end = cache == nullptr ? x.size(1) : cache->position();
  const auto positions = probe ? at::arange(end - x.size(1), end) : torch::Tensor();
  return tap(probe, {Site::kLogits, -1, positions}, out_head(x));
}

void Gemma3ModelImpl::tie_weights() {
  out_head->tie(tok_emb->weight);
}

void Gemma3ModelImpl::for_each_linear(
    const std::function<void(torch::nn::Module&, const std::string&, Linear&)>& visit) {
  for (auto& block : *blocks) {
    auto& layer = *block->as<TransformerBlockImpl>();
    visit(*layer.att, "W_query", layer.att->W_query);
    visit(*layer.att, "W_key", layer.att->W_key);
    visit(*layer.att, "W_value", layer.att->W_value);
    visit(*layer.att, "out_proj", layer.att->out_proj);
    visit(*layer.ff, "fc1", layer.ff->fc1);
    visit(*layer.ff, "fc2", layer.ff->fc2);
    visit(*layer.ff, "fc3", layer.ff->fc3);
  }
  visit(*this, "out_head", out_head);
}

}  // namespace gemma_torch
