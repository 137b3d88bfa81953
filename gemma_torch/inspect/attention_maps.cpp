#include "gemma_torch/inspect/attention_maps.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/xlogy.h>

#include <algorithm>
#include <numeric>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

// Those asked for, in order and once; all n where none were.
std::vector<int64_t> chosen(const char* what, std::vector<int64_t> asked, int64_t n) {
  if (asked.empty()) {
    asked.resize(static_cast<size_t>(n));
    std::iota(asked.begin(), asked.end(), int64_t{0});
  }
  for (const auto i : asked) {
    check(i >= 0 && i < n, "[attention] {}: expected 0 to {}, got {}", what, n - 1, i);
  }
  std::sort(asked.begin(), asked.end());
  asked.erase(std::unique(asked.begin(), asked.end()), asked.end());
  return asked;
}

at::Tensor pooled(const at::Tensor& pattern, int64_t max_pixels) {
  const auto side = (pattern.size(0) + max_pixels - 1) / max_pixels;  // tokens of a pixel
  if (side == 1) {
    return pattern;
  }
  return at::max_pool2d(pattern.unsqueeze(0), side, side, /*padding=*/0, /*dilation=*/1, true)[0];
}

AttentionMap map_of(const at::Tensor& pattern, int64_t max_pixels) {  // (T, T)
  const auto rest = pattern.narrow(/*dim=*/0, 1, pattern.size(0) - 1);
  const auto mean = [](const at::Tensor& x) { return x.mean(at::kDouble).item<double>(); };
  return {.pixels = pooled(pattern, max_pixels).clone(),
          .to_first = mean(rest.select(/*dim=*/1, 0)),
          .to_previous = mean(rest.diagonal()),
          .to_self = mean(pattern.diagonal().narrow(/*dim=*/0, 1, pattern.size(0) - 1)),
          .entropy = -mean(at::xlogy(rest, rest).sum(/*dim=*/1))};
}

}  // namespace

std::vector<AttentionMap> attention_maps(Gemma3Model model,
                                         const std::vector<int64_t>& ids,
                                         const AttentionOptions& options) {
  const auto input = prompt_row("attention", ids, model);
  check(ids.size() >= 2, "[attention] prompt: expected at least 2 tokens, got 1");
  check(options.max_pixels >= 1,
        "[attention] max_pixels: expected at least 1, got {}",
        options.max_pixels);
  const auto layers = chosen("layers", options.layers, model->cfg.n_layers);
  const auto heads = chosen("heads", options.heads, model->cfg.n_heads);
  const auto from =
      checked_position("attention", options.from.value_or(0), static_cast<int64_t>(ids.size()));
  const at::NoGradGuard no_grad;
  std::vector<AttentionMap> maps;
  const Probe probe = [&](const At& at, const at::Tensor& x) {
    if (at.site == Site::kPattern && std::binary_search(layers.begin(), layers.end(), at.layer)) {
      const auto patterns = x[0].to(at::kCPU, at::kFloat);  // (H, T, T)
      for (const auto head : heads) {
        maps.push_back(map_of(patterns[head], options.max_pixels));
        maps.back().layer = at.layer;
        maps.back().head = head;
        maps.back().weights = options.from ? patterns[head][from].clone() : at::Tensor();
      }
    }
    return x;
  };
  model->hidden(input, /*cache=*/nullptr, probe);
  return maps;
}

}  // namespace gemma_torch
