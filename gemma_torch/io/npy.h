#pragma once

#include <string>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/io/file_bytes.h"

namespace gemma_torch {

/// The array of a .npy file (versions 1 to 3): float16, float32 or float64, little-endian, in C
/// order. The tensor is a copy, in the file's dtype.
/// Throws: Error naming the file for anything else, or where the bytes are not as many as the
/// header says.
/// Source:  numpy's description of the format (numpy.lib.format).
at::Tensor read_npy(const FileBytes& file);

/// Every array of a .npz file, by its name without ".npy". Members must be stored, as np.savez
/// does; deflated ones (np.savez_compressed) are refused, and so are files of 4 GiB and more.
/// Throws: Error naming file and member where the archive breaks the zip format or read_npy throws.
TensorMap load_npz(const std::string& path);

/// The same from bytes already in memory.
TensorMap read_npz(const FileBytes& file);

/// Whether the bytes begin as a zip archive does.
bool is_zip(const FileBytes& file);

}  // namespace gemma_torch
