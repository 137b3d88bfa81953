#include "gemma_torch/model/config.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

using nlohmann::json;

constexpr const char* kSliding = "sliding_attention";
constexpr const char* kFull = "full_attention";

// Fields that say nothing about the forward pass, or that are read elsewhere (token ids: pretrained.cpp).
const std::set<std::string> kIgnored = {"architectures",
                                        "model_type",
                                        "transformers_version",
                                        "torch_dtype",
                                        "dtype",
                                        "use_cache",
                                        "initializer_range",
                                        "attention_dropout",
                                        "bos_token_id",
                                        "eos_token_id",
                                        "pad_token_id",
                                        "cache_implementation",
                                        "return_dict",
                                        "output_attentions",
                                        "output_hidden_states",
                                        "chunk_size_feed_forward",
                                        "is_encoder_decoder",
                                        "problem_type",
                                        "id2label",
                                        "label2id",
                                        "vision_config",
                                        "boi_token_index",
                                        "eoi_token_index",
                                        "image_token_index",
                                        "mm_tokens_per_image",
                                        "boi_token_id",
                                        "eoi_token_id",
                                        "image_token_id",
                                        "tie_encoder_decoder",
                                        "is_decoder",
                                        "cross_attention_hidden_size",
                                        "add_cross_attention",
                                        "pruned_heads",
                                        "torchscript",
                                        "use_bfloat16",
                                        "tf_legacy_loss",
                                        "finetuning_task",
                                        "task_specific_params",
                                        "tokenizer_class",
                                        "prefix",
                                        "sep_token_id",
                                        "decoder_start_token_id",
                                        "name_or_path",
                                        "text_config",
                                        "tie_word_embeddings"};

[[noreturn]] void bad(const std::string& key, const std::string& expected, const json& got) {
  const std::string text = got.dump(-1, ' ', false, json::error_handler_t::replace);
  fail("[config] {}: expected {}, got {}",
       key,
       expected,
       text.size() > 80 ? text.substr(0, 80) + ".." : text);
}

// A config object that remembers which of its fields were read, so that the others can be named.
class Fields {
 public:
  explicit Fields(const json& object) : object_(object) {}

  const json* find(const std::string& key) {
    used_.insert(key);
    const auto at = object_.find(key);
    return at == object_.end() || at->is_null() ? nullptr : &*at;
  }

  std::optional<int64_t> integer(const std::string& key) {
    const json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    // A size past 2^31 is damage, and would overflow products of sizes.
    if (!value->is_number_integer() ||
        (value->is_number_unsigned() && value->get<uint64_t>() > INT32_MAX) ||
        value->get<int64_t>() < 1 || value->get<int64_t>() > INT32_MAX) {
      bad(key, "a whole number from 1 to 2147483647", *value);
    }
    return value->get<int64_t>();
  }

  std::optional<double> number(const std::string& key) {
    const json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() <= 0) {
      bad(key, "a positive number", *value);
    }
    return value->get<double>();
  }

  int64_t required(const std::string& key) {
    const auto value = integer(key);
    check(value.has_value(), "[config] {}: expected a whole number, got nothing", key);
    return *value;
  }

  void must_be(const std::string& key, const json& wanted) {
    const json* value = find(key);
    if (value != nullptr && *value != wanted) {
      bad(key, wanted.dump() + " (nothing else is supported)", *value);
    }
  }

  void refuse_others() const {
    for (const auto& [key, value] : object_.items()) {
      check(used_.contains(key) || kIgnored.contains(key) || key.starts_with("_"),
            "[config] {}: unsupported field",
            key);
    }
  }

 private:
  const json& object_;
  std::set<std::string> used_;
};

// "dtype" or "torch_dtype" of an object; nothing where it has neither.
std::optional<std::string> stated_dtype(const json& object) {
  std::optional<std::string> name;
  for (const char* key : {"dtype", "torch_dtype"}) {
    const auto at = object.find(key);
    if (at == object.end() || at->is_null()) {
      continue;
    }
    if (*at != "float32" && *at != "bfloat16" && *at != "float16") {
      bad(key, "float32, bfloat16 or float16", *at);
    }
    const auto value = at->get<std::string>();
    check(!name || *name == value,
          "[config] torch_dtype: {} disagrees with dtype {}",
          value,
          name.value_or(""));
    name = value;
  }
  return name;
}

c10::ScalarType read_dtype(const json& root, const json& text) {
  const auto own = stated_dtype(text);
  // float16 weights are computed in bfloat16: Gemma's activations overflow the range of float16.
  return (own ? own : stated_dtype(root)) == "float32" ? c10::ScalarType::Float
                                                       : c10::ScalarType::BFloat16;
}

std::vector<LayerType> read_layer_types(Fields& fields, int64_t n_layers) {
  std::optional<int64_t> pattern;
  for (const char* key : {"sliding_window_pattern", "_sliding_window_pattern"}) {
    const auto value = fields.integer(key);
    check(!value || !pattern || *value == *pattern,
          "[config] {}: disagrees with sliding_window_pattern ({} and {})",
          key,
          value.value_or(0),
          pattern.value_or(0));
    pattern = value ? value : pattern;
  }
  auto types = make_layer_types(n_layers, pattern.value_or(6));
  const json* list = fields.find("layer_types");
  if (list == nullptr) {
    return types;
  }
  if (!list->is_array() || static_cast<int64_t>(list->size()) != n_layers) {
    bad("layer_types", fmt::format("a list of {} (num_hidden_layers)", n_layers), *list);
  }
  std::vector<LayerType> stated;
  for (const auto& item : *list) {
    if (item != kSliding && item != kFull) {
      bad("layer_types", "sliding_attention or full_attention", item);
    }
    stated.push_back(item == kFull ? LayerType::kFullAttention : LayerType::kSlidingAttention);
  }
  check(!pattern || stated == types,
        "[config] layer_types: disagrees with sliding_window_pattern {}",
        pattern.value_or(0));
  return stated;
}

// {"rope_type": "linear", "factor": 8.0} -> 8; null or "default" -> 1. `theta` is set where one is given.
double read_rope(const std::string& where, const json& rope, std::optional<double>& theta) {
  if (!rope.is_object()) {
    bad(where, "an object", rope);
  }
  Fields fields(rope);
  const json* type = fields.find("rope_type");
  const json* old_type = fields.find("type");
  type = type == nullptr ? old_type : type;
  if (type != nullptr && *type != "linear" && *type != "default") {
    bad(where + ".rope_type", "\"linear\" or \"default\" (nothing else is supported)", *type);
  }
  const auto stated = fields.number("rope_theta");
  check(!stated || !theta || *stated == *theta,
        "[config] {}.rope_theta: disagrees with the other spelling ({} and {})",
        where,
        stated.value_or(0),
        theta.value_or(0));
  theta = stated ? stated : theta;
  const auto factor = fields.number("factor");
  for (const auto& [key, value] : rope.items()) {
    check(key == "rope_type" || key == "type" || key == "rope_theta" || key == "factor",
          "[config] {}.{}: unsupported field",
          where,
          key);
  }
  const bool linear = type != nullptr && *type == "linear";
  check(!linear || factor, "[config] {}.factor: expected a number, got nothing", where);
  return linear ? *factor : 1.0;
}

void read_ropes(Fields& fields, Gemma3Config& cfg) {
  auto global = fields.number("rope_theta");
  auto local = fields.number("rope_local_base_freq");
  std::optional<double> scaling;
  if (const json* rope = fields.find("rope_scaling")) {
    scaling = read_rope("rope_scaling", *rope, global);
  }
  if (const json* both = fields.find("rope_parameters")) {
    for (const auto& [kind, rope] : both->items()) {
      const std::string where = "rope_parameters." + kind;
      check(kind == kSliding || kind == kFull, "[config] {}: unsupported field", where);
      const double factor = read_rope(where, rope, kind == kFull ? global : local);
      if (kind == kSliding && factor != 1.0) {
        bad(where, "no scaling of sliding layers", rope);
      }
      if (kind == kFull) {
        check(!scaling || *scaling == factor,
              "[config] {}: disagrees with rope_scaling ({} and {})",
              where,
              factor,
              scaling.value_or(0));
        scaling = factor;
      }
    }
  }
  cfg.rope_base = global.value_or(cfg.rope_base);
  cfg.rope_local_base = local.value_or(cfg.rope_local_base);
  cfg.rope_scaling = scaling.value_or(1.0);
}

void refuse_unsupported(Fields& fields) {
  fields.must_be("hidden_activation", "gelu_pytorch_tanh");
  fields.must_be("hidden_act", "gelu_pytorch_tanh");
  fields.must_be("attention_bias", false);
  fields.must_be("use_bidirectional_attention", false);
  fields.must_be("attn_logit_softcapping", nullptr);
  fields.must_be("final_logit_softcapping", nullptr);
  fields.must_be("quantization_config", nullptr);
  fields.refuse_others();
}

}  // namespace

Gemma3Config parse_config(const json& root) {
  if (!root.is_object()) {
    bad("config", "an object", root);
  }
  const auto type = root.find("model_type");
  if (type != root.end() && *type != "gemma3_text" && *type != "gemma3") {
    bad("model_type", "gemma3_text or gemma3", *type);
  }
  const auto nested = root.find("text_config");
  if (nested != root.end() && !nested->is_object()) {
    bad("text_config", "an object", *nested);
  }
  const json& text = nested == root.end() ? root : *nested;
  Fields fields(text);
  Gemma3Config cfg;  // what a file leaves out gets the default of transformers' Gemma3TextConfig
  cfg.emb_dim = fields.required("hidden_size");
  cfg.hidden_dim = fields.required("intermediate_size");
  cfg.n_layers = fields.required("num_hidden_layers");
  cfg.vocab_size = fields.integer("vocab_size").value_or(262'208);
  cfg.n_heads = fields.integer("num_attention_heads").value_or(8);
  cfg.n_kv_groups = fields.integer("num_key_value_heads").value_or(4);
  cfg.head_dim = fields.integer("head_dim").value_or(256);
  cfg.context_length = fields.integer("max_position_embeddings").value_or(131'072);
  cfg.sliding_window = fields.integer("sliding_window").value_or(4096);
  // Some exports write 256.0; transformers takes whole numbers only, so no other is kept.
  const double scalar = fields.number("query_pre_attn_scalar").value_or(256.0);
  check(scalar >= 1 && scalar <= 1e6 && scalar == std::floor(scalar),
        "[config] query_pre_attn_scalar: expected a whole number, got {}",
        scalar);
  cfg.query_pre_attn_scalar = static_cast<int64_t>(scalar);
  cfg.rms_norm_eps = fields.number("rms_norm_eps").value_or(1e-6);
  check(cfg.n_layers <= 1024,
        "[config] num_hidden_layers: expected at most 1024, got {}",
        cfg.n_layers);
  for (const json* object : {&root, &text}) {
    const auto tied = object->find("tie_word_embeddings");
    if (tied != object->end() && !tied->is_boolean()) {
      bad("tie_word_embeddings", "true or false", *tied);
    }
    cfg.tie_word_embeddings = tied == object->end() ? cfg.tie_word_embeddings : tied->get<bool>();
  }
  cfg.dtype = read_dtype(root, text);
  cfg.layer_types = read_layer_types(fields, cfg.n_layers);
  read_ropes(fields, cfg);
  refuse_unsupported(fields);
  return validated(std::move(cfg));
}

}  // namespace gemma_torch
