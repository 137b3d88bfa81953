#include "gemma_torch/io/gguf.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/gguf_model.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/model/config.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/gguf_writer.h"

using namespace gemma_torch;
using Catch::Matchers::ContainsSubstring;

namespace {

GgufFile open(const GgufWriter& file) {
  return GgufFile(copy_bytes(file.bytes(), "test.gguf"));
}

TensorMap golden_blocks() {
  return load_safetensors(GEMMA_TORCH_GOLDEN_DIR "/gguf_blocks.safetensors");
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0;
}

}  // namespace

TEST_CASE("every block type dequantises as the gguf package does, bit for bit", "[gguf][golden]") {
  const auto golden = golden_blocks();
  int compared = 0;
  for (const uint32_t type : {1U, 2U, 3U, 6U, 7U, 8U, 12U, 13U, 14U, 30U}) {
    const auto& layout = *find_layout(type);
    INFO(layout.name);
    const auto& bytes = golden.at(fmt::format("{}.bytes", layout.name));
    const auto& want = golden.at(fmt::format("{}.values", layout.name));
    REQUIRE(bytes.size(1) == layout.bytes);
    auto got = at::empty(want.sizes(), at::kFloat);
    dequantize_blocks(layout.type,
                      static_cast<const std::byte*>(bytes.data_ptr()),
                      bytes.size(0),
                      got.data_ptr<float>());
    CHECK(same_bits(got, want));
    ++compared;
  }
  CHECK(compared == 10);
}

TEST_CASE("a large tensor is dequantised whole in float32 and bfloat16", "[gguf][golden]") {
  const auto golden = golden_blocks();
  const auto& block = golden.at("Q6_K.bytes");
  const auto& values = golden.at("Q6_K.values");
  constexpr int64_t kRows =
      67;  // a number of blocks that fills neither the last tile nor the last thread
  std::string content;
  for (int64_t row = 0; row < kRows; ++row) {
    content.append(static_cast<const char*>(block.data_ptr()), block.nbytes());
  }
  GgufWriter writer;
  const auto row_length = static_cast<uint64_t>(values.numel());
  writer.tensor("w", {row_length, kRows}, /*Q6_K=*/14, content);
  const auto file = open(writer);
  const auto want = values.reshape({1, -1}).expand({kRows, -1}).contiguous();
  CHECK(same_bits(file.dequantize("w"), want));
  CHECK(same_bits(file.dequantize("w", at::kBFloat16), want.to(at::kBFloat16)));
  CHECK_THROWS_WITH(file.dequantize("v"), ContainsSubstring("v: no such tensor (test.gguf)"));
  CHECK_THROWS_WITH(file.dequantize("w", at::kHalf), ContainsSubstring("got Half"));
}

TEST_CASE("shapes are torch's: rows first", "[gguf]") {
  GgufWriter writer;
  floats(writer, "w", {3, 2});
  const auto file = open(writer);
  const auto w = file.dequantize("w");
  REQUIRE(w.sizes() == at::IntArrayRef({2, 3}));
  CHECK(w[1][0].item<float>() == 3);
}

TEST_CASE("metadata comes back by type", "[gguf]") {
  GgufWriter writer;
  writer.string("name", "tiny");
  writer.u32("size", 7);
  writer.f32("eps", 1e-6F);
  writer.value("flag", GgufWriter::kBool, "\x01");
  writer.value("huge", GgufWriter::kU64, GgufWriter::raw(~uint64_t{0}));
  writer.strings("words", {"a", "", "bc"});
  writer.array<int32_t>("signed", GgufWriter::kI32, {-1, 2});
  writer.array<uint8_t>("flags", GgufWriter::kBool, {1, 0});
  const auto file = open(writer);
  CHECK(file.get_string("name") == "tiny");
  CHECK(file.get_integer("size") == 7);
  CHECK(file.get_number("size") == 7.0);
  CHECK(file.get_number("eps") == 1e-6);  // not the nearest float's 9.99999997e-07
  CHECK(file.get_bool("flag"));
  CHECK(file.get_strings("words") == std::vector<std::string>{"a", "", "bc"});
  CHECK(file.get_integers("signed") == std::vector<int64_t>{-1, 2});
  CHECK(file.get_numbers("signed") == std::vector<double>{-1, 2});
  CHECK(file.get_integers("flags") == std::vector<int64_t>{1, 0});
  CHECK_THROWS_WITH(file.get_integer("huge"), ContainsSubstring("huge: expected less than 2^63"));
}

TEST_CASE("a getter of another type names key, expected and got", "[gguf]") {
  GgufWriter writer;
  writer.string("name", "tiny");
  writer.u32("size", 7);
  writer.array<uint8_t>("bytes", /*uint8=*/0, {1, 2, 3});
  const auto file = open(writer);
  const auto is = [](const std::string& text) { return ContainsSubstring("[gguf] " + text); };
  CHECK_THROWS_WITH(file.get_integer("no"), is("no: key is missing (test.gguf)"));
  CHECK_THROWS_WITH(file.get_string("size"), is("size: expected a string, got uint32 (test.gguf)"));
  CHECK_THROWS_WITH(file.get_bool("size"), is("size: expected a bool, got uint32"));
  CHECK_THROWS_WITH(file.get_integer("name"), is("name: expected whole numbers, got string"));
  CHECK_THROWS_WITH(file.get_number("name"), ContainsSubstring("got string"));
  CHECK_THROWS_WITH(file.get_integer("bytes"),
                    is("bytes: expected a whole number, got an array of uint8"));
  CHECK_THROWS_WITH(file.get_strings("bytes"), is("bytes: expected an array of strings"));
  CHECK_THROWS_WITH(file.get_strings("name"), is("name: expected an array of strings, got string"));
}

TEST_CASE("the vocabulary is what the file stores", "[gguf]") {
  const auto vocabulary = gguf_vocabulary(open(tiny_gemma_gguf()));
  REQUIRE(vocabulary.pieces.size() == 4);
  CHECK(vocabulary.pieces[2].text == "<bos>");
  CHECK(vocabulary.pieces[2].score == -2.0F);
  CHECK(vocabulary.pieces[2].type == PieceType::kControl);
  CHECK(vocabulary.pieces[3].type == PieceType::kUnknown);
}

TEST_CASE("the config is one that the model reads", "[gguf]") {
  auto writer = tiny_gemma_gguf();
  writer.u32("tokenizer.ggml.eos_token_id", 1);
  writer.u32("tokenizer.ggml.eot_token_id", 3);
  const auto json = gguf_config(open(writer));
  const auto cfg = parse_config(json);
  CHECK(cfg.vocab_size == 4);
  CHECK(cfg.emb_dim == 32);
  CHECK(cfg.hidden_dim == 64);
  CHECK(cfg.n_heads == 2);
  CHECK(cfg.n_kv_groups == 1);
  CHECK(cfg.head_dim == 16);
  CHECK(cfg.context_length == 64);
  CHECK(cfg.sliding_window == 8);
  CHECK(cfg.query_pre_attn_scalar == 16.0);
  CHECK(cfg.rms_norm_eps == 1e-6);
  CHECK(cfg.rope_base == 1e6);
  CHECK(cfg.rope_local_base == 1e4);
  CHECK(cfg.rope_scaling == 1.0);
  CHECK(cfg.tie_word_embeddings);
  CHECK(json["model_type"] == "gemma3_text");
  CHECK(json["torch_dtype"] == "bfloat16");
  CHECK(json["eos_token_id"] == nlohmann::json({1, 3}));
  CHECK(json["bos_token_id"] == 2);
}

TEST_CASE("the config follows what larger models store", "[gguf]") {
  auto writer = tiny_gemma_gguf();
  writer.string("gemma3.rope.scaling.type", "linear");
  writer.f32("gemma3.rope.scaling.factor", 8);
  writer.f32("gemma3.rope.freq_base_swa", 5000);
  writer.array<uint8_t>("gemma3.attention.sliding_window_pattern", GgufWriter::kBool, {0});
  floats(writer, "output.weight", {32, 4});
  const auto cfg = parse_config(gguf_config(open(writer)));
  CHECK(cfg.rope_scaling == 8.0);
  CHECK(cfg.rope_local_base == 5000.0);
  CHECK(cfg.layer_types.at(0) == LayerType::kFullAttention);
  CHECK_FALSE(cfg.tie_word_embeddings);
}

TEST_CASE("another architecture and a missing key are named", "[gguf]") {
  GgufWriter writer;
  writer.string("general.architecture", "llama");
  CHECK_THROWS_WITH(gguf_config(open(writer)),
                    ContainsSubstring("general.architecture: expected gemma3, got llama"));
  GgufWriter bare;
  bare.string("general.architecture", "gemma3");
  floats(bare, "token_embd.weight", {32, 4});
  CHECK_THROWS_WITH(gguf_config(open(bare)),
                    ContainsSubstring("gemma3.context_length: key is missing"));
}

TEST_CASE("weights get Hugging Face names, norms lose their one", "[gguf]") {
  const auto weights = gguf_weights(open(tiny_gemma_gguf()));
  CHECK(weights.size() == 15);
  const auto& norm = weights.at("model.norm.weight");
  CHECK(norm.scalar_type() == at::kBFloat16);
  CHECK(norm[5].item<float>() == 0.5F);
  CHECK(weights.at("model.layers.0.input_layernorm.weight")[0].item<float>() == 0.0F);
  const auto& down = weights.at("model.layers.0.mlp.down_proj.weight");
  CHECK(down.sizes() == at::IntArrayRef({32, 64}));
  CHECK(down[1][0].item<float>() == 64.0F);
  auto writer = tiny_gemma_gguf();
  floats(writer, "blk.0.attn_q.bias", {32});
  CHECK_THROWS_WITH(gguf_weights(open(writer)),
                    ContainsSubstring("blk.0.attn_q.bias: Gemma 3 has no such tensor"));
}

TEST_CASE("a norm weight is rounded after its one is taken off", "[gguf]") {
  GgufWriter writer;
  floats(writer, "output_norm.weight", {1}, /*first=*/1.001F);
  const auto w = gguf_weights(open(writer)).at("model.norm.weight").item<float>();
  CHECK(w == Approx(0.001).epsilon(0.01));  // 1.001 in bfloat16 is 1
}
