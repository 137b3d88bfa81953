#include "gemma_torch/model/config.h"

#include <nlohmann/json.hpp>

#include "gemma_torch/base/error.h"
#include "support/catch.h"

using namespace gemma_torch;
using nlohmann::json;

namespace {

json base() {
  return {{"model_type", "gemma3_text"},
          {"hidden_size", 640},
          {"intermediate_size", 2048},
          {"num_hidden_layers", 18},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 1},
          {"head_dim", 256},
          {"vocab_size", 262144},
          {"sliding_window", 512},
          {"max_position_embeddings", 32768}};
}

json with(json object, const json& more) {
  object.merge_patch(more);
  return object;
}

}  // namespace

TEST_CASE("every spelling of a 270M config reads the same", "[config]") {
  const auto want = config_to_json(Gemma3Config{});
  auto types = json::array();
  for (int i = 1; i <= 18; ++i) {
    types.push_back(i % 6 == 0 ? "full_attention" : "sliding_attention");
  }
  const json flat = {
      {"rope_theta", 1e6}, {"rope_local_base_freq", 1e4}, {"torch_dtype", "bfloat16"}};
  const json nested = {{"rope_parameters",
                        {{"full_attention", {{"rope_theta", 1e6}, {"rope_type", "default"}}},
                         {"sliding_attention", {{"rope_theta", 1e4}, {"rope_type", "default"}}}}},
                       {"dtype", "bfloat16"}};
  for (const auto& spelling : {with(flat, {{"layer_types", types}}),
                               with(flat, {{"sliding_window_pattern", 6}}),
                               with(flat, {{"_sliding_window_pattern", 6}, {"layer_types", types}}),
                               with(nested, {{"layer_types", types}}),
                               with(flat, nested)}) {
    CAPTURE(spelling.dump());
    CHECK(config_to_json(parse_config(with(base(), spelling))) == want);
  }
  CHECK(config_to_json(parse_config(want)) == want);
}

TEST_CASE("larger sizes read from a multimodal config, with linear RoPE scaling", "[config]") {
  const json four_b = {{"model_type", "gemma3"},
                       {"vision_config", {{"hidden_size", 1152}}},
                       {"mm_tokens_per_image", 256},
                       {"torch_dtype", "bfloat16"},
                       {"text_config",
                        {{"model_type", "gemma3_text"},
                         {"hidden_size", 2560},
                         {"intermediate_size", 10240},
                         {"num_hidden_layers", 34},
                         {"sliding_window", 1024},
                         {"rope_scaling", {{"factor", 8.0}, {"rope_type", "linear"}}}}}};
  const auto cfg = parse_config(four_b);
  CHECK(cfg.emb_dim == 2560);
  CHECK(cfg.n_heads == 8);
  CHECK(cfg.n_kv_groups == 4);
  CHECK(cfg.rope_scaling == 8.0);
  CHECK(cfg.vocab_size == 262208);
  CHECK(cfg.layer_types.size() == 34);
}

TEST_CASE("what a config cannot mean is an error that names the field", "[config]") {
  const std::pair<json, const char*> cases[] = {
      {{{"final_logit_softcapping", 30.0}}, "final_logit_softcapping"},
      {{{"attn_logit_softcapping", 50.0}}, "attn_logit_softcapping"},
      {{{"attention_bias", true}}, "attention_bias"},
      {{{"hidden_activation", "silu"}}, "hidden_activation"},
      {{{"use_bidirectional_attention", true}}, "use_bidirectional_attention"},
      {{{"quantization_config", {{"bits", 4}}}}, "quantization_config"},
      {{{"mixture_of_experts", 8}}, "mixture_of_experts: unsupported field"},
      {{{"model_type", "gemma2"}}, "model_type"},
      {{{"hidden_size", "640"}}, "hidden_size"},
      {{{"hidden_size", -1}}, "hidden_size"},
      {{{"hidden_size", 9223372036854775807}}, "hidden_size"},
      {{{"hidden_size", 18446744073709551615U}}, "hidden_size"},
      {{{"hidden_size", nullptr}}, "hidden_size"},
      {{{"head_dim", 255}}, "head_dim"},
      {{{"num_attention_heads", 3}, {"num_key_value_heads", 2}}, "n_heads"},
      {{{"num_hidden_layers", 100000}}, "num_hidden_layers"},
      {{{"layer_types", {"full_attention"}}}, "layer_types"},
      {{{"layer_types", "full"}}, "layer_types"},
      {{{"num_hidden_layers", 1}, {"layer_types", {"chunked_attention"}}}, "layer_types"},
      {{{"sliding_window_pattern", 6}, {"_sliding_window_pattern", 5}}, "_sliding_window_pattern"},
      {{{"num_hidden_layers", 1},
        {"layer_types", {"full_attention"}},
        {"sliding_window_pattern", 6}},
       "layer_types"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 8}}}}, "rope_scaling.rope_type"},
      {{{"rope_scaling", {{"rope_type", "linear"}}}}, "rope_scaling.factor"},
      {{{"rope_theta", 1e4}, {"rope_parameters", {{"full_attention", {{"rope_theta", 1e6}}}}}},
       "rope_theta"},
      {{{"rope_parameters", {{"other_attention", {{"rope_theta", 1e6}}}}}},
       "rope_parameters.other_attention"},
      {{{"rope_theta", 0}}, "rope_theta"},
      {{{"query_pre_attn_scalar", 2.5}}, "query_pre_attn_scalar"},
      {{{"dtype", "bfloat16"}, {"torch_dtype", "float32"}}, "dtype"},
      {{{"torch_dtype", "int8"}}, "torch_dtype"},
      {{{"tie_word_embeddings", "yes"}}, "tie_word_embeddings"}};
  for (const auto& [change, name] : cases) {
    CAPTURE(change.dump());
    CHECK_THROWS_WITH(parse_config(with(base(), change)), Catch::Contains(name));
  }
  CHECK_THROWS_AS(parse_config(json::array()), Error);
  CHECK_THROWS_AS(parse_config(json(3)), Error);
}
