// The product of 32 rows and 32 columns in tiles of AMX: 16 rows of 64 bytes each.

#include <immintrin.h>

#include <cstring>

#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch::kernels::amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfig() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = 16;
    }
  }
};

// Constant: g++ 12 believes that ldtilecfg reads 8 bytes, and would not store the rest of a variable.
constexpr TileConfig kConfig;

}  // namespace

// The configuration is the thread's and takes 50 ns to load: a product of 256 columns takes 200.
void begin() {
  _tile_loadconfig(&kConfig);
}

void end() {
  _tile_release();
}

// Tiles 0 to 3 are the four quarters of c, 4 and 5 two of a, 6 and 7 the two panels.
void gemm_bf16(const Bf16* a,
               int64_t a_stride,
               const Bf16* const panels[2],
               int64_t k,
               float* c,
               int64_t c_stride,
               bool add) {
  const int64_t c_bytes = c_stride * 4;
  const int64_t a_bytes = a_stride * 2;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * c_stride, c_bytes);
    _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t j = 0; j < k; j += 32) {
    _tile_loadd(4, a + j, a_bytes);
    _tile_loadd(6, panels[0] + 16 * j, 64);
    _tile_loadd(7, panels[1] + 16 * j, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_stride + j, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * c_stride, c_bytes);
  _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

}  // namespace gemma_torch::kernels::amx
