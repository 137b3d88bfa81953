#pragma once

#include <cstdint>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/inspect/perplexity.h"

namespace gemma_torch {

/// How unexpected a token is after those before it.
struct TokenSurprisal {
  TokenScore score = {};
  double bits = 0;          // -log2 of its probability
  double entropy_bits = 0;  // of the distribution: the surprisal that was to be expected
  int64_t rank = 0;         // 1: no other token is more probable
};

/// Of the tokens of a text that `options` says (its `step` apart, which is 32), as run_windows cuts
/// it. Holds (32, V) numbers about five times, 170 MB of Gemma's.
/// Throws: as run_windows; Error for logits that are no numbers.
std::vector<TokenSurprisal> surprisals(Engine& engine,
                                       const std::vector<int64_t>& ids,
                                       WindowOptions options = {});

}  // namespace gemma_torch
