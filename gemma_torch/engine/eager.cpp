#include "gemma_torch/engine/eager.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>

#include "gemma_torch/base/device.h"
#include "gemma_torch/kernels/cpu/row_kernels.h"

namespace gemma_torch {

EagerEngine::EagerEngine(Gemma3Model model, const EngineOptions& options)
    : HiddenEngine(model->cfg, cache_options(options, model->tok_emb->weight)),
      model_(std::move(model)),
      probe_(options.probe) {}

at::Tensor EagerEngine::run(const at::Tensor& ids) {
  return model_->hidden(ids, &cache_, probe_);
}

at::Tensor EagerEngine::head(const at::Tensor& x) {
  return model_->out_head(x);
}

at::Tensor EagerEngine::observed(at::Tensor logits, int64_t end) {
  const auto positions = probe_ ? at::arange(end - logits.size(1), end) : at::Tensor();
  return tap(probe_, {Site::kLogits, -1, positions}, std::move(logits));
}

int64_t step_bytes(Gemma3Model model) {
  int64_t bytes = 0;
  for (const auto& parameter : model->parameters()) {
    bytes += static_cast<int64_t>(parameter.nbytes());  // the embedding counts as the head
  }
  if (model->out_head->weight.data_ptr() != model->tok_emb->weight.data_ptr()) {
    bytes -= static_cast<int64_t>(model->tok_emb->weight.nbytes());
  }
  return bytes;
}

EngineReport EagerEngine::report(int64_t depth) const {
  return {
      "eager",
      kernels_name(model_->tok_emb->weight.device(), kernels::isa_name(kernels::row_kernels().isa)),
      dtype_name(model_->tok_emb->weight.scalar_type()),
      at::get_num_threads(),
      step_bytes(model_) + cache_.bytes_seen(depth)};
}

}  // namespace gemma_torch
