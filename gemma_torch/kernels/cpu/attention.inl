// Attention of the queries of one token to a part of the keys.

#include <algorithm>

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

constexpr int kHeadsAtOnce = 4;  // queries that share the loads of a key

// Slots whose scores are held at a time; their values wait in the second cache until all of those are known.
constexpr int64_t kTile = 128;

// The head size of the released models, which the compiler knows, so that nothing is left of the loops over a key: where
// it carries what one round has loaded to the next, through memory, attention takes half as long again.
constexpr int64_t kUsualSize = 256;

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

// kHeads queries of kSize numbers, or of any number where that is 0, as products with keys take them: rounded to T.
template <typename T, int kHeads, int64_t kSize>
struct Queries {
  Queries(const float* given, int64_t D) : size(D) {
    alignas(64) T rounded[16];
    for (int64_t j = 0; j < kHeads * D; j += 16) {
      store(rounded, load(given + j));
      store(q + j, load(rounded));
    }
  }

  // Adding up the lanes of parts[h] gives q[h] . key.
  GEMMA_TORCH_INLINE void dot(const T* key, F* parts) const {
    const int64_t D = kSize > 0 ? kSize : size;
    F acc[kHeads] = {};
    for (int64_t j = 0; j < D; j += 16) {
      const F k = load(key + j);
      for (int h = 0; h < kHeads; ++h) {
        acc[h] = fma(k, load(q + h * D + j), acc[h]);
      }
    }
    std::memcpy(parts, acc, sizeof acc);
  }

  alignas(64) float q[kHeads * kMaxHeadDim];
  int64_t size;
};

// Memory that is to be read next, asked for by two lines while there is something else to do. To the second cache: to the
// first, or more of them, they are in the way of what is read meanwhile.
struct Ahead {
  const char* next;
  int64_t step = 64;  // 0 if nothing is next, and the same line is asked for again and again

  GEMMA_TORCH_INLINE void ask() {
    prefetch_later(next);
    prefetch_later(next + step);
    next += 2 * step;
  }
};

// Adds weights[h][i] values[i] to z[h], for 16 kVectors columns. A value is 2 D after the one before. Two lines are asked
// for with each two values.
template <int kHeads, int kVectors, typename T>
void add_columns(const T (*weights)[kTile], const T* values, int64_t count, int64_t D, float* z, Ahead& ahead) {
  F acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      acc[h][v] = load(z + h * D + 16 * v);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (i % 2 == 0) {
      ahead.ask();
    }
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
// Two products of bfloat16 and their sum at once; nothing becomes float32 before. A sum has to wait for the one before,
// for longer than four queries take: so the even and the odd lines of a key are summed apart.
template <int kHeads, int64_t kSize>
struct Queries<Bf16, kHeads, kSize> {
  Queries(const float* given, int64_t D) : size(D) {
    for (int64_t j = 0; j < kHeads * D; j += 16) {
      store(q + j, load(given + j));
    }
  }

  GEMMA_TORCH_INLINE void dot(const Bf16* key, F* parts) const {
    const int64_t D = kSize > 0 ? kSize : size;
    __m512 acc[2][kHeads] = {};
    const auto add = [&](int odd, int64_t j) __attribute__((always_inline)) {
      const auto k = load_as<__m512bh>(key + j);
      unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
        acc[odd][h] = _mm512_dpbf16_ps(acc[odd][h], k, load_as<__m512bh>(q + h * D + j));
      });
    };
    if constexpr (kSize > 0) {
      unrolled<kSize / 32>([&](auto n) __attribute__((always_inline)) { add(n % 2, 32 * n); });
    } else {
      for (int64_t j = 0; j < D; j += 32) {
        add(j / 32 % 2, j);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      parts[h] = std::bit_cast<F>(acc[0][h] + acc[1][h]);
    }
  }

  alignas(64) Bf16 q[kHeads * kMaxHeadDim];
  int64_t size;
};

// Values of two slots at a time, their numbers by turns. Unpacking does that within 16 bytes, so of 32 columns, by fours,
// sums hold the even fours and the odd ones.
template <int kHeads, int kVectors>
void add_columns(const Bf16 (*weights)[kTile], const Bf16* values, int64_t count, int64_t D, float* z, Ahead& ahead) {
  __m512 acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; v += 2) {
      const __m512 a = _mm512_loadu_ps(z + h * D + 16 * v), b = _mm512_loadu_ps(z + h * D + 16 * v + 16);
      acc[h][v] = _mm512_shuffle_f32x4(a, b, 0x88);
      acc[h][v + 1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    }
  }
  for (int64_t i = 0; i < count; i += 2) {
    ahead.ask();
    const Bf16* even = values + i * 2 * D;
    const Bf16* odd = i + 1 < count ? even + 2 * D : even;  // the last one alone has a second weight of 0
    __m512bh value[kVectors];
    unrolled<kVectors / 2>([&](auto v) __attribute__((always_inline)) {
      const auto a = load_as<__m512i>(even + 32 * v), b = load_as<__m512i>(odd + 32 * v);
      value[2 * v] = std::bit_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      value[2 * v + 1] = std::bit_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
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
    for (int v = 0; v < kVectors; v += 2) {
      const __m512 a = _mm512_shuffle_f32x4(acc[h][v], acc[h][v + 1], 0x44);
      const __m512 b = _mm512_shuffle_f32x4(acc[h][v], acc[h][v + 1], 0xee);
      _mm512_storeu_ps(z + h * D + 16 * v, _mm512_shuffle_f32x4(a, a, 0xd8));
      _mm512_storeu_ps(z + h * D + 16 * v + 16, _mm512_shuffle_f32x4(b, b, 0xd8));
    }
  }
}
#endif

// scores[h][i] = q[h] . keys[i]. Keys are read one after the other, each whole, and its value's lines are touched right
// behind it: what fetches ahead by itself follows that, and hardly anything else. Two keys by turns, or lines asked for
// further on, cost up to twice the time.
template <typename T, int kHeads, int64_t kSize>
void tile_scores(const Queries<T, kHeads, kSize>& q, const T* pairs, int64_t count, float (*scores)[kTile]) {
  const int64_t D = kSize > 0 ? kSize : q.size;
  const auto dot = [&](int64_t i, F* parts) __attribute__((always_inline)) {
    const T* const key = pairs + i * 2 * D;
    q.dot(key, parts);
    for (int64_t j = 0; j < D; j += static_cast<int64_t>(64 / sizeof(T))) {
      touch(key + D + j);
    }
  };
  int64_t i = 0;
#if defined(__AVX512F__)
  // The sixteen sums of four keys and four queries are folded together.
  if constexpr (kHeads == 4) {
    for (; i + 4 <= count; i += 4) {
      PartF parts[16];
      for (int n = 0; n < 4; ++n) {
        dot(i + n, parts + 4 * n);
      }
      const PartF all = sums_by_four(parts);
      for (int h = 0; h < kHeads; ++h) {
        std::memcpy(scores[h] + i, reinterpret_cast<const float*>(&all) + 4 * h, 4 * sizeof(float));
      }
    }
  }
#endif
  for (; i < count; ++i) {
    F parts[kHeads];
    dot(i, parts);
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

template <typename T, int kHeads, int64_t kSize>
void attend_heads(const float* q, int64_t size, const Seen& seen, const Partial& out) {
  const int64_t D = kSize > 0 ? kSize : size;
  for (int h = 0; h < kHeads; ++h) {
    out.largest[h] = -INFINITY;
    out.sum[h] = 0;
  }
  std::memset(out.z, 0, static_cast<size_t>(kHeads * D) * sizeof(float));
  const Queries<T, kHeads, kSize> queries(q, D);
  alignas(64) float scores[kHeads][kTile];
  alignas(64) T weights[kHeads][kTile];
  const auto pairs_at = [&](int64_t slot) { return static_cast<const T*>(seen.pairs) + slot * 2 * D; };
  for (const auto& run : seen.slots) {
    for (int64_t i = run.begin; i < run.end; i += kTile) {
      const int64_t count = std::min(kTile, run.end - i);
      const T* const pairs = pairs_at(i);
      tile_scores(queries, pairs, count, scores);
      for (int h = 0; h < kHeads; ++h) {
        soften(scores[h], count, D, out.largest[h], out.sum[h], out.z + h * D, weights[h]);
      }
      // Values are in the second cache by now, and memory would wait.
      const auto& later = seen.slots[1];
      const bool within = i + count < run.end, last = !within && (&run == &later || later.begin == later.end);
      Ahead ahead{reinterpret_cast<const char*>(within ? pairs_at(i + count) : pairs_at(later.begin)), last ? 0 : 64};
      const T* const values = pairs + D;
      int64_t j = 0;
      for (; j + 64 <= D; j += 64) {
        add_columns<kHeads, 4>(weights, values + j, count, D, out.z + j, ahead);
      }
      if (j < D) {
        add_columns<kHeads, 2>(weights, values + j, count, D, out.z + j, ahead);
      }
    }
  }
}

template <typename T, int64_t kSize>
void attend_all(const float* q, int64_t heads, int64_t D, const Seen& seen, const Partial& out) {
  const auto part = [&](int64_t h) {
    return Partial{out.largest + h, out.sum + h, out.z + h * D};
  };
  int64_t h = 0;
  for (; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce) {
    attend_heads<T, kHeadsAtOnce, kSize>(q + h * D, D, seen, part(h));
  }
  for (; h < heads; ++h) {
    attend_heads<T, 1, kSize>(q + h * D, D, seen, part(h));
  }
}

template <typename T>
void attend(const float* q, int64_t heads, int64_t D, const Seen& seen, const Partial& out) {
  (D == kUsualSize ? attend_all<T, kUsualSize> : attend_all<T, 0>)(q, heads, D, seen, out);
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
