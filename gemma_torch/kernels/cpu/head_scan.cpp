#include "gemma_torch/kernels/cpu/head_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace gemma_torch::kernels {
namespace {

constexpr float kLargestValue = 32'512;  // 127 * 256: both halves fit a byte

// How far a number in 16 bits is off, in units: half a unit, and what three roundings (unit, its inverse, the product)
// make of up to kLargestValue units, 0.5 + 3 * 2^-24 * 32,512.
constexpr double kMissed = 0.506;

// [a, b] = r (count) in 16 bits. False if they are so small that they became zeros.
bool fill_planes(const HeadScan& head, const float* r, int64_t count, ScanInput& input) {
  float most = 0;
  for (int64_t j = 0; j < count; ++j) {
    most = std::max(most, std::fabs(r[j]));
  }
  std::memset(input.planes, 0, static_cast<size_t>(2 * head.plane_bytes()));
  input.rest_unit = most / kLargestValue;
  if (most < 1e-30F) {
    return false;  // the inverse might overflow
  }
  const float factor = kLargestValue / most;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t byte = head.residual_byte(j);
    int8_t* const at = input.planes + byte / 64 * 256 + j % 4 * 64 + byte % 64;
    const auto value = static_cast<int32_t>(std::lrintf(r[j] * factor));
    const int32_t high = (value + 128) >> 8;
    at[0] = static_cast<int8_t>(high);
    at[head.plane_bytes()] = static_cast<int8_t>(value - 256 * high);
  }
  return true;
}

}  // namespace

void bound_scan(const HeadScan& head, const float* x, ScanInput& input) {
  constexpr double kUp = 1 + 1e-6;  // covers the rounding of what is computed here, and to float
  const int64_t minor_begin = kScanOutliers + head.major_columns();
  const auto squares = [&](int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t j = begin; j < end; ++j) {
      total += static_cast<double>(x[j]) * x[j];
    }
    return total;
  };
  const double outliers = squares(0, kScanOutliers), major = squares(kScanOutliers, minor_begin),
               minor = squares(minor_begin, head.columns);
  double missed = 0;
  for (int64_t g = 0; g < head.columns / 32; ++g) {
    // Groups below 1e-30 became zeros: there it is all of it.
    const double unit = input.x.scales[g];
    const double half = unit < 1e-34 ? kLargestValue * unit : kMissed * unit;
    missed += 32 * half * half;
  }
  const double norm = std::sqrt(outliers + major + minor);
  // |w~.(x - x~)| <= |w~| |x - x~|. A float32 sum of n products, in any order, is off by at most n 2^-24 / (1 - n
  // 2^-24) times the sum of their sizes, which is at most |w| |x|: once for the full head's kernel with n = columns,
  // once for the scan with fewer than `columns` + 64 operations.
  const double roundings = 2.0 * static_cast<double>(head.columns + 64) * std::ldexp(1.0, -24);
  const bool filled = fill_planes(head, x + kScanOutliers, head.columns - kScanOutliers, input);
  // rho_a.a = step (sum of bits times a - middle). Bits are at most 3: so much times what is missed of a, and with the
  // middle 4.5 times its sizes, which no more than `columns` operations round. So for b, and for sigma.
  const int64_t ranges[kScanParts][2] = {
      {kScanOutliers, minor_begin}, {minor_begin, head.columns}, {kScanOutliers, head.columns}};
  for (size_t part = 0; part < kScanParts; ++part) {
    const auto [begin, end] = ranges[part];
    double sum = 0, sizes = 0;
    for (int64_t j = begin; j < end; ++j) {
      sum += x[j];
      sizes += std::fabs(x[j]);
    }
    const auto count = static_cast<double>(end - begin);
    const double left_out = filled ? count * kMissed * input.rest_unit : sizes;
    input.middle[part] = static_cast<float>(1.5 * sum);
    input.step_slack[part] = static_cast<float>(
        (4.5 * sizes * static_cast<double>(head.columns + 64) * std::ldexp(1.0, -24) +
         3 * left_out) *
            1.01 +
        1e-37);
  }
  input.outlier_norm = static_cast<float>(std::sqrt(outliers) * kUp);
  input.major_norm = static_cast<float>(std::sqrt(major) * kUp);
  input.minor_norm = static_cast<float>(std::sqrt(minor) * kUp);
  input.slack =
      static_cast<float>(head.largest_norm *
                         (std::sqrt(missed) + roundings * (norm + std::sqrt(missed))) * kUp * 1.01);
}

}  // namespace gemma_torch::kernels
