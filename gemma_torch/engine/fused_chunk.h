#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {

/// Buffers of one pass of many tokens whose products take activations of type T (Bf16 or float). Rows are padded to a
/// multiple of 32, which is what a product takes at a time.
template <typename T>
struct FusedEngine::Chunk {
  struct Scratch {
    std::span<T> panels;    // two, of the longest product
    std::span<T> q;         // (32, D)
    std::span<float> c;     // (padded, 32), or all heads of a token
    std::span<float> wide;  // (E)
  };
  int64_t padded = 0;
  std::span<float> x;            // (rows, E) the residual
  std::span<T> h;                // (padded, E) after a norm
  std::span<float> qkv;          // (padded, (H + 2 G) D)
  std::span<T> q;                // (rows, H, D), scaled
  std::span<T> z;                // (padded, H D)
  std::span<float> y;            // (padded, E) what out_proj or fc3 gives
  std::span<T> act;              // (padded, F)
  std::span<T> key_panels;       // (B, G, keys / 16, D, 16)
  std::span<T> value_panels;     // (B, G, D / 16, keys, 16)
  std::vector<Scratch> scratch;  // by thread

  /// Makes room for `rows` tokens that see up to `keys` keys, in one piece on 2 MiB pages: 32 rows of a product lie on
  /// 32 pages otherwise, and finding those takes longer than the product.
  void fit(int64_t rows, int64_t keys, const Gemma3Config& cfg, int threads);

 private:
  int64_t rows_ = 0, keys_ = 0;
  std::shared_ptr<std::byte> arena_;
};

/// One for each type; made when it is first needed.
struct FusedEngine::Chunks {
  std::unique_ptr<Chunk<kernels::Bf16>> bf16;
  std::unique_ptr<Chunk<float>> f32;
};

}  // namespace gemma_torch
