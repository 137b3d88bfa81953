#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// How far one next-token distribution, q, is from another, p.
struct PositionDivergence {
  double kl = 0;                  // sum of p (ln p - ln q), nats
  double reference_log_prob = 0;  // ln p and ln q of the token that follows
  double other_log_prob = 0;
  bool same_top = false;  // the most probable token is the same
};

/// A mean and its standard error, positions being taken as independent.
struct Estimate {
  double value = 0;
  double error = 0;
};

struct KlSummary {
  Estimate mean;
  double median = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;  // percentiles interpolate, as numpy's do
};

/// How far the next-token distributions of one engine are from another's, over the same texts.
struct Divergence {
  int64_t positions = 0;
  KlSummary kl;            // nats
  Estimate same_top;       // share of positions whose most probable token is the same
  Estimate delta_p;        // other's less reference's probability of the token that follows
  Estimate rms_delta_p;    // root of its mean square: llama-perplexity's "RMS Δp", there in percent
  Estimate reference_nll;  // mean of -ln of that probability, nats; perplexity is exp of it
  Estimate other_nll;
  Estimate nll_difference;  // other's less reference's, whose error is smaller than either's
};

/// Positions whose (V) numbers are in memory at a time.
inline constexpr int64_t kDivergenceRows = 32;

/// Of each of n positions: `log_p` and `log_q` (n, V) float32 on the CPU, `next` (n) int64 the token
/// that follows. Takes (n, V) numbers four times besides.
std::vector<PositionDivergence> diverge(const at::Tensor& log_p,
                                        const at::Tensor& log_q,
                                        const at::Tensor& next);

/// Throws: Error if there are no positions.
Divergence summarize(const std::vector<PositionDivergence>& positions);

/// ln of the probabilities that logits (n, V) float32 on the CPU stand for. The sum over the
/// vocabulary is in double: in float32, as log_softmax has it, 262,144 terms lose 2 parts in 100,000,
/// and every ln p is off by that, more than the KL that is looked for.
at::Tensor log_normalized(const at::Tensor& logits);

/// ln of the probabilities after each token of the engine's last append, (T, V) float32 on the CPU.
/// Throws: Error where they are no numbers.
at::Tensor log_probabilities(Engine& engine);

/// Each text is read from its first token on; the positions are all but its last. Holds (32, V)
/// numbers about seven times.
/// Throws: Error if a text has fewer than two tokens or does not fit an engine, or an engine has another batch than 1.
Divergence compare_distributions(Engine& reference,
                                 Engine& other,
                                 const std::vector<std::vector<int64_t>>& texts,
                                 const std::function<void(int64_t done, int64_t of)>& on_progress);

}  // namespace gemma_torch
