#include "gemma_torch/quant/round_codes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::Format;
using kernels::kBlockRows;

// Calls fill(cell's place, first row, first column) for every cell, in parallel.
template <typename Fill>
at::Tensor make_cells(
    int64_t rows, int64_t columns, Format format, int64_t slice, const Fill& fill) {
  const auto blocks = rows / kBlockRows;
  const auto stride = kernels::cell_bytes(format, slice);
  auto cells = at::empty({blocks * (columns / slice) * stride}, at::kByte);
  auto* bytes = cells.mutable_data_ptr<uint8_t>();
  at::parallel_for(
      0, blocks * (columns / slice), /*grain_size=*/8, [&](int64_t begin, int64_t end) {
        for (int64_t cell = begin; cell < end; ++cell) {
          fill(bytes + cell * stride, cell % blocks * kBlockRows, cell / blocks * slice);
        }
      });
  return cells;
}

}  // namespace

void round_cell(const Bf16* const* rows, int64_t columns, uint8_t* cell) {
  constexpr auto kGroup = kernels::group_columns(Format::kInt8);
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockRows * columns));
  std::vector<Bf16> scales(static_cast<size_t>(kBlockRows * columns / kGroup));
  const auto code_of = [](float x, float inverse) {
    return std::clamp(std::nearbyint(x * inverse), -128.0F, 127.0F);
  };
  for (int64_t first = 0; first < kBlockRows * columns; first += kGroup) {
    float x[kGroup], extreme = 0;
    for (int64_t j = 0; j < kGroup; ++j) {
      x[j] = kernels::to_float(rows[first / columns][first % columns + j]);
      extreme = std::abs(x[j]) > std::abs(extreme) ? x[j] : extreme;
    }
    float least = std::numeric_limits<float>::infinity(), inverse = 0;
    auto& best = scales[static_cast<size_t>(first / kGroup)];
    for (const float reach : {-128.0F, 127.0F}) {
      const Bf16 scale = kernels::to_bf16(extreme / reach);
      const float unit = kernels::to_float(scale);
      const float trial = unit != 0 ? 1.0F / unit : 0.0F;
      float error = 0;
      for (const float value : x) {
        const float e = value - unit * code_of(value, trial);
        error += e * e;
      }
      if (error < least) {
        least = error;
        best = scale;
        inverse = trial;
      }
    }
    for (int64_t j = 0; j < kGroup; ++j) {
      codes[static_cast<size_t>(first + j)] = static_cast<uint8_t>(code_of(x[j], inverse) + 128.0F);
    }
  }
  kernels::encode_codes(Format::kInt8, codes.data(), scales.data(), columns, cell);
}

at::Tensor round_matrix(const at::Tensor& weight, int64_t slice) {
  check(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.is_cpu(),
        "[quantize] weights: expected bfloat16 on the CPU, got {} on {}",
        c10::toString(weight.scalar_type()),
        weight.device().str());
  const auto columns = weight.size(1);
  const auto* const data = static_cast<const Bf16*>(weight.const_data_ptr());
  return make_cells(weight.size(0),
                    columns,
                    Format::kInt8,
                    slice,
                    [&](uint8_t* cell, int64_t row, int64_t column) {
                      const Bf16* rows[kBlockRows];
                      for (int64_t r = 0; r < kBlockRows; ++r) {
                        rows[r] = data + (row + r) * columns + column;
                      }
                      round_cell(rows, slice, cell);
                    });
}

at::Tensor lay_out(const Codes& from, int64_t slice) {
  const auto group = kernels::group_columns(from.format);
  return make_cells(
      from.rows, from.columns, from.format, slice, [&](uint8_t* cell, int64_t row, int64_t column) {
        std::vector<uint8_t> codes(static_cast<size_t>(kBlockRows * slice));
        std::vector<Bf16> scales(static_cast<size_t>(kBlockRows * slice / group));
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const auto at = (row + r) * from.columns + column;
          std::copy_n(from.codes.begin() + at, slice, codes.begin() + r * slice);
          std::copy_n(
              from.scales.begin() + at / group, slice / group, scales.begin() + r * slice / group);
        }
        kernels::encode_codes(from.format, codes.data(), scales.data(), slice, cell);
      });
}

}  // namespace gemma_torch
