#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// A number that a run gives.
enum class Explained {
  kLogit,
  kLogProb,  // natural logarithm of the probability
  kLoss,     // mean of -ln of each token's probability after those before it, nats
};

struct SaliencyTarget {
  Explained of = Explained::kLogit;
  /// But for kLoss: one token, or two, the first's number less the second's.
  std::vector<int64_t> tokens = {};
  int64_t position = -1;  // whose next token is predicted; negative: from the end
};

struct EmbeddingGradient {
  at::Tensor values = {};    // (B) float64 on the CPU
  at::Tensor gradient = {};  // (B, T, E) of each row's value, dtype and device of the embeddings
};

/// The target and its gradient where `embeddings` (B, T, E), as the site embed has them (scaled by
/// sqrt(E)), stand in the place of those of ids. Rows are runs of their own, without a cache.
/// Memory: what autograd keeps of a pass of B * T tokens (near 2.5 MB a token of the 270M model in
///         float32), and 32 rows of logits four times in float64.
/// Throws: Error for no ids, ids or tokens outside the vocabulary, another number of tokens, a
///         position that is not there, a loss of one token, embeddings of another shape.
EmbeddingGradient embedding_gradient(Gemma3Model model,
                                     const std::vector<int64_t>& ids,
                                     const SaliencyTarget& target,
                                     const at::Tensor& embeddings);

/// The scaled embeddings of ids: (T, E). Throws: Error for no ids or one outside the vocabulary.
at::Tensor embeddings_of(Gemma3Model model, const std::vector<int64_t>& ids);

/// How much each token's embedding moves a number, to first order.
struct Saliency {
  double value = 0;          // of the target
  at::Tensor embed = {};     // (T, E)
  at::Tensor gradient = {};  // (T, E) of the target by embed
  at::Tensor scores = {};    // (T) float64: gradient . embed
  at::Tensor norms = {};     // (T) float64: of the gradient
};

/// Gradient x input. Throws and memory: as embedding_gradient, of one row.
Saliency gradient_times_input(Gemma3Model model,
                              const std::vector<int64_t>& ids,
                              const SaliencyTarget& target);

}  // namespace gemma_torch
