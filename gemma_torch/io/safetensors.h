#pragma once

#include <map>
#include <string>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/io/file_bytes.h"

namespace gemma_torch {

using Metadata = std::map<std::string, std::string>;

/// Every tensor of a safetensors file, in the file's own dtypes (F64 F32 F16 BF16, I64 I32 I16 I8,
/// U64 U32 U16 U8, BOOL, F8_E4M3, F8_E5M2). The tensors lie over one private mapping, which lives
/// as long as any of them: loading reads no data, and writing to a tensor (training) stays in this
/// process. A tensor whose bytes are not aligned to its dtype is copied. Throws:  Error naming file
/// and tensor where the file breaks the format: header length, JSON, repeated names,
///          dtype, shape, or offsets that overlap, leave a gap or disagree with shape and dtype.
/// Source:  the format's description (huggingface/safetensors, README).
TensorMap load_safetensors(const std::string& path);

/// The same from bytes already in memory.
TensorMap read_safetensors(const FileBytes& file);

/// The free-form `__metadata__` of a file; empty where there is none. Throws: as load_safetensors.
Metadata load_safetensors_metadata(const std::string& path);

/// A checkpoint in several files, by its index (model.safetensors.index.json with "weight_map":
/// name -> file). Throws:  Error unless every name of the index is in exactly the shard it says,
/// and no shard holds another;
///          Error where a shard is not a plain file name beside the index.
TensorMap load_sharded_safetensors(const std::string& index_path);

/// Writes `tensors` to `path`: whole or not at all, the same bytes for the same content (widest
/// dtype first, then by name; data from a multiple of 64 bytes). Non-contiguous tensors and tensors
/// of other devices are copied. Throws:  Error for a dtype or layout without a safetensors form, a
/// name or metadata that is no UTF-8, or a
///          failed write.
void save_safetensors(const std::string& path,
                      const TensorMap& tensors,
                      const Metadata& metadata = {});

}  // namespace gemma_torch
