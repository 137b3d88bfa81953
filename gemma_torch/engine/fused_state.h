#pragma once

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

/// What one thread keeps to itself while up to kMaxRows tokens pass.
struct FusedEngine::Worker {
  std::vector<float> x, h;          // (rows, E) the residual, what a norm made of it
  std::vector<float> q, k;          // (rows, H D), (rows, G D)
  std::vector<float> z;             // (rows, H D)
  std::vector<float> gate_up, act;  // (rows, 2 F), (rows, F)
  QuantizedRows quantized;          // (rows, the widest of them)
};

/// Shared by the threads.
struct FusedEngine::Buffers {
  std::vector<Worker> workers;
  std::vector<float> qkv;                    // (rows, (H + 2 G) D)
  std::vector<float> out_parts, down_parts;  // (threads, rows, E)
  std::vector<float> largest, sum,
      z;  // attention by parts: (threads, rows, H), .., (threads, rows, H, D)
  std::vector<float> cos[2], sin[2];  // sliding, full: (T, D / 2)
};

}  // namespace gemma_torch
