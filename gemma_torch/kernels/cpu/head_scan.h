#pragma once

#include <cstdint>

#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch::kernels {

/// The output head W (vocab, columns) at about 4.5 bits a number, good enough to tell which rows cannot be among the
/// best. The kScanOutliers columns where activations are largest have 8 bits; the others one of kLevels times a
/// scale for 32 columns. With w~ the decoded row, x = [o, r] split as the columns are, and norms euclidean, the
/// Cauchy-Schwarz inequality gives
///
///   w.x  =  w~.x + (w - w~).x  <=  w~.x + |w_o - w~_o| |o| + |w_r - w~_r| |r|
///
/// whose two error norms are computed from the decoded rows when they are encoded, rounded up, and stored beside
/// them. What rounding adds (x in 16 bits, sums in float32, here and in the full head's kernel) is the caller's
/// `slack`, the same for all rows: see scan_input.
///
/// A block of 16 rows: 8 steps of the outliers (64 bytes, laid out as kInt8); for each group 256 bytes of level
/// indices, laid out as kLevels4, and 16 scales of 8 bits; then 16 bfloat16 each: scale of the outliers, unit of the
/// 8-bit scales, error norm of the outliers, error norm of the rest.
///
/// Rows that may be among the best are looked at once more before W is read: what the levels miss, w - w~ in the columns
/// r, stands row by row at 2 bits a number, rho. Since |w_r - w~_r - rho| is 0.4 of |w_r - w~_r| (the median on
/// Gemma 3 270M),
///
///   w.x  <=  w~.x + rho.r + |w_o - w~_o| |o| + |w_r - w~_r - rho| |r|
///
/// is so much nearer. A row: bfloat16 step, bfloat16 difference of the two norms, rounded down; then 2 bits for each
/// column, sixteen columns in 32 bits, the first in the lowest: (bits - 1.5) * step.
struct HeadScan {
  int64_t rows = 0;                // a multiple of 16; those past the vocabulary are zeros
  int64_t columns = 0;             // a multiple of 32
  const int32_t* order = nullptr;  // (columns) which column of W each is; the outliers come first
  const uint8_t* blocks = nullptr;
  const uint8_t* residuals = nullptr;
  float largest_norm = 0;  // of the decoded rows and of W's, euclidean, rounded up

  int64_t groups() const { return columns / 32 - 1; }
  int64_t stride() const { return 512 + groups() * 272 + 128; }                  // bytes of a block
  int64_t residual_stride() const { return (4 + groups() * 8 + 31) / 32 * 32; }  // bytes of a row
  int64_t plane_bytes() const { return (residual_stride() + 63) / 64 * 256; }    // see ScanInput
};

constexpr int64_t kScanOutliers = 32;

/// One row of activations, its columns in the order of the scan.
struct ScanInput {
  QuantizedRow x;
  float outlier_norm = 0, rest_norm = 0;  // |o|, |r|, rounded up
  float slack = 0;
  // r for rho.r: rest_unit * (256 high + low), in the order of a residual row's bits. The numbers of its bytes 64 i ..,
  // bits 2 s and 2 s + 1, meet the 64 from planes + 256 i + 64 s on (high), and those plane_bytes() later (low); zeros
  // meet what is no number.
  int8_t* planes = nullptr;  // (2, plane_bytes())
  float rest_unit = 0;
  float middle = 0;      // 1.5 times the sum of r
  float step_slack = 0;  // what rounding adds to rho.r, for a step of 1
};

/// Fills in what belongs to x (columns), whose quantised form is in input.x already, and input.planes.
void bound_scan(const HeadScan& head, const float* x, ScanInput& input);

}  // namespace gemma_torch::kernels
