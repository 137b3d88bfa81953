#pragma once

#include <vector>

#include "gemma_torch/adapt/adamw.h"
#include "gemma_torch/adapt/training_data.h"
#include "gemma_torch/adapt/training_pass.h"

namespace gemma_torch {

/// The ids that stand in some example, (S) int64, ascending. Encodes every example once more;
/// `on_progress` counts them.
at::Tensor ids_seen(const TrainingData& data, const ReadProgress& on_progress = {});

/// Of a tied embedding that `trained` holds whole, trains `rows` (S) int64 alone: they get their full gradient, from
/// the embedding and from the head's softmax, and AdamW's master copies and moments; the others stay as they are, yet
/// the softmax is over all of them. AdamW on the whole embedding moves the others too, by the softmax's gradient, which
/// pushes down what is never right, and by weight decay; and its gradient norm counts them.
/// Throws: Error if the embedding is not among `trained`, or the head is not tied to it.
void train_rows(const at::Tensor& rows,
                Gemma3Model model,
                TrainingPass& pass,
                std::vector<TrainedTensor>& trained);

}  // namespace gemma_torch
