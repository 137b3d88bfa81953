// The kernels of row_kernels.h, written once. Each of row_kernels_{generic,avx2,avx512}.cpp includes this file under
// its own namespace and is compiled for its own instruction set, which the vector type below follows.

#include <bit>
#include <cmath>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "gemma_torch/kernels/cpu/row_kernels.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

#if defined(__AVX512F__)
struct Vec {
  static constexpr int64_t kSize = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const Bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
};
#elif defined(__AVX2__)
struct Vec {
  static constexpr int64_t kSize = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const Bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};
#endif

float widen(float x) { return x; }
float widen(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
T narrow(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {   // to nearest, ties to even; a NaN stays one
    const auto bits = std::bit_cast<uint32_t>(x);
    const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
    return {static_cast<uint16_t>(nan ? 0x7fc0U : (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
  }
}

// Far enough that a line is there when it is needed, near enough that it still is: 4 KiB.
template <typename T>
void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
}

#if defined(__AVX512F__) || defined(__AVX2__)
// Two rows at a time share the loads of x; two sums a row hide the latency of the additions.
template <typename T>
void gemv(const T* w, const float* x, T* y, int64_t rows, int64_t columns) {
  constexpr int64_t kStep = 2 * Vec::kSize;
  const int64_t even = columns / kStep * kStep;
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const T* a = w + r * columns;
    const T* b = a + columns;
    Vec a0 = Vec::zero(), a1 = Vec::zero(), b0 = Vec::zero(), b1 = Vec::zero();
    for (int64_t j = 0; j < even; j += kStep) {
      prefetch(a + j);
      prefetch(b + j);
      const Vec x0 = Vec::load(x + j);
      const Vec x1 = Vec::load(x + j + Vec::kSize);
      a0 = Vec::fma(Vec::load(a + j), x0, a0);
      a1 = Vec::fma(Vec::load(a + j + Vec::kSize), x1, a1);
      b0 = Vec::fma(Vec::load(b + j), x0, b0);
      b1 = Vec::fma(Vec::load(b + j + Vec::kSize), x1, b1);
    }
    float sum_a = a0.sum() + a1.sum();
    float sum_b = b0.sum() + b1.sum();
    for (int64_t j = even; j < columns; ++j) {
      sum_a += widen(a[j]) * x[j];
      sum_b += widen(b[j]) * x[j];
    }
    y[r] = narrow<T>(sum_a);
    y[r + 1] = narrow<T>(sum_b);
  }
  if (r < rows) {
    const T* a = w + r * columns;
    Vec a0 = Vec::zero();
    int64_t j = 0;
    for (; j + Vec::kSize <= columns; j += Vec::kSize) {
      a0 = Vec::fma(Vec::load(a + j), Vec::load(x + j), a0);
    }
    float sum = a0.sum();
    for (; j < columns; ++j) {
      sum += widen(a[j]) * x[j];
    }
    y[r] = narrow<T>(sum);
  }
}
#else
template <typename T>
void gemv(const T* w, const float* x, T* y, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* a = w + r * columns;
    float sums[8] = {};   // eight at a time: what a compiler makes vectors of
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      for (int64_t i = 0; i < 8; ++i) {
        sums[i] += widen(a[j + i]) * x[j + i];
      }
    }
    float sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    for (; j < columns; ++j) {
      sum += widen(a[j]) * x[j];
    }
    y[r] = narrow<T>(sum);
  }
}
#endif

template <typename T>
void rms_norm(const T* x, const T* scale, T* y, int64_t rows, int64_t columns, double eps) {
  for (int64_t r = 0; r < rows; ++r, x += columns, y += columns) {
    float sums[16] = {};
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
      for (int64_t i = 0; i < 16; ++i) {
        const float value = widen(x[j + i]);
        sums[i] += value * value;
      }
    }
    float sum = 0;
    for (const float part : sums) {
      sum += part;
    }
    for (; j < columns; ++j) {
      sum += widen(x[j]) * widen(x[j]);
    }
    const float factor = 1.0F / std::sqrt(sum / static_cast<float>(columns) + static_cast<float>(eps));
    for (j = 0; j < columns; ++j) {
      y[j] = narrow<T>(widen(x[j]) * factor * (1.0F + widen(scale[j])));
    }
  }
}

template <typename T>
void rope(const T* x, const float* cos, const float* sin, T* y, int64_t rows, int64_t columns) {
  const int64_t half = columns / 2;
  for (int64_t r = 0; r < rows; ++r, x += columns, y += columns, cos += columns, sin += columns) {
    for (int64_t j = 0; j < half; ++j) {
      const float a = widen(x[j]);
      const float b = widen(x[half + j]);
      y[j] = narrow<T>(a * cos[j] - b * sin[j]);
      y[half + j] = narrow<T>(b * cos[half + j] + a * sin[half + j]);
    }
  }
}

void widen_all(const Bf16* x, float* y, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    y[j] = widen(x[j]);
  }
}

}  // namespace

extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {GEMMA_TORCH_ISA_VALUE,
                                gemv<float>,
                                gemv<Bf16>,
                                rms_norm<float>,
                                rms_norm<Bf16>,
                                rope<float>,
                                rope<Bf16>,
                                widen_all};

}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
