#pragma once

#include <ATen/core/Tensor.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/inspect/embedding.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// Vectors with names, and what was asked about them.
struct Embedded {
  std::string what = {};                 // "mean of final_norm"
  at::Tensor vectors;                    // (N, E) float32
  std::vector<std::string> labels = {};  // N
  at::Tensor similarity;                 // (N, N) cosine; undefined: not asked for
  std::optional<Neighbours> nearest = {};
};

/// Fields vectors, similarity and nearest; null where not asked for.
nlohmann::json embedded_json(const Embedded& found, const std::optional<Tokenizer>& tokenizer);

/// The matrix, the lists of nearest tokens, and a line about the vectors, as text.
std::string embedded_text(const Embedded& found, const std::optional<Tokenizer>& tokenizer);

/// A page: a map of the similarities (up to 100 vectors), the vectors on their first two principal
/// axes (from 3 on), the nearest tokens.
std::string embedded_page(const Embedded& found, const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
