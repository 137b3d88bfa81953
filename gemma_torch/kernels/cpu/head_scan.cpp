#include "gemma_torch/kernels/cpu/head_scan.h"

#include <cmath>

namespace gemma_torch::kernels {

void bound_scan(const HeadScan& head, const float* x, ScanInput& input) {
  constexpr double kUp = 1 + 1e-6;  // covers the rounding of what is computed here, and to float
  double outliers = 0, rest = 0, missed = 0, sum = 0, sizes = 0;
  for (int64_t j = 0; j < head.columns; ++j) {
    (j < kScanOutliers ? outliers : rest) += static_cast<double>(x[j]) * x[j];
    sum += j < kScanOutliers ? 0.0 : x[j];
    sizes += j < kScanOutliers ? 0.0 : std::fabs(x[j]);
  }
  for (int64_t g = 0; g < head.columns / 32; ++g) {
    // A number is off by at most half a unit, and by what three roundings (unit, its inverse, the product) make of up
    // to 32,512 units: 0.5 + 3 * 2^-24 * 32,512 < 0.506. Groups below 1e-30 became zeros: there it is all of it.
    const double unit = input.x.scales[g];
    const double half = unit < 1e-34 ? 32'512 * unit : 0.506 * unit;
    missed += 32 * half * half;
  }
  const double norm = std::sqrt(outliers + rest);
  // |w~.(x - x~)| <= |w~| |x - x~|. A float32 sum of n products, in any order, is off by at most n 2^-24 / (1 - n
  // 2^-24) times the sum of their sizes, which is at most |w| |x|: once for the full head's kernel with n = columns,
  // once for the scan with fewer than `columns` + 64 operations.
  const double roundings = 2.0 * static_cast<double>(head.columns + 64) * std::ldexp(1.0, -24);
  input.rest = x + kScanOutliers;
  input.middle = static_cast<float>(1.5 * sum);
  // rho.r = step (sum of bits r - middle): bits are at most 3, so the sizes of both add up to 4.5 of r's, and no more
  // than `columns` operations round them.
  input.step_slack = static_cast<float>(
      4.5 * sizes * static_cast<double>(head.columns + 64) * std::ldexp(1.0, -24) * 1.01 + 1e-37);
  input.outlier_norm = static_cast<float>(std::sqrt(outliers) * kUp);
  input.rest_norm = static_cast<float>(std::sqrt(rest) * kUp);
  input.slack =
      static_cast<float>(head.largest_norm *
                         (std::sqrt(missed) + roundings * (norm + std::sqrt(missed))) * kUp * 1.01);
}

}  // namespace gemma_torch::kernels
