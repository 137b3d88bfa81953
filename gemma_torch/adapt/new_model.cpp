#include "gemma_torch/adapt/new_model.h"

#include <torch/utils.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/tokenizer_json.h"

namespace gemma_torch {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

Vocabulary read_vocabulary(const std::string& path) {
  check(fs::exists(path), "[new_model] tokenizer: {}: no such file or folder", path);
  std::string file = path;
  if (fs::is_directory(path)) {
    file = path + "/tokenizer.model";
    file = fs::exists(file) ? file : path + "/tokenizer.json";
    check(fs::exists(file),
          "[new_model] tokenizer: {}: expected tokenizer.model or tokenizer.json, found neither",
          path);
  }
  const auto text = read_file(file);
  return text.starts_with('{') ? parse_tokenizer_json(text, file)
                               : parse_tokenizer_model(text, file);
}

// -1 as JSON's null: transformers would take row 0 for padding otherwise, and never train it.
json id_or_null(int64_t id) {
  return id >= 0 ? json(id) : json();
}

void write_tokenizer(const std::string& path, const Vocabulary& vocabulary, AtomicFolder& out) {
  write_file(out.file("tokenizer.model"), serialize_tokenizer_model(vocabulary));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
    if (fs::is_directory(path) && fs::exists(path + "/" + name)) {
      fs::copy_file(path + "/" + name, out.file(name));
    }
  }
}

}  // namespace

Gemma3Model new_model(const Gemma3Config& cfg, uint64_t seed) {
  torch::manual_seed(seed);
  Gemma3Model model(cfg);
  if (cfg.tie_word_embeddings) {
    const torch::NoGradGuard no_grad;
    model->tok_emb->weight.mul_(1.0 / std::sqrt(static_cast<double>(cfg.emb_dim)));
    model->tie_weights();
  }
  return model;
}

std::string tokenizer_model(const std::string& tokenizer) {
  return tokenizer.empty() ? "" : serialize_tokenizer_model(read_vocabulary(tokenizer));
}

void write_new_model(const Gemma3Model& model, const std::string& tokenizer, AtomicFolder& out) {
  auto config = config_to_json(model->cfg);
  json generation = {{"do_sample", true}, {"temperature", 1.0}, {"top_k", 64}, {"top_p", 0.95}};
  for (const char* name : {"pad_token_id", "bos_token_id", "eos_token_id"}) {
    config[name] = nullptr;
  }
  if (!tokenizer.empty()) {
    const auto vocabulary = read_vocabulary(tokenizer);
    const Tokenizer ids(vocabulary);
    // Gemma's own has one piece more than its text models have rows, for images.
    const auto last = ids.size() - 1;
    const auto rows = ids.piece(last) == "<image_soft_token>" ? last : last + 1;
    check(rows <= model->cfg.vocab_size,
          "[new_model] vocab_size: expected at least the {} pieces of the tokenizer, got {} ({})",
          rows,
          model->cfg.vocab_size,
          tokenizer);
    config["pad_token_id"] = id_or_null(ids.pad_id());
    config["bos_token_id"] = id_or_null(ids.bos_id());
    config["eos_token_id"] = id_or_null(ids.eos_id());
    write_tokenizer(tokenizer, vocabulary, out);
  }
  generation["eos_token_id"] = config["eos_token_id"];
  write_file(out.file("config.json"), config.dump(2) + "\n");
  write_file(out.file("generation_config.json"), generation.dump(2) + "\n");
  save_safetensors(out.file("model.safetensors"), hf_weights(model), {{"format", "pt"}});
}

}  // namespace gemma_torch
