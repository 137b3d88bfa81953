// Products of many rows: weights are unpacked, 16 rows at a time, into panels that stay in the inner caches while all
// rows of activations pass by.

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// Two columns of some rows, from `row` on, into a panel: pairs side by side in bfloat16, one column after the other in
// float32.
GEMMA_TORCH_INLINE void put_pair(Bf16* panel, int64_t column, int row, const PartF& even, const PartF& odd) {
#if defined(__AVX512BF16__)
  const auto low = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(even))));
  const auto high = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(odd))));
  store_as(panel + column * 16 + 2 * row, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  const PartU low = rounded_bits(std::bit_cast<PartU>(even)) >> 16;
  const PartU high = rounded_bits(std::bit_cast<PartU>(odd)) & 0xffff0000U;
  store_as(panel + column * 16 + 2 * row, low | high);
#endif
}
GEMMA_TORCH_INLINE void put_pair(float* panel, int64_t column, int row, const PartF& even, const PartF& odd) {
  store_as(panel + column * 16 + row, even);
  store_as(panel + column * 16 + 16 + row, odd);
}
template <typename T, typename V>
GEMMA_TORCH_INLINE void put_pair(T* panel, int64_t column, int row, const Pair<V>& even, const Pair<V>& odd) {
  constexpr int kHalf = static_cast<int>(sizeof(V) / sizeof(PartF)) * kPartLanes;
  put_pair(panel, column, row, even.lo, odd.lo);
  put_pair(panel, column, row + kHalf, even.hi, odd.hi);
}

template <typename T>
void lossless_panel(const uint8_t* cell, uint8_t base, int64_t columns, T* panel) {
  const UpperBytes upper(base);
  for (int64_t j = 0; j < columns; j += 8, cell += 192) {
    prefetch_soon(cell + 1024);
    prefetch_soon(cell + 1024 + 64);
    prefetch_soon(cell + 1024 + 128);
    for (int p = 0; p < kParts; ++p) {
      PartU pairs[4];
      lossless_step(cell, p, upper, pairs);
      for (int64_t i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
          store_as(panel + (j + 2 * i) * 16 + 2 * p * kPartLanes, pairs[i]);
        } else {
          put_pair(panel, j + 2 * i, p * kPartLanes, even_of(pairs[i]), odd_of(pairs[i]));
        }
      }
    }
  }
}

template <Format kFormat, typename T>
void int_panel(const uint8_t* cell, int64_t columns, T* panel) {
  constexpr int64_t kGroup = group_columns(kFormat);
  constexpr int64_t kGroupBytes = kGroup / 32 * code_bytes(kFormat);
  for (int64_t j = 0; j < columns; j += kGroup, cell += kGroupBytes + kBlockRows * 2) {
    for (int p = 0; p < kParts; ++p) {
      const int row = p * kPartLanes;
      const PartF scale = load_part(reinterpret_cast<const Bf16*>(cell + kGroupBytes) + row);
      for (int64_t i = 0; i < kGroup; i += 32) {
        for (int two = 0; two < 4; ++two) {
          const auto codes = codes_at<kFormat>(cell + i / 32 * code_bytes(kFormat) + p * kWidth, two);
          for (int half = 0; half < 2; ++half) {
            const auto value = [&](int byte) {
              const auto code = std::bit_cast<PartI>((codes.step[half] >> (8 * byte)) & 0xffU) - code_zero(kFormat);
              return to_floats(code) * scale;
            };
            const int64_t column = j + i + 8 * two + 4 * half;
            put_pair(panel, column, row, value(0), value(1));
            put_pair(panel, column + 2, row, value(2), value(3));
          }
        }
      }
    }
  }
}

GEMMA_TORCH_INLINE void patch(Bf16* panel, const Exception& e, int64_t column) {
  panel[column / 2 * 32 + e.row * 2 + column % 2] = e.value;
}
GEMMA_TORCH_INLINE void patch(float* panel, const Exception& e, int64_t column) {
  panel[column * 16 + e.row] = widen(e.value);
}

template <typename T>
void patch_exceptions(const Packed& w, int64_t cell, T* panel) {
  const auto* end = w.exceptions + w.exception_count;
  const auto* e = first_exception(w, static_cast<uint32_t>(cell));
  for (; e != end && e->cell == cell; ++e) {
    patch(panel, *e, e->column);
  }
}

template <typename T>
void panel_of(const Packed& w, int64_t block, T* panel) {
  for (int64_t s = 0; s < w.slices(); ++s) {
    const int64_t index = s * w.blocks() + block;
    const uint8_t* cell = w.cells + index * w.stride();
    T* part = panel + s * w.slice * 16;
    switch (w.format) {
      case Format::kLossless12:
        lossless_panel(cell, w.exponents[index], w.slice, part);
        patch_exceptions(w, index, part);
        break;
      case Format::kLevels4:
        int_panel<Format::kLevels4>(cell, w.slice, part);
        break;
      case Format::kInt5:
        int_panel<Format::kInt5>(cell, w.slice, part);
        break;
      case Format::kInt6:
        int_panel<Format::kInt6>(cell, w.slice, part);
        break;
      case Format::kInt8:
        int_panel<Format::kInt8>(cell, w.slice, part);
        break;
    }
  }
}

void nothing() {}

// c (32, 32) = a (32, k) panels, float32: kTall rows at a time.
void gemm_f32(const float* a, int64_t a_stride, const float* const panels[2], int64_t k, float* c,
              int64_t c_stride, bool add) {
#if defined(__AVX512F__)
  constexpr int64_t kTall = 8;
#else
  constexpr int64_t kTall = 4;
#endif
  for (int64_t r = 0; r < 32; r += kTall) {
    for (int p = 0; p < 2; ++p) {
      const float* b = panels[p];
      F acc[kTall];
      for (int64_t i = 0; i < kTall; ++i) {
        acc[i] = add ? load(c + (r + i) * c_stride + 16 * p) : F{};
      }
      for (int64_t j = 0; j < k; ++j) {
        const F w = load(b + 16 * j);
        for (int64_t i = 0; i < kTall; ++i) {
          acc[i] = fma(w, splat(a[(r + i) * a_stride + j]), acc[i]);
        }
      }
      for (int64_t i = 0; i < kTall; ++i) {
        store(c + (r + i) * c_stride + 16 * p, acc[i]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
constexpr bool kFastBf16 = true;
void gemm_bf16(const Bf16* a, int64_t a_stride, const Bf16* const panels[2], int64_t k, float* c,
               int64_t c_stride, bool add) {
  constexpr int64_t kTall = 8;
  for (int64_t r = 0; r < 32; r += kTall) {
    __m512 acc[kTall][2];
    for (int64_t i = 0; i < kTall; ++i) {
      for (int p = 0; p < 2; ++p) {
        acc[i][p] = add ? _mm512_loadu_ps(c + (r + i) * c_stride + 16 * p) : _mm512_setzero_ps();
      }
    }
    for (int64_t j = 0; j < k; j += 2) {
      const auto w0 = load_as<__m512bh>(panels[0] + 16 * j);
      const auto w1 = load_as<__m512bh>(panels[1] + 16 * j);
      for (int64_t i = 0; i < kTall; ++i) {
        int32_t two;
        std::memcpy(&two, a + (r + i) * a_stride + j, 4);
        const auto x = std::bit_cast<__m512bh>(_mm512_set1_epi32(two));
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, w0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, w1);
      }
    }
    for (int64_t i = 0; i < kTall; ++i) {
      for (int p = 0; p < 2; ++p) {
        _mm512_storeu_ps(c + (r + i) * c_stride + 16 * p, acc[i][p]);
      }
    }
  }
}
#else
// Two numbers to all lanes.
GEMMA_TORCH_INLINE U splat_bits(const Bf16* two) {
  uint32_t bits;
  std::memcpy(&bits, two, sizeof bits);
  return build<U>([&](int) { return PartU{} + bits; });
}

// Without an instruction for it: the products are exact in float32, and so are both orders of rounding.
constexpr bool kFastBf16 = false;
void gemm_bf16(const Bf16* a, int64_t a_stride, const Bf16* const panels[2], int64_t k, float* c,
               int64_t c_stride, bool add) {
  constexpr int64_t kTall = 4;
  for (int64_t r = 0; r < 32; r += kTall) {
    for (int p = 0; p < 2; ++p) {
      F acc[kTall];
      for (int64_t i = 0; i < kTall; ++i) {
        acc[i] = add ? load(c + (r + i) * c_stride + 16 * p) : F{};
      }
      for (int64_t j = 0; j < k; j += 2) {
        const U both = load_as<U>(panels[p] + 16 * j);
        const F even = as_float(both << 16);
        const F odd = as_float(both & 0xffff0000U);
        for (int64_t i = 0; i < kTall; ++i) {
          const U x = splat_bits(a + (r + i) * a_stride + j);
          acc[i] = fma(odd, as_float(x & 0xffff0000U), fma(even, as_float(x << 16), acc[i]));
        }
      }
      for (int64_t i = 0; i < kTall; ++i) {
        store(c + (r + i) * c_stride + 16 * p, acc[i]);
      }
    }
  }
}
#endif

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
