#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/engine/sampling.h"
#include "gemma_torch/kernels/cpu/packed.h"
#include "gemma_torch/model/gemma3.h"
#include "gemma_torch/quant/recipe.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch {

class AtomicFolder;  // io/hf_folder.h
class Pack;          // quant/pack.h

struct LoadOptions {
  c10::Device device = c10::kCPU;
  std::optional<c10::ScalarType> dtype = {};  // default: the checkpoint's own
  /// Leave a folder's weights in the file: less memory for an engine that packs them, slower for one that does not.
  bool mapped = false;
  /// Pack the weights for fused engines of so many threads while the tokenizer is made, which takes as long, where such
  /// an engine can run the model; 0: leave it to the engine.
  int pack_threads = 0;
  kernels::Format pack_format = kernels::Format::kLossless12;  // of weights that are not packed yet
};

/// What stands beside the weights of a checkpoint.
struct Description {
  Gemma3Config config = {};
  std::vector<int64_t> stop_ids = {};  // of config, generation_config and tokenizer together
  Sampling sampling = {};              // defaults of generation_config, else Gemma's 1.0, 64, 0.95
  bool instruct = false;               // <end_of_turn> ends a text: the model was trained to chat
  Formats formats = {};                // of packed projections; empty: weights
};

struct Pretrained : Description {
  Gemma3Model model{nullptr};
  std::optional<Tokenizer> tokenizer = {};  // absent where the folder has none
  std::shared_ptr<const Pack> pack = {};    // for FusedOptions::pack, as LoadOptions asked
};

/// A model from a Hugging Face folder (config.json, model.safetensors or shards, and, where there is one,
/// tokenizer.model or tokenizer.json) or from a .gguf file, whose tensors are dequantised. Which of the two decides
/// what `path` is, not how it is called.
/// Throws: Error naming file, tensor or field.
Pretrained load_pretrained(const std::string& path, const LoadOptions& options = {});

/// The same without the weights.
Description load_description(const std::string& path);

/// The tokenizer alone; nothing where a folder has none.
std::optional<Tokenizer> load_tokenizer(const std::string& path);

/// Writes what load_pretrained(source) reads as a Hugging Face folder in bfloat16 (or the folder's own dtype):
/// config.json, generation_config.json, model.safetensors, tokenizer.model; tokenizer.json, tokenizer_config.json
/// and the chat template where the source has them. Whole or not at all.
void convert_to_folder(const std::string& source, const std::string& folder);

/// The same for the weights that a model loaded from `source` has now: trained, or merged with an adapter;
/// into a folder still to be committed. Throws: Error if the model is quantised.
void write_model(const std::string& source, const Pretrained& loaded, AtomicFolder& out);

/// The same for a model that quantize() has rounded, of load_pretrained(source), into a folder still to be committed.
/// `report` is kept in config.json, in quantization_config. load_pretrained reads it back without any rounding.
void write_quantized(const std::string& source,
                     const Pretrained& loaded,
                     const nlohmann::json& report,
                     AtomicFolder& out);

}  // namespace gemma_torch
