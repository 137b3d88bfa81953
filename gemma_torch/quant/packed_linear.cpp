#include "gemma_torch/quant/packed_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <vector>

#include "gemma_torch/base/error.h"
#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch {

using kernels::Format;
using kernels::Packed;

PackedLinearImpl::PackedLinearImpl(
    int64_t in, int64_t out, Format format, int64_t slice, torch::Tensor given)
    : cells(std::move(given)), format_(format), slice_(slice) {
  in_features = in;
  out_features = out;
  check(out % kernels::kBlockRows == 0 && slice > 0 && in % slice == 0 &&
            slice % kernels::kSliceColumns == 0,
        "[packed_linear] expected out a multiple of 16 and in of slices of 64, got {} and {} ({})",
        out,
        in,
        slice);
  const auto expected =
      out / kernels::kBlockRows * (in / slice) * kernels::cell_bytes(format, slice);
  check(cells.scalar_type() == torch::kByte && cells.numel() == expected && cells.is_contiguous(),
        "[packed_linear] cells: expected {} bytes, got {}",
        expected,
        cells.numel());
  register_buffer("cells", cells);
}

Packed PackedLinearImpl::packed() const {
  Packed w;
  w.format = format_;
  w.rows = out_features;
  w.columns = in_features;
  w.slice = slice_;
  w.cells = cells.const_data_ptr<uint8_t>();
  return w;
}

torch::Tensor PackedLinearImpl::unpacked() const {
  const auto w = packed();
  const auto& kernel = kernels::fused_kernels(kernels::best_isa());
  auto panels = at::empty({w.blocks(), w.columns, kernels::kBlockRows}, torch::kFloat);
  for (int64_t b = 0; b < w.blocks(); ++b) {
    kernel.panel_f32(w, b, panels.mutable_data_ptr<float>() + b * w.columns * kernels::kBlockRows);
  }
  return panels.transpose(1, 2).reshape({w.rows, w.columns});
}

torch::Tensor PackedLinearImpl::forward(const torch::Tensor& x) {
  return at::linear(x, unpacked().to(x.scalar_type()));
}

}  // namespace gemma_torch
