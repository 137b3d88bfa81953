#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "explain_flags.h"
#include "gemma_torch/inspect/lens.h"

namespace gemma_torch::apps {

/// {ids, pieces, depths: ["embed", "0", ..], top_ids, top_pieces, top_logits, top_logprobs,
/// targets, target_logprobs, target_ranks, kl}: lists of depths, these of positions, and but for kl
/// these of tokens; targets are by position alone. A target that does not exist is null.
nlohmann::json lens_json(const Lens& lens, const Explainable& of);

/// A line for each depth: means over the positions, and what it says of one of them.
std::string lens_text(const Lens& lens, const Explainable& of);

/// A page: likeliest tokens, ranks of the targets, KL, each layer by position.
std::string lens_page(const Lens& lens, const Explainable& of);

}  // namespace gemma_torch::apps
