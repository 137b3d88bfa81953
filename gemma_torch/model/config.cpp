#include "gemma_torch/model/config.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

using nlohmann::json;

std::vector<LayerType> make_layer_types(int64_t n_layers, int64_t pattern) {
  std::vector<LayerType> types;
  for (int64_t layer = 0; layer < n_layers; ++layer) {
    types.push_back((layer + 1) % pattern == 0 ? LayerType::kFullAttention
                                               : LayerType::kSlidingAttention);
  }
  return types;
}

Gemma3Config validated(Gemma3Config cfg) {
  const auto at_least_one = [](const char* name, int64_t value) {
    check(value >= 1, "[config] {}: expected at least 1, got {}", name, value);
  };
  at_least_one("vocab_size", cfg.vocab_size);
  at_least_one("context_length", cfg.context_length);
  at_least_one("emb_dim", cfg.emb_dim);
  at_least_one("n_heads", cfg.n_heads);
  at_least_one("n_layers", cfg.n_layers);
  at_least_one("hidden_dim", cfg.hidden_dim);
  at_least_one("n_kv_groups", cfg.n_kv_groups);
  at_least_one("sliding_window", cfg.sliding_window);
  check(cfg.n_layers <= 1024, "[config] n_layers: expected at most 1024, got {}", cfg.n_layers);
  check(cfg.head_dim >= 2 && cfg.head_dim % 2 == 0,
        "[config] head_dim: expected an even number, got {}",
        cfg.head_dim);
  check(cfg.n_heads % cfg.n_kv_groups == 0,
        "[config] n_heads: expected a multiple of n_kv_groups {}, got {}",
        cfg.n_kv_groups,
        cfg.n_heads);
  if (cfg.layer_types.empty()) {
    cfg.layer_types = make_layer_types(cfg.n_layers, 6);
  }
  check(static_cast<int64_t>(cfg.layer_types.size()) == cfg.n_layers,
        "[config] layer_types: expected {} of them, got {}",
        cfg.n_layers,
        cfg.layer_types.size());
  return cfg;
}

json config_to_json(const Gemma3Config& given) {
  const auto cfg = validated(given);
  auto types = json::array();
  for (const auto type : cfg.layer_types) {
    types.push_back(type == LayerType::kFullAttention ? "full_attention" : "sliding_attention");
  }
  auto scaling = json();
  if (cfg.rope_scaling != 1.0) {
    scaling = {{"rope_type", "linear"}, {"factor", cfg.rope_scaling}};
  }
  return {{"architectures", {"Gemma3ForCausalLM"}},
          {"model_type", "gemma3_text"},
          {"vocab_size", cfg.vocab_size},
          {"max_position_embeddings", cfg.context_length},
          {"hidden_size", cfg.emb_dim},
          {"num_attention_heads", cfg.n_heads},
          {"num_hidden_layers", cfg.n_layers},
          {"intermediate_size", cfg.hidden_dim},
          {"head_dim", cfg.head_dim},
          {"num_key_value_heads", cfg.n_kv_groups},
          {"rope_local_base_freq", cfg.rope_local_base},
          {"rope_theta", cfg.rope_base},
          {"rope_scaling", scaling},
          {"sliding_window", cfg.sliding_window},
          {"layer_types", types},
          {"torch_dtype", cfg.dtype == c10::ScalarType::Float ? "float32" : "bfloat16"},
          {"query_pre_attn_scalar", cfg.query_pre_attn_scalar},
          {"rms_norm_eps", cfg.rms_norm_eps},
          {"tie_word_embeddings", cfg.tie_word_embeddings},
          {"hidden_activation", "gelu_pytorch_tanh"},
          {"attention_bias", false},
          {"attention_dropout", 0.0},
          {"attn_logit_softcapping", nullptr},
          {"final_logit_softcapping", nullptr}};
}

}  // namespace gemma_torch
