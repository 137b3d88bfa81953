#pragma once

#include <cstdint>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/inspect/windows.h"

namespace gemma_torch {

struct TokenScore {
  int64_t index = 0;  // in the ids given
  int64_t id = 0;
  double log_prob = 0;  // natural logarithm of its probability after the tokens before it
};

/// How well the model predicts a text, token by token: the tokens that `options` says, as
/// run_windows cuts the text. Throws: as run_windows.
std::vector<TokenScore> score_tokens(Engine& engine,
                                     const std::vector<int64_t>& ids,
                                     const WindowOptions& options = {});

/// Negative mean of the scores, nats a token. Perplexity is exp of it.
double mean_nll(const std::vector<TokenScore>& scores);

}  // namespace gemma_torch
