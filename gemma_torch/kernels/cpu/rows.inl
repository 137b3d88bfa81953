// What happens to rows of activations between products.

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lane_math.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// Values are at most 127 * 256 so that both halves, the lower one rounded to nearest, fit a signed byte.
constexpr float kLargestValue = 32512.0F;

GEMMA_TORCH_INLINE F absolute(F x) { return as_float(as_bits(x) & 0x7fffffffU); }

// Each four in the order 0, 2, 1, 3.
GEMMA_TORCH_INLINE PartU crossed(const PartU& x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7);
#else
  return __builtin_shufflevector(x, x, 0, 2, 1, 3);
#endif
}
template <typename V>
GEMMA_TORCH_INLINE Pair<V> crossed(const Pair<V>& x) {
  return {crossed(x.lo), crossed(x.hi)};
}

void quantize(const float* x, int64_t n, const QuantizedRow& out) {
  for (int64_t j = 0; j < n; j += 32) {
    const F v[2] = {load(x + j), load(x + j + 16)};
    const float most = largest(max(absolute(v[0]), absolute(v[1])));
    const float factor = most > 1e-30F ? kLargestValue / most : 0.0F;  // nearer to zero it overflows
    out.scales[j / 32] = most / kLargestValue;
    I sums = {};
    for (int half = 0; half < 2; ++half) {
      const int64_t at = j + 16 * half;
      const I value = nearest_whole(v[half] * factor);
      const I high = (value + 128) >> 8;
      store_narrow(out.high + at, as_bits(high));
      store_narrow(out.low + at, as_bits(value) - (as_bits(high) << 8));
      store_narrow(out.pairs + at, crossed(as_bits(value)));
      sums += value;
    }
    out.sums[j / 32] = whole_sum(sums);
  }
}

void rms_norm(const float* x, const float* scale, float* y, int64_t n, float eps) {
  F sums[2] = {};
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    const F a = load(x + j);
    const F b = load(x + j + 16);
    sums[0] = fma(a, a, sums[0]);
    sums[1] = fma(b, b, sums[1]);
  }
  for (; j < n; j += 16) {
    const F a = load(x + j);
    sums[0] = fma(a, a, sums[0]);
  }
  const float mean = sum(sums[0] + sums[1]) / static_cast<float>(n);
  const float factor = 1.0F / std::sqrt(mean + eps);
  for (j = 0; j < n; j += 16) {
    store(y + j, load(x + j) * factor * load(scale + j));
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t j = 0; j < half; j += 16) {
    const F a = load(x + j);
    const F b = load(x + half + j);
    store(x + j, a * load(cos + j) - b * load(sin + j));
    store(x + half + j, b * load(cos + j) + a * load(sin + j));
  }
}

void gelu_mul(const float* gate_up, float* y, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    store(y + j, gelu(load(gate_up + 2 * j)) * load(gate_up + 2 * j + 16));
  }
}

// 32 rows of 16 gates and their 16 ups.
template <typename T>
void gelu_tile(const float* gate_up, T* y, int64_t y_stride) {
  for (int64_t r = 0; r < 32; ++r) {
    store(y + r * y_stride, gelu(load(gate_up + 32 * r)) * load(gate_up + 32 * r + 16));
  }
}

void narrow_row(const float* x, Bf16* y, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    store(y + j, load(x + j));
  }
}

void widen_row(const Bf16* x, float* y, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    store(y + j, load(x + j));
  }
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
