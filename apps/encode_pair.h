#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// A context and a text that continues it, as tokens.
struct TokenPair {
  std::vector<int64_t> context = {};
  std::vector<int64_t> continuation = {};
};

/// The tokens that lm-evaluation-harness scores (TemplateLM.loglikelihood, 0.4.13): white space at
/// the context's end moves to the continuation; both are encoded together and cut where the context
/// alone ends; <bos> comes first, once. An empty context is <bos>.
/// Throws: Error if nothing is left for the continuation, and as Tokenizer::encode.
TokenPair encode_pair(const std::string& context,
                      const std::string& continuation,
                      const Tokenizer& tokenizer);

/// How many bytes of a UTF-8 text are left without the white space at its end, as Python's rstrip.
size_t length_without_trailing_space(std::string_view text);

/// Characters of a UTF-8 text, as Python's len.
int64_t count_characters(std::string_view text);

/// The first `most` tokens of a text as text, and how many there were. No character is cut.
struct CutText {
  std::string text = {};
  int64_t dropped = 0;  // tokens left out
};
CutText cut_text(const std::string& text, int64_t most, const Tokenizer& tokenizer);

}  // namespace gemma_torch::apps
