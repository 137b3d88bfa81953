#pragma once

#include <cstdint>

#include "gemma_torch/kernels/cpu/isa.h"
#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch::kernels {

/// Kernels over rows of numbers, for one instruction set. Sums are in float32 whatever the numbers are. None
/// allocates, none starts threads: callers share rows out among theirs.
struct RowKernels {
  Isa isa;
  /// y[r] = sum over j of w[r, j] x[j], w (rows, columns) row-major.
  void (*gemv_f32)(const float* w, const float* x, float* y, int64_t rows, int64_t columns);
  void (*gemv_bf16)(const Bf16* w, const float* x, Bf16* y, int64_t rows, int64_t columns);
  /// y[r, j] = x[r, j] / sqrt(mean over j of x[r, j]^2 + eps) * (1 + scale[j]).
  void (*rms_norm_f32)(
      const float* x, const float* scale, float* y, int64_t rows, int64_t columns, double eps);
  void (*rms_norm_bf16)(
      const Bf16* x, const Bf16* scale, Bf16* y, int64_t rows, int64_t columns, double eps);
  /// One rotated head per row: y[j] = x[j] cos[j] - x[j + n/2] sin[j] in the first half of the n columns, and
  /// y[j] = x[j] cos[j] + x[j - n/2] sin[j] in the second.
  void (*rope_f32)(
      const float* x, const float* cos, const float* sin, float* y, int64_t rows, int64_t columns);
  void (*rope_bf16)(
      const Bf16* x, const float* cos, const float* sin, Bf16* y, int64_t rows, int64_t columns);
  /// y[j] = x[j], exactly.
  void (*widen_bf16)(const Bf16* x, float* y, int64_t count);
};

/// Those of the widest instruction set that this CPU has.
const RowKernels& row_kernels();

/// Those of one instruction set, or of the next narrower one that there are any for. The caller sees to it that
/// has_isa(isa).
const RowKernels& row_kernels(Isa isa);

}  // namespace gemma_torch::kernels
