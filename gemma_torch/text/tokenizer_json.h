#pragma once

#include <string>
#include <string_view>

#include "gemma_torch/base/vocabulary.h"

namespace gemma_torch {

/// The pieces of a Hugging Face tokenizer.json, normalized (text/vocabulary_rules.h). Its merge
/// list is not read: Gemma numbers its pieces in merge order, so the score of an ordinary piece is
/// -id. Throws: Error naming `place` if the text is not JSON, nests deeper than 64, lacks a key or
/// has it in another type, holds ids that are not 0 .. n - 1 each once, or describes another kind
/// of tokenizer than Gemma's (BPE with byte fallback whose normalizer only turns spaces into
/// U+2581).
Vocabulary parse_tokenizer_json(std::string_view text, const std::string& place);
Vocabulary read_tokenizer_json(const std::string& path);

}  // namespace gemma_torch
