#include "gemma_torch/quant/round_codes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::Format;

float code_of(float x, float inverse, float half) {
  return std::clamp(std::nearbyint(x * inverse), -half, half - 1);
}

}  // namespace

int code_bits(Format format) {
  return format == Format::kInt4   ? 4
         : format == Format::kInt5 ? 5
         : format == Format::kInt6 ? 6
                                   : 8;
}

int code_offset(Format format) {
  return 1 << (code_bits(format) - 1);
}

Bf16 round_group(const float* x, const float* weights, int64_t n, Format format, uint8_t* codes) {
  const auto half = static_cast<float>(code_offset(format));
  float extreme = 0;
  for (int64_t j = 0; j < n; ++j) {
    extreme = std::abs(x[j]) > std::abs(extreme) ? x[j] : extreme;
  }
  // Eight bits have no number that would gain from being cut off.
  const int tries = format == Format::kInt8 ? 1 : 16;
  Bf16 best{0};
  float least = std::numeric_limits<float>::infinity();
  for (int t = 0; t < tries; ++t) {
    for (const float reach : {-half, half - 1}) {
      const Bf16 scale = kernels::to_bf16(extreme / reach * (1.0F - 0.02F * static_cast<float>(t)));
      const float unit = kernels::to_float(scale);
      const float inverse = unit != 0 ? 1.0F / unit : 0.0F;
      float error = 0;
      for (int64_t j = 0; j < n; ++j) {
        const float e = x[j] - unit * code_of(x[j], inverse, half);
        error += (weights != nullptr ? weights[j] : 1.0F) * e * e;
      }
      if (error < least) {
        least = error;
        best = scale;
      }
    }
  }
  const float unit = kernels::to_float(best);
  const float inverse = unit != 0 ? 1.0F / unit : 0.0F;
  for (int64_t j = 0; j < n; ++j) {
    codes[j] = static_cast<uint8_t>(code_of(x[j], inverse, half) + half);
  }
  return best;
}

void round_cell(const Bf16* const* rows, Format format, int64_t columns, uint8_t* cell) {
  const auto group = kernels::group_columns(format);
  std::vector<uint8_t> codes(static_cast<size_t>(kernels::kBlockRows * columns));
  std::vector<Bf16> scales(static_cast<size_t>(kernels::kBlockRows * columns / group));
  float x[64];
  for (int64_t r = 0; r < kernels::kBlockRows; ++r) {
    for (int64_t j = 0; j < columns; j += group) {
      for (int64_t i = 0; i < group; ++i) {
        x[i] = kernels::to_float(rows[r][j + i]);
      }
      scales[static_cast<size_t>((r * columns + j) / group)] =
          round_group(x, nullptr, group, format, codes.data() + r * columns + j);
    }
  }
  kernels::encode_codes(format, codes.data(), scales.data(), columns, cell);
}

}  // namespace gemma_torch
