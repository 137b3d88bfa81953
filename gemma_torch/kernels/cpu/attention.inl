// Attention of the queries of one token to a part of the keys.

#include <algorithm>
#include <array>

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

constexpr int kHeadsAtOnce = 4;  // queries that share the loads of a key

// Slots whose scores are held at a time. A tile is read first, then worked on where it lies, in the second cache.
constexpr int64_t kTile = 128;

#if defined(__AVX512F__)
// Lane 4 i + j is sum(x[4 j + i]), to the bit.
GEMMA_TORCH_INLINE PartF sums_by_four(const PartF (&x)[16]) {
  const auto of = [](const PartF& v) { return std::bit_cast<__m512>(v); };
  __m512 eight[8], four[4], two[2];
  unrolled<8>([&](auto i) __attribute__((always_inline)) {
    const __m512 a = of(x[2 * i]), b = of(x[2 * i + 1]);
    eight[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  });
  unrolled<4>([&](auto i) __attribute__((always_inline)) {
    const __m512 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  });
  unrolled<2>([&](auto i) __attribute__((always_inline)) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  });
  return std::bit_cast<PartF>(_mm512_shuffle_ps(two[0], two[1], 0x88) +
                              _mm512_shuffle_ps(two[0], two[1], 0xdd));
}
#endif

// Asks for a stretch of memory, two lines now and then: as many as arithmetic hides.
struct Ahead {
  const char* next;
  const char* end;

  GEMMA_TORCH_INLINE void ask() {
    if (next < end) {
      prefetch_later(next);
      prefetch_later(next + 64);
      next += 128;
    }
  }
};

// Reads memory from beginning to end, and nothing else: what fetches ahead by itself does so for a loop like this, at
// whatever rate memory has, and not for loads that arithmetic keeps apart.
GEMMA_TORCH_INLINE void read_through(const void* from, const void* end) {
  const auto* p = static_cast<const uint8_t*>(from);
  const auto* const to = static_cast<const uint8_t*>(end);
  PartU seen[4] = {};
  for (; p + 256 <= to; p += 256) {
    prefetch_stream(p, 256);
    unrolled<4>([&](auto n) __attribute__((always_inline)) { seen[n] |= load_as<PartU>(p + 64 * n); });
  }
  for (; p + 64 <= to; p += 64) {
    seen[0] |= load_as<PartU>(p);
  }
  const PartU all = (seen[0] | seen[1]) | (seen[2] | seen[3]);
  asm volatile("" : : "m"(all));
}

// kHeads queries (D), as products with keys take them: rounded to T.
template <typename T, int kHeads>
struct Queries {
  Queries(const float* given, int64_t size) : D(size) {
    alignas(64) T rounded[16];
    for (int64_t j = 0; j < kHeads * D; j += 16) {
      store(rounded, load(given + j));
      store(q + j, load(rounded));
    }
  }

  // Adding up the lanes of parts[kHeads n + h] gives q[h] . the n-th of kKeys keys, which are 2 D apart.
  template <int kKeys>
  GEMMA_TORCH_INLINE void dot(const T* keys, Ahead& ahead, F* parts) const {
    F acc[kKeys * kHeads] = {};
    for (int64_t j = 0; j < D; j += 16) {
      ahead.ask();
      F k[kKeys];
      for (int n = 0; n < kKeys; ++n) {
        k[n] = load(keys + n * 2 * D + j);
      }
      for (int h = 0; h < kHeads; ++h) {
        const F qh = load(q + h * D + j);
        for (int n = 0; n < kKeys; ++n) {
          acc[n * kHeads + h] = fma(k[n], qh, acc[n * kHeads + h]);
        }
      }
    }
    std::memcpy(parts, acc, sizeof acc);
  }

  alignas(64) float q[kHeads * kMaxHeadDim];
  int64_t D;
};

// Adds weights[h][i] values[i] to z[h], for 16 kVectors columns. A value is 2 D after the one before.
template <int kHeads, int kVectors, typename T>
void add_columns(const T (*weights)[kTile], const T* values, int64_t count, int64_t D, Ahead& ahead, float* z) {
  F acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      acc[h][v] = load(z + h * D + 16 * v);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    ahead.ask();
    F value[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load(values + i * 2 * D + 16 * v);
    }
    for (int h = 0; h < kHeads; ++h) {
      const F w = splat(widen(weights[h][i]));
      for (int v = 0; v < kVectors; ++v) {
        acc[h][v] = fma(value[v], w, acc[h][v]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      store(z + h * D + 16 * v, acc[h][v]);
    }
  }
}

#if defined(__AVX512BF16__)
// Two products of bfloat16 and their sum at once; nothing becomes float32 before.
template <int kHeads>
struct Queries<Bf16, kHeads> {
  Queries(const float* given, int64_t size) : D(size) {
    for (int64_t j = 0; j < kHeads * D; j += 16) {
      store(q + j, load(given + j));
    }
  }

  template <int kKeys>
  GEMMA_TORCH_INLINE void dot(const Bf16* keys, Ahead& ahead, F* parts) const {
    __m512 acc[kKeys * kHeads] = {};
    for (int64_t j = 0; j < D; j += 32) {
      ahead.ask();
      __m512bh k[kKeys];
      unrolled<kKeys>([&](auto n) __attribute__((always_inline)) { k[n] = load_as<__m512bh>(keys + n * 2 * D + j); });
      unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
        const auto qh = load_as<__m512bh>(q + h * D + j);
        unrolled<kKeys>([&](auto n) __attribute__((always_inline)) {
          acc[n * kHeads + h] = _mm512_dpbf16_ps(acc[n * kHeads + h], k[n], qh);
        });
      });
    }
    std::memcpy(parts, acc, sizeof acc);
  }

  alignas(64) Bf16 q[kHeads * kMaxHeadDim];
  int64_t D;
};

// Values of two slots at a time, their numbers by turns.
template <int kHeads, int kVectors>
void add_columns(const Bf16 (*weights)[kTile], const Bf16* values, int64_t count, int64_t D, Ahead& ahead, float* z) {
  alignas(64) static constexpr auto kTurns = [] {
    std::array<int16_t, 64> turns{};
    for (int n = 0; n < 64; ++n) {
      turns[static_cast<size_t>(n)] = static_cast<int16_t>(n / 2 + n % 2 * 32);
    }
    return turns;
  }();
  const auto first = load_as<__m512i>(kTurns.data()), second = load_as<__m512i>(kTurns.data() + 32);
  __m512 acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      acc[h][v] = _mm512_loadu_ps(z + h * D + 16 * v);
    }
  }
  for (int64_t i = 0; i < count; i += 2) {
    ahead.ask();
    const Bf16* even = values + i * 2 * D;
    const Bf16* odd = i + 1 < count ? even + 2 * D : even;  // the last one alone has a second weight of 0
    __m512bh value[kVectors];
    unrolled<kVectors / 2>([&](auto v) __attribute__((always_inline)) {
      const auto a = load_as<__m512i>(even + 32 * v), b = load_as<__m512i>(odd + 32 * v);
      value[2 * v] = std::bit_cast<__m512bh>(_mm512_permutex2var_epi16(a, first, b));
      value[2 * v + 1] = std::bit_cast<__m512bh>(_mm512_permutex2var_epi16(a, second, b));
    });
    unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
      int32_t two;
      std::memcpy(&two, weights[h] + i, sizeof two);
      const auto w = std::bit_cast<__m512bh>(_mm512_set1_epi32(two));
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        acc[h][v] = _mm512_dpbf16_ps(acc[h][v], value[v], w);
      });
    });
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(z + h * D + 16 * v, acc[h][v]);
    }
  }
}
#endif

// scores[h][i] = q[h] . keys[i].
template <typename T, int kHeads>
void tile_scores(const Queries<T, kHeads>& q, const T* pairs, int64_t count, Ahead& ahead, float (*scores)[kTile]) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // Four keys at a time share the loads of four queries, and their sixteen sums are folded together.
  if constexpr (kHeads == 4) {
    for (; i + 4 <= count; i += 4) {
      PartF parts[16];
      q.template dot<4>(pairs + i * 2 * q.D, ahead, parts);
      const PartF all = sums_by_four(parts);
      for (int h = 0; h < kHeads; ++h) {
        std::memcpy(scores[h] + i, reinterpret_cast<const float*>(&all) + 4 * h, 4 * sizeof(float));
      }
    }
  }
#endif
  for (; i < count; ++i) {
    F parts[kHeads];
    q.template dot<1>(pairs + i * 2 * q.D, ahead, parts);
    for (int h = 0; h < kHeads; ++h) {
      scores[h][i] = sum(parts[h]);
    }
  }
}

// Turns scores to weights e^(score - largest); z and sum so far are scaled to a new largest. The sum is that of the
// weights as rounded to T, so that they weigh 1 together whatever T is.
template <typename T>
void soften(float* scores, int64_t count, int64_t D, float& most, float& total, float* z, T* weights) {
  for (int64_t i = count; i < (count + 15) / 16 * 16; ++i) {
    scores[i] = -INFINITY;
  }
  F tile_most = splat(-INFINITY);
  for (int64_t i = 0; i < count; i += 16) {
    tile_most = max(tile_most, load(scores + i));
  }
  const float now = std::fmax(most, largest(tile_most));
  if (now > most) {
    const float factor = std::exp(most - now);  // 0 the first time
    total *= factor;
    for (int64_t j = 0; j < D; j += 16) {
      store(z + j, load(z + j) * factor);
    }
    most = now;
  }
  F sums = {};
  for (int64_t i = 0; i < count; i += 16) {
    const F score = load(scores + i);
    store(weights + i, select(score > splat(-INFINITY), exp(score - now), F{}));
    sums += load(weights + i);
  }
  total += sum(sums);
}

template <typename T, int kHeads>
void attend_heads(const float* q, int64_t D, const Seen& seen, const Partial& out) {
  for (int h = 0; h < kHeads; ++h) {
    out.largest[h] = -INFINITY;
    out.sum[h] = 0;
  }
  std::memset(out.z, 0, static_cast<size_t>(kHeads * D) * sizeof(float));
  const Queries<T, kHeads> queries(q, D);
  alignas(64) float scores[kHeads][kTile];
  alignas(64) T weights[kHeads][kTile];
  for (const auto& run : seen.slots) {
    const auto* const first = static_cast<const T*>(seen.pairs) + run.begin * 2 * D;
    const auto* const last = static_cast<const T*>(seen.pairs) + run.end * 2 * D;
    Ahead ahead{reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(last)};
    for (const T* pairs = first; pairs < last; pairs += kTile * 2 * D) {
      const T* const end = last - pairs < kTile * 2 * D ? last : pairs + kTile * 2 * D;
      const int64_t count = (end - pairs) / (2 * D);
      // What was not asked for, and the kilobyte before: so the reading is on its way when it comes there.
      read_through(pairs == first ? ahead.next : ahead.next - 1024, end);
      ahead.next = std::max(ahead.next, reinterpret_cast<const char*>(end));
      tile_scores(queries, pairs, count, ahead, scores);
      for (int h = 0; h < kHeads; ++h) {
        soften(scores[h], count, D, out.largest[h], out.sum[h], out.z + h * D, weights[h]);
      }
      const T* values = pairs + D;
      int64_t j = 0;
      for (; j + 64 <= D; j += 64) {
        add_columns<kHeads, 4>(weights, values + j, count, D, ahead, out.z + j);
      }
      if (j < D) {
        add_columns<kHeads, 2>(weights, values + j, count, D, ahead, out.z + j);
      }
    }
  }
}

template <typename T>
void attend(const float* q, int64_t heads, int64_t D, const Seen& seen, const Partial& out) {
  const auto part = [&](int64_t h) {
    return Partial{out.largest + h, out.sum + h, out.z + h * D};
  };
  int64_t h = 0;
  for (; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce) {
    attend_heads<T, kHeadsAtOnce>(q + h * D, D, seen, part(h));
  }
  for (; h < heads; ++h) {
    attend_heads<T, 1>(q + h * D, D, seen, part(h));
  }
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
