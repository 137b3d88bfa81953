#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

namespace gemma_torch {

/// How the next token is chosen. In the order and with the meaning of transformers' generate(): repetition penalty,
/// temperature, top-k, top-p, min-p, then a draw from what is left. Computed in float32, sums in float64.
struct Sampling {
  double temperature = 1.0;  // 0: the most likely token (greedy)
  int64_t top_k = 0;         // keep the k most likely; 0: all
  double top_p = 1.0;        // keep the fewest most likely that together reach p
  double min_p = 0.0;        // keep those at least p times as likely as the most likely
  double repetition_penalty =
      1.0;  // divides positive, multiplies negative logits of tokens in the sequence
  uint64_t seed = 0;
};

/// Throws Error naming the field if one is out of range.
void check_sampling(const Sampling& sampling);

struct Candidate {
  int64_t id = 0;
  float logit = 0.0F;
};

/// Lowers the logits of `history`'s tokens among the candidates by `penalty`, and restores the order (best first,
/// the lower id of equals first).
void apply_repetition_penalty(std::vector<Candidate>& candidates,
                              const std::vector<int64_t>& history,
                              double penalty);

/// What temperature, top-k, top-p and min-p leave of candidates that are sorted best first: their probabilities,
/// for the first so many of them. Equals of the k-th most likely stay, as in transformers.
std::vector<double> filter(const std::vector<Candidate>& candidates, const Sampling& sampling);

/// A token drawn with the probabilities that filter() leaves.
int64_t draw(const std::vector<Candidate>& candidates,
             const Sampling& sampling,
             std::mt19937_64& random);

}  // namespace gemma_torch
