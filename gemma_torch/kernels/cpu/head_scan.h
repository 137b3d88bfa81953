#pragma once

#include <algorithm>
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
/// them. (One for both a and b would be as right, and on Gemma 3 270M larger: with a quarter of the columns for a, 1.04
/// times on prose, 1.18 after 2,048 tokens of no text.) What rounding adds (x in 16 bits, sums in float32, here and in
/// the full head's kernel) is the caller's `slack`, the same for all rows: see bound_scan.
///
/// A block of 16 rows: 8 steps of the outliers (64 bytes, laid out as kInt8); for each group 256 bytes of level
/// indices, laid out as kLevels4, and 16 scales of 8 bits; then 16 bfloat16 each: scale of the outliers, unit of the
/// 8-bit scales, error norms of the columns o, a and b.
///
/// Rows that may be among the best are looked at again before W is read: what the levels miss, w - w~ in the columns a
/// and b, stands row by row at 2 bits a number, rho. It misses some 0.4 of that (the median on Gemma 3 270M), so
///
///   w.x  <=  w~.x + rho_a.a + |w_o - w~_o| |o| + |w_a - w~_a - rho_a| |a| + |w_b - w~_b| |b|
///
/// is nearer, for one cache line a row, and the same with rho_b nearer still, for those rows that are left. For rows
/// that even so may be among the best, what rho misses stands at 2 bits a number too, sigma, which again misses 0.4 of
/// it: three lines a row, where W has twenty.
///
/// So there are two tables: first all rows' rho_a; then, row by row, rho_b and sigma. (The last two lie together because
/// to find the first line of a page takes as long as to read five; rho_a does not, because it is what many rows in order
/// are looked at for.) rho_a and sigma begin with a bfloat16 step, the bfloat16 differences of the two norms of a and of
/// those of b, rounded down, and two bytes of nothing. Then come 2 bits for each column, sixteen columns in 32 bits, the
/// first in the lowest: (bits - 1.5) * step.
struct HeadScan {
  static constexpr int64_t kResidualHeader = 8;  // bytes before the numbers of rho_a and of sigma

  int64_t rows = 0;                // a multiple of 16; those past the vocabulary are zeros
  int64_t columns = 0;             // a multiple of 32
  const int32_t* order = nullptr;  // (columns) which column of W each is: o, a, b
  const uint8_t* blocks = nullptr;
  const uint8_t* residuals = nullptr;
  float largest_norm = 0;  // of the decoded rows and of W's, euclidean, rounded up

  int64_t groups() const { return columns / 32 - 1; }
  int64_t stride() const { return 512 + groups() * 272 + 160; }  // bytes of a block
  // Those of a: what fills whole lines beside the header, about a third.
  int64_t major_groups() const { return std::min(groups(), 8 * (1 + groups() / 32) - 1); }
  int64_t major_columns() const { return 32 * major_groups(); }
  // Bytes of rho_a, whole lines; of rho_b; of sigma, whose parts are as long; of both tables.
  int64_t major_bytes() const { return (kResidualHeader + major_groups() * 8 + 63) / 64 * 64; }
  int64_t minor_bytes() const { return ((groups() - major_groups()) * 8 + 31) / 32 * 32; }
  int64_t finer_bytes() const { return major_bytes() + minor_bytes(); }
  int64_t residual_bytes() const { return rows * (major_bytes() + other_stride()); }
  // Of a row of the second table, and where one begins. Those of the first are rho_a.
  int64_t other_stride() const { return minor_bytes() + finer_bytes(); }
  int64_t other_at(int64_t row) const { return rows * major_bytes() + row * other_stride(); }
  // Where the bits of column j, counted without the outliers, stand in sigma; and in rho, were it in one piece.
  int64_t residual_byte(int64_t j) const {
    return j < major_columns() ? kResidualHeader + j / 4
                               : major_bytes() + (j - major_columns()) / 4;
  }
  // Bytes of one of ScanInput::planes.
  int64_t plane_bytes() const { return 4 * ((finer_bytes() + 63) / 64 * 64); }
};

constexpr int64_t kScanOutliers = 32;

/// One row of activations, its columns in the order of the scan.
struct ScanInput {
  QuantizedRow x;
  float outlier_norm = 0, major_norm = 0, minor_norm = 0;  // |o|, |a|, |b|, rounded up
  float slack = 0;
  // [a, b] for rho and sigma: rest_unit * (256 high + low), in the order of sigma. Numbers of its bytes 64 i ..,
  // bits 2 s and 2 s + 1, meet the 64 from planes + 256 i + 64 s on (high), and those plane_bytes() later (low); zeros
  // meet what is no number.
  int8_t* planes = nullptr;  // (2, plane_bytes())
  float rest_unit = 0;
  // For each ScanPart, and a step of 1: 1.5 times the sum of its numbers, and what rounding adds to their products.
  float middle[kScanParts] = {};
  float step_slack[kScanParts] = {};
};

/// Fills in what belongs to x (columns), whose quantised form is in input.x already, and input.planes.
void bound_scan(const HeadScan& head, const float* x, ScanInput& input);

}  // namespace gemma_torch::kernels
