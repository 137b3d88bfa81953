#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/inspect/steer_measure.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// What was measured, for reports.
struct MeasureCase {
  std::string direction = {};  // the file
  std::vector<std::vector<int64_t>> prompts = {};
  MeasureOptions options = {};
  std::optional<Tokenizer> tokenizer = {};
};

/// {direction, layers, keep_norm, tokens, against, prompts: [{ids, pieces}], rows: [{strength,
/// mean, kl, scores}], grows}.
nlohmann::json measure_json(const std::vector<MeasureRow>& rows, const MeasureCase& of);

/// A line for each strength.
std::string measure_text(const std::vector<MeasureRow>& rows, const MeasureCase& of);

/// A page with a chart of the scores over the strengths, and a heatmap of every prompt's.
std::string measure_page(std::vector<MeasureRow> rows, const MeasureCase& of);

}  // namespace gemma_torch::apps
