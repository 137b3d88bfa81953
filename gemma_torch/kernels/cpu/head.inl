// The output head: exact rows, and the scan over all rows.

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
  constexpr int64_t kRowsAhead = 4;  // rows in any order: the next ones are asked for by hand
  const auto ahead = [&](int64_t i) {
    const auto* p = reinterpret_cast<const char*>(table + ids[i] * columns);
    for (int64_t b = 0; b < columns * 2; b += 64) {
      prefetch_later(p + b);
    }
  };
  for (int64_t i = 0; ids != nullptr && i < count && i < kRowsAhead; ++i) {
    ahead(i);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (ids != nullptr && i + kRowsAhead < count) {
      ahead(i + kRowsAhead);
    } else if (ids == nullptr) {
      prefetch_stream(reinterpret_cast<const uint8_t*>(table + (first + i) * columns), columns * 2);
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

// Two bits for each lane, the first lane's lowest.
GEMMA_TORCH_INLINE F two_bits(uint32_t word) {
  static constexpr uint32_t kShifts[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return to_floats(build<I>([&](int lane) {
    return std::bit_cast<PartI>(((PartU{} + word) >> load_as<PartU>(kShifts + lane)) & 3U);
  }));
}

void refine(const HeadScan& head, const int32_t* ids, int64_t count, const ScanInput& in, float* upper) {
  constexpr int64_t kRowsAhead = 12;
  const int64_t stride = head.residual_stride(), words = 2 * head.groups();
  const auto ahead = [&](int64_t i) {
    for (int64_t b = 0; i < count && b < stride; b += 64) {
      prefetch_later(head.residuals + ids[i] * stride + b);
    }
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) {
    ahead(i);
  }
  for (int64_t i = 0; i < count; ++i) {
    ahead(i + kRowsAhead);
    const uint8_t* p = head.residuals + ids[i] * stride;
    F sums[2] = {};
    for (int64_t w = 0; w < words; w += 2) {
      for (int64_t n = 0; n < 2; ++n) {
        const auto word = static_cast<uint32_t>(four_bytes(p + 4 + 4 * (w + n)));
        sums[n] = fma(two_bits(word), load(in.rest + 16 * (w + n)), sums[n]);
      }
    }
    Bf16 parts[2];
    std::memcpy(parts, p, sizeof parts);
    const float step = widen(parts[0]), nearer = widen(parts[1]) * in.rest_norm;
    const float value = step * (sum(sums[0] + sums[1]) - in.middle);
    // A few roundings of numbers of these sizes.
    const float slack = step * in.step_slack + (std::fabs(upper[i]) + nearer + std::fabs(value)) * 0x1p-21F;
    upper[i] = upper[i] - nearer + value + slack;
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

int64_t reach_rows(const float* upper, const int32_t* blocks, int64_t count, float threshold, int64_t most,
                   int32_t* rows, float* bounds) {
  int64_t found = 0;
  for (int64_t n = 0; n < count && found <= most; ++n) {
    const int32_t first = blocks[n] * static_cast<int32_t>(kBlockRows);
    const float* from = upper + first;
#if defined(__AVX512F__)
    const __m512 all = load_as<__m512>(from);
    const __mmask16 reaching = _mm512_cmp_ps_mask(all, _mm512_set1_ps(threshold), _CMP_GE_OQ);
    const __m512i numbers = _mm512_add_epi32(
        _mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    store_as(rows + found, _mm512_maskz_compress_epi32(reaching, numbers));
    store_as(bounds + found, _mm512_maskz_compress_ps(reaching, all));
    found += __builtin_popcount(reaching);
#else
    for (int32_t r = 0; r < static_cast<int32_t>(kBlockRows); ++r) {
      rows[found] = first + r;
      bounds[found] = from[r];
      found += from[r] >= threshold ? 1 : 0;
    }
#endif
  }
  return found;
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
