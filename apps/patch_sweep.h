#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/inspect/sweep.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// What a sweep was of, for reports.
struct SweepCase {
  std::vector<int64_t> clean = {};
  std::vector<int64_t> corrupted = {};
  std::vector<int64_t> tokens = {};
};

/// The sites named by --sweep: resid_post, without a layer.
/// Throws: Error naming what is no site.
std::vector<Site> sweep_sites(const std::vector<std::string>& names);

/// {ids, pieces, corrupted_ids, corrupted_pieces, tokens, clean, corrupted, maps: [{site, columns,
/// scores, normalised}]}, the last two lists of layers.
nlohmann::json sweep_json(const Sweep& sweep,
                          const SweepCase& of,
                          const std::optional<Tokenizer>& tokenizer);

/// The scores of both runs, and of each map the five places that move the score most.
std::string sweep_text(const Sweep& sweep,
                       const SweepCase& of,
                       const std::optional<Tokenizer>& tokenizer);

/// A page with a heatmap of each map.
std::string sweep_page(const Sweep& sweep,
                       const SweepCase& of,
                       const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
