#include "gemma_torch/adapt/sparse_embedding.h"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

at::Tensor ids_seen(const TrainingData& data, const ReadProgress& on_progress) {
  std::vector<bool> seen(static_cast<size_t>(data.options().vocab_size), false);
  for (int64_t i = 0; i < data.size(); ++i) {
    for (const auto id : data.example(i).ids) {
      seen[static_cast<size_t>(id)] = true;
    }
    if (on_progress) {
      on_progress(i + 1, data.size());
    }
  }
  std::vector<int64_t> rows;
  for (size_t id = 0; id < seen.size(); ++id) {
    if (seen[id]) {
      rows.push_back(static_cast<int64_t>(id));
    }
  }
  return at::tensor(rows, at::kLong);
}

void train_rows(const at::Tensor& given,
                Gemma3Model model,
                TrainingPass& pass,
                std::vector<TrainedTensor>& trained) {
  auto weight = model->tok_emb->weight;
  const auto found = std::find_if(trained.begin(), trained.end(), [&](const TrainedTensor& tensor) {
    return tensor.parameter.is_same(weight);
  });
  check(found != trained.end(),
        "[train] embedding rows: expected the embedding among what is trained, it is frozen");
  const auto rows = given.to(weight.device());
  weight.requires_grad_(false);
  found->rows = rows;
  found->gradient = at::zeros({rows.size(0), weight.size(1)}, weight.options().dtype(at::kFloat));
  pass.limit_embedding(rows, found->gradient);
}

}  // namespace gemma_torch
