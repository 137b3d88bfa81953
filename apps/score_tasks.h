#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// A context and what may continue it, as tokens.
struct ScoreItem {
  std::vector<int64_t> context = {};
  std::vector<std::vector<int64_t>> continuations = {};
  std::vector<int64_t> characters = {};  // of each choice; empty where they are given as ids
  std::optional<int64_t> answer = {};    // index of the right one, where it is known
  int64_t dropped = 0;                   // tokens that max_tokens left out
  std::string where = {};                // for messages: "FILE line 3"
};

/// How texts become tokens.
struct PairOptions {
  std::string delimiter = " ";  // between the context and a choice or label
  int64_t max_tokens = 0;       // of a context, or of a text to be labelled; 0: all
};

/// One item of texts that continue a prompt.
/// Throws: Error as encode_pair, or where the model has no tokenizer.
ScoreItem make_item(const std::string& context,
                    const std::vector<std::string>& continuations,
                    const std::optional<Tokenizer>& tokenizer);

/// Multiple choice: JSON lines {"context": .., "choices": [..], "answer": index or choice}, or
/// {"ids": [..], "choices_ids": [[..], ..]}. Where max_tokens is given, contexts keep their end,
/// and <bos>. Throws: Error naming file and line of what is neither, and as make_item.
std::vector<ScoreItem> read_choices(const std::string& path,
                                    const PairOptions& options,
                                    const std::optional<Tokenizer>& tokenizer);

/// A text to be labelled by the label that is likeliest to follow it.
struct LabelOptions {
  std::vector<std::string> labels = {};
  std::string text_template = {};                // with {text} once
  std::vector<std::string> content_free = {""};  // texts that say nothing, for calibration
};

/// Classification: first an item for each content-free text, then JSON lines {"text": ..,
/// "label": ..}. Where max_tokens is given, texts keep their beginning, and the template stays.
/// Throws: Error for a template without {text}, or naming file and line.
std::vector<ScoreItem> read_labelled(const std::string& path,
                                     const LabelOptions& labels,
                                     const PairOptions& options,
                                     const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
