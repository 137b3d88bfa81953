// The output head: exact rows, the scan over all rows, and its encoder.

#include "gemma_torch/kernels/cpu/head_scan.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// The one order of summation of the full head: four sums, added in pairs.
GEMMA_TORCH_INLINE float dot_row(const Bf16* w, const float* x, int64_t columns) {
  F acc[4] = {};
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64) {
    for (int i = 0; i < 4; ++i) {
      acc[i] = fma(load(w + j + 16 * i), load(x + j + 16 * i), acc[i]);
    }
  }
  for (; j < columns; j += 16) {
    acc[0] = fma(load(w + j), load(x + j), acc[0]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void dot_rows(const Bf16* table, const int32_t* ids, int64_t first, int64_t count, const float* x,
              int64_t columns, float* y) {
  constexpr int64_t kRowsAhead = 2;  // rows in any order: the next ones are asked for by hand
  const auto ahead = [&](int64_t i) {
    const auto* p = reinterpret_cast<const char*>(table + ids[i] * columns);
    for (int64_t b = 0; b < columns * 2; b += 64) {
      __builtin_prefetch(p + b);
    }
  };
  for (int64_t i = 0; ids != nullptr && i < count && i < kRowsAhead; ++i) {
    ahead(i);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (ids != nullptr && i + kRowsAhead < count) {
      ahead(i + kRowsAhead);
    } else if (ids == nullptr) {
      for (int64_t b = 0; b < columns * 2; b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(table + (first + i + 2) * columns) + b);
      }
    }
    y[i] = dot_row(table + (ids != nullptr ? ids[i] : first + i) * columns, x, columns);
  }
}

GEMMA_TORCH_INLINE void scan_block(const uint8_t* p, int64_t groups, const ScanInput& in, PartF (&bound)[kParts]) {
  PartF outliers[kParts][1], rest[kParts] = {};
  prefetch_stream(p, 512);
  const auto code = [&](int part, int step) { return codes_at<Format::kInt8>(p + part * kWidth, step); };
  dot_codes<largest_of(Format::kInt8), code_zero(Format::kInt8), 1>(code, &in.x, 0, outliers);
  p += 512;
  for (int64_t g = 1; g <= groups; ++g, p += 272) {
    prefetch_stream(p, 272);
    PartF sums[kParts][1];
    const auto level = [&](int part, int step) { return codes_at<Format::kLevels4>(p + part * kWidth, step); };
    dot_codes<largest_of(Format::kLevels4), code_zero(Format::kLevels4), 1>(level, &in.x, 32 * g, sums);
    for (int part = 0; part < kParts; ++part) {
      const PartF scale = to_floats(widen8_part(p + 256 + part * kPartLanes)) * in.x.scales[g];
      rest[part] = fma(sums[part][0], scale, rest[part]);
    }
  }
  for (int part = 0; part < kParts; ++part) {
    const auto* footer = reinterpret_cast<const Bf16*>(p) + part * kPartLanes;
    const PartF scale = load_part(footer) * in.x.scales[0];
    const PartF value = fma(outliers[part][0], scale, rest[part] * load_part(footer + 16));
    bound[part] = fma(load_part(footer + 32), splat_part(in.outlier_norm),
                      fma(load_part(footer + 48), splat_part(in.rest_norm), value + in.slack));
  }
}

void scan(const HeadScan& head, Range blocks, const ScanInput& in, float* upper, float* block_upper) {
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    PartF bound[kParts];
    scan_block(head.blocks + b * head.stride(), head.groups(), in, bound);
    std::memcpy(upper + b * kBlockRows, bound, sizeof bound);
    block_upper[b] = largest(load(upper + b * kBlockRows));
  }
}

int64_t reach(const float* block_upper, Range blocks, float threshold, int32_t* found) {
  int64_t count = 0;
  int64_t b = blocks.begin;
  for (; b + 16 <= blocks.end; b += 16) {
    if (largest(load(block_upper + b)) >= threshold) {
      for (int64_t i = b; i < b + 16; ++i) {
        found[count] = static_cast<int32_t>(i);
        count += block_upper[i] >= threshold ? 1 : 0;
      }
    }
  }
  for (; b < blocks.end; ++b) {
    found[count] = static_cast<int32_t>(b);
    count += block_upper[b] >= threshold ? 1 : 0;
  }
  return count;
}

// ---- encoding

GEMMA_TORCH_INLINE uint16_t bf16_up(float x) {  // the next bfloat16 at or above a number of at least 0
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0xffffU) >> 16);
}

struct Levelled {
  U index[2];
  float error;  // sum of squares
};

// The nearest levels of 32 numbers, in units of `unit`.
GEMMA_TORCH_INLINE Levelled nearest_levels(F a, F b, float unit) {
  const float inverse = unit > 0 ? 1.0F / unit : 0.0F;
  Levelled out{};
  F squares = {};
  for (int half = 0; half < 2; ++half) {
    const F x = half == 0 ? a : b;
    const F y = x * inverse;
    I index = {};
    F level = splat(static_cast<float>(kLevels[0]) - 127.0F);
    for (int i = 1; i < 16; ++i) {
      const float lower = static_cast<float>(kLevels[i - 1]) - 127.0F;
      const float upper = static_cast<float>(kLevels[i]) - 127.0F;
      const I above = y > splat((lower + upper) / 2);
      index -= above;
      level = select(above, splat(upper), level);
    }
    const F error = x - level * unit;
    squares = fma(error, error, squares);
    out.index[half] = as_bits(index);
  }
  out.error = sum(squares);
  return out;
}

struct RowCodes {
  uint8_t outliers[kScanOutliers];
  uint8_t* indices;  // (columns - 32)
  uint8_t* scales;   // (groups)
  uint16_t footer[4];
  float norm;  // of the decoded row
};

void encode_outliers(const float* x, RowCodes& out, double& error, double& norm) {
  const F a = load(x), b = load(x + 16);
  const float most = largest(max(absolute(a), absolute(b)));
  out.footer[0] = bf16_up(most / 127.0F);
  const float scale = widen(Bf16{out.footer[0]});
  for (int64_t j = 0; j < kScanOutliers; ++j) {
    const float code = scale > 0 ? std::nearbyint(x[j] / scale) : 0.0F;
    const double value = static_cast<double>(code) * scale;
    out.outliers[j] = static_cast<uint8_t>(code + 128.0F);
    error += (x[j] - value) * (x[j] - value);
    norm += value * value;
  }
}

void encode_rest(const float* x, int64_t groups, RowCodes& out, double& error, double& norm) {
  float most = 0;
  for (int64_t j = 0; j < 32 * groups; j += 16) {
    most = std::fmax(most, largest(absolute(load(x + j))));
  }
  // The largest scale is 255 units; a level spans 127.
  out.footer[1] = bf16_up(most / (127.0F * 255.0F));
  const float unit = widen(Bf16{out.footer[1]});
  for (int64_t g = 0; g < groups; ++g, x += 32) {
    const F a = load(x), b = load(x + 16);
    const float reach_all = largest(max(absolute(a), absolute(b)));
    Levelled best{};
    best.error = INFINITY;
    // A scale that cuts the largest number off is often the better one.
    for (const float part : {1.0F, 0.92F, 0.85F}) {
      const float scale = unit > 0 ? std::fmin(std::ceil(reach_all * part / (127.0F * unit)), 255.0F) : 0.0F;
      const auto found = nearest_levels(a, b, scale * unit);
      if (found.error < best.error) {
        best = found;
        out.scales[g] = static_cast<uint8_t>(scale);
      }
    }
    const float scale = static_cast<float>(out.scales[g]) * unit;
    uint32_t index[32];
    store_as(index, best.index[0]);
    store_as(index + 16, best.index[1]);
    for (int64_t j = 0; j < 32; ++j) {
      const double value = (static_cast<double>(kLevels[index[j]]) - 127.0) * scale;
      out.indices[32 * g + j] = static_cast<uint8_t>(index[j]);
      error += (x[j] - value) * (x[j] - value);
      norm += value * value;
    }
  }
}

// Lays 16 rows' codes out as a block.
void write_block(const RowCodes (&rows)[16], int64_t groups, uint8_t* block) {
  for (int64_t lane = 0; lane < 64; ++lane) {
    for (int64_t step = 0; step < 8; ++step) {
      block[64 * step + lane] = rows[lane / 4].outliers[4 * step + lane % 4];
    }
  }
  block += 512;
  for (int64_t g = 0; g < groups; ++g, block += 272) {
    for (int64_t lane = 0; lane < 64; ++lane) {
      const uint8_t* index = rows[lane / 4].indices + 32 * g + lane % 4;
      for (int64_t two = 0; two < 4; ++two) {
        block[64 * two + lane] = static_cast<uint8_t>(index[8 * two] | index[8 * two + 4] << 4);
      }
    }
    for (int64_t r = 0; r < 16; ++r) {
      block[256 + r] = rows[r].scales[g];
    }
  }
  for (int64_t part = 0; part < 4; ++part) {
    for (int64_t r = 0; r < 16; ++r) {
      std::memcpy(block + 32 * part + 2 * r, &rows[r].footer[part], 2);
    }
  }
}

float encode_scan(const Bf16* const* rows, const int32_t* order, int64_t columns, uint8_t* block, float* scratch) {
  const int64_t groups = columns / 32 - 1;
  RowCodes codes[16];
  auto* bytes = reinterpret_cast<uint8_t*>(scratch + columns);
  double largest_norm = 0;
  for (int64_t r = 0; r < 16; ++r, bytes += columns) {
    codes[r].indices = bytes;
    codes[r].scales = bytes + columns - 32;
    double norm_whole = 0, norm = 0, error_outliers = 0, error_rest = 0;
    for (int64_t j = 0; j < columns; ++j) {
      scratch[j] = rows[r] != nullptr ? widen(rows[r][order[j]]) : 0.0F;
      norm_whole += static_cast<double>(scratch[j]) * scratch[j];
    }
    encode_outliers(scratch, codes[r], error_outliers, norm);
    encode_rest(scratch + kScanOutliers, groups, codes[r], error_rest, norm);
    constexpr double kUp = 1 + 1e-6;
    codes[r].footer[2] = bf16_up(static_cast<float>(std::sqrt(error_outliers) * kUp));
    codes[r].footer[3] = bf16_up(static_cast<float>(std::sqrt(error_rest) * kUp));
    largest_norm = std::fmax(largest_norm, std::sqrt(std::fmax(norm, norm_whole)) * kUp);
  }
  write_block(codes, groups, block);
  return static_cast<float>(largest_norm * (1 + 1e-6));
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
