#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// Which tokens make a text's vector: all alike; the last; all, the i-th with weight i (SGPT).
enum class Pooling { kMean, kLast, kWeighted };

struct EmbedOptions {
  Pooling pooling = Pooling::kMean;
  std::vector<int64_t> layers = {};  // whose resid_post is pooled, then averaged; none: final_norm
  bool normalize = true;             // to length 1
  int64_t skip = 0;                  // first tokens (BOS) that mean and weighted leave out
  int64_t batch = 8;                 // texts in one pass
  /// Told of the texts done; may throw to stop.
  std::function<void(int64_t done, int64_t total)> on_progress = {};
};

/// A vector for each of N texts, (N, E) float32 on the CPU. Sums over tokens are in double.
///
/// Texts of like length run together, the shorter ones padded at their end: no token sees what
/// comes after it, so padding changes no number but by the rounding of products of other shapes.
/// Memory: keys and values of a batch, and attention of 512 tokens at a time: a few tensors of
/// (batch, H, 512, longest text).
/// Throws: Error for a text without a pooled token, an id outside the vocabulary or a layer that
/// the model lacks, before any work.
at::Tensor embed(Gemma3Model model,
                 const std::vector<std::vector<int64_t>>& texts,
                 const EmbedOptions& options = {});

/// Rows divided by their lengths; rows of zeros stay. In float32.
at::Tensor unit_rows(const at::Tensor& x);

struct Neighbours {
  at::Tensor ids;         // (Q, k) int64, best first
  at::Tensor similarity;  // (Q, k) float32, cosine
};

/// The k rows of `table` (V, E) that point most in the direction of each of `queries` (Q, E). Holds
/// 8,192 rows of the table in float32 at a time.
/// Throws: Error unless 1 <= k <= V and both have E columns.
Neighbours nearest_rows(const at::Tensor& table, const at::Tensor& queries, int64_t k);

struct PrincipalAxes {
  at::Tensor coordinates;  // (N, k) float64, of the rows less their mean
  at::Tensor shares;       // (k) float64: of the variance, the largest first
};

/// The k directions in which rows (N, E) vary most. An axis points where its largest entry is
/// positive, so that the same rows give the same picture.
/// Throws: Error unless 1 <= k <= min(N - 1, E).
PrincipalAxes principal_axes(const at::Tensor& rows, int64_t k);

}  // namespace gemma_torch
