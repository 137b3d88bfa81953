#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace gemma_torch {

/// Writes a tensor as a NumPy file (format 1.0, C order), whole or not at all. Strided tensors and
/// tensors of other devices are copied.
/// Throws: Error for a dtype that NumPy lacks (bfloat16), or a failed write.
void save_npy(const std::string& path, const at::Tensor& tensor);

}  // namespace gemma_torch
