// write_tiny_model FOLDER: tiny model folders for test_cli.py. FOLDER/text has random weights and a
// tokenizer of 300 pieces, FOLDER/ids the same without the tokenizer, FOLDER/golden the weights of
// golden/tiny_scaled.safetensors.
#include <fmt/format.h>
#include <torch/utils.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/text/model_proto.h"
#include "support/golden.h"
#include "support/vocabularies.h"

namespace {

using namespace gemma_torch;

Gemma3Config tiny_config() {
  return validated({.vocab_size = 300,
                    .context_length = 256,
                    .emb_dim = 16,
                    .n_heads = 2,
                    .n_layers = 2,
                    .hidden_dim = 32,
                    .head_dim = 8,
                    .sliding_window = 8,
                    .layer_types = {LayerType::kSlidingAttention, LayerType::kFullAttention},
                    .dtype = c10::kFloat,
                    .query_pre_attn_scalar = 8});
}

void write_random(const std::string& folder, bool with_tokenizer) {
  torch::manual_seed(1);
  Gemma3Model model(tiny_config());
  model->tie_weights();
  AtomicFolder out(folder);
  auto config = config_to_json(model->cfg);
  config["eos_token_id"] = 1;
  write_file(out.file("config.json"), config.dump(2));
  save_safetensors(out.file("model.safetensors"), hf_weights(model), {{"format", "pt"}});
  if (with_tokenizer) {
    write_file(out.file("tokenizer.model"), serialize_tokenizer_model(small_vocabulary()));
  }
  out.commit();
}

void write_golden(const std::string& folder) {
  const auto path = test::golden_path("tiny_scaled.safetensors");
  AtomicFolder out(folder);
  write_file(out.file("config.json"), load_safetensors_metadata(path).at("config"));
  save_safetensors(out.file("model.safetensors"),
                   test::Tiny("tiny_scaled.safetensors").weights(),
                   {{"format", "pt"}});
  out.commit();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    fmt::print(stderr, "usage: write_tiny_model FOLDER\n");
    return 2;
  }
  const std::string folder = argv[1];
  try {
    std::filesystem::create_directories(folder);
    write_random(folder + "/text", /*with_tokenizer=*/true);
    write_random(folder + "/ids", /*with_tokenizer=*/false);
    write_golden(folder + "/golden");
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "write_tiny_model: error: {}\n", error.what());
    return 1;
  }
}
