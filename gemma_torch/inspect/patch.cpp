#include "gemma_torch/inspect/patch.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/mix.h"

namespace gemma_torch {
namespace {

// Places of the axes that a part is cut from.
struct Axes {
  explicit Axes(Site site) : tokens(site_axis(site, "T")), heads(site_axis(site, "HG")) {}
  int64_t tokens, heads;  // -1: the site has none
  static constexpr int64_t kChannels = -1;
};

void check_index(const std::string& where, const char* what, int64_t got, int64_t size) {
  check(got >= 0 && got < size,
        "[patch] {}: {}: expected 0 to {}, got {}",
        where,
        what,
        size - 1,
        got);
}

void check_part(const std::string& where,
                const Part& part,
                const Axes& axes,
                const std::vector<int64_t>& shape) {
  const auto size = [&](int64_t axis) { return shape[static_cast<size_t>(axis)]; };
  const auto channels = shape.back();
  for (const auto position : part.positions) {
    check_index(where, "position", position, size(axes.tokens));
  }
  if (part.head) {
    check(axes.heads >= 0,
          "[patch] {}: head: expected a site with heads (q, k, v, rot_q, rot_k, scores, pattern, "
          "z), got {}",
          where,
          *part.head);
    check_index(where, "head", *part.head, size(axes.heads));
  }
  if (part.channels) {
    const auto [first, last] = *part.channels;
    check_index(where, "first channel", first, channels);
    check_index(where, "last channel", last, channels);
    check(first <= last, "[patch] {}: channels: expected {} or more, got {}", where, first, last);
  }
}

// The value with all its axes, the absent ones of size 1.
at::Tensor with_all_axes(const std::string& where,
                         const at::Tensor& value,
                         const std::vector<int64_t>& shape) {
  const auto rank = static_cast<int64_t>(shape.size());
  check(value.defined(), "[patch] {}: value: expected a tensor, got none", where);
  bool fits = value.dim() <= rank;
  for (int64_t axis = 1; fits && axis <= value.dim(); ++axis) {
    const auto size = value.size(-axis);
    fits = size == 1 || size == shape[static_cast<size_t>(rank - axis)];
  }
  check(fits,
        "[patch] {}: value: expected {} or 1 along an axis, got {}. Hint: another prompt has to "
        "have as many tokens",
        where,
        shape_str(shape),
        shape_str(value.sizes()));
  auto sizes = value.sizes().vec();
  sizes.insert(sizes.begin(), shape.size() - sizes.size(), 1);
  return value.view(sizes);
}

void check_edit(Edit& edit, const Gemma3Config& cfg, int64_t T) {
  const auto where = edit.site.name();
  const bool in_layers = is_in_layers(edit.site.site);
  check(in_layers ? edit.site.layer >= 0 && edit.site.layer < cfg.n_layers : edit.site.layer == -1,
        "[patch] {}: layer: expected {}, got {}",
        where,
        in_layers ? fmt::format("0 to {}", cfg.n_layers - 1) : "-1",
        edit.site.layer);
  const auto shape = site_shape(edit.site.site, cfg, /*B=*/1, T);
  check_part(where, edit.part, Axes(edit.site.site), shape);
  if (edit.with.fill == Fill::kValue) {
    edit.with.value = with_all_axes(where, edit.with.value, shape);
  }
  const bool noise = edit.with.fill == Fill::kNoise || edit.with.fill == Fill::kAddNoise;
  check(!noise || (std::isfinite(edit.with.std) && edit.with.std >= 0),
        "[patch] {}: noise: expected a standard deviation of 0 or more, got {}",
        where,
        edit.with.std);
}

// Row, head and channels of x; an axis of size 1 serves all of them.
at::Tensor cut(at::Tensor x, const Part& part, const Axes& axes) {
  const auto narrow = [&](int64_t axis, int64_t first, int64_t count) {
    x = x.size(axis) > 1 ? x.narrow(axis, first, count) : x;
  };
  if (part.row >= 0) {
    narrow(/*axis=*/0, part.row, 1);
  }
  if (part.head) {
    narrow(axes.heads, *part.head, 1);
  }
  if (part.channels) {
    narrow(Axes::kChannels, part.channels->first, part.channels->second - part.channels->first + 1);
  }
  return x;
}

// Noise like `part`, whose tokens stand at `positions`: the same in each row, and of every position
// from its own seed, so that it depends neither on which others are edited nor on a pass's length.
at::Tensor noise(const Edit& edit, const at::Tensor& part, const at::Tensor& positions) {
  const auto axis = Axes(edit.site.site).tokens;
  auto sizes = part.sizes().vec();
  sizes[0] = 1;
  auto drawn = at::empty(sizes, c10::kFloat);
  const auto seed =
      mix(mix(edit.with.seed, static_cast<int64_t>(edit.site.site)), edit.site.layer + 1);
  sizes[static_cast<size_t>(axis)] = 1;
  for (int64_t i = 0; i < positions.numel(); ++i) {
    const auto position = positions.const_data_ptr<int64_t>()[i];
    const auto one = at::randn(sizes, at::detail::createCPUGenerator(mix(seed, position)));
    drawn.narrow(axis, i, 1).copy_(one * edit.with.std);
  }
  return drawn.to(part.options());  // float32 until here: the same numbers for any dtype and device
}

// The same part of the edit's own value.
at::Tensor value_at(const Edit& edit, const at::Tensor& part, const at::Tensor& positions) {
  const Axes axes(edit.site.site);
  auto value = edit.with.value;
  if (value.size(axes.tokens) > 1) {
    const auto last = positions.max().item<int64_t>();
    check_index(edit.site.name(), "position of the value", last, value.size(axes.tokens));
    value = value.index_select(axes.tokens, positions.to(value.device()));
  }
  value = cut(value, Part{.head = edit.part.head, .channels = edit.part.channels}, axes);
  check(at::is_expandable_to(value.sizes(), part.sizes()),
        "[patch] {}: value: expected {}, got {}",
        edit.site.name(),
        shape_str(part.sizes()),
        shape_str(value.sizes()));
  return value.to(part.options());  // a file may hold another dtype than the model computes in
}

// Indices of the positions asked for among those of the pass.
at::Tensor places_of(const std::vector<int64_t>& wanted, const at::Tensor& positions) {
  std::vector<int64_t> found;
  const auto* at = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), at[i]) != wanted.end()) {
      found.push_back(i);
    }
  }
  return at::tensor(found, at::kLong);
}

// Writes the edit into y, whose tokens stand at `positions` (CPU).
void apply(const Edit& edit, const at::Tensor& y, const at::Tensor& positions) {
  const Axes axes(edit.site.site);
  check(edit.part.row < y.size(0),
        "[patch] {}: row: expected -1 to {}, got {}",
        edit.site.name(),
        y.size(0) - 1,
        edit.part.row);
  const auto places = places_of(edit.part.positions, positions);
  if (places.numel() == 0) {
    return;
  }
  const auto there = positions.index_select(0, places);
  const auto index = places.to(y.device());
  const auto target = cut(y, edit.part, axes);  // a view of y
  const auto part = target.index_select(axes.tokens, index);
  const auto filling = [&]() -> at::Tensor {
    switch (edit.with.fill) {
      case Fill::kZero:
        return at::zeros_like(part);
      case Fill::kMean:
        return target.mean(axes.tokens, /*keepdim=*/true);
      case Fill::kNoise:
        return noise(edit, part, there);
      case Fill::kAddNoise:
        return part + noise(edit, part, there);
      case Fill::kValue:
        break;
    }
    return value_at(edit, part, there);
  }();
  target.index_copy_(axes.tokens, index, filling.expand(part.sizes()));
}

}  // namespace

Probe edits_probe(std::vector<Edit> edits, const Gemma3Config& cfg, int64_t T) {
  for (auto& edit : edits) {
    check_edit(edit, cfg, T);
  }
  return [edits = std::move(edits)](const At& at, const at::Tensor& x) {
    at::Tensor y, positions;
    for (const auto& edit : edits) {
      if (edit.site.site != at.site || edit.site.layer != at.layer) {
        continue;
      }
      if (!y.defined()) {
        y = x.clone();
        positions = at.positions.cpu().contiguous();
      }
      apply(edit, y, positions);
    }
    return y.defined() ? y : x;
  };
}

TensorMap site_values(Gemma3Model model, const at::Tensor& ids, const std::vector<SiteAt>& sites) {
  check(ids.dim() == 2 && ids.size(0) == 1,
        "[patch] ids: expected (1, T), got {}",
        shape_str(ids.sizes()));
  const at::NoGradGuard no_grad;
  TensorMap values;
  bool logits = false;
  for (const auto& site : sites) {
    values[site.name()] = at::Tensor();
    logits |= site.site == Site::kLogits;
  }
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    const auto found = values.find(site_name(at.site, at.layer));
    if (found != values.end()) {
      found->second = value;  // nothing writes to it later
    }
    return value;
  };
  if (logits) {
    model->forward(ids, /*cache=*/nullptr, probe);
  } else {
    model->hidden(ids, /*cache=*/nullptr, probe);
  }
  return values;
}

}  // namespace gemma_torch
