#include "gemma_torch/model/linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "gemma_torch/model/inference.h"

namespace gemma_torch {

LinearImpl::LinearImpl(int64_t in, int64_t out, const torch::TensorOptions& options, Init init)
    : in_features(in), out_features(out) {
  weight = register_parameter("weight", at::empty({out, in}, options));
  if (init == Init::kReference) {
    torch::nn::init::kaiming_uniform_(weight, /*a=*/std::sqrt(5.0));
  }
}

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  return is_row_product(x, weight) ? row_product(x, weight) : at::linear(x, weight);
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "Linear(in_features=" << in_features << ", out_features=" << out_features
         << ", bias=False)";
}

void LinearImpl::tie(const torch::Tensor& other) {
  parameters_.erase("weight");
  weight = other;
}

}  // namespace gemma_torch
