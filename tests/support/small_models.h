#pragma once

#include <ATen/Functions.h>
#include <torch/utils.h>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch::test {

// The smallest shape the kernels take, with sliding and full layers and a window shorter than the texts.
inline Gemma3Config small_config(c10::ScalarType dtype) {
  Gemma3Config cfg;
  cfg.vocab_size = 1003;  // not a multiple of 16
  cfg.emb_dim = 128;
  cfg.n_heads = 4;
  cfg.n_kv_groups = 2;
  cfg.head_dim = 32;
  cfg.hidden_dim = 192;
  cfg.n_layers = 4;
  cfg.sliding_window = 8;
  cfg.layer_types = make_layer_types(4, 2);
  cfg.query_pre_attn_scalar = 32;
  cfg.round_emb_scale = false;
  cfg.dtype = dtype;
  return validated(cfg);
}

// Ids of its vocabulary: the first n of a fixed text.
inline std::vector<int64_t> small_prompt(int64_t n) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back((i * 37 + 5) % 1003);
  }
  return ids;
}

// The same weights in bfloat16, for the fused engine, and in float32, for the modules that judge it.
struct Pair {
  Gemma3Model rounded{nullptr}, wide{nullptr};
};

inline Pair small_models() {
  torch::manual_seed(7);
  Pair pair;
  pair.rounded = Gemma3Model(small_config(at::kBFloat16));
  pair.wide = Gemma3Model(small_config(at::kFloat));
  const torch::NoGradGuard no_grad;
  for (auto& parameter : pair.rounded->parameters()) {
    if (parameter.dim() == 1) {
      parameter.normal_(0, 0.3);  // norms start at zero, which would hide them
    }
  }
  pair.rounded->tok_emb->weight.mul_(0.1);  // else every token is sure of itself
  for (auto* model : {&pair.rounded, &pair.wide}) {
    (*model)->tie_weights();
  }
  const auto from = pair.rounded->named_parameters();
  for (auto& item : pair.wide->named_parameters()) {
    item.value().copy_(from[item.key()]);
  }
  return pair;
}

}  // namespace gemma_torch::test
