#pragma once

#include <string>
#include <vector>

#include "gemma_torch/inspect/surprisal.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// Surprisal of a word: of all its tokens together, -log2 of the probability of reading it.
struct WordSurprisal {
  int64_t first = 0;  // index of its first token in the text
  int64_t tokens = 0;
  std::string text = {};  // without white space
  double bits = 0;
};

/// Words of a text, cut at white space. A token belongs to one word, and white space between words
/// to the word after it: "a  b" is the words "a" and "b", and what ends the text counts to the last
/// word. The bits of all words together are those of all tokens.
std::vector<WordSurprisal> word_surprisals(const std::vector<TokenSurprisal>& scores,
                                           const Tokenizer& tokenizer);

}  // namespace gemma_torch::apps
