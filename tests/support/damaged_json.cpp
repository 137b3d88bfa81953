#include <nlohmann/json.hpp>

#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/proto_wire.h"
#include "support/damaged.h"

namespace {

using nlohmann::json;

json tiny_config() {
  return {{"model_type", "gemma3_text"},
          {"vocab_size", 300},
          {"hidden_size", 32},
          {"intermediate_size", 64},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 2},
          {"num_key_value_heads", 1},
          {"head_dim", 16},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-6},
          {"rope_theta", 1e6},
          {"rope_local_base_freq", 1e4},
          {"sliding_window", 8},
          {"layer_types", {"sliding_attention", "full_attention"}},
          {"query_pre_attn_scalar", 16},
          {"hidden_activation", "gelu_pytorch_tanh"},
          {"torch_dtype", "bfloat16"}};
}

Damaged config(const std::string& name,
               const std::string& key,
               const json& value,
               const std::string& message) {
  auto file = tiny_config();
  file[key] = value;
  return {name, file.dump(), message};
}

Damaged config_without(const std::string& key) {
  auto file = tiny_config();
  file.erase(key);
  return {"no_" + key, file.dump(), key};
}

json tiny_tokenizer() {
  json vocab;
  const std::vector<std::string> pieces = {"<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab"};
  for (size_t id = 0; id < pieces.size(); ++id) {
    vocab[pieces[id]] = id;
  }
  json added = json::array();
  for (size_t id = 0; id < 4; ++id) {
    added.push_back({{"id", id}, {"content", pieces[id]}, {"special", true}});
  }
  return {
      {"added_tokens", added},
      {"normalizer", {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}},
      {"model",
       {{"type", "BPE"},
        {"byte_fallback", true},
        {"vocab", vocab},
        {"merges", json::array({json::array({"a", "b"})})}}}};
}

template <typename Change>
Damaged tokenizer(const std::string& name, Change change, const std::string& message) {
  auto file = tiny_tokenizer();
  change(file);
  return {name, file.dump(), message};
}

std::string with_piece(const std::string& piece_fields) {
  gemma_torch::ProtoWriter file;
  file.bytes(/*pieces=*/1, piece_fields);
  return good_tokenizer_model() + file.message();
}

std::string piece(const std::string& text, uint64_t type) {
  gemma_torch::ProtoWriter fields;
  fields.bytes(1, text);
  fields.varint(3, type);
  return fields.message();
}

std::string without_last(std::string text) {
  text.pop_back();
  return text;
}

}  // namespace

std::string good_config() {
  return tiny_config().dump();
}

std::vector<Damaged> damaged_configs() {
  const std::string deep(100'000, '[');
  return {
      {"empty", "", "[json]"},
      {"cut", good_config().substr(0, 100), "[json]"},
      {"deep", R"({"hidden_size":)" + deep, "nesting"},
      {"array", "[1, 2]", "expected an object"},
      {"number", "3", "expected an object"},
      {"key_twice", R"({"hidden_size":32,"hidden_size":64})", "appears twice"},
      {"huge_number", R"({"hidden_size":1e999})", "[json]"},
      {"invalid_utf8", "{\"\xff\":1}", "[json]"},
      {"not_a_number", R"({"hidden_size":NaN})", "[json]"},
      config_without("hidden_size"),
      config_without("num_hidden_layers"),
      config_without("intermediate_size"),
      config("width_text", "hidden_size", "640", "hidden_size"),
      config("width_zero", "hidden_size", 0, "hidden_size"),
      config("width_negative", "hidden_size", -640, "hidden_size"),
      config("width_fraction", "hidden_size", 640.5, "hidden_size"),
      config("width_2_63", "hidden_size", uint64_t{1} << 63, "hidden_size"),
      config("width_array", "hidden_size", json::array({640}), "hidden_size"),
      config("layers_million", "num_hidden_layers", 1'000'000, "num_hidden_layers"),
      config("heads_not_divisible", "num_key_value_heads", 3, "n_kv_groups"),
      config("odd_head", "head_dim", 15, "head_dim"),
      config("eps_negative", "rms_norm_eps", -1e-6, "rms_norm_eps"),
      config("theta_text", "rope_theta", "1e6", "rope_theta"),
      config("layer_types_short", "layer_types", json::array({"full_attention"}), "layer_types"),
      config("layer_types_unknown",
             "layer_types",
             json::array({"full_attention", "linear_attention"}),
             "layer_types"),
      config("layer_types_number", "layer_types", json::array({1, 2}), "layer_types"),
      config("pattern_zero", "sliding_window_pattern", 0, "sliding_window_pattern"),
      config("pattern_disagrees", "sliding_window_pattern", 6, "layer_types"),
      config("other_model", "model_type", "llama", "model_type"),
      config("model_type_number", "model_type", 3, "model_type"),
      config("activation", "hidden_activation", "silu", "hidden_activation"),
      config("bias", "attention_bias", true, "attention_bias"),
      config("soft_capping", "final_logit_softcapping", 30.0, "final_logit_softcapping"),
      config("unknown_field", "num_experts", 8, "num_experts"),
      config("dtype", "torch_dtype", "int8", "torch_dtype"),
      config(
          "scaling_yarn", "rope_scaling", {{"rope_type", "yarn"}, {"factor", 8.0}}, "rope_scaling"),
      config("scaling_no_factor", "rope_scaling", {{"rope_type", "linear"}}, "factor"),
      config("scaling_array", "rope_scaling", json::array({8}), "rope_scaling"),
      config("rope_parameters_array", "rope_parameters", json::array({1}), "rope_parameters"),
      config("rope_parameters_number", "rope_parameters", 1, "rope_parameters"),
      config("nested_array", "text_config", json::array(), "text_config"),
      config("tied_text", "tie_word_embeddings", "yes", "tie_word_embeddings"),
  };
}

std::string good_tokenizer_json() {
  return tiny_tokenizer().dump();
}

std::vector<Damaged> damaged_tokenizer_jsons() {
  const std::string deep(100'000, '[');
  return {
      {"empty", "", "not valid JSON"},
      {"cut", good_tokenizer_json().substr(0, 60), "not valid JSON"},
      {"deep", R"({"model":)" + deep, "nested deeper"},
      {"array", "[]", "model"},
      {"huge_number", R"({"model":1e999})", "(test)"},
      {"invalid_utf8", "{\"\xff\":1}", "not valid JSON"},
      tokenizer(
          "no_model", [](json& file) { file.erase("model"); }, "model"),
      tokenizer(
          "unigram", [](json& file) { file["model"]["type"] = "Unigram"; }, "BPE"),
      tokenizer(
          "no_byte_fallback",
          [](json& file) { file["model"]["byte_fallback"] = false; },
          "byte_fallback"),
      tokenizer(
          "vocab_array", [](json& file) { file["model"]["vocab"] = json::array(); }, "vocab"),
      tokenizer(
          "id_negative", [](json& file) { file["model"]["vocab"]["ab"] = -1; }, "got -1"),
      tokenizer(
          "id_text", [](json& file) { file["model"]["vocab"]["ab"] = "6"; }, "got string"),
      tokenizer(
          "id_2_63",
          [](json& file) { file["model"]["vocab"]["ab"] = uint64_t{1} << 63; },
          "9223372036854775808"),
      tokenizer(
          "id_far", [](json& file) { file["model"]["vocab"]["ab"] = 1'000'000; }, "1000000"),
      tokenizer(
          "id_twice", [](json& file) { file["model"]["vocab"]["ab"] = 5; }, "id 5"),
      tokenizer(
          "id_gap", [](json& file) { file["model"]["vocab"]["ab"] = 7; }, "7"),
      tokenizer(
          "added_object",
          [](json& file) { file["added_tokens"] = json::object(); },
          "added_tokens"),
      tokenizer(
          "added_number", [](json& file) { file["added_tokens"][0] = 1; }, "content"),
      tokenizer(
          "added_no_id", [](json& file) { file["added_tokens"][0].erase("id"); }, "lacks an id"),
      tokenizer(
          "added_disagrees", [](json& file) { file["added_tokens"][0]["id"] = 5; }, "id"),
      tokenizer(
          "normalizer", [](json& file) { file["normalizer"]["content"] = "_"; }, "normalizer"),
      tokenizer(
          "bytes_few", [](json& file) { file["model"]["vocab"]["<0x00>"] = 7; }, "256 byte pieces"),
      tokenizer(
          "no_unknown",
          [](json& file) {
            file["model"]["vocab"].erase("<unk>");
            file["model"]["vocab"]["x"] = 3;
            file["added_tokens"].erase(3);
          },
          "UNKNOWN"),
  };
}

std::string good_tokenizer_model() {
  using gemma_torch::PieceType;
  return gemma_torch::serialize_tokenizer_model({{{"<pad>", 0, PieceType::kControl},
                                                  {"<eos>", 0, PieceType::kControl},
                                                  {"<bos>", 0, PieceType::kControl},
                                                  {"<unk>", 0, PieceType::kUnknown},
                                                  {"a", -4, PieceType::kNormal},
                                                  {"b", -5, PieceType::kNormal},
                                                  {"ab", -6, PieceType::kNormal}}});
}

std::vector<Damaged> damaged_tokenizer_models() {
  const auto good = good_tokenizer_model();
  return {
      {"empty", "", "model_type"},
      {"cut", without_last(good), "[protobuf]"},
      {"tag_only", "\x0a", "[protobuf]"},
      {"length_2_63", "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "[protobuf]"},
      {"varint_endless", "\x0a" + std::string(20, '\xff'), "above 64 bits"},
      {"wire_type_3", "\x0b", "wire type 3"},
      {"field_zero", std::string("\x02\x00", 2), "field number 0"},
      {"piece_is_number", "\x08\x01", "field 1"},
      {"piece_type_7", with_piece(piece("x", 7)), "got 7"},
      {"piece_type_2_64", with_piece(piece("x", ~uint64_t{0})), "piece type"},
      {"piece_empty", with_piece(piece("", 1)), "is empty"},
      {"piece_not_utf8", with_piece(piece("\xff", 1)), "not UTF-8"},
      {"two_unknowns", with_piece(piece("x", 2)), "UNKNOWN"},
      {"byte_minus_one", with_piece(piece("<0x-1>", 6)), "<0x-1>"},
      {"byte_too_long", with_piece(piece("<0x000>", 6)), "<0x000>"},
      {"byte_alone", with_piece(piece("<0x41>", 6)), "256 byte pieces"},
      {"a_json", good_tokenizer_json(), "(test)"},
  };
}
