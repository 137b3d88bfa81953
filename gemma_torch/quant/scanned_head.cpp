#include "gemma_torch/quant/scanned_head.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::kBlockRows;

// How large the head's inputs are by column (E), as far as the norms tell: what a layer adds has the sizes |1 + weight|
// of the norm behind it, and the final norm scales their sum. On Gemma 3 270M, over 1,391 positions of text, the 32
// columns that come out largest have 57 % of the inputs' squares; the best 32 have 59 %, and finding them takes a pass
// through the model.
at::Tensor column_sizes(const Gemma3Model& model) {
  const auto sizes = [](const RMSNorm& norm) {
    return (norm->scale.detach().to(at::kFloat) + 1.0).abs();
  };
  auto sum = at::zeros({model->cfg.emb_dim});
  for (const auto& module : *model->blocks) {
    const auto& block = *module->as<TransformerBlockImpl>();
    sum += sizes(block.post_attention_layernorm) + sizes(block.post_feedforward_layernorm);
  }
  return sum * sizes(model->final_norm);
}

at::Tensor column_order(const Gemma3Model& model) {
  const auto by_size = column_sizes(model).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  auto order = by_size.to(at::kInt);
  kernels::HeadScan shape;
  shape.columns = order.numel();
  // The outliers; the larger ones of the others, then the smaller ones, in their own order.
  auto* first = order.mutable_data_ptr<int32_t>();
  auto* const minor = first + kernels::kScanOutliers + 32 * shape.major_groups();
  std::sort(first + kernels::kScanOutliers, minor);
  std::sort(minor, first + order.numel());
  return order.clone();
}

}  // namespace

kernels::HeadScan ScanTensors::view() const {
  kernels::HeadScan head;
  head.columns = order.numel();
  head.order = order.const_data_ptr<int32_t>();
  head.blocks = blocks.const_data_ptr<uint8_t>();
  head.residuals = residuals.const_data_ptr<uint8_t>();
  head.rows = blocks.numel() / head.stride() * kBlockRows;
  head.largest_norm = *largest_norm.const_data_ptr<float>();  // not item(): every token asks
  return head;
}

ScannedHeadImpl::ScannedHeadImpl(int64_t in, int64_t out, ScanTensors given)
    : scan(std::move(given)) {
  in_features = in;
  out_features = out;
  kernels::HeadScan shape;
  shape.columns = in;
  const auto blocks = (out + kBlockRows - 1) / kBlockRows;
  shape.rows = blocks * kBlockRows;
  const auto check_bytes = [](const char* name, const at::Tensor& tensor, int64_t bytes) {
    check(tensor.scalar_type() == at::kByte && tensor.is_contiguous() && tensor.numel() == bytes,
          "[scan] {}: expected {} bytes, got {} of {}",
          name,
          bytes,
          tensor.numel(),
          c10::toString(tensor.scalar_type()));
  };
  check_bytes("scan_blocks", scan.blocks, blocks * shape.stride());
  check_bytes("scan_residuals", scan.residuals, shape.residual_bytes());
  check(scan.order.scalar_type() == at::kInt && scan.order.numel() == in &&
            at::equal(std::get<0>(scan.order.sort()), at::arange(in, at::kInt)),
        "[scan] scan_order: expected the {} columns, each once",
        in);
  check(scan.largest_norm.scalar_type() == at::kFloat && scan.largest_norm.numel() == 1 &&
            scan.largest_norm.item<float>() >= 0,
        "[scan] scan_largest_norm: expected one number of at least 0");
  register_buffer("scan_blocks", scan.blocks);
  register_buffer("scan_residuals", scan.residuals);
  register_buffer("scan_order", scan.order);
  register_buffer("scan_largest_norm", scan.largest_norm);
}

bool can_scan(const Gemma3Model& model) {
  const auto& weight = model->out_head->weight;
  return weight.defined() && weight.device().is_cpu() && weight.scalar_type() == at::kBFloat16 &&
         weight.is_contiguous() && weight.size(1) % 64 == 0;
}

ScanTensors make_scan(const Gemma3Model& model) {
  check(can_scan(model),
        "[make_scan] expected a head in bfloat16 on the CPU, of 64 columns or a multiple");
  const auto weight = model->out_head->weight.detach();
  const auto rows = weight.size(0);
  const auto columns = weight.size(1);
  const auto count = (rows + kBlockRows - 1) / kBlockRows;
  ScanTensors scan;
  scan.order = column_order(model);
  kernels::HeadScan shape;
  shape.columns = columns;
  shape.rows = count * kBlockRows;
  scan.blocks = zeros_on_large_pages({count * shape.stride()}, at::kByte);
  scan.residuals = zeros_on_large_pages({shape.residual_bytes()}, at::kByte);
  const auto* table = static_cast<const Bf16*>(weight.const_data_ptr());
  const auto* order = scan.order.const_data_ptr<int32_t>();
  auto* blocks = scan.blocks.mutable_data_ptr<uint8_t>();
  auto* residuals = scan.residuals.mutable_data_ptr<uint8_t>();
  const auto& kernel = kernels::fused_kernels(kernels::best_isa());
  std::mutex mutex;
  float largest = 0;
  at::parallel_for(0, count, /*grain_size=*/64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(5 * columns));
    float most = 0;
    for (int64_t b = begin; b < end; ++b) {
      const Bf16* pointers[kBlockRows];
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const auto row = b * kBlockRows + r;
        pointers[r] = row < rows ? table + row * columns : nullptr;
      }
      most = std::max(most,
                      kernel.encode_scan(pointers,
                                         order,
                                         columns,
                                         blocks + b * shape.stride(),
                                         residuals + b * kBlockRows * shape.major_bytes(),
                                         residuals + shape.other_at(b * kBlockRows),
                                         scratch.data()));
    }
    const std::lock_guard lock(mutex);
    largest = std::max(largest, most);
  });
  scan.largest_norm = at::full({1}, largest);
  return scan;
}

}  // namespace gemma_torch
