#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch {

/// A matrix (rows, columns) as codes, row by row, and a scale for each group of a row.
struct Codes {
  kernels::Format format;
  int64_t rows, columns;
  std::vector<uint8_t> codes;         // (rows, columns)
  std::vector<kernels::Bf16> scales;  // (rows, columns / group_columns(format))
};

/// One cell of 16 rows of bfloat16 as kInt8, each number to the nearest code. A group's largest number has one of the
/// codes that reach furthest, -128 or 127, whichever gives the smaller sum of squares.
void round_cell(const kernels::Bf16* const* rows, int64_t columns, uint8_t* cell);

/// (out, in) bfloat16 as cells of kInt8, see kernels/cpu/packed.h: (bytes) uint8.
at::Tensor round_matrix(const at::Tensor& weight, int64_t slice);

/// The cells of codes.
at::Tensor lay_out(const Codes& codes, int64_t slice);

}  // namespace gemma_torch
