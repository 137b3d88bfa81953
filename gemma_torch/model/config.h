#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <vector>

namespace gemma_torch {

enum class LayerType { kSlidingAttention, kFullAttention };

/// Shape and constants of a Gemma 3 text model. Names are the reference's; where Hugging Face's config.json calls
/// a field otherwise, that name stands beside it. The defaults are those of the 270M model.
struct Gemma3Config {
  int64_t vocab_size = 262'144;
  int64_t context_length = 32'768;  // "max_position_embeddings"
  int64_t emb_dim = 640;            // "hidden_size"
  int64_t n_heads = 4;              // "num_attention_heads"
  int64_t n_layers = 18;            // "num_hidden_layers"
  int64_t hidden_dim = 2048;        // "intermediate_size"
  int64_t head_dim = 256;
  bool qk_norm = true;
  int64_t n_kv_groups = 1;            // "num_key_value_heads"
  double rope_local_base = 10'000.0;  // "rope_local_base_freq", sliding layers
  double rope_base = 1'000'000.0;     // "rope_theta", full layers
  double rope_scaling = 1.0;          // "rope_scaling.factor": full layers, linear; 1 is none
  int64_t sliding_window = 512;       // tokens a sliding layer sees, the current one among them
  std::vector<LayerType> layer_types = {};  // size n_layers; empty: every sixth layer is full
  c10::ScalarType dtype = c10::ScalarType::BFloat16;
  int64_t query_pre_attn_scalar = 256;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = true;  // the output head is the embedding
  bool round_emb_scale =
      true;  // sqrt(emb_dim) in the weights' dtype, as transformers; the notebook: false
};

/// Layer types by Hugging Face's "sliding_window_pattern": every `pattern`-th layer is full, the others slide.
std::vector<LayerType> make_layer_types(int64_t n_layers, int64_t pattern);

/// Throws Error naming the field if the config cannot be a model (sizes, heads that do not divide, layer_types).
/// Returns it with layer_types filled in.
Gemma3Config validated(Gemma3Config cfg);

/// Reads Hugging Face's config.json of a Gemma 3 text model, or the "text_config" of a Gemma 3 multimodal one.
/// Accepts every spelling in use: layer_types or (_)sliding_window_pattern; rope_theta and rope_local_base_freq or
/// rope_parameters; dtype or torch_dtype. Spellings that stand side by side must agree.
/// Throws: Error naming the field for a missing, ill-typed, unknown or unsupported one.
Gemma3Config parse_config(const nlohmann::json& json);

/// The config.json of `cfg`, which parse_config and transformers both read.
nlohmann::json config_to_json(const Gemma3Config& cfg);

}  // namespace gemma_torch
