#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_torch {

/// The tensor types of GGUF that this library reads; the numbers are those in the file.
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

/// How a type is stored: `bytes` for every `values` consecutive weights of a row.
struct GgmlLayout {
  GgmlType type = GgmlType::kF32;
  const char* name = "";
  int64_t values = 1;
  int64_t bytes = 4;
};

/// The layout of type number `type`; nullptr where this library does not read it.
const GgmlLayout* find_layout(uint32_t type);

/// Dequantises `blocks` consecutive blocks into `out`, `blocks` x values floats.
/// Every product and sum is rounded to float32 on its own, in the order of gguf.quants.dequantize
/// (Python package gguf), which makes the result equal to it bit for bit; NaN scales excepted.
void dequantize_blocks(GgmlType type, const std::byte* data, int64_t blocks, float* out);

/// Rounds to bfloat16, nearest even, as ATen does. `out` takes the bit patterns.
void round_to_bfloat16(const float* values, int64_t count, uint16_t* out);

}  // namespace gemma_torch
