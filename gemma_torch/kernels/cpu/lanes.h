// Sixteen numbers at a time, one for each row of a block, in the vector types that g++ and clang share: one register
// of AVX-512, two of AVX2, four elsewhere. (A vector type wider than the registers would be simpler still, but g++
// moves those through memory.) What the shared types cannot say is written in intrinsics. For the .inl files of
// kernels/cpu, inside the namespace of one instruction set.

#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "gemma_torch/kernels/cpu/isa.h"
#include "gemma_torch/kernels/cpu/packed.h"
#include "gemma_torch/kernels/cpu/prefetch.h"

#define GEMMA_TORCH_INLINE inline __attribute__((always_inline))

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;  // bytes of a register
#elif defined(__AVX2__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
constexpr int kLanes = 16;
constexpr int kParts = 64 / kWidth;          // registers for sixteen numbers
constexpr int kPartLanes = kLanes / kParts;  // numbers in one

// One register.
using PartF = float __attribute__((vector_size(kWidth)));
using PartI = int32_t __attribute__((vector_size(kWidth)));
using PartU = uint32_t __attribute__((vector_size(kWidth)));
using PartU8 = uint8_t __attribute__((vector_size(kWidth)));

// Two vectors side by side.
template <typename V>
struct Pair {
  V lo, hi;
};
template <typename V>
Pair(V, V) -> Pair<V>;

template <typename V>
constexpr bool kIsPair = false;
template <typename V>
constexpr bool kIsPair<Pair<V>> = true;

template <typename V, int kCopies>
struct Wide {
  using Type = Pair<typename Wide<V, kCopies / 2>::Type>;
};
template <typename V>
struct Wide<V, 1> {
  using Type = V;
};

// Sixteen numbers.
using F = Wide<PartF, kParts>::Type;
using I = Wide<PartI, kParts>::Type;
using U = Wide<PartU, kParts>::Type;

// body(0) .. body(kCount - 1), in place: what an array of registers is indexed with has to be known.
template <int kCount, typename Body>
GEMMA_TORCH_INLINE void unrolled(const Body& body) {
  const auto all = [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  };
  all(std::make_integer_sequence<int, kCount>{});
}

// ---- operations on pairs are those on their halves

template <typename S>
concept Number = std::is_arithmetic_v<S>;

// clang-format off
template <typename V> GEMMA_TORCH_INLINE auto operator+(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo + b.lo, a.hi + b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator-(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo - b.lo, a.hi - b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator*(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo * b.lo, a.hi * b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator/(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo / b.lo, a.hi / b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator&(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo & b.lo, a.hi & b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator|(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo | b.lo, a.hi | b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator^(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo ^ b.lo, a.hi ^ b.hi}; }
template <typename V> GEMMA_TORCH_INLINE auto operator>(const Pair<V>& a, const Pair<V>& b) { return Pair{a.lo > b.lo, a.hi > b.hi}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator+(const Pair<V>& a, S s) { return Pair{a.lo + s, a.hi + s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator-(const Pair<V>& a, S s) { return Pair{a.lo - s, a.hi - s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator*(const Pair<V>& a, S s) { return Pair{a.lo * s, a.hi * s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator&(const Pair<V>& a, S s) { return Pair{a.lo & s, a.hi & s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator<<(const Pair<V>& a, S s) { return Pair{a.lo << s, a.hi << s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator>>(const Pair<V>& a, S s) { return Pair{a.lo >> s, a.hi >> s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator>=(const Pair<V>& a, S s) { return Pair{a.lo >= s, a.hi >= s}; }
template <typename V, Number S> GEMMA_TORCH_INLINE auto operator<=(const Pair<V>& a, S s) { return Pair{a.lo <= s, a.hi <= s}; }
template <typename V> GEMMA_TORCH_INLINE Pair<V>& operator+=(Pair<V>& a, const Pair<V>& b) { return a = a + b; }
template <typename V> GEMMA_TORCH_INLINE Pair<V>& operator-=(Pair<V>& a, const Pair<V>& b) { return a = a - b; }
// clang-format on

template <typename To, typename V>
GEMMA_TORCH_INLINE To bits_as(const V& x) {  // V and To of the same number of registers
  if constexpr (kIsPair<To>) {
    return {bits_as<decltype(To::lo)>(x.lo), bits_as<decltype(To::hi)>(x.hi)};
  } else {
    return std::bit_cast<To>(x);
  }
}
template <typename V>
GEMMA_TORCH_INLINE F as_float(const V& x) {
  return bits_as<F>(x);
}
template <typename V>
GEMMA_TORCH_INLINE U as_bits(const V& x) {
  return bits_as<U>(x);
}

// mask ? a : b
template <typename M, typename V>
GEMMA_TORCH_INLINE V select(const M& mask, const V& a, const V& b) {
  if constexpr (kIsPair<V>) {
    return {select(mask.lo, a.lo, b.lo), select(mask.hi, a.hi, b.hi)};
  } else {
    return mask ? a : b;
  }
}

// ---- loads and stores

// Lane by lane, from what `part` gives for the register that starts at a lane.
template <typename V, typename Part>
GEMMA_TORCH_INLINE V build(const Part& part, int first = 0) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::lo);
    constexpr int kHalf = static_cast<int>(sizeof(V) / sizeof(PartF)) * kPartLanes / 2;
    return {build<Half>(part, first), build<Half>(part, first + kHalf)};
  } else {
    return part(first);
  }
}

template <typename V>
GEMMA_TORCH_INLINE V load_as(const void* p) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::lo);
    return {load_as<Half>(p), load_as<Half>(static_cast<const char*>(p) + sizeof(Half))};
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}
template <typename V>
GEMMA_TORCH_INLINE void store_as(void* p, const V& v) {
  if constexpr (kIsPair<V>) {
    store_as(p, v.lo);
    store_as(static_cast<char*>(p) + sizeof v.lo, v.hi);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}
GEMMA_TORCH_INLINE F load(const float* p) {
  return load_as<F>(p);
}
GEMMA_TORCH_INLINE void store(float* p, const F& x) {
  store_as(p, x);
}

// Not PartF{} + x: that is a sum, which has to be made, because -0 + 0 is 0.
GEMMA_TORCH_INLINE PartF splat_part(float x) {
#if defined(__AVX512F__)
  return std::bit_cast<PartF>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return std::bit_cast<PartF>(_mm256_set1_ps(x));
#else
  return PartF{x, x, x, x};
#endif
}
GEMMA_TORCH_INLINE F splat(float x) {
  return build<F>([&](int) { return splat_part(x); });
}

// Numbers of 16 and of 8 bits, as many as a register has lanes.
GEMMA_TORCH_INLINE PartU widen16_part(const void* p) {
#if defined(__AVX512F__)
  return std::bit_cast<PartU>(_mm512_cvtepu16_epi32(load_as<__m256i>(p)));
#elif defined(__AVX2__)
  return std::bit_cast<PartU>(_mm256_cvtepu16_epi32(load_as<__m128i>(p)));
#elif defined(__SSE2__)
  return std::bit_cast<PartU>(
      _mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)), _mm_setzero_si128()));
#elif defined(__aarch64__)
  return std::bit_cast<PartU>(vmovl_u16(vld1_u16(static_cast<const uint16_t*>(p))));
#else
  using Narrow = uint16_t __attribute__((vector_size(kPartLanes * 2)));
  return __builtin_convertvector(load_as<Narrow>(p), PartU);
#endif
}
GEMMA_TORCH_INLINE PartI widen8_part(const void* p) {
#if defined(__AVX512F__)
  return std::bit_cast<PartI>(_mm512_cvtepu8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
  return std::bit_cast<PartI>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return std::bit_cast<PartI>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#else
  using Narrow = uint8_t __attribute__((vector_size(kPartLanes)));
  return __builtin_convertvector(load_as<Narrow>(p), PartI);
#endif
}
GEMMA_TORCH_INLINE PartF load_part(const Bf16* p) {
  return std::bit_cast<PartF>(widen16_part(p) << 16);
}
GEMMA_TORCH_INLINE F load(const Bf16* p) {
  return build<F>([&](int lane) { return load_part(p + lane); });
}

GEMMA_TORCH_INLINE PartF to_floats(const PartI& x) {
  return __builtin_convertvector(x, PartF);
}
template <typename V>
GEMMA_TORCH_INLINE auto to_floats(const Pair<V>& x) {
  return Pair{to_floats(x.lo), to_floats(x.hi)};
}

// Bits of float32, rounded in the upper 16 to the nearest bfloat16, ties to even.
template <typename V>
GEMMA_TORCH_INLINE V rounded_bits(const V& bits) {
  return bits + 0x7fffU + ((bits >> 16) & 1U);
}

GEMMA_TORCH_INLINE void store(Bf16* p, const F& x) {
#if defined(__AVX512BF16__)
  // Denormals become zeros: none matters in activations.
  store_as(p, _mm512_cvtneps_pbh(std::bit_cast<__m512>(x)));
#else
  const U rounded = rounded_bits(as_bits(x)) >> 16;
#if defined(__AVX2__)
  const __m256i packed =
      _mm256_packus_epi32(std::bit_cast<__m256i>(rounded.lo), std::bit_cast<__m256i>(rounded.hi));
  store_as(p, _mm256_permute4x64_epi64(packed, 0xd8));  // lanes of 128 bits lie by turns
#else
  using Narrow = uint16_t __attribute__((vector_size(8)));
  store_as(p, __builtin_convertvector(rounded.lo.lo, Narrow));
  store_as(p + 4, __builtin_convertvector(rounded.lo.hi, Narrow));
  store_as(p + 8, __builtin_convertvector(rounded.hi.lo, Narrow));
  store_as(p + 12, __builtin_convertvector(rounded.hi.hi, Narrow));
#endif
#endif
}

// ---- arithmetic

GEMMA_TORCH_INLINE PartF fma(const PartF& a, const PartF& b, const PartF& c) {
#if defined(__AVX512F__)
  return std::bit_cast<PartF>(_mm512_fmadd_ps(
      std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return std::bit_cast<PartF>(_mm256_fmadd_ps(
      std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#elif defined(__aarch64__)
  return std::bit_cast<PartF>(vfmaq_f32(
      std::bit_cast<float32x4_t>(c), std::bit_cast<float32x4_t>(a), std::bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
template <typename V>
GEMMA_TORCH_INLINE Pair<V> fma(const Pair<V>& a, const Pair<V>& b, const Pair<V>& c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

template <typename V>
GEMMA_TORCH_INLINE V max(const V& a, const V& b) {
  return select(a > b, a, b);
}
template <typename V>
GEMMA_TORCH_INLINE V min(const V& a, const V& b) {
  return select(b > a, a, b);
}

// Sums and largest ones are taken in the same order everywhere: halves with halves.
template <typename Op>
GEMMA_TORCH_INLINE float fold(const PartF& x, const Op& op) {
  PartF v = x;
#if defined(__AVX512F__)
  const auto whole = std::bit_cast<__m512>(v);
  const __m256 y = op(_mm512_castps512_ps256(whole),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1)));
  const __m128 z = op(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
  const auto y = std::bit_cast<__m256>(v);
  const __m128 z = op(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#else
  const PartF z = v;
#endif
  return op(op(z[0], z[2]), op(z[1], z[3]));
}
template <typename V, typename Op>
GEMMA_TORCH_INLINE float fold(const Pair<V>& x, const Op& op) {
  return fold(op(x.lo, x.hi), op);
}
GEMMA_TORCH_INLINE float sum(const F& x) {
  return fold(x, [](const auto& a, const auto& b) { return a + b; });
}
GEMMA_TORCH_INLINE float largest(const F& x) {
  return fold(x, [](const auto& a, const auto& b) { return select(a > b, a, b); });
}

GEMMA_TORCH_INLINE float widen(float x) {
  return x;
}
GEMMA_TORCH_INLINE float widen(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Asks for what a stream of weights needs next: soon in the innermost cache, later in the one behind it.
GEMMA_TORCH_INLINE void prefetch_stream(const uint8_t* p, int64_t bytes) {
  const auto [soon, later] = stream_ahead;
  if (later == 0) {
    return;
  }
  for (int64_t i = 0; i < bytes; i += 64) {
    prefetch_soon(p + soon + i);
    prefetch_later(p + later + i);
  }
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
