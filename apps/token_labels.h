#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// A token for people: its piece with a small dot for a space and an arrow for a line's end; its id
/// where there are no pieces.
std::string token_label(int64_t id, const std::optional<Tokenizer>& tokenizer);

/// The labels of many.
std::vector<std::string> token_labels(const std::vector<int64_t>& ids,
                                      const std::optional<Tokenizer>& tokenizer);

/// One token's label, or "A − B" of two, whose difference is meant.
std::string difference_label(const std::vector<int64_t>& tokens,
                             const std::optional<Tokenizer>& tokenizer);

/// A token as it reads in its text, spaces and line ends as they are; " 818" where there are no
/// pieces.
std::string token_text(int64_t id, const std::optional<Tokenizer>& tokenizer);

/// The text of ids; "2,818" where there are no pieces.
std::string prompt_text(const std::vector<int64_t>& ids, const std::optional<Tokenizer>& tokenizer);

/// "0", "1", ..: labels of layers and heads.
std::vector<std::string> indices(int64_t n);

}  // namespace gemma_torch::apps
