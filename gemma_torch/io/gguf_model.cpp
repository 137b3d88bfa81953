#include "gemma_torch/io/gguf_model.h"

#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/model/config.h"

namespace gemma_torch {
namespace {

constexpr auto kEmbedding = "token_embd.weight";
constexpr auto kHead = "output.weight";  // absent where the head is the embedding

struct Name {
  const char* gguf = "";
  const char* hugging_face = "";
  bool norm = false;  // stored plus one
};
constexpr std::array<Name, 3> kNames = {{
    {kEmbedding, "model.embed_tokens.weight"},
    {kHead, "lm_head.weight"},
    {"output_norm.weight", "model.norm.weight", /*norm=*/true},
}};
// After "blk.N." and "model.layers.N.".
constexpr std::array<Name, 13> kLayerNames = {{
    {"attn_norm.weight", "input_layernorm.weight", /*norm=*/true},
    {"post_attention_norm.weight", "post_attention_layernorm.weight", /*norm=*/true},
    {"ffn_norm.weight", "pre_feedforward_layernorm.weight", /*norm=*/true},
    {"post_ffw_norm.weight", "post_feedforward_layernorm.weight", /*norm=*/true},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q_norm.weight", "self_attn.q_norm.weight", /*norm=*/true},
    {"attn_k_norm.weight", "self_attn.k_norm.weight", /*norm=*/true},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
}};

struct Target {
  std::string name = {};  // Hugging Face's
  bool norm = false;
};

/// "blk.3.ffn_up.weight" -> "model.layers.3.mlp.up_proj.weight"; nothing where Gemma 3 has no such
/// tensor.
std::optional<Target> find_target(const std::string& gguf) {
  for (const auto& row : kNames) {
    if (gguf == row.gguf) {
      return Target{row.hugging_face, row.norm};
    }
  }
  constexpr std::string_view kPrefix = "blk.";
  const size_t dot = gguf.find('.', kPrefix.size());
  if (!gguf.starts_with(kPrefix) || dot == std::string::npos) {
    return std::nullopt;
  }
  const auto layer = gguf.substr(kPrefix.size(), dot - kPrefix.size());
  const bool digits = !layer.empty() && layer.find_first_not_of("0123456789") == std::string::npos;
  for (const auto& row : kLayerNames) {
    if (digits && gguf.substr(dot + 1) == row.gguf) {
      return Target{fmt::format("model.layers.{}.{}", layer, row.hugging_face), row.norm};
    }
  }
  return std::nullopt;
}

std::string key(const char* name) {
  return fmt::format("gemma3.{}", name);
}

int64_t size_or(const GgufFile& file, const std::string& key, int64_t otherwise) {
  return file.has(key) ? file.get_integer(key) : otherwise;
}

/// Which layers are full: a pattern length, or one bool a layer (true: sliding); every sixth where
/// neither is stored.
std::vector<LayerType> layer_types(const GgufFile& file, int64_t n_layers) {
  const auto pattern = key("attention.sliding_window_pattern");
  constexpr int64_t kGemma3Pattern = 6;
  if (!file.is_array(pattern)) {
    const int64_t length = size_or(file, pattern, kGemma3Pattern);
    check(length >= 1, "[gguf] {}: expected at least 1, got {} ({})", pattern, length, file.name());
    return make_layer_types(n_layers, length);
  }
  std::vector<LayerType> types;
  for (const int64_t sliding : file.get_integers(pattern)) {
    types.push_back(sliding != 0 ? LayerType::kSlidingAttention : LayerType::kFullAttention);
  }
  return types;
}

double rope_scaling(const GgufFile& file) {
  const auto type = key("rope.scaling.type");
  if (!file.has(type) || file.get_string(type) == "none") {
    return 1.0;
  }
  check(file.get_string(type) == "linear",
        "[gguf] {}: expected linear, got {} ({})",
        type,
        printable(file.get_string(type)),
        file.name());
  return file.get_number(key("rope.scaling.factor"));
}

void refuse_others(const GgufFile& file) {
  const auto architecture = file.get_string("general.architecture");
  check(architecture == "gemma3",
        "[gguf] general.architecture: expected gemma3, got {} ({})",
        printable(architecture),
        file.name());
  const auto capping = key("final_logit_softcapping");
  check(!file.has(capping) || file.get_number(capping) == 0.0,
        "[gguf] {}: expected none, which is all that is supported ({})",
        capping,
        file.name());
}

}  // namespace

Vocabulary gguf_vocabulary(const GgufFile& file) {
  auto tokens = file.get_strings("tokenizer.ggml.tokens");
  const auto scores = file.get_numbers("tokenizer.ggml.scores");
  const auto types = file.get_integers("tokenizer.ggml.token_type");
  check(scores.size() == tokens.size() && types.size() == tokens.size(),
        "[gguf] tokenizer.ggml: {} tokens, {} scores and {} types ({})",
        tokens.size(),
        scores.size(),
        types.size(),
        file.name());
  Vocabulary vocabulary;
  vocabulary.pieces.reserve(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    check(types[id] >= 1 && types[id] <= 6,
          "[gguf] tokenizer.ggml.token_type: expected 1 to 6, got {} for token {} ({})",
          types[id],
          id,
          file.name());
    vocabulary.pieces.push_back({.text = std::move(tokens[id]),
                                 .score = static_cast<float>(scores[id]),
                                 .type = static_cast<PieceType>(types[id])});
  }
  return vocabulary;
}

nlohmann::json gguf_config(const GgufFile& file) {
  refuse_others(file);
  const auto embedding = file.tensors().find(kEmbedding);
  check(
      embedding != file.tensors().end(), "[gguf] {}: no such tensor ({})", kEmbedding, file.name());
  Gemma3Config cfg;
  cfg.vocab_size = embedding->second.shape[0];
  cfg.context_length = file.get_integer(key("context_length"));
  cfg.emb_dim = file.get_integer(key("embedding_length"));
  cfg.n_layers = file.get_integer(key("block_count"));
  cfg.hidden_dim = file.get_integer(key("feed_forward_length"));
  cfg.n_heads = file.get_integer(key("attention.head_count"));
  cfg.n_kv_groups = file.get_integer(key("attention.head_count_kv"));
  cfg.head_dim = file.get_integer(key("attention.key_length"));
  cfg.rms_norm_eps = file.get_number(key("attention.layer_norm_rms_epsilon"));
  cfg.sliding_window = file.get_integer(key("attention.sliding_window"));
  cfg.rope_base = file.get_number(key("rope.freq_base"));
  cfg.rope_scaling = rope_scaling(file);
  check(cfg.n_layers >= 1 && cfg.n_layers <= 1024,
        "[gguf] {}: expected 1 to 1024, got {} ({})",
        key("block_count"),
        cfg.n_layers,
        file.name());
  cfg.layer_types = layer_types(file, cfg.n_layers);
  // GGUF does not carry the next two: the sliding base is Gemma 3's own unless a newer converter
  // wrote it; the query scale is head_dim but for the 27B model (62 layers), which takes emb_dim /
  // n_heads.
  const auto local_base = key("rope.freq_base_swa");
  cfg.rope_local_base = file.has(local_base) ? file.get_number(local_base) : 10'000.0;
  const bool is_27b = cfg.n_layers == 62 && cfg.n_heads > 0;
  cfg.query_pre_attn_scalar = is_27b ? cfg.emb_dim / cfg.n_heads : cfg.head_dim;
  cfg.dtype = at::kBFloat16;
  cfg.tie_word_embeddings = !file.tensors().contains(kHead);

  auto json = config_to_json(cfg);
  json["bos_token_id"] = size_or(file, "tokenizer.ggml.bos_token_id", 2);
  json["pad_token_id"] = size_or(file, "tokenizer.ggml.padding_token_id", 0);
  const int64_t eos = size_or(file, "tokenizer.ggml.eos_token_id", 1);
  const int64_t end_of_turn = size_or(file, "tokenizer.ggml.eot_token_id", eos);
  json["eos_token_id"] = eos;
  if (end_of_turn != eos) {
    json["eos_token_id"] = {eos, end_of_turn};
  }
  return json;
}

TensorMap gguf_weights(const GgufFile& file) {
  TensorMap weights;
  for (const auto& [name, tensor] : file.tensors()) {
    const auto to = find_target(name);
    check(
        to.has_value(), "[gguf] {}: Gemma 3 has no such tensor ({})", printable(name), file.name());
    // Norms lose their one in float32: rounded first, small weights would drown in it.
    weights[to->name] = to->norm ? file.dequantize(name).sub_(1).to(at::kBFloat16)
                                 : file.dequantize(name, at::kBFloat16);
  }
  return weights;
}

}  // namespace gemma_torch
