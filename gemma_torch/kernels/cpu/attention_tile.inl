// Attention of many tokens: 32 rows of queries at a time, keys in tiles, softmax as the tiles go by.

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

constexpr int64_t kTileKeys = 128;

GEMMA_TORCH_INLINE void gemm(const Bf16* a, int64_t stride, const Bf16* const panels[2], int64_t k, float* c,
                             int64_t c_stride, bool add, const Gemm& how) {
  how.bf16(a, stride, panels, k, c, c_stride, add);
}
GEMMA_TORCH_INLINE void gemm(const float* a, int64_t stride, const float* const panels[2], int64_t k, float* c,
                             int64_t c_stride, bool add, const Gemm& how) {
  how.f32(a, stride, panels, k, c, c_stride, add);
}

GEMMA_TORCH_INLINE I lane_numbers() {
  constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_as<I>(kNumbers);
}

template <typename T>
void attend_tile(const QueryTile<T>& tile, const Gemm& how, T* out, int64_t out_stride) {
  alignas(64) float scores[32 * kTileKeys];
  alignas(64) T weights[32 * kTileKeys];
  alignas(64) float z[32 * kMaxHeadDim];
  float most[32], total[32];
  const int64_t D = tile.D;
  std::memset(z, 0, static_cast<size_t>(32 * D) * sizeof(float));
  int32_t lowest = tile.first[0], highest = tile.last[0];
  for (int64_t r = 0; r < 32; ++r) {
    most[r] = -INFINITY;
    total[r] = 0;
    if (r < tile.rows) {
      lowest = tile.first[r] < lowest ? tile.first[r] : lowest;
      highest = tile.last[r] > highest ? tile.last[r] : highest;
    }
  }
  for (int64_t start = lowest / 32 * 32; start <= highest; start += kTileKeys) {
    const int64_t left = (highest - start) / 32 * 32 + 32;
    const int64_t keys = left < kTileKeys ? left : kTileKeys;
    for (int64_t i = 0; i < keys; i += 32) {
      const T* const panels[2] = {tile.key_panels + (start + i) * D, tile.key_panels + (start + i + 16) * D};
      gemm(tile.q, D, panels, D, scores + i, kTileKeys, false, how);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* row = scores + r * kTileKeys;
      for (int64_t i = 0; i < keys; i += 16) {
        const I key = lane_numbers() + static_cast<int32_t>(start + i);
        const auto seen = (key >= tile.first[r]) & (key <= tile.last[r]);
        store(row + i, select(seen, load(row + i), splat(-INFINITY)));
      }
      soften(row, keys, D, most[r], total[r], z + r * D, weights + r * kTileKeys);
    }
    for (int64_t r = tile.rows; r < 32; ++r) {
      std::memset(weights + r * kTileKeys, 0, sizeof(T) * kTileKeys);
    }
    for (int64_t j = 0; j < D; j += 32) {
      const T* const panels[2] = {tile.value_panels + j * tile.keys + start * 16,
                                  tile.value_panels + (j + 16) * tile.keys + start * 16};
      gemm(weights, kTileKeys, panels, keys, z + j, D, true, how);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float factor = 1.0F / total[r];
    for (int64_t j = 0; j < D; j += 16) {
      store(out + r * out_stride + j, load(z + r * D + j) * factor);
    }
  }
}

// 16 keys (D numbers each, `stride` apart) as a panel with k = D: rows become lanes. Rows past `count` are zeros.
template <typename T, typename S>
void key_panel(const S* rows, int64_t stride, int64_t count, int64_t D, T* panel) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2 && sizeof(S) == 2) {
    // Pairs of numbers are moved as one: lane r gathers pair j of row r.
    alignas(64) int32_t at[16];
    for (int64_t r = 0; r < 16; ++r) {
      at[r] = static_cast<int32_t>((r < count ? r : 0) * stride / 2);
    }
    const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
    const __m512i index = load_as<__m512i>(at);
    for (int64_t j = 0; j < D; j += 2) {
      store_as(panel + j * 16, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, rows + j, 4));
    }
    return;
  }
#endif
  for (int64_t j = 0; j < D; j += 2) {
    float even[16] = {}, odd[16] = {};
    for (int64_t r = 0; r < count; ++r) {
      even[r] = widen(rows[r * stride + j]);
      odd[r] = widen(rows[r * stride + j + 1]);
    }
    put_pair(panel, j, 0, load(even), load(odd));
  }
}

// 32 values (D numbers each, `stride` apart) to their place in panels of 16 columns with k = values, `keys` of them in all.
template <typename T, typename S>
void value_panels(const S* rows, int64_t stride, int64_t count, int64_t D, int64_t keys, T* panels) {
  for (int64_t j = 0; j < D; j += 16) {
    for (int64_t i = 0; i < 32; i += 2) {
      put_pair(panels + j * keys, i, 0, i < count ? load(rows + i * stride + j) : F{},
               i + 1 < count ? load(rows + (i + 1) * stride + j) : F{});
    }
  }
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
