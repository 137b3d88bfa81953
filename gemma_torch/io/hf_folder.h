#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/model/gemma3.h"
#include "gemma_torch/quant/recipe.h"

namespace gemma_torch {

/// Hugging Face's name of one of our parameters: "blocks.3.att.W_query.weight" ->
/// "model.layers.3.self_attn.q_proj.weight".
std::string hf_name(const std::string& parameter);

/// Fills the model with tensors under Hugging Face's names, in the config's dtype, on `device`. A tensor that
/// already has both is taken as it is, without a copy. Ties the head if the config says so.
/// Strict: every parameter is filled, every tensor is used once, shapes are equal. Of a multimodal checkpoint
/// (names below "language_model.") the text part is taken.
/// With `formats`, projections are packed: "model.layers.3.self_attn.q_proj.cells" stands for the weight, and
/// "lm_head.scan_blocks", "scan_residuals", "scan_order" and "scan_largest_norm" stand beside the head.
/// Throws: Error naming the tensor, both shapes and `place` (the file or folder).
Gemma3Model build_model(const Gemma3Config& cfg,
                        TensorMap tensors,
                        c10::Device device,
                        const std::string& place,
                        const Formats& formats = {});

/// The model's parameters, and what packed modules hold instead, under Hugging Face's names.
TensorMap hf_weights(const Gemma3Model& model);

/// Formats as config.json has them, by Hugging Face's names of projections: {"q_proj": "int8", ..}.
nlohmann::json formats_to_json(const Formats& formats);
/// Throws: Error unless every projection has a format of codes.
Formats formats_from_json(const nlohmann::json& json);

/// Parses `<folder>/<name>`; an object, or null where the file is absent. Throws: Error naming the file.
nlohmann::json read_json(const std::string& folder, const std::string& name);

/// Whether weights stay in the file they came from, mapped, or are copied to 2 MiB pages, which are faster to read
/// again and again.
enum class Weights { kCopied, kMapped };

/// The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists (always mapped).
/// Throws: Error naming the folder if it has neither.
TensorMap read_folder_weights(const std::string& folder, Weights weights = Weights::kCopied);

/// A folder that appears under its name whole or not at all: filled under a temporary name beside it, then renamed.
class AtomicFolder {
 public:
  /// Throws: Error if `path` exists and is anything but an empty folder, or cannot be made.
  explicit AtomicFolder(const std::string& path);
  ~AtomicFolder();  // removes what was not committed
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  std::string file(const std::string& name) const { return temporary_ + "/" + name; }
  void commit();

 private:
  std::string path_, temporary_;
};

}  // namespace gemma_torch
