#pragma once

#include "gemma_torch/kernels/cpu/packed.h"
#include "gemma_torch/model/linear.h"

namespace gemma_torch {

/// A Linear whose weight is codes and scales in the layout of kernels/cpu/packed.h. Eager products unpack it each
/// time, and again for the gradient of x; the fused engine reads it as it is. It has no gradient itself.
class PackedLinearImpl : public LinearImpl {
 public:
  /// `cells`: (bytes) uint8 on the CPU, as Packed lays them out. `slice` is in_features or kSliceColumns.
  /// Throws: Error if sizes do not fit each other.
  PackedLinearImpl(int64_t in_features,
                   int64_t out_features,
                   kernels::Format format,
                   int64_t slice,
                   torch::Tensor cells);

  torch::Tensor forward(const torch::Tensor& x) override;  // (..., in) -> (..., out)

  kernels::Packed packed() const;
  torch::Tensor unpacked() const;  // (out, in) float32

  torch::Tensor cells;

 private:
  kernels::Format format_;
  int64_t slice_;
};

}  // namespace gemma_torch
