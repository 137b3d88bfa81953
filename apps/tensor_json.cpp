#include "tensor_json.h"

#include <ATen/ops/_to_copy.h>

namespace gemma_torch::apps {

std::vector<double> numbers(const at::Tensor& tensor) {
  const auto flat = tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

nlohmann::json tensor_json(const at::Tensor& tensor) {
  if (tensor.dim() > 1) {
    auto rows = nlohmann::json::array();
    for (int64_t row = 0; row < tensor.size(0); ++row) {
      rows.push_back(tensor_json(tensor[row]));
    }
    return rows;
  }
  if (at::isFloatingType(tensor.scalar_type())) {
    const nlohmann::json list = numbers(tensor);
    return tensor.dim() == 0 ? list[0] : list;
  }
  const auto flat = tensor.to(at::kCPU, at::kLong).contiguous();
  const nlohmann::json list = std::vector<int64_t>(flat.const_data_ptr<int64_t>(),
                                                   flat.const_data_ptr<int64_t>() + flat.numel());
  return tensor.dim() == 0 ? list[0] : list;
}

}  // namespace gemma_torch::apps
