#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

struct LensOptions {
  /// Tokens that are followed at every position; empty: at each the one that comes next there.
  std::vector<int64_t> targets = {};
  int64_t top = 1;    // likeliest tokens kept
  int64_t rows = 16;  // positions whose logits are formed at a time
  /// Told of the rows (depth and position) done and in all; false stops.
  std::function<bool(int64_t done, int64_t total)> on_progress = {};
};

/// What the head would say of the next token, had the model ended earlier.
/// Axes: N = n_layers + 1 depths (the embedding, then the resid_post of each layer), T positions,
/// K likeliest tokens, M targets. All on the CPU.
struct Lens {
  at::Tensor top_ids = {};           // (N, T, K) int64, the likeliest first
  at::Tensor top_logits = {};        // (N, T, K) float32
  at::Tensor top_log_probs = {};     // (N, T, K) float32, natural logarithms
  at::Tensor targets = {};           // (T, M) int64; -1: none follows
  at::Tensor target_log_probs = {};  // (N, T, M) float32; NaN where there is no target
  at::Tensor target_ranks = {};      // (N, T, M) int64; 1: the likeliest; 0: no target
  at::Tensor kl = {};  // (N, T) float64: of this depth's distribution from the last one's, nats
};

/// Logit lens: final_norm and the output head on what each layer leaves, in one run of ids without
/// a cache. The last depth is the model's own prediction.
/// Memory: N * T * E numbers, and about seven float32 for each of `rows` times the vocabulary:
///         115 MiB for 16 rows of 262,144.
/// Throws: Error for no ids, an id outside the vocabulary, a `top` or `rows` below 1; before any
///         work; where it was stopped.
Lens logit_lens(Gemma3Model model, const std::vector<int64_t>& ids, const LensOptions& options);

}  // namespace gemma_torch
