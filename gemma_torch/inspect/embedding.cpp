#include "gemma_torch/inspect/embedding.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <numeric>

#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

using Texts = std::vector<std::vector<int64_t>>;

constexpr int64_t kPadding = 0;  // any id: nothing sees it

void check_texts(const Gemma3Config& cfg, const Texts& texts, const EmbedOptions& options) {
  check(!texts.empty(), "[embed] texts: expected at least one, got none");
  check(options.batch >= 1, "[embed] batch: expected at least 1, got {}", options.batch);
  check(options.skip >= 0, "[embed] skip: expected at least 0, got {}", options.skip);
  for (const auto layer : options.layers) {
    check(layer >= 0 && layer < cfg.n_layers,
          "[embed] layers: expected 0 to {}, got {}",
          cfg.n_layers - 1,
          layer);
  }
  const auto least = options.pooling == Pooling::kLast ? 1 : options.skip + 1;
  for (size_t n = 0; n < texts.size(); ++n) {
    const auto tokens = static_cast<int64_t>(texts[n].size());
    check(tokens >= least,
          "[embed] text {}: expected at least {} token{}, got {}",
          n,
          least,
          least == 1 ? "" : "s",
          tokens);
    check_ids("embed", fmt::format("text {}", n), texts[n], cfg.vocab_size);
  }
}

// Texts in order of length, so that those of a batch need little padding.
std::vector<size_t> by_length(const Texts& texts) {
  std::vector<size_t> order(texts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return texts[a].size() < texts[b].size();
  });
  return order;
}

// Weight of each token in its text's vector, (B, 1, T): 0 for padding, each text's summing to 1.
at::Tensor pooling_weights(const at::Tensor& lengths,
                           const at::Tensor& positions,
                           const EmbedOptions& options) {
  const auto length = lengths.unsqueeze(1);      // (B, 1)
  const auto position = positions.unsqueeze(0);  // (1, T)
  if (options.pooling == Pooling::kLast) {
    return position.eq(length - 1).to(at::kDouble).unsqueeze(1);
  }
  const auto pooled = position.lt(length).logical_and(position.ge(options.skip));
  const auto count = (length - options.skip).to(at::kDouble);
  const auto weights =
      options.pooling == Pooling::kMean
          ? count.reciprocal().expand({-1, positions.size(0)})
          : (position - options.skip + 1).to(at::kDouble) / (count * (count + 1) / 2);
  return weights.mul(pooled).unsqueeze(1);
}

// The vectors of a batch, (B, E) float64, before they are normalised.
class Pooler {
 public:
  Pooler(const EmbedOptions& options, at::Tensor lengths, int64_t E)
      : options_(options),
        lengths_(std::move(lengths)),
        sum_(at::zeros({lengths_.size(0), E}, at::kDouble)) {}

  void visit(const At& at, const at::Tensor& value) {
    if (!wants(at)) {
      return;
    }
    const auto weights = pooling_weights(lengths_, at.positions.to(at::kCPU), options_);
    sum_.add_(at::bmm(weights, value.to(at::kCPU, at::kDouble)).squeeze(1));
  }

  at::Tensor vectors() const {
    return sum_ / static_cast<double>(std::max<size_t>(options_.layers.size(), 1));
  }

 private:
  bool wants(const At& at) const {
    const auto& layers = options_.layers;
    return layers.empty() ? at.site == Site::kFinalNorm
                          : at.site == Site::kResidPost &&
                                std::count(layers.begin(), layers.end(), at.layer) > 0;
  }

  const EmbedOptions& options_;
  at::Tensor lengths_;  // (B) int64
  at::Tensor sum_;
};

at::Tensor embed_batch(const Gemma3Model& model, const Texts& texts, const EmbedOptions& options) {
  const auto B = static_cast<int64_t>(texts.size());
  const auto longest = static_cast<int64_t>(texts.back().size());
  std::vector<int64_t> padded, lengths;
  for (const auto& text : texts) {
    padded.insert(padded.end(), text.begin(), text.end());
    padded.insert(padded.end(), static_cast<size_t>(longest) - text.size(), kPadding);
    lengths.push_back(static_cast<int64_t>(text.size()));
  }
  Pooler pooler(options, at::tensor(lengths, at::kLong), model->cfg.emb_dim);
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    pooler.visit(at, value);
    return value;
  };
  const auto engine = make_engine(
      model, {.kind = EngineKind::kEager, .capacity = longest, .batch = B, .probe = probe});
  engine->append(at::tensor(padded, at::kLong).view({B, longest}));
  return pooler.vectors();
}

}  // namespace

at::Tensor embed(Gemma3Model model, const Texts& texts, const EmbedOptions& options) {
  const c10::InferenceMode inference;
  check_texts(model->cfg, texts, options);
  const auto order = by_length(texts);
  auto vectors = at::zeros({static_cast<int64_t>(texts.size()), model->cfg.emb_dim}, at::kFloat);
  for (size_t start = 0; start < order.size(); start += static_cast<size_t>(options.batch)) {
    const auto end = std::min(order.size(), start + static_cast<size_t>(options.batch));
    Texts batch;
    for (size_t n = start; n < end; ++n) {
      batch.push_back(texts[order[n]]);
    }
    const auto found = embed_batch(model, batch, options);
    for (size_t n = start; n < end; ++n) {
      vectors[static_cast<int64_t>(order[n])].copy_(found[static_cast<int64_t>(n - start)]);
    }
    if (options.on_progress) {
      options.on_progress(static_cast<int64_t>(end), static_cast<int64_t>(order.size()));
    }
  }
  return options.normalize ? unit_rows(vectors) : vectors;
}

at::Tensor unit_rows(const at::Tensor& x) {
  const auto wide = x.to(at::kDouble);
  const auto length = at::linalg_vector_norm(wide, 2, at::IntArrayRef{-1}, /*keepdim=*/true);
  return (wide / length.clamp_min(1e-300)).to(at::kFloat);
}

Neighbours nearest_rows(const at::Tensor& table, const at::Tensor& queries, int64_t k) {
  const c10::InferenceMode inference;
  const auto V = table.size(0);
  check(k >= 1 && k <= V, "[nearest] count: expected 1 to {}, got {}", V, k);
  check(queries.dim() == 2 && queries.size(1) == table.size(1),
        "[nearest] queries: expected {} columns, got {}",
        table.size(1),
        queries.size(-1));
  constexpr int64_t kRows = 8192;
  const auto directions = unit_rows(queries).t();  // (E, Q)
  Neighbours best;
  for (int64_t begin = 0; begin < V; begin += kRows) {
    const auto rows = table.narrow(/*dim=*/0, begin, std::min(kRows, V - begin)).to(at::kCPU);
    auto similarity = at::matmul(unit_rows(rows), directions).t();  // (Q, rows)
    auto [values, ids] = similarity.topk(std::min(k, rows.size(0)), /*dim=*/1);
    ids = ids + begin;
    if (best.ids.defined()) {
      values = at::cat({best.similarity, values}, /*dim=*/1);
      ids = at::cat({best.ids, ids}, /*dim=*/1);
    }
    const auto [kept, places] = values.topk(std::min(k, values.size(1)), /*dim=*/1);
    best = {ids.gather(/*dim=*/1, places), kept};
  }
  return best;
}

PrincipalAxes principal_axes(const at::Tensor& rows, int64_t k) {
  const c10::InferenceMode inference;
  const auto most = std::min(rows.size(0) - 1, rows.size(1));
  check(k >= 1 && k <= most, "[pca] axes: expected 1 to {}, got {}", most, k);
  const auto x = rows.to(at::kCPU, at::kDouble);
  const auto centred = x - x.mean(/*dim=*/0, /*keepdim=*/true);
  const auto [u, s, vh] = at::linalg_svd(centred, /*full_matrices=*/false);
  const auto axes = vh.narrow(/*dim=*/0, 0, k);  // (k, E)
  const auto largest = axes.abs().argmax(/*dim=*/1, /*keepdim=*/true);
  const auto signs = axes.gather(/*dim=*/1, largest).sign();  // (k, 1)
  const auto variance = s.square();
  return {at::matmul(centred, (axes * signs).t()),
          variance.narrow(/*dim=*/0, 0, k) / variance.sum().clamp_min(1e-300)};
}

}  // namespace gemma_torch
