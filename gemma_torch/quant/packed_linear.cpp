#include "gemma_torch/quant/packed_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/BFloat16.h>
#include <torch/csrc/autograd/custom_function.h>

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

namespace {

// sizes: out, in, slice.
Packed packed_of(const torch::Tensor& cells, Format format, const std::vector<int64_t>& sizes) {
  Packed w;
  w.format = format;
  w.rows = sizes[0];
  w.columns = sizes[1];
  w.slice = sizes[2];
  w.cells = cells.const_data_ptr<uint8_t>();
  return w;
}

// Rows 16 block .. of w, to `to` (16, columns). `panel` has room for them in the kernels' order.
template <typename T, typename Narrow>
void unpack_block(
    const Packed& w, int64_t block, std::vector<float>& panel, T* to, const Narrow& narrow) {
  kernels::fused_kernels(kernels::best_isa()).panel_f32(w, block, panel.data());
  for (int64_t r = 0; r < kernels::kBlockRows; ++r) {
    const float* from = panel.data() + r;
    for (int64_t c = 0; c < w.columns; ++c) {
      to[r * w.columns + c] = narrow(from[c * kernels::kBlockRows]);
    }
  }
}

// (out, in), in float32 or bfloat16.
torch::Tensor unpack(const Packed& w, at::ScalarType dtype) {
  const auto unpacked = at::empty({w.rows, w.columns}, dtype);
  auto* to = unpacked.mutable_data_ptr();
  const auto size = kernels::kBlockRows * w.columns;
  at::parallel_for(0, w.blocks(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(static_cast<size_t>(size));
    for (auto b = begin; b < end; ++b) {
      if (dtype == at::kFloat) {
        unpack_block(w, b, panel, static_cast<float*>(to) + b * size, [](float x) { return x; });
      } else {
        unpack_block(w, b, panel, static_cast<c10::BFloat16*>(to) + b * size, [](float x) {
          return c10::BFloat16(x);
        });
      }
    }
  });
  return unpacked;
}

// x W^T, which unpacks W again for its gradient: autograd would keep the unpacked weights of a whole pass.
struct Product : torch::autograd::Function<Product> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context,
                               const torch::Tensor& x,
                               const torch::Tensor& cells,
                               const Packed& w) {
    context->save_for_backward({cells});
    context->saved_data["format"] = static_cast<int64_t>(w.format);
    context->saved_data["sizes"] = std::vector<int64_t>{w.rows, w.columns, w.slice};
    return at::linear(x, unpack(w, x.scalar_type()));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& slopes) {
    const auto cells = context->get_saved_variables()[0];
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const auto w =
        packed_of(cells, static_cast<Format>(context->saved_data["format"].toInt()), sizes);
    return {slopes[0].matmul(unpack(w, slopes[0].scalar_type())), {}, {}};
  }
};

}  // namespace

Packed PackedLinearImpl::packed() const {
  return packed_of(cells, format_, {out_features, in_features, slice_});
}

torch::Tensor PackedLinearImpl::unpacked() const {
  return unpack(packed(), at::kFloat);
}

torch::Tensor PackedLinearImpl::forward(const torch::Tensor& x) {
  if (torch::GradMode::is_enabled() && x.requires_grad()) {
    return Product::apply(x, cells, packed());
  }
  return at::linear(x, unpack(packed(), x.scalar_type()));
}

}  // namespace gemma_torch
