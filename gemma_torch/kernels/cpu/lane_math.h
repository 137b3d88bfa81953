// Functions of sixteen numbers at a time, beside the arithmetic of lanes.h. For the .inl files of kernels/cpu, inside
// the namespace of one instruction set.

#pragma once

#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// ---- whole numbers

// The nearest whole number, ties to even, of numbers below 2^22 in size.
GEMMA_TORCH_INLINE I nearest_whole(const F& x) {
  const F magic = splat(12582912.0F);  // 1.5 * 2^23: the last bit of a sum with it stands for 1
  return bits_as<I>(as_bits(x + magic) - as_bits(magic));
}

template <typename V>
GEMMA_TORCH_INLINE int32_t whole_sum(const V& x) {  // of I
  if constexpr (kIsPair<V>) {
    return whole_sum(x.lo + x.hi);
  } else {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(std::bit_cast<__m512i>(x));
#else
    int32_t total = 0;
    for (int lane = 0; lane < kPartLanes; ++lane) {
      total += x[lane];
    }
    return total;
#endif
  }
}

// The lowest bits of each, as many as a Narrow has: 8 or 16. (What g++ 12 makes of __builtin_convertvector is slow for
// AVX-512.)
template <typename Narrow, typename V>
GEMMA_TORCH_INLINE void store_narrow(Narrow* p, const V& x) {  // of U
  if constexpr (kIsPair<V>) {
    store_narrow(p, x.lo);
    store_narrow(p + sizeof x.lo / 4, x.hi);
  } else {
#if defined(__AVX512F__)
    const auto all = std::bit_cast<__m512i>(x);
    if constexpr (sizeof(Narrow) == 1) {
      store_as(p, _mm512_cvtepi32_epi8(all));
    } else {
      store_as(p, _mm512_cvtepi32_epi16(all));
    }
#else
    // Not an alias: g++ leaves its attribute out while Narrow is not known.
    typedef Narrow Numbers __attribute__((vector_size(kPartLanes * sizeof(Narrow))));
    store_as(p, __builtin_convertvector(x, Numbers));
#endif
  }
}

// ---- functions

GEMMA_TORCH_INLINE PartF sqrt(const PartF& x) {
#if defined(__AVX512F__)
  return std::bit_cast<PartF>(_mm512_sqrt_ps(std::bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return std::bit_cast<PartF>(_mm256_sqrt_ps(std::bit_cast<__m256>(x)));
#else
  return PartF{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
#endif
}
template <typename V>
GEMMA_TORCH_INLINE Pair<V> sqrt(const Pair<V>& x) {
  return {sqrt(x.lo), sqrt(x.hi)};
}

// e^x to about 2 units in the last place: x = n ln 2 + r, and a polynomial for e^r, |r| <= 0.35. Below -87 it is 0 or
// nearly, above 88 the largest power of two.
GEMMA_TORCH_INLINE F exp(F x) {
  x = min(max(x, splat(-87.0F)), splat(88.0F));
  const F magic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to a whole number
  const F shifted = x * 1.44269504F + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0.693145752F) - n * 1.42860677e-6F;
  F p = splat(1.9875691e-4F);
  p = fma(p, r, splat(1.3981999e-3F));
  p = fma(p, r, splat(8.3334519e-3F));
  p = fma(p, r, splat(4.1665796e-2F));
  p = fma(p, r, splat(1.6666666e-1F));
  p = fma(p, r, splat(5.0000001e-1F));
  p = fma(p, r * r, r + 1.0F);
  return as_float(as_bits(p) + ((as_bits(shifted) - as_bits(magic)) << 23));
}

// (1 + tanh u) / 2 = 1 / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): gelu(x) is x times that.
GEMMA_TORCH_INLINE F gelu_gate(F x) {
  const F u = x * (x * x * 0.044715F + 1.0F) * 0.797884561F;
  return splat(1.0F) / (exp(u * -2.0F) + 1.0F);
}

// gelu(x) = x / 2 (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh u) / 2 = 1 / (1 + e^(-2u)).
GEMMA_TORCH_INLINE F gelu(F x) {
  const F u = x * (x * x * 0.044715F + 1.0F) * 0.797884561F;
  return x / (exp(u * -2.0F) + 1.0F);
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
