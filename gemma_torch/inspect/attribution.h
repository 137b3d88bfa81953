#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// What is taken apart: the logit of a token at a position; with two tokens, that of the first less
/// that of the second.
struct AttributionTarget {
  std::vector<int64_t> tokens = {};  // one or two
  int64_t position = -1;             // whose next token is predicted; negative: from the end
  bool less_mean = false;            // of one token: less the mean of all logits
};

/// What each part of the model adds to a logit, float64 on the CPU.
/// Axes: L layers, H heads, F neurons of a layer's MLP.
struct Attribution {
  double value = 0;  // as the model's own head gives it
  double embed = 0;
  at::Tensor attn = {};         // (L) of a layer's attention, all heads together
  at::Tensor heads = {};        // (L, H)
  at::Tensor mlp = {};          // (L) of a layer's MLP
  at::Tensor neurons = {};      // (L, F)
  at::Tensor activations = {};  // (L, F) mlp_act: what a neuron's column of fc3 is multiplied by

  double sum() const;  // of embed, heads and neurons: `value`, but for rounding
  double residual() const { return value - sum(); }
  double coarse_residual() const;  // of embed, attn and mlp
};

/// Direct logit attribution. A logit is linear in what embedding, heads and neurons write to the
/// residual stream once the scales by which the norms after them divide (final_norm, and each
/// block's post_attention_layernorm and post_feedforward_layernorm) are held at the values that
/// they have in this run. Products and sums are float64, of values in the model's dtype: the
/// residual stays near 1e-5 in float32, and is the rounding of the residual stream in bfloat16.
/// Memory: the sites of one pass at one position, and 16,384 rows of the head in float64 (80 MiB)
///         where the mean of the logits is taken off.
/// Throws: Error for no ids, another number of tokens, ids outside the vocabulary, a position that
///         is not there, two tokens and the mean; for a head without a weight.
Attribution attribute_logit(Gemma3Model model,
                            const std::vector<int64_t>& ids,
                            const AttributionTarget& target);

}  // namespace gemma_torch
