#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// How far the next-token distributions of one engine are from another's, over the same texts.
struct Divergence {
  int64_t positions = 0;
  double mean_kl = 0;        // of `other` from `reference`: mean of sum p (ln p - ln q), nats
  double same_top = 0;       // share of positions whose most probable token is the same
  double reference_nll = 0;  // mean of -ln of the probability of the token that follows, nats
  double other_nll = 0;
};

/// Each text is read from its first token on; the positions are all but its last. Holds (32, V) numbers a few times.
/// Throws: Error if a text has fewer than two tokens or does not fit an engine, or an engine has another batch than 1.
Divergence compare_distributions(Engine& reference,
                                 Engine& other,
                                 const std::vector<std::vector<int64_t>>& texts,
                                 const std::function<void(int64_t done, int64_t of)>& on_progress);

}  // namespace gemma_torch
