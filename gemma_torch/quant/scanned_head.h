#pragma once

#include "gemma_torch/kernels/cpu/head_scan.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// The tensors of a HeadScan: what kernels/cpu/head_scan.h describes.
struct ScanTensors {
  torch::Tensor blocks;        // (bytes) uint8
  torch::Tensor residuals;     // (bytes) uint8
  torch::Tensor order;         // (E) int32
  torch::Tensor largest_norm;  // (1) float32

  kernels::HeadScan view() const;
};

/// The output head with its scan beside it, in the buffers scan_blocks, scan_residuals, scan_order and
/// scan_largest_norm. Its weight is for the caller to set.
class ScannedHeadImpl : public LinearImpl {
 public:
  /// Throws: Error naming the tensor if one is not what a head of these sizes has.
  ScannedHeadImpl(int64_t in_features, int64_t out_features, ScanTensors scan);

  ScanTensors scan;
};

/// Whether a scan can be made for the model's head: bfloat16 on the CPU, E a multiple of 64.
bool can_scan(const Gemma3Model& model);

/// Encodes the head. Which columns get 8 bits is guessed from the weights of the norms: right or wrong, it changes only
/// how many rows a scan leaves over. Uses ATen's threads.
ScanTensors make_scan(const Gemma3Model& model);

}  // namespace gemma_torch
