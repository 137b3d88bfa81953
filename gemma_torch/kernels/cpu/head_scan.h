#pragma once

#include <cstdint>

#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch::kernels {

/// The output head W (vocab, columns) at about 4.5 bits a number, good enough to tell which rows cannot be among the
/// best. The kScanOutliers columns where activations are largest have 8 bits; the others one of kLevels times a
/// scale for 32 columns. With w~ the decoded row, x = [o, a, b] split as the columns are, b where activations are smallest,
/// and norms euclidean, the Cauchy-Schwarz inequality gives
///
///   w.x  =  w~.x + (w - w~).x  <=  w~.x + |w_o - w~_o| |o| + |w_a - w~_a| |a| + |w_b - w~_b| |b|
///
/// whose three error norms are computed from the decoded rows when they are encoded, rounded up, and stored beside
/// them. (One for both a and b would be as right, and on Gemma 3 270M larger: 1.04 times on prose, 1.18 after 2,048 tokens
/// of no text.) What rounding adds (x in 16 bits, sums in float32, here and in the full head's kernel) is the caller's
/// `slack`, the same for all rows: see scan_input.
///
/// A block of 16 rows: 8 steps of the outliers (64 bytes, laid out as kInt8); for each group 256 bytes of level
/// indices, laid out as kLevels4, and 16 scales of 8 bits; then 16 bfloat16 each: scale of the outliers, unit of the
/// 8-bit scales, error norms of the columns o, a and b.
///
/// Rows that may be among the best are looked at once more before W is read: what the levels miss, w - w~ in the columns
/// a and b, stands row by row at 2 bits a number, rho. It misses some 0.4 of that (the median on Gemma 3 270M), so
///
///   w.x  <=  w~.x + rho.[a, b] + |w_o - w~_o| |o| + |w_a - w~_a - rho_a| |a| + |w_b - w~_b - rho_b| |b|
///
/// is so much nearer. A row: bfloat16 step; bfloat16 differences of the two norms of a and of those of b, rounded down;
/// two bytes of nothing; then 2 bits for each column, sixteen columns in 32 bits, the first in the lowest:
/// (bits - 1.5) * step.
struct HeadScan {
  static constexpr int64_t kResidualHeader = 8;  // bytes of a residual row before its numbers

  int64_t rows = 0;                // a multiple of 16; those past the vocabulary are zeros
  int64_t columns = 0;             // a multiple of 32
  const int32_t* order = nullptr;  // (columns) which column of W each is: o, a, b
  const uint8_t* blocks = nullptr;
  const uint8_t* residuals = nullptr;
  float largest_norm = 0;  // of the decoded rows and of W's, euclidean, rounded up

  int64_t groups() const { return columns / 32 - 1; }
  int64_t major_groups() const { return (groups() + 3) / 4; }    // those of a
  int64_t stride() const { return 512 + groups() * 272 + 160; }  // bytes of a block
  int64_t residual_stride() const {                              // bytes of a row
    return (kResidualHeader + groups() * 8 + 31) / 32 * 32;
  }
  int64_t plane_bytes() const { return (residual_stride() + 63) / 64 * 256; }  // see ScanInput
};

constexpr int64_t kScanOutliers = 32;

/// One row of activations, its columns in the order of the scan.
struct ScanInput {
  QuantizedRow x;
  float outlier_norm = 0, major_norm = 0, minor_norm = 0;  // |o|, |a|, |b|, rounded up
  float slack = 0;
  // [a, b] for rho: rest_unit * (256 high + low), in the order of a residual row's bits. The numbers of its bytes 64 i ..,
  // bits 2 s and 2 s + 1, meet the 64 from planes + 256 i + 64 s on (high), and those plane_bytes() later (low); zeros
  // meet what is no number.
  int8_t* planes = nullptr;  // (2, plane_bytes())
  float rest_unit = 0;
  float middle = 0;      // 1.5 times the sum of [a, b]
  float step_slack = 0;  // what rounding adds to its product with rho, for a step of 1
};

/// Fills in what belongs to x (columns), whose quantised form is in input.x already, and input.planes.
void bound_scan(const HeadScan& head, const float* x, ScanInput& input);

}  // namespace gemma_torch::kernels
