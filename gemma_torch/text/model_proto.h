#pragma once

#include <string>
#include <string_view>

#include "gemma_torch/base/vocabulary.h"

namespace gemma_torch {

// tokenizer.model is a serialized sentencepiece ModelProto: pieces, trainer_spec, normalizer_spec.
// Source: sentencepiece_model.proto.

/// The pieces of a tokenizer.model, normalized (text/vocabulary_rules.h).
/// Throws: Error naming `place` if the bytes are damaged, if the model is not BPE, or if it changes
/// text before cutting it (a dummy prefix, removed spaces, a character map): Gemma's does none of
/// that.
Vocabulary parse_tokenizer_model(std::string_view bytes, const std::string& place);
Vocabulary read_tokenizer_model(const std::string& path);

/// The bytes of a tokenizer.model with these pieces, from whichever source they came: sentencepiece,
/// transformers and parse_tokenizer_model read it. Throws: Error if check_vocabulary finds a fault.
std::string serialize_tokenizer_model(const Vocabulary& vocabulary);

/// The same for a vocabulary that is normalized already.
std::string serialize_normalized(const Vocabulary& vocabulary);

}  // namespace gemma_torch
