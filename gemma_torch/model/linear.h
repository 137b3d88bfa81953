#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace gemma_torch {

/// Whether a new module draws its weights as PyTorch does, or leaves them for a loader to fill.
enum class Init { kReference, kNone };

/// y = x W^T, without bias. The one place where a product with a weight matrix happens, so that another kind of
/// weight (adapted, packed) takes its place by overriding forward.
class LinearImpl : public torch::nn::Module {
 public:
  /// Draws as torch.nn.Linear: uniform within 1 / sqrt(in_features).
  LinearImpl(int64_t in_features,
             int64_t out_features,
             const torch::TensorOptions& options,
             Init init = Init::kReference);

  virtual torch::Tensor forward(const torch::Tensor& x);  // (..., in) -> (..., out)
  void pretty_print(std::ostream& stream) const override;

  /// Shares `other` as the weight: it is no longer a parameter of this module (weight tying).
  void tie(const torch::Tensor& other);

  torch::Tensor weight;  // (out, in); undefined in modules that hold it in another form
  int64_t in_features = 0;
  int64_t out_features = 0;

 protected:
  LinearImpl() = default;
};
TORCH_MODULE(Linear);

}  // namespace gemma_torch
