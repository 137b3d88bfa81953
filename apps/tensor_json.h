#pragma once

#include <ATen/core/Tensor.h>

#include <nlohmann/json.hpp>
#include <vector>

namespace gemma_torch::apps {

/// Every number of a tensor, the innermost axis fastest.
std::vector<double> numbers(const at::Tensor& tensor);

/// Nested lists, one level for each axis; integers stay integers. JSON has no NaN or infinity:
/// null.
nlohmann::json tensor_json(const at::Tensor& tensor);

}  // namespace gemma_torch::apps
