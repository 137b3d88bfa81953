#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

namespace gemma_torch {

/// "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1" or "mps".
/// Throws: Error for another name, or if this LibTorch or machine has no such device.
c10::Device parse_device(const std::string& name);

/// "float32" or "bfloat16"; "auto" gives `automatic`.
/// Throws: Error for another name; for float16 with the reason.
c10::ScalarType parse_dtype(const std::string& name, c10::ScalarType automatic);

/// "float32", "bfloat16": the name that parse_dtype reads.
std::string dtype_name(c10::ScalarType dtype);

/// Waits until the device has finished what was queued on it; nothing on the CPU.
void synchronize(c10::Device device);

/// Cores this process may use: physical ones within its affinity and its cgroup's quota, at least 1.
int usable_cores();

/// Instruction sets of this CPU that matter here, for reports: "avx2", "avx512_bf16", "amx_bf16", "neon", ...
std::vector<std::string> cpu_features();

/// Largest resident memory of this process so far, bytes.
int64_t peak_memory_bytes();

/// Most bytes of a CUDA device that tensors had at once since the last reset; nothing for other devices, whose allocators
/// do not count.
std::optional<int64_t> peak_device_memory_bytes(c10::Device device);
void reset_peak_device_memory(c10::Device device);

}  // namespace gemma_torch
