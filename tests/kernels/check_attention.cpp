// Attention of one token, and of tiles of 32.

#include <algorithm>
#include <type_traits>

#include "check.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}
float number(float x) {
  return x;
}
float number(Bf16 x) {
  return to_float(x);
}

template <typename T>
std::vector<T> drawn(Random& random, int64_t n, float scale) {
  std::vector<T> numbers(index(n));
  for (auto& x : numbers) {
    if constexpr (std::is_same_v<T, Bf16>) {
      x = to_bf16(random.normal() * scale);
    } else {
      x = random.normal() * scale;
    }
  }
  return numbers;
}

// The softmax of one query over some keys, in float64: what Partial holds.
struct Plain {
  double largest = -INFINITY, sum = 0;
  std::vector<double> z, size;  // sum of weighted values, and of their sizes
  double score_size = 0;        // the largest sum of |q k|

  template <typename Q, typename T>
  Plain(const Q* q, int64_t D, const T* keys, const T* values, const std::vector<int64_t>& seen)
      : z(index(D)), size(index(D)) {
    std::vector<double> scores;
    for (const auto i : seen) {
      double score = 0, sizes = 0;
      for (int64_t j = 0; j < D; ++j) {
        const double product = static_cast<double>(number(q[j])) * number(keys[i * D + j]);
        score += product;
        sizes += std::fabs(product);
      }
      scores.push_back(score);
      largest = std::max(largest, score);
      score_size = std::max(score_size, sizes);
    }
    for (size_t n = 0; n < seen.size(); ++n) {
      const double weight = std::exp(scores[n] - largest);
      sum += weight;
      for (int64_t j = 0; j < D; ++j) {
        z[index(j)] += weight * number(values[seen[n] * D + j]);
        size[index(j)] += weight * std::fabs(number(values[seen[n] * D + j]));
      }
    }
  }
};

struct Case {
  int64_t heads, D;
  Range slots[2];
  float spread;  // of the queries: how far scores lie apart
};

template <typename T>
std::vector<T> side_by_side(const std::vector<T>& keys, const std::vector<T>& values, int64_t D) {
  std::vector<T> pairs;
  for (size_t i = 0; i < keys.size(); i += index(D)) {
    for (const auto* from : {&keys, &values}) {
      pairs.insert(pairs.end(),
                   from->begin() + static_cast<int64_t>(i),
                   from->begin() + static_cast<int64_t>(i) + D);
    }
  }
  return pairs;
}

template <typename T, typename Kernel>
void compare_attend(Check& check, const Kernel& attend, const Case& c) {
  Random random(static_cast<uint64_t>(c.heads * 1000 + c.D));
  const int64_t slots = std::max(c.slots[0].end, c.slots[1].end);
  const auto keys = drawn<T>(random, slots * c.D, 1), values = drawn<T>(random, slots * c.D, 1);
  const auto pairs = side_by_side(keys, values, c.D);
  const auto q = random.normals(c.heads * c.D, c.spread / std::sqrt(static_cast<float>(c.D)));
  std::vector<float> largest(index(c.heads), NAN), sum(index(c.heads), NAN),
      z(index(c.heads * c.D), NAN);
  attend(q.data(),
         c.heads,
         c.D,
         {pairs.data(), {c.slots[0], c.slots[1]}},
         {largest.data(), sum.data(), z.data()});
  std::vector<int64_t> seen;
  for (const auto& run : c.slots) {
    for (int64_t i = run.begin; i < run.end; ++i) {
      seen.push_back(i);
    }
  }
  // Queries are rounded as keys are.
  std::vector<T> rounded;
  for (const float x : q) {
    if constexpr (sizeof(T) == 2) {
      rounded.push_back(to_bf16(x));
    } else {
      rounded.push_back(x);
    }
  }
  for (int64_t h = 0; h < c.heads; ++h) {
    const Plain want(rounded.data() + h * c.D, c.D, keys.data(), values.data(), seen);
    const double score_error = kSum * want.score_size;
    const double rounding = sizeof(T) == 2 ? 0x1p-8 : 0;  // of a weight
    // An error in a score is a relative one in its weight, and the kernel's own largest score is a
    // little off too.
    const double relative = 1e-6 + 2 * score_error + rounding;
    check.near(largest[index(h)], want.largest, score_error);
    check.near(sum[index(h)], want.sum, relative * want.sum);
    for (int64_t j = 0; j < c.D; ++j) {
      check.near(z[index(h * c.D + j)], want.z[index(j)], relative * want.size[index(j)]);
    }
  }
}

std::vector<Case> cases(bool small) {
  std::vector<Case> all = {
      {1, 32, {{0, 1}, {0, 0}}, 1},
      {4, 256, {{0, 64}, {64, 64}}, 1},
      {3, 96, {{2, 67}, {70, 133}}, 1},
      {5, 96, {{10, 11}, {3, 6}}, 3},
      {8, 64, {{0, 0}, {7, 200}}, 1},
      {4, 256, {{100, 300}, {0, 90}}, 10},
      {2, 128, {{5, 5}, {5, 5}}, 1},    // nothing is seen
      {4, 64, {{0, 130}, {0, 0}}, 80},  // weights down to e^-87 and below
  };
  if (!small) {
    all.push_back({4, 256, {{600, 2048}, {0, 511}}, 2});
  }
  return all;
}

// ---- tiles

struct TileCase {
  int64_t rows, D, keys;
  int32_t first, last,
      window;  // row r sees first + r .. last + r but at most `window` keys; both are clamped
};

// 16 keys at a time, the last ones fewer; values 32 at a time.
template <typename T, typename S>
void fill_panels(const KeyValuePanels<T, S>& how,
                 const std::vector<S>& keys,
                 const std::vector<S>& values,
                 int64_t D,
                 int64_t there,
                 int64_t count,
                 std::vector<T>& key_panels,
                 std::vector<T>& value_panels) {
  for (int64_t i = 0; i < count; i += 16) {
    how.key(keys.data() + i * D,
            D,
            std::clamp<int64_t>(there - i, 0, 16),
            D,
            key_panels.data() + i * D);
  }
  for (int64_t i = 0; i < count; i += 32) {
    how.values(values.data() + i * D,
               D,
               std::clamp<int64_t>(there - i, 0, 32),
               D,
               count,
               value_panels.data() + i * 16);
  }
}

template <typename T, typename S, typename Kernel>
void compare_tile(Check& check,
                  const FusedKernels& kernels,
                  const Kernel& attend,
                  const KeyValuePanels<T, S>& how,
                  const TileCase& c) {
  Random random(static_cast<uint64_t>(c.D + c.keys));
  const int64_t D = c.D, padded = (c.keys + 31) / 32 * 32;
  const auto keys = drawn<S>(random, padded * D, 1), values = drawn<S>(random, padded * D, 1);
  auto q = drawn<T>(random, 32 * D, 2 / std::sqrt(static_cast<float>(D)));
  std::fill(q.begin() + c.rows * D, q.end(), T{});
  std::vector<T> key_panels(index(padded * D), T{}), value_panels(index(padded * D), T{});
  fill_panels(how, keys, values, D, c.keys, padded, key_panels, value_panels);
  QueryTile<T> tile{q.data(), c.rows, D, key_panels.data(), value_panels.data(), padded, {}, {}};
  for (int32_t r = 0; r < 32; ++r) {
    tile.last[r] = std::min(c.last + r, static_cast<int32_t>(c.keys) - 1);
    tile.first[r] = std::max({c.first + r, tile.last[r] - c.window + 1, 0});
  }
  const int64_t stride = D + 16;
  std::vector<T> out(index(32 * stride), T{});
  kernels.gemm.begin();
  attend(tile, kernels.gemm, out.data(), stride);
  kernels.gemm.end();
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<int64_t> seen;
    for (int64_t i = tile.first[r]; i <= tile.last[r]; ++i) {
      seen.push_back(i);
    }
    // Keys and values as the panels hold them.
    std::vector<T> k(keys.size()), v(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      if constexpr (sizeof(T) == 2) {
        k[i] = to_bf16(number(keys[i]));
        v[i] = to_bf16(number(values[i]));
      } else {
        k[i] = number(keys[i]);
        v[i] = number(values[i]);
      }
    }
    const Plain want(q.data() + r * D, D, k.data(), v.data(), seen);
    // In bfloat16 weights are rounded, and so is what comes out: 2^-8 each.
    const double relative = (sizeof(T) == 2 ? 0x1p-7 : 1e-6) + 4 * kSum * want.score_size;
    for (int64_t j = 0; j < D; ++j) {
      check.near(number(out[index(r * stride + j)]),
                 want.z[index(j)] / want.sum,
                 relative * want.size[index(j)] / want.sum);
    }
  }
  for (int64_t i = 0; i < 32 * stride; ++i) {
    if (i % stride >= D || i / stride >= c.rows) {
      check.same(out[index(i)], T{});
    }
  }
}

// Every number of a panel in its place, and zeros where there is no row; not a byte is read past
// the last one.
template <typename T, typename S>
void compare_panels(Check& check, const KeyValuePanels<T, S>& how, int64_t D, int64_t count) {
  Random random(static_cast<uint64_t>(D + count));
  const int64_t stride = D + 6, last = (count - 1) * stride + D;
  const auto rows = drawn<S>(random, last, 1);
  const auto at = [&](int64_t row, int64_t j) -> T {
    const float x = row < count ? number(rows[index(row * stride + j)]) : 0.0F;
    if constexpr (sizeof(T) == 2) {
      return to_bf16(x);
    } else {
      return x;
    }
  };
  // Where column `lane` of row k lies in a panel of 16 columns.
  const auto place = [](int64_t k, int64_t lane) {
    return index(sizeof(T) == 2 ? k / 2 * 32 + lane * 2 + k % 2 : k * 16 + lane);
  };
  if (count <= 16) {
    std::vector<T> panel(index(16 * D));
    how.key(rows.data(), stride, count, D, panel.data());
    for (int64_t i = 0; i < 16 * D; ++i) {
      check.same(panel[place(i % D, i / D)], at(i / D, i % D));
    }
  }
  const int64_t keys = 96;  // of which these 32 are the second
  std::vector<T> panels(index(keys * D));
  how.values(rows.data(), stride, count, D, keys, panels.data() + 32 * 16);
  for (int64_t i = 0; i < keys * D; ++i) {
    const int64_t row = i / D, j = i % D;
    const bool here = row >= 32 && row < 64;
    check.same(panels[index(j / 16 * 16 * keys) + place(row, j % 16)],
               here ? at(row - 32, j) : T{});
  }
}

template <typename T, typename S>
void check_key_value_panels(const Subject& s,
                            const std::string& what,
                            const KeyValuePanels<T, S>& how) {
  s.report.check(s.name("panels of keys and values, " + what + ", bit for bit"), [&](Check& check) {
    for (const int64_t D : {32, 64, 256}) {
      for (const int64_t count : {1, 2, 5, 15, 16, 17, 31, 32}) {
        compare_panels(check, how, D, count);
      }
    }
  });
}

std::vector<TileCase> tile_cases(bool small) {
  std::vector<TileCase> all = {
      {32, 64, 32, 0, 0, 1000},       // causal from the start
      {1, 32, 1, 0, 0, 1000},         // one query, one key
      {32, 256, 300, 0, 268, 1000},   // causal, keys behind
      {20, 128, 333, 0, 300, 64},     // a window, across the edges of tiles
      {32, 96, 512, 0, 400, 1},       // each its own key
      {7, 512, 160, 100, 150, 1000},  // the widest head
      {32, 64, 420, 5, 5, 3},
  };
  if (!small) {
    all.push_back({32, 256, 2048, 0, 2016, 1000000});
    all.push_back({32, 256, 2048, 0, 2016, 512});
  }
  return all;
}

template <typename T, typename S, typename Kernel>
void check_tile(const Subject& s,
                const std::string& what,
                const Kernel& attend,
                const KeyValuePanels<T, S>& how) {
  s.report.check(s.name("attend_tile " + what), [&](Check& check) {
    for (const auto& c : tile_cases(s.small)) {
      compare_tile(check, s.kernels, attend, how, c);
    }
  });
}

}  // namespace

void check_attention(const Subject& s) {
  s.report.check(s.name("attend_f32"), [&](Check& check) {
    for (const auto& c : cases(s.small)) {
      compare_attend<float>(check, s.kernels.attend_f32, c);
      compare_attend<float>(check, s.generic.attend_f32, c);
    }
  });
  s.report.check(s.name("attend_bf16"), [&](Check& check) {
    for (const auto& c : cases(s.small)) {
      compare_attend<Bf16>(check, s.kernels.attend_bf16, c);
    }
  });
}

void check_tiles(const Subject& s) {
  const auto& k = s.kernels;
  check_key_value_panels(s, "bf16 of bf16", k.panels_bf16_bf16);
  check_key_value_panels(s, "bf16 of f32", k.panels_bf16_f32);
  check_key_value_panels(s, "f32 of bf16", k.panels_f32_bf16);
  check_key_value_panels(s, "f32 of f32", k.panels_f32_f32);
  check_tile(s, "bf16, cache bf16", k.attend_tile_bf16, k.panels_bf16_bf16);
  check_tile(s, "bf16, cache f32", k.attend_tile_bf16, k.panels_bf16_f32);
  check_tile(s, "f32, cache bf16", k.attend_tile_f32, k.panels_f32_bf16);
  check_tile(s, "f32, cache f32", k.attend_tile_f32, k.panels_f32_f32);
}

}  // namespace gemma_torch::kernels::test
