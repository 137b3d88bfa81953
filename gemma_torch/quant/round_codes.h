#pragma once

#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch {

/// Codes and scale of one group: n numbers to the nearest codes of a kIntN format. Of some scales below the one that
/// just holds the largest number, of both signs (an offset-binary code reaches one further down than up), it takes the
/// one with the least sum of weights[j] * error^2; null weights are ones.
kernels::Bf16 round_group(
    const float* x, const float* weights, int64_t n, kernels::Format format, uint8_t* codes);

/// One cell of 16 rows of bfloat16, group by group.
void round_cell(const kernels::Bf16* const* rows,
                kernels::Format format,
                int64_t columns,
                uint8_t* cell);

/// The number a code stands for, in units of its scale.
int code_offset(kernels::Format format);
int code_bits(kernels::Format format);

}  // namespace gemma_torch
