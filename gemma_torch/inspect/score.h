#pragma once

#include <cstdint>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// How likely a model holds one continuation of a context to be.
struct ContinuationScore {
  std::vector<double> log_probs = {};  // of each token after those before it, natural logarithm
  bool is_greedy = false;              // every token is the most probable one at its place

  double total() const;  // of the whole continuation: their sum
};

/// Scores continuations that share a context. The context runs once, then each continuation is
/// appended and rewound; only where it outgrows the ring of the sliding layers (more than chunk - 1
/// tokens in a cache longer than window + chunk - 1) does the context run anew. The engine is reset
/// before, so a score depends on nothing that ran earlier.
///
/// Memory:  logits of 64 tokens at most, (64, V) float32, beside what the engine holds.
/// Throws:  Error if the context or a continuation is empty, an id is outside the vocabulary, or the
///          engine has another batch than 1 or cannot hold them; before any work.
std::vector<ContinuationScore> score_continuations(
    Engine& engine,
    const std::vector<int64_t>& context,
    const std::vector<std::vector<int64_t>>& continuations);

}  // namespace gemma_torch
