#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

struct AttentionOptions {
  std::vector<int64_t> layers = {};  // empty: all
  std::vector<int64_t> heads = {};   // empty: all
  int64_t max_pixels = 256;          // sides of a map; of more tokens, several share a pixel
  /// A position whose weights are kept whole; negative: from the end.
  std::optional<int64_t> from = {};
};

/// Where one head looks. Means are over the positions after the first, whose only choice is itself.
struct AttentionMap {
  int64_t layer = 0, head = 0;
  /// (P, P) float32 on the CPU: from which position (row) to which (column); of more than
  /// max_pixels tokens the largest weight of each square of them.
  at::Tensor pixels = {};
  double to_first = 0;     // mean weight on the first position
  double to_previous = 0;  // on the one before
  double to_self = 0;
  double entropy = 0;  // mean, nats: 0 where all weight is on one position
  at::Tensor weights =
      {};  // (T) float32, from that one position; undefined where none was asked for
};

/// The patterns of the heads asked for, in the order of layers, in one run of ids without a cache.
/// Memory: one layer's (H, T, T) at a time, and P * P numbers a map.
/// Throws: Error for fewer than two ids, an id outside the vocabulary, a layer, head or position
///         that is not there, max_pixels below 1.
std::vector<AttentionMap> attention_maps(Gemma3Model model,
                                         const std::vector<int64_t>& ids,
                                         const AttentionOptions& options = {});

}  // namespace gemma_torch
