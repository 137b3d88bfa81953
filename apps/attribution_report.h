#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "explain_flags.h"
#include "gemma_torch/inspect/attribution.h"

namespace gemma_torch::apps {

/// {ids, pieces, position, tokens, less_mean, value, sum, residual, embed, attn (L), heads (L, H),
/// mlp (L), neurons (L, F), activations (L, F)}: nested lists.
nlohmann::json attribution_json(const Attribution& found, const Explainable& of, bool less_mean);

/// The largest parts, the largest neurons, `top` of each, and what the sum leaves.
std::string attribution_text(const Attribution& found,
                             const Explainable& of,
                             bool less_mean,
                             int64_t top);

/// A page: layer by head and MLP, and the largest neurons of each layer.
std::string attribution_page(const Attribution& found, const Explainable& of, bool less_mean);

}  // namespace gemma_torch::apps
