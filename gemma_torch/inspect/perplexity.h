#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

struct TokenScore {
  int64_t index = 0;  // in the ids given
  int64_t id = 0;
  double log_prob = 0;  // natural logarithm of its probability after the tokens before it
};

struct PerplexityOptions {
  int64_t chunk = 512;  // tokens of a window that starts anew; 0: all ids are one sequence
  int64_t bos_id = 2;   // overwrites the first token of each window
  std::function<void(int64_t done, int64_t total)> on_progress = {};  // in tokens
};

/// How well the model predicts a text, token by token.
///
/// With windows of c tokens, those at c/2 + 1 .. c - 1 of each are scored (255 of 512), so that
/// every one has half a window before it; what is left after the last whole window is dropped. This
/// is what llama-perplexity does. As one sequence, every token after the first is scored, and no
/// token is overwritten.
/// Throws: Error if the ids fill no window, or the engine has another batch than 1 or cannot hold
/// a window; before any work.
std::vector<TokenScore> score_tokens(Engine& engine,
                                     const std::vector<int64_t>& ids,
                                     const PerplexityOptions& options = {});

/// Negative mean of the scores, nats a token. Perplexity is exp of it.
double mean_nll(const std::vector<TokenScore>& scores);

}  // namespace gemma_torch
