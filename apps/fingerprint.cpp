#include "fingerprint.h"

#include <algorithm>

#include "gemma_torch/base/device.h"

namespace gemma_torch::apps {

std::string fingerprint(const Gemma3Model& model) {
  Fingerprint result;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    result.add(name);
    result.add(tensor.sizes().vec());
    const auto count = std::min<int64_t>(tensor.numel(), 2048);
    const auto first = tensor.detach().flatten().narrow(/*dim=*/0, 0, count).to(at::kCPU);
    result.add(first.const_data_ptr(), first.nbytes());
  };
  for (const auto& item : model->named_parameters()) {
    add(item.key(), item.value());
  }
  for (const auto& item : model->named_buffers()) {
    add(item.key(), item.value());
  }
  return result.hex();
}

nlohmann::json numbers_json(const Pretrained& loaded) {
  return {{"weights", fingerprint(loaded.model)},
          {"dtype", dtype_name(loaded.config.dtype)},
          {"device", loaded.model->tok_emb->weight.device().str()}};
}

}  // namespace gemma_torch::apps
