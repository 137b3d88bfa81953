// The encoder of the output head's scan (head_scan.h).
//
// The stored norms have to be upper bounds, whatever codes were chosen. They are sums of squares in float32, of at most
// `columns` terms, none of them negative. A decoded number is exact in float32: a level, the scale of its group and the
// unit of the row have 7, 8 and 8 bits, an outlier's code and scale 7 and 8. So a term has three roundings at most (the
// error, its square) and a sum of n terms, in any order, n - 1 more: it is at least (1 - (n + 3) 2^-24) times the true
// one. A square that underflows is off by less than 2^-126.

#include "gemma_torch/kernels/cpu/head_scan.h"
#include "gemma_torch/kernels/cpu/lane_math.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// The next bfloat16 at or above a number of at least 0.
GEMMA_TORCH_INLINE uint16_t bf16_up(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0xffffU) >> 16);
}

// The square root of such a sum of squares, rounded up. A part that is all zeros (`most` is its largest) has none.
GEMMA_TORCH_INLINE float root_up(float squares, int64_t columns, float most) {
  const double n = static_cast<double>(columns);
  const double bound = squares * (1 + (n + 16) * 0x1p-23) + n * 0x1p-125;
  return most == 0 ? 0.0F : static_cast<float>(std::sqrt(bound) * (1 + 1e-6));
}

// The next whole number at or above x, of 0 to 255. (std::fmin and std::ceil would be calls.)
GEMMA_TORCH_INLINE float whole_up(float x) {
  const float clamped = x < 255.0F ? x : 255.0F;  // also if x is not a number
  const auto whole = static_cast<float>(static_cast<int32_t>(clamped));
  return whole < clamped ? whole + 1.0F : whole;
}

// table[index], of sixteen.
GEMMA_TORCH_INLINE F pick(const F& table, const U& index) {
#if defined(__AVX512F__)
  return std::bit_cast<F>(
      _mm512_permutexvar_ps(std::bit_cast<__m512i>(index), std::bit_cast<__m512>(table)));
#elif defined(__AVX2__)
  const auto eight = [&](const PartU& some) {
    const auto i = std::bit_cast<__m256i>(some);
    const __m256 lo = _mm256_permutevar8x32_ps(std::bit_cast<__m256>(table.lo), i);
    const __m256 hi = _mm256_permutevar8x32_ps(std::bit_cast<__m256>(table.hi), i);
    return std::bit_cast<PartF>(_mm256_blendv_ps(lo, hi, std::bit_cast<__m256>(some << 28)));
  };
  return {eight(index.lo), eight(index.hi)};
#elif defined(__aarch64__)
  const uint8x16x4_t bytes = {std::bit_cast<uint8x16_t>(table.lo.lo), std::bit_cast<uint8x16_t>(table.lo.hi),
                              std::bit_cast<uint8x16_t>(table.hi.lo), std::bit_cast<uint8x16_t>(table.hi.hi)};
  const auto four = [&](const PartU& some) {
    return std::bit_cast<PartF>(vqtbl4q_u8(bytes, std::bit_cast<uint8x16_t>(some * 0x04040404U + 0x03020100U)));
  };
  return {{four(index.lo.lo), four(index.lo.hi)}, {four(index.hi.lo), four(index.hi.hi)}};
#else
  float from[16], to[16];
  uint32_t i[16];
  store(from, table);
  store_as(i, index);
  for (int lane = 0; lane < 16; ++lane) {
    to[lane] = from[i[lane]];
  }
  return load(to);
#endif
}

struct Levels {
  F level;  // kLevels, less 127
  F bar;    // halfway from the level before; the first is not used

  Levels() {
    float levels[16], bars[16] = {};
    for (int i = 0; i < 16; ++i) {
      levels[i] = static_cast<float>(kLevels[i]) - 127.0F;
      bars[i] = i == 0 ? levels[0] : (levels[i - 1] + levels[i]) / 2;
    }
    level = load(levels);
    bar = load(bars);
  }

  // The index of the level nearest to y, one bit after the other.
  GEMMA_TORCH_INLINE U nearest(const F& y) const {
    U index = as_bits(y > splat(static_cast<float>(kLevels[7] + kLevels[8]) / 2 - 127.0F)) & 8U;
    for (const uint32_t bit : {4U, 2U, 1U}) {
      index = index | (as_bits(y > pick(bar, index + bit)) & bit);
    }
    return index;
  }
};

struct Levelled {
  U index[2];
  F errors, squares;  // of the errors; of the decoded numbers
};

// The nearest levels of 32 numbers, times `scale`.
GEMMA_TORCH_INLINE Levelled nearest_levels(const Levels& levels, const F (&x)[2], float scale) {
  const float inverse = scale > 0 ? 1.0F / scale : 0.0F;
  Levelled out{};
  unrolled<2>([&](auto half) {
    out.index[half] = levels.nearest(x[half] * inverse);
    const F value = pick(levels.level, out.index[half]) * scale;
    const F error = x[half] - value;
    out.errors = fma(error, error, out.errors);
    out.squares = fma(value, value, out.squares);
  });
  return out;
}

struct RowCodes {
  uint8_t outliers[kScanOutliers];
  uint8_t* indices;  // (columns - 32)
  uint8_t* scales;   // (groups)
  uint16_t footer[5];
};

// The next bfloat16 at or below a number.
GEMMA_TORCH_INLINE uint16_t bf16_down(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((x < 0 ? bits + 0xffffU : bits) >> 16);
}

// Two bits of each lane, the first lane's lowest.
GEMMA_TORCH_INLINE uint32_t two_bit_word(const U& codes) {
  uint32_t lanes[16], word = 0;
  store_as(lanes, codes);
  for (int lane = 0; lane < 16; ++lane) {
    word |= lanes[lane] << (2 * lane);
  }
  return word;
}

// Each gives the squares of the decoded numbers.

GEMMA_TORCH_INLINE F encode_outliers(const float* x, int64_t columns, RowCodes& out) {
  const F v[2] = {load(x), load(x + 16)};
  const float most = largest(max(absolute(v[0]), absolute(v[1])));
  out.footer[0] = bf16_up(most / 127.0F);
  const float scale = widen(Bf16{out.footer[0]});
  const float inverse = scale > 0 ? 1.0F / scale : 0.0F;
  F errors = {}, squares = {};
  unrolled<2>([&](auto half) {
    const I code = nearest_whole(min(max(v[half] * inverse, splat(-127.0F)), splat(127.0F)));
    const F value = to_floats(code) * scale;
    const F error = v[half] - value;
    errors = fma(error, error, errors);
    squares = fma(value, value, squares);
    store_narrow(out.outliers + 16 * half, as_bits(code) + 128U);
  });
  out.footer[2] = bf16_up(root_up(sum(errors), columns, most));
  return squares;
}

// x becomes what the levels miss.
GEMMA_TORCH_INLINE F encode_rest(const Levels& levels, float* x, const HeadScan& shape, RowCodes& out) {
  const int64_t groups = shape.groups(), major_groups = shape.major_groups();
  F sizes = {};
  for (int64_t j = 0; j < 32 * groups; j += 16) {
    sizes = max(sizes, absolute(load(x + j)));
  }
  const float most = largest(sizes);
  // The largest scale is 255 units; a level spans 127.
  out.footer[1] = bf16_up(most / (127.0F * 255.0F));
  const float unit = widen(Bf16{out.footer[1]});
  const float inverse = unit > 0 ? 1.0F / (127.0F * unit) : 0.0F;
  F errors[2] = {}, squares = {};
  for (int64_t g = 0; g < groups; ++g, x += 32) {
    const F v[2] = {load(x), load(x + 16)};
    const float units = largest(max(absolute(v[0]), absolute(v[1]))) * inverse;
    // A scale that cuts the largest number off is often the better one. All are tried: a branch would be guessed wrong.
    constexpr float kShares[] = {1.0F, 0.92F, 0.85F};
    float scale[3], error[3];
    Levelled tried[3];
    for (int i = 0; i < 3; ++i) {
      scale[i] = whole_up(units * kShares[i]);
      tried[i] = nearest_levels(levels, v, scale[i] * unit);
      error[i] = sum(tried[i].errors);
    }
    const int two = error[1] < error[0] ? 1 : 0;
    const int i = error[2] < error[two] ? 2 : two;
    const Levelled& best = tried[i];
    errors[g < major_groups ? 0 : 1] += best.errors;
    squares += best.squares;
    out.scales[g] = static_cast<uint8_t>(scale[i]);
    store_narrow(out.indices + 32 * g, best.index[0]);
    store_narrow(out.indices + 32 * g + 16, best.index[1]);
    for (int half = 0; half < 2; ++half) {
      store(x + 16 * half, v[half] - pick(levels.level, best.index[half]) * (scale[i] * unit));
    }
  }
  for (int part = 0; part < 2; ++part) {
    out.footer[3 + part] = bf16_up(root_up(sum(errors[part]), shape.columns, most));
  }
  return squares;
}

// What a row's codes have missed so far.
struct Missed {
  float* x;            // (columns - kScanOutliers)
  float norms[2];      // of its parts a and b, or more
  float roundings[2];  // of x: how far off they may have made the norms
};

// rho or sigma: that at two bits a number, with a step of `spread` times the root mean square. `missed` becomes what is
// missed then.
GEMMA_TORCH_INLINE void encode_residual(const HeadScan& shape, float spread, Missed& missed, uint8_t* major_out,
                                        uint8_t* minor_out) {
  float* const x = missed.x;
  const int64_t n = shape.columns - kScanOutliers, major = shape.major_columns();
  F squares = {};
  for (int64_t j = 0; j < n; j += 16) {
    squares = fma(load(x + j), load(x + j), squares);
  }
  uint16_t head[4] = {bf16_up(spread * std::sqrt(sum(squares) / static_cast<float>(n)))};
  const float step = widen(Bf16{head[0]});
  const float inverse = step > 0 ? 1.0F / step : 0.0F;
  F errors[2] = {};
  for (int64_t j = 0; j < n; j += 16) {
    const I code = nearest_whole(min(max(load(x + j) * inverse + 1.5F, F{}), splat(3.0F)));
    const F error = load(x + j) - (to_floats(code) - splat(1.5F)) * step;
    F& own = errors[j < major ? 0 : 1];
    own = fma(error, error, own);
    store(x + j, error);
    const uint32_t word = two_bit_word(as_bits(code));
    std::memcpy(j < major ? major_out + shape.residual_byte(j) : minor_out + (j - major) / 4, &word, sizeof word);
  }
  for (int part = 0; part < 2; ++part) {
    // x itself was rounded, by 2^-24 of what it stands for, whose norm is at most that. A part of which nothing was
    // missed is farther away now, since no bits stand for zero.
    float& norm = missed.norms[part];
    missed.roundings[part] += norm * 0x1p-22F;
    const float left = root_up(sum(errors[part]), shape.columns, /*most=*/1.0F) + missed.roundings[part];
    head[1 + part] = bf16_down(norm - left - (norm + left) * 0x1p-22F);
    norm -= widen(Bf16{head[1 + part]});  // as whoever reads it will have it
  }
  std::memcpy(major_out, head, sizeof head);
}

// Lays 16 rows' codes out as a block.
void write_block(const RowCodes (&rows)[16], int64_t groups, uint8_t* block) {
  for (int64_t r = 0; r < 16; ++r) {
    for (int64_t step = 0; step < 8; ++step) {
      std::memcpy(block + 64 * step + 4 * r, rows[r].outliers + 4 * step, 4);
    }
    uint8_t* group = block + 512;
    for (int64_t g = 0; g < groups; ++g, group += 272) {
      for (int64_t two = 0; two < 4; ++two) {  // four columns in the lower halves, the next four in the upper ones
        const uint8_t* index = rows[r].indices + 32 * g + 8 * two;
        const int32_t pairs = four_bytes(index) | four_bytes(index + 4) << 4;
        std::memcpy(group + 64 * two + 4 * r, &pairs, sizeof pairs);
      }
      group[256 + r] = rows[r].scales[g];
    }
    for (int64_t part = 0; part < 5; ++part) {
      std::memcpy(group + 32 * part + 2 * r, &rows[r].footer[part], 2);
    }
  }
}

float encode_scan(const Bf16* const* rows, const int32_t* order, int64_t columns, uint8_t* block,
                  uint8_t* major_residuals, uint8_t* other_residuals, float* scratch) {
  HeadScan shape;
  shape.columns = columns;
  const Levels levels;
  RowCodes codes[16];
  auto* bytes = reinterpret_cast<uint8_t*>(scratch + columns);
  float largest_norm = 0;
  for (int64_t r = 0; r < 16; ++r, bytes += columns) {
    codes[r].indices = bytes;
    codes[r].scales = bytes + columns - 32;
    for (int64_t j = 0; j < columns; ++j) {
      scratch[j] = rows[r] != nullptr ? widen(rows[r][order[j]]) : 0.0F;
    }
    F whole = {};
    for (int64_t j = 0; j < columns; j += 16) {
      const F x = load(scratch + j);
      whole = fma(x, x, whole);
    }
    const F outliers = encode_outliers(scratch, columns, codes[r]);
    const F rest = encode_rest(levels, scratch + kScanOutliers, shape, codes[r]);
    // What the levels miss is spread about evenly, with tails. Steps that would serve rho best (0.95) cut more of the
    // tails off than sigma can bring back.
    Missed missed{scratch + kScanOutliers, {widen(Bf16{codes[r].footer[3]}), widen(Bf16{codes[r].footer[4]})}, {}};
    uint8_t* const rho_b = other_residuals + r * shape.other_stride();
    uint8_t* const sigma = rho_b + shape.minor_bytes();
    encode_residual(shape, 1.2F, missed, major_residuals + r * shape.major_bytes(), rho_b);
    encode_residual(shape, 0.9F, missed, sigma, sigma + shape.major_bytes());
    const float squares = max(sum(outliers + rest), sum(whole));
    largest_norm = max(largest_norm, root_up(squares, columns, /*most=*/1.0F));
  }
  write_block(codes, columns / 32 - 1, block);
  return largest_norm;
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
