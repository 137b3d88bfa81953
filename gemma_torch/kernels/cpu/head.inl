// The output head: exact rows, and the scan over all rows.

#include <algorithm>

#include "gemma_torch/kernels/cpu/head_scan.h"
#include "gemma_torch/kernels/cpu/lane_math.h"

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
  // Rows in any order: the next ones are asked for by hand, and the ends of later ones, because a row of a mapped file
  // lies on small pages of its own, which take longer to look up than the row to read. So many because a CPU looks up
  // several at a time: 48 rows take 11 us, with 16 ahead 14.
  constexpr int64_t kRowsAhead = 4, kPagesAhead = 64;
  const int64_t bytes = columns * 2;
  const auto ask_for = [&](int64_t i, int64_t step) {
    const auto* p = reinterpret_cast<const char*>(table + ids[i] * columns);
    for (int64_t b = 0; b < bytes; b += step) {
      prefetch_later(p + b);
    }
  };
  const auto ahead = [&](int64_t i) {
    if (i + kPagesAhead < count) {
      ask_for(i + kPagesAhead, bytes - 1);
    }
    if (i + kRowsAhead >= 0 && i + kRowsAhead < count) {
      ask_for(i + kRowsAhead, 64);
    }
  };
  for (int64_t i = -kPagesAhead; ids != nullptr && i < 0; ++i) {
    ahead(i);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (ids != nullptr) {
      ahead(i);
    } else {
      prefetch_stream(reinterpret_cast<const uint8_t*>(table + (first + i) * columns), bytes);
    }
    y[i] = dot_row(table + (ids != nullptr ? ids[i] : first + i) * columns, x, columns);
  }
}

GEMMA_TORCH_INLINE void scan_block(const uint8_t* p, int64_t groups, const ScanInput& in, PartF (&bound)[kParts]) {
  PartF outliers[kParts][1], rest[kParts] = {};
  prefetch_stream(p, 512);
  const auto code = [&](int part, int i) { return codes_at<Format::kInt8>(p + part * kWidth, i); };
  dot_codes<largest_of(Format::kInt8), code_zero(Format::kInt8), 1>(code, &in.x, 0, outliers);
  p += 512;
  for (int64_t g = 1; g <= groups; ++g, p += 272) {
    prefetch_stream(p, 272);
    PartF sums[kParts][1];
    const auto level = [&](int part, int i) { return codes_at<Format::kLevels4>(p + part * kWidth, i); };
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
    const PartF minor = fma(load_part(footer + 64), splat_part(in.minor_norm), value + in.slack);
    bound[part] = fma(load_part(footer + 32), splat_part(in.outlier_norm),
                      fma(load_part(footer + 48), splat_part(in.major_norm), minor));
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

// Bytes of a residual, of which `left` are left, a multiple of 32; zeros past them.
GEMMA_TORCH_INLINE PartU row_bytes(const uint8_t* p, [[maybe_unused]] int64_t left) {
#if defined(__AVX512F__)
  if (left < kWidth) {
    return std::bit_cast<PartU>(_mm512_zextsi256_si512(load_as<__m256i>(p)));
  }
#endif
  return load_as<PartU>(p);
}

// The sums over sixteen residuals' numbers of bits * value, for their values of ScanInput::planes; residual(n) gives the
// n-th. Their `length` in bytes makes kLines lines, the last perhaps half, or any number where that is 0.
template <int kLines, typename Residual>
GEMMA_TORCH_INLINE F dot_two_bits(const Residual& residual, int64_t length, const int8_t* planes, int64_t low) {
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(__AVX2__)
  using Four = Dot<31>;  // whose sums are complete after four steps, whatever the instruction set
  const auto values = [&](int64_t i, int s) __attribute__((always_inline)) {
    const int8_t* const at = planes + i / 64 * 256 + i % 64 + 64 * s;
    return Four::lanes(at, at + low);
  };
  const auto bits = [](PartU bytes, int s) __attribute__((always_inline)) { return (bytes >> (2 * s)) & 0x03030303U; };
#if defined(__AVX512F__)
  // The values stay in registers.
  if constexpr (kLines > 0) {
    Four::Columns x[kLines][4];
    unrolled<kLines>([&](auto i) { unrolled<4>([&](auto s) { x[i][s] = values(64 * i, s); }); });
    PartF lanes[16];
    for (int n = 0; n < 16; ++n) {
      const uint8_t* const p = residual(n);
      Four dot;
      unrolled<kLines>([&](auto i) __attribute__((always_inline)) {
        const PartU bytes = row_bytes(p + 64 * i, length - 64 * i);
        unrolled<4>([&](auto s) __attribute__((always_inline)) { dot.add(bits(bytes, s), x[i][s], s); });
      });
      lanes[n % 4 * 4 + n / 4] = to_floats(dot.total(0, 0));
    }
    return sums_by_four(lanes);
  }
#endif
#endif
  alignas(64) float sums[16];
  for (int n = 0; n < 16; ++n) {
    const uint8_t* const p = residual(n);
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(__AVX2__)
    Four dot;
    for (int64_t i = 0; i < length; i += kWidth) {
      const PartU bytes = row_bytes(p + i, length - i);
      unrolled<4>([&](auto s) __attribute__((always_inline)) { dot.add(bits(bytes, s), values(i, s), s); });
    }
    sums[n] = static_cast<float>(whole_sum(dot.total(0, 0)));
#else
    int32_t total = 0;
    for (int64_t i = 0; i < length; ++i) {
      for (int s = 0; s < 4; ++s) {
        const int8_t* at = planes + i / 64 * 256 + i % 64 + 64 * s;
        total += (p[i] >> (2 * s) & 3) * (256 * at[0] + at[low]);
      }
    }
    sums[n] = static_cast<float>(total);
#endif
  }
  return load(sums);
}

GEMMA_TORCH_INLINE int64_t length_of(const HeadScan& head, ScanPart part) {
  switch (part) {
    case ScanPart::kMajor:
      return head.major_bytes();
    case ScanPart::kMinor:
      return head.minor_bytes();
    case ScanPart::kFiner:
      return head.finer_bytes();
  }
  return 0;
}

template <int kLines>
void refine_part(const HeadScan& head, ScanPart part, const int32_t* ids, int64_t count, const ScanInput& in,
                 float* upper) {
  const bool of_major = part == ScanPart::kMajor, of_minor = part == ScanPart::kMinor;
  const int64_t length = length_of(head, part);
  const int64_t stride = of_major ? length : head.other_stride();
  const uint8_t* const others = head.residuals + head.other_at(0);
  const uint8_t* const rows = of_major ? head.residuals : of_minor ? others : others + head.minor_bytes();
  // rho_b has that of rho_a.
  const int64_t header_stride = of_minor ? head.major_bytes() : stride;
  const uint8_t* const headers = of_minor ? head.residuals : rows;
  const int8_t* const planes = in.planes + (of_minor ? 4 * head.major_bytes() : 0);
  const float major_norm = of_minor ? 0.0F : in.major_norm, minor_norm = of_major ? 0.0F : in.minor_norm;
  const float middle = in.middle[static_cast<size_t>(part)], slack = in.step_slack[static_cast<size_t>(part)];
  const auto id_of = [&](int64_t i) { return static_cast<int64_t>(ids[i < count ? i : count - 1]); };
  // Twice: what is asked for to the second cache is at times not fetched at all (Zen 4), which makes rows five times as
  // slow; all of it asked for to the first, rows take twice as long at all times.
  constexpr int64_t kSoonBytes = 1152, kLaterBytes = 3072;
  const int64_t soon = kSoonBytes / length, later = kLaterBytes / length;  // rows ahead
  const auto ask_for = [&](int64_t i, const auto& prefetch) __attribute__((always_inline)) {
    const uint8_t* const row = rows + id_of(i) * stride;
    for (int64_t b = 0; b < (kLines > 0 ? 64 * kLines : length); b += 64) {
      prefetch(row + b);
    }
  };
  for (int64_t i = 0; i < later; ++i) {
    i < soon ? ask_for(i, prefetch_soon) : ask_for(i, prefetch_later);
  }
  for (int64_t first = 0; first < count; first += 16) {
    alignas(64) uint32_t parts[2][16];
    const auto residual = [&](int64_t n) __attribute__((always_inline)) {
      ask_for(first + n + later, prefetch_later);
      ask_for(first + n + soon, prefetch_soon);
      const auto id = id_of(first + n);
      const uint8_t* const header = headers + id * header_stride;
      std::memcpy(&parts[0][n], header, 4);
      std::memcpy(&parts[1][n], header + 4, 4);
      return rows + id * stride;
    };
    const F dots = dot_two_bits<kLines>(residual, length, planes, head.plane_bytes());
    const U begins = load_as<U>(parts[0]), ends = load_as<U>(parts[1]);
    const F step = as_float(begins << 16);
    const F major = as_float(begins & 0xffff0000U) * major_norm, minor = as_float(ends << 16) * minor_norm;
    const F value = step * (dots * in.rest_unit - middle);
    alignas(64) float bounds[16] = {};
    const auto bytes = sizeof(float) * static_cast<size_t>(std::min<int64_t>(16, count - first));
    std::memcpy(bounds, upper + first, bytes);
    const F before = load(bounds);
    // A few roundings of numbers of these sizes. A bound that went away, since no bits stand for zero, stays: sigma goes
    // on from here.
    const F sizes = absolute(before) + absolute(major) + absolute(minor) + absolute(value);
    store(bounds, before - (major + minor) + value + step * slack + sizes * 0x1p-21F);
    std::memcpy(upper + first, bounds, bytes);
  }
}

void refine(const HeadScan& head, ScanPart part, const int32_t* ids, int64_t count, const ScanInput& in, float* upper) {
  const int64_t length = length_of(head, part);
  if (length == 0 || count == 0) {
    return;
  }
  switch ((length + 63) / 64) {
    case 1:
      return refine_part<1>(head, part, ids, count, in, upper);
    case 2:
      return refine_part<2>(head, part, ids, count, in, upper);
    case 3:
      return refine_part<3>(head, part, ids, count, in, upper);
    default:
      return refine_part<0>(head, part, ids, count, in, upper);
  }
}

// Writes which of sixteen bounds reach `threshold`, the first of them as `first`, and those bounds if asked for. There
// is room for sixteen. Returns how many do.
GEMMA_TORCH_INLINE int64_t list_reaching(const float* upper, int32_t first, float threshold, int32_t* found,
                                         float* bounds = nullptr) {
#if defined(__AVX512F__)
  const __m512 all = load_as<__m512>(upper);
  const __mmask16 reaching = _mm512_cmp_ps_mask(all, _mm512_set1_ps(threshold), _CMP_GE_OQ);
  const __m512i numbers = _mm512_add_epi32(
      _mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  store_as(found, _mm512_maskz_compress_epi32(reaching, numbers));
  if (bounds != nullptr) {
    store_as(bounds, _mm512_maskz_compress_ps(reaching, all));
  }
  return __builtin_popcount(reaching);
#else
  int64_t count = 0;
  if (largest(load(upper)) >= threshold) {
    for (int32_t i = 0; i < 16; ++i) {
      found[count] = first + i;
      if (bounds != nullptr) {
        bounds[count] = upper[i];
      }
      count += upper[i] >= threshold ? 1 : 0;
    }
  }
  return count;
#endif
}

int64_t reach(const float* block_upper, Range blocks, float threshold, int32_t* found) {
  int64_t count = 0;
  int64_t b = blocks.begin;
  for (; b + 16 <= blocks.end; b += 16) {
    count += list_reaching(block_upper + b, static_cast<int32_t>(b), threshold, found + count);
  }
  for (; b < blocks.end; ++b) {
    found[count] = static_cast<int32_t>(b);
    count += block_upper[b] >= threshold ? 1 : 0;
  }
  return count;
}

int64_t reach_rows(const float* upper, const int32_t* blocks, int64_t count, float threshold, int64_t most,
                   int32_t* rows, float* bounds) {
  constexpr int64_t kAhead = 16;  // few of very many blocks, in no near cache
  int64_t found = 0;
  for (int64_t n = 0; n < count && found <= most; ++n) {
    prefetch_soon(upper + blocks[std::min(n + kAhead, count - 1)] * kBlockRows);
    const auto first = static_cast<int32_t>(blocks[n] * kBlockRows);
    found += list_reaching(upper + first, first, threshold, rows + found, bounds + found);
  }
  return found;
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
