#include "gemma_torch/quant/scanned_head.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <mutex>
#include <random>
#include <vector>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::kBlockRows;

// Hidden states (rows, E) float32 of short runs of random tokens: 8 of 8. More find the same outliers.
at::Tensor sample_hidden(Gemma3Model& model) {
  constexpr int64_t kRuns = 8, kTokens = 8, kBos = 2;
  std::mt19937 random(1);
  auto ids = at::empty({kRuns, kTokens}, at::kLong);
  auto* id = ids.mutable_data_ptr<int64_t>();
  const auto vocab = model->cfg.vocab_size;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    id[i] = i % kTokens == 0 ? std::min(kBos, vocab - 1) : static_cast<int64_t>(random()) % vocab;
  }
  const c10::InferenceMode inference;
  const auto hidden = model->hidden(ids).to(at::kFloat);
  return hidden.narrow(/*dim=*/1, 1, kTokens - 1).reshape({-1, hidden.size(2)});
}

at::Tensor column_order(Gemma3Model& model) {
  const auto squares = sample_hidden(model).square().sum(/*dim=*/0);
  const auto by_size = squares.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  // The outliers, then the others in their own order.
  auto order = by_size.to(at::kInt);
  auto* first = order.mutable_data_ptr<int32_t>();
  std::sort(first + kernels::kScanOutliers, first + order.numel());
  return order.clone();
}

}  // namespace

kernels::HeadScan ScanTensors::view() const {
  kernels::HeadScan head;
  head.columns = order.numel();
  head.order = order.const_data_ptr<int32_t>();
  head.blocks = blocks.const_data_ptr<uint8_t>();
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
  check(scan.blocks.scalar_type() == at::kByte && scan.blocks.is_contiguous() &&
            scan.blocks.numel() == blocks * shape.stride(),
        "[scan] scan_blocks: expected {} bytes, got {} of {}",
        blocks * shape.stride(),
        scan.blocks.numel(),
        c10::toString(scan.blocks.scalar_type()));
  check(scan.order.scalar_type() == at::kInt && scan.order.numel() == in &&
            at::equal(std::get<0>(scan.order.sort()), at::arange(in, at::kInt)),
        "[scan] scan_order: expected the {} columns, each once",
        in);
  check(scan.largest_norm.scalar_type() == at::kFloat && scan.largest_norm.numel() == 1 &&
            scan.largest_norm.item<float>() >= 0,
        "[scan] scan_largest_norm: expected one number of at least 0");
  register_buffer("scan_blocks", scan.blocks);
  register_buffer("scan_order", scan.order);
  register_buffer("scan_largest_norm", scan.largest_norm);
}

bool can_scan(const Gemma3Model& model) {
  const auto& weight = model->out_head->weight;
  return weight.defined() && weight.device().is_cpu() && weight.scalar_type() == at::kBFloat16 &&
         weight.is_contiguous() && weight.size(1) % 64 == 0;
}

ScanTensors make_scan(Gemma3Model model) {
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
  scan.blocks = zeros_on_large_pages({count * shape.stride()}, at::kByte);
  const auto* table = static_cast<const Bf16*>(weight.const_data_ptr());
  const auto* order = scan.order.const_data_ptr<int32_t>();
  auto* blocks = scan.blocks.mutable_data_ptr<uint8_t>();
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
                      kernel.encode_scan(
                          pointers, order, columns, blocks + b * shape.stride(), scratch.data()));
    }
    const std::lock_guard lock(mutex);
    largest = std::max(largest, most);
  });
  scan.largest_norm = at::full({1}, largest);
  return scan;
}

}  // namespace gemma_torch
