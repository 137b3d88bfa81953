#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {

constexpr int64_t kTile = 32;

inline int64_t up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The kernels for activations of one type.
template <typename T>
struct Typed;
template <>
struct Typed<kernels::Bf16> {
  static void panel(const kernels::FusedKernels& k,
                    const kernels::Packed& w,
                    int64_t block,
                    kernels::Bf16* out) {
    k.panel_bf16(w, block, out);
  }
  static void gemm(const kernels::FusedKernels& k,
                   const kernels::Bf16* a,
                   int64_t stride,
                   const kernels::Bf16* const p[2],
                   int64_t n,
                   float* c,
                   int64_t c_stride) {
    k.gemm.bf16(a, stride, p, n, c, c_stride, false);
  }
  static void gelu(const kernels::FusedKernels& k,
                   const float* c,
                   kernels::Bf16* y,
                   int64_t stride) {
    k.gelu_tile_bf16(c, y, stride);
  }
  static void put(const kernels::FusedKernels& k, const float* x, kernels::Bf16* y, int64_t n) {
    k.to_bf16(x, y, n);
  }
  static void attend(const kernels::FusedKernels& k,
                     const kernels::QueryTile<kernels::Bf16>& tile,
                     kernels::Bf16* out,
                     int64_t stride) {
    k.attend_tile_bf16(tile, k.gemm, out, stride);
  }
  static const kernels::KeyValuePanels<kernels::Bf16, kernels::Bf16>& panels(
      const kernels::FusedKernels& k, kernels::Bf16) {
    return k.panels_bf16_bf16;
  }
  static const kernels::KeyValuePanels<kernels::Bf16, float>& panels(const kernels::FusedKernels& k,
                                                                     float) {
    return k.panels_bf16_f32;
  }
};
template <>
struct Typed<float> {
  static void panel(const kernels::FusedKernels& k,
                    const kernels::Packed& w,
                    int64_t block,
                    float* out) {
    k.panel_f32(w, block, out);
  }
  static void gemm(const kernels::FusedKernels& k,
                   const float* a,
                   int64_t stride,
                   const float* const p[2],
                   int64_t n,
                   float* c,
                   int64_t c_stride) {
    k.gemm.f32(a, stride, p, n, c, c_stride, false);
  }
  static void gelu(const kernels::FusedKernels& k, const float* c, float* y, int64_t stride) {
    k.gelu_tile_f32(c, y, stride);
  }
  static void put(const kernels::FusedKernels&, const float* x, float* y, int64_t n) {
    std::copy_n(x, n, y);
  }
  static void attend(const kernels::FusedKernels& k,
                     const kernels::QueryTile<float>& tile,
                     float* out,
                     int64_t stride) {
    k.attend_tile_f32(tile, k.gemm, out, stride);
  }
  static const kernels::KeyValuePanels<float, kernels::Bf16>& panels(const kernels::FusedKernels& k,
                                                                     kernels::Bf16) {
    return k.panels_f32_bf16;
  }
  static const kernels::KeyValuePanels<float, float>& panels(const kernels::FusedKernels& k,
                                                             float) {
    return k.panels_f32_f32;
  }
};

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
  std::shared_ptr<std::byte> memory_;
};

/// One for each type; made when it is first needed.
struct FusedEngine::Chunks {
  std::unique_ptr<Chunk<kernels::Bf16>> bf16;
  std::unique_ptr<Chunk<float>> f32;
};

}  // namespace gemma_torch
