#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "gemma_torch/engine/fused.h"

namespace gemma_torch {

/// Rows of activations in 16 bits.
class QuantizedRows {
 public:
  QuantizedRows(int64_t rows, int64_t columns)
      : high_(static_cast<size_t>(rows * columns)),
        low_(high_.size()),
        pairs_(high_.size()),
        sums_(static_cast<size_t>(rows * columns / 32)),
        scales_(sums_.size()) {
    for (int64_t r = 0; r < rows; ++r) {
      views_.push_back({high_.data() + r * columns,
                        low_.data() + r * columns,
                        pairs_.data() + r * columns,
                        sums_.data() + r * columns / 32,
                        scales_.data() + r * columns / 32});
    }
  }

  const kernels::QuantizedRow* views() const { return views_.data(); }

 private:
  std::vector<int8_t> high_, low_;
  std::vector<int16_t> pairs_;
  std::vector<int32_t> sums_;
  std::vector<float> scales_;
  std::vector<kernels::QuantizedRow> views_;
};

/// What one thread writes while up to kMaxRows tokens pass.
struct FusedEngine::Worker {
  explicit Worker(int64_t widest) : quantized(kernels::kMaxRows, widest) {}

  std::span<float> x, h;          // (rows, E) the residual, what a norm made of it
  std::span<float> qkv;           // ((H + 2 G) D) of one row, gathered from all
  std::span<float> q, k;          // (rows, H D), (rows, G D)
  std::span<float> z;             // (rows, H D)
  std::span<float> gate_up, act;  // (rows, 2 F), (rows, F)
  QuantizedRows quantized;        // (rows, the widest of them)

  // Its part of rows and of sums, for all to read after a barrier.
  std::span<float> qkv_part;             // (rows, (H + 2 G) D), the rest of a row is zeros
  std::span<float> out_part, down_part;  // (rows, E)
  std::span<float> largest_part, sum_part, z_part;  // attention: (rows, H), .., (rows, H, D)
};

/// Shared by the threads.
struct FusedEngine::Buffers {
  std::vector<Worker> workers;
  std::span<float> cos[2], sin[2];  // sliding, full: (T, D / 2)

  Buffers(const Gemma3Config& cfg, int threads, int64_t chunk);

 private:
  std::shared_ptr<std::byte> memory_;
};

}  // namespace gemma_torch
