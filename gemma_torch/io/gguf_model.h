#pragma once

#include <nlohmann/json_fwd.hpp>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/base/vocabulary.h"
#include "gemma_torch/io/gguf.h"

namespace gemma_torch {

/// The pieces of the tokenizer as the file stores them (spaces, `<unk>` and added tokens are put
/// right in text/). Throws: Error where tokens, scores and types are missing, of other lengths, or
/// of an unknown piece type.
Vocabulary gguf_vocabulary(const GgufFile& file);

/// Hugging Face's config.json of the model in the file, with bos, eos and pad ids.
/// Throws: Error for an architecture other than gemma3, and for a missing or ill-typed key, by
/// name.
nlohmann::json gguf_config(const GgufFile& file);

/// Every tensor under its Hugging Face name, in bfloat16. Norm weights are stored plus one: one is
/// taken off in float32 before rounding. Throws: Error for a tensor that Gemma 3 does not have.
TensorMap gguf_weights(const GgufFile& file);

}  // namespace gemma_torch
