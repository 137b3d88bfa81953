#include "gemma_torch/quant/gptq.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/linalg_cholesky.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::Format;
using kernels::kBlockRows;

constexpr double kDamping = 0.01;        // of the mean of the diagonal
constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number

// One number for each of 16 rows.
using Lanes = std::array<float, kBlockRows>;

// Scales that are tried: the largest number of a group by these, with both signs.
struct Trials {
  float first, last;
  int count;
};
constexpr Trials trials_of(Format format) {
  switch (format) {
    case Format::kInt8:
      return {118, 129, 12};
    case Format::kInt6:
      return {25, 33, 17};
    case Format::kInt5:
      return {11, 17, 21};
    default:
      return {84, 139, 12};  // kLevels4
  }
}

// By a whole number + 127, the nearest level's index.
constexpr auto kNearestLevel = [] {
  std::array<uint8_t, 255> nearest{};
  for (int at = 0, index = 0; at < 255; ++at) {
    while (index < 15 && 2 * at > kernels::kLevels[index] + kernels::kLevels[index + 1]) {
      ++index;
    }
    nearest[static_cast<size_t>(at)] = static_cast<uint8_t>(index);
  }
  return nearest;
}();

// x / scale, as the number that its code stands for.
template <Format kFormat>
float nearest_value(float x, float inverse) {
  constexpr auto kZero = static_cast<float>(kernels::code_zero(kFormat));
  constexpr float kMost = kFormat == Format::kLevels4 ? kZero : kZero - 1;
  const float value = std::min(std::max((x * inverse + kRounder) - kRounder, -kZero), kMost);
  if constexpr (kFormat == Format::kLevels4) {
    const auto index = kNearestLevel[static_cast<size_t>(value + kZero)];
    return static_cast<float>(kernels::kLevels[index]) - kZero;
  }
  return value;
}

template <Format kFormat>
uint8_t code_of(float value) {
  const auto whole = static_cast<int>(value) + kernels::code_zero(kFormat);
  return static_cast<uint8_t>(
      kFormat == Format::kLevels4 ? kNearestLevel[static_cast<size_t>(whole)] : whole);
}

// For each row the scale with the least sum of weights[j] * error^2 over a group.
template <Format kFormat>
std::array<Bf16, kBlockRows> best_scales(const Lanes* x, const float* weights) {
  constexpr auto kGroup = kernels::group_columns(kFormat);
  constexpr auto kTrials = trials_of(kFormat);
  Lanes most{}, least;
  std::array<Bf16, kBlockRows> best{};
  least.fill(std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < kGroup; ++j) {
    for (size_t r = 0; r < kBlockRows; ++r) {
      most[r] = std::max(most[r], std::abs(x[j][r]));
    }
  }
  for (int trial = 0; trial < 2 * kTrials.count; ++trial) {
    const float step = (kTrials.last - kTrials.first) / static_cast<float>(kTrials.count - 1);
    const float by = kTrials.first + step * static_cast<float>(trial / 2);
    std::array<Bf16, kBlockRows> scale;
    Lanes unit, inverse, error{};
    for (size_t r = 0; r < kBlockRows; ++r) {
      scale[r] = kernels::to_bf16(most[r] / (trial % 2 == 0 ? by : -by));
      unit[r] = kernels::to_float(scale[r]);
      inverse[r] = unit[r] != 0 ? 1.0F / unit[r] : 0.0F;
    }
    for (int64_t j = 0; j < kGroup; ++j) {
      for (size_t r = 0; r < kBlockRows; ++r) {
        const float e = x[j][r] - unit[r] * nearest_value<kFormat>(x[j][r], inverse[r]);
        error[r] += weights[j] * e * e;
      }
    }
    for (size_t r = 0; r < kBlockRows; ++r) {
      if (error[r] < least[r]) {
        least[r] = error[r];
        best[r] = scale[r];
      }
    }
  }
  return best;
}

// 16 rows from `row` on, whose columns are in x; what is still to be rounded changes there.
template <Format kFormat>
void round_rows(std::vector<Lanes>& x,
                const float* factor,
                const std::vector<float>& cost,
                int64_t row,
                Codes& out) {
  constexpr auto kGroup = kernels::group_columns(kFormat);
  const auto n = out.columns;
  Lanes unit{}, inverse{};
  for (int64_t j = 0; j < n; ++j) {
    auto& column = x[static_cast<size_t>(j)];
    if (j % kGroup == 0) {
      const auto scales = best_scales<kFormat>(&column, cost.data() + j);
      for (size_t r = 0; r < kBlockRows; ++r) {
        out.scales[static_cast<size_t>((row + static_cast<int64_t>(r)) * n + j) / kGroup] =
            scales[r];
        unit[r] = kernels::to_float(scales[r]);
        inverse[r] = unit[r] != 0 ? 1.0F / unit[r] : 0.0F;
      }
    }
    const float* const u = factor + j * n;
    Lanes error;
    for (size_t r = 0; r < kBlockRows; ++r) {
      const float value = nearest_value<kFormat>(column[r], inverse[r]);
      out.codes[static_cast<size_t>((row + static_cast<int64_t>(r)) * n + j)] =
          code_of<kFormat>(value);
      error[r] = (column[r] - value * unit[r]) / u[j];
    }
    for (int64_t later = j + 1; later < n; ++later) {
      auto& to = x[static_cast<size_t>(later)];
      for (size_t r = 0; r < kBlockRows; ++r) {
        to[r] -= u[later] * error[r];
      }
    }
  }
}

using RoundRows =
    void (*)(std::vector<Lanes>&, const float*, const std::vector<float>&, int64_t, Codes&);
RoundRows round_rows_of(Format format) {
  switch (format) {
    case Format::kInt8:
      return round_rows<Format::kInt8>;
    case Format::kInt6:
      return round_rows<Format::kInt6>;
    case Format::kInt5:
      return round_rows<Format::kInt5>;
    case Format::kLevels4:
      return round_rows<Format::kLevels4>;
    case Format::kLossless12:
      break;
  }
  fail("[gptq] format: expected one of codes, got {}", kernels::format_name(format));
}

}  // namespace

at::Tensor inverse_factor(const at::Tensor& second_moment) {
  auto h = second_moment.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  auto diagonal = h.diagonal();
  check(diagonal.isfinite().all().item<bool>(),
        "[gptq] inputs of a projection: expected finite numbers, got others");
  diagonal.masked_fill_(diagonal.le(0), 1.0);  // inputs that are always zero: any code will do
  diagonal.add_(diagonal.mean().mul(kDamping));
  const auto inverse = at::cholesky_inverse(at::linalg_cholesky(h));
  return at::linalg_cholesky(inverse, /*upper=*/true).to(at::kFloat).contiguous();
}

Codes round_compensated(const at::Tensor& weight, const at::Tensor& factor, Format format) {
  const auto rows = weight.size(0), n = weight.size(1);
  check(rows % kBlockRows == 0 && n % kernels::kSliceColumns == 0,
        "[gptq] expected rows a multiple of 16 and columns of 64, got {} and {}",
        rows,
        n);
  check(factor.dim() == 2 && factor.size(0) == n && factor.size(1) == n,
        "[gptq] factor: expected {} x {}",
        n,
        n);
  const auto w = weight.detach().to(at::kFloat).contiguous();
  const auto u = factor.contiguous();
  const auto* const from = w.const_data_ptr<float>();
  const auto* const upper = u.const_data_ptr<float>();
  // What an error in a column costs once later columns have made up for it.
  std::vector<float> cost(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) {
    const float d = upper[j * n + j];
    cost[static_cast<size_t>(j)] = 1.0F / (d * d);
  }
  Codes out{format, rows, n, {}, {}};
  out.codes.resize(static_cast<size_t>(rows * n));
  out.scales.resize(static_cast<size_t>(rows * n / kernels::group_columns(format)));
  const auto round = round_rows_of(format);
  at::parallel_for(0, rows / kBlockRows, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> x(static_cast<size_t>(n));
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t r = 0; r < kBlockRows; ++r) {
          x[static_cast<size_t>(j)][static_cast<size_t>(r)] =
              from[(block * kBlockRows + r) * n + j];
        }
      }
      round(x, upper, cost, block * kBlockRows, out);
    }
  });
  return out;
}

}  // namespace gemma_torch
