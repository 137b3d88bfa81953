#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemma_torch/inspect/attention_maps.h"
#include "gemma_torch/model/config.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// Maps and what they are of.
struct AttentionCase {
  std::vector<int64_t> ids = {};
  std::vector<AttentionMap> maps = {};
  Gemma3Config config = {};
};

/// A page with a small picture of each map, a row for each layer. Colours are steps of the square
/// root of the weight, and cells of one step are one path, which keeps 72 maps of 200 tokens under
/// 2 MB. Tokens stand beside pictures that are large enough; where there are not too many rows,
/// each tells under the pointer where it looks.
std::string attention_page(const AttentionCase& of, const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
