// Attention of the queries of one token to a part of the keys.

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

constexpr int64_t kTile = 32;      // keys whose scores are held at a time
constexpr int kHeadsAtOnce = 4;    // queries that share the loads of a key

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

// Keys and values are read by turns, in pieces too short for the hardware to look far ahead, so they are asked for by
// hand: evenly, a few lines with as many products as hide them. Many at once fill the queue, and all loads wait.
template <typename T>
GEMMA_TORCH_INLINE void prefetch_numbers(const T* numbers, int64_t count) {
  const auto* p = reinterpret_cast<const char*>(numbers);
  for (int64_t b = 0; b < count * static_cast<int64_t>(sizeof(T)); b += 64) {
    prefetch_later(p + b);
  }
}

// scores[h][i] = q[h] . keys[i]. Meanwhile asks for their values, and in the first tile, which nobody has asked for, for
// later keys.
template <typename T, int kHeads>
void tile_scores(const float* q, int64_t D, const T* keys, const T* values, int64_t count, bool first,
                 float (*scores)[kTile]) {
  constexpr int64_t kKeysAhead = 8;
  if (first) {
    prefetch_numbers(keys, (count < kKeysAhead ? count : kKeysAhead) * D);
  }
  int64_t i = 0;
#if defined(__AVX512F__)
  // Four keys at a time share the loads of four queries, and their sixteen sums are folded together.
  for (; kHeads == 4 && i + 4 <= count; i += 4) {
    const bool later_keys = first && i + kKeysAhead + 4 <= count;
    PartF acc[16] = {};
    for (int64_t j = 0; j < D; j += 16) {
      prefetch_numbers(values + i * D + 4 * j, 64);
      if (later_keys) {
        prefetch_numbers(keys + (i + kKeysAhead) * D + 4 * j, 64);
      }
      PartF k[4];
      unrolled<4>([&](auto n) __attribute__((always_inline)) { k[n] = load(keys + (i + n) * D + j); });
      unrolled<4>([&](auto h) __attribute__((always_inline)) {
        const PartF qh = load(q + h * D + j);
        unrolled<4>([&](auto n) __attribute__((always_inline)) { acc[4 * n + h] = fma(k[n], qh, acc[4 * n + h]); });
      });
    }
    const PartF all = sums_by_four(acc);
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(scores[h] + i, reinterpret_cast<const float*>(&all) + 4 * h, 4 * sizeof(float));
    }
  }
#endif
  for (; i < count; ++i) {
    const T* key = keys + i * D;
    prefetch_numbers(values + i * D, D);
    if (first && i + kKeysAhead < count) {
      prefetch_numbers(key + kKeysAhead * D, D);
    }
    F acc[kHeads] = {};
    for (int64_t j = 0; j < D; j += 16) {
      const F k = load(key + j);
      for (int h = 0; h < kHeads; ++h) {
        acc[h] = fma(k, load(q + h * D + j), acc[h]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      scores[h][i] = sum(acc[h]);
    }
  }
}

// z[h] += sum over i of weights[h][i] values[i]. Meanwhile asks for the `ahead` keys of the next tile.
template <typename T, int kHeads>
void tile_values(const float (*weights)[kTile], const T* values, int64_t count, int64_t D, const T* next_keys,
                 int64_t ahead, float* z) {
  constexpr int64_t kWide = 64;
  int64_t j = 0;
  for (; j + kWide <= D; j += kWide) {
    F acc[kHeads][4];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < 4; ++v) {
        acc[h][v] = load(z + h * D + j + 16 * v);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i < ahead) {
        prefetch_numbers(next_keys + i * D + j, kWide);
      }
      const T* value = values + i * D + j;
      const F v0 = load(value), v1 = load(value + 16), v2 = load(value + 32), v3 = load(value + 48);
      for (int h = 0; h < kHeads; ++h) {
        const F w = splat(weights[h][i]);
        acc[h][0] = fma(v0, w, acc[h][0]);
        acc[h][1] = fma(v1, w, acc[h][1]);
        acc[h][2] = fma(v2, w, acc[h][2]);
        acc[h][3] = fma(v3, w, acc[h][3]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < 4; ++v) {
        store(z + h * D + j + 16 * v, acc[h][v]);
      }
    }
  }
  for (; j < D; j += 16) {
    for (int h = 0; h < kHeads; ++h) {
      F acc = load(z + h * D + j);
      for (int64_t i = 0; i < count; ++i) {
        acc = fma(load(values + i * D + j), splat(weights[h][i]), acc);
      }
      store(z + h * D + j, acc);
    }
  }
}

// Turns scores to weights e^(score - largest); z and sum so far are scaled to a new largest.
void soften(float* scores, int64_t count, int64_t D, float& most, float& total, float* z) {
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
    const F weight = select(score > splat(-INFINITY), exp(score - now), F{});
    store(scores + i, weight);
    sums += weight;
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
  alignas(64) float scores[kHeads][kTile];
  for (const auto& run : seen.slots) {
    for (int64_t i = run.begin; i < run.end; i += kTile) {
      const int64_t count = run.end - i < kTile ? run.end - i : kTile;
      const T* keys = static_cast<const T*>(seen.keys) + i * D;
      const T* values = static_cast<const T*>(seen.values) + i * D;
      tile_scores<T, kHeads>(q, D, keys, values, count, i == run.begin, scores);
      for (int h = 0; h < kHeads; ++h) {
        soften(scores[h], count, D, out.largest[h], out.sum[h], out.z + h * D);
      }
      const int64_t left = run.end - i - count;
      tile_values<T, kHeads>(scores, values, count, D, keys + count * D, left < kTile ? left : kTile, out.z);
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
