#pragma once

#include <string>

#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// A model whose weights are drawn from a seed as the reference draws them: projections and a head of its own uniform
/// within 1 / sqrt(in_features), the embedding normal(0, 1), norms zero. A tied head is the embedding, which is then
/// multiplied by 1 / sqrt(emb_dim): as drawn, logits would have a deviation of sqrt(emb_dim). Seeds torch's generator.
Gemma3Model new_model(const Gemma3Config& cfg, uint64_t seed);

/// The bytes of the tokenizer.model that write_new_model makes of a tokenizer; empty for none. Throws: as it does.
std::string tokenizer_model(const std::string& tokenizer);

/// Writes a model, and the tokenizer that goes with it, as a Hugging Face folder, still to be committed. `tokenizer` is
/// a folder, a tokenizer.model, a tokenizer.json (told apart by what is in them), or empty for none.
/// Throws: Error if there is no such tokenizer, or it has more pieces than the model has rows.
void write_new_model(const Gemma3Model& model, const std::string& tokenizer, AtomicFolder& out);

}  // namespace gemma_torch
