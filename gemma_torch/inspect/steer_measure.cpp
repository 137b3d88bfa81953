#include "gemma_torch/inspect/steer_measure.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

using Prompts = std::vector<std::vector<int64_t>>;

void check_some(const std::vector<int64_t>& ids, const char* what, int64_t vocab_size) {
  check(!ids.empty(), "[steer] {}: expected at least one token, got none", what);
  check_ids("steer", what, ids, vocab_size);
}

// ln P of every next token, (V) float64.
at::Tensor next_log_probs(Gemma3Model& model, const std::vector<int64_t>& ids, const Probe& probe) {
  const auto device = model->tok_emb->weight.device();
  const auto row = at::tensor(ids, at::kLong).unsqueeze(0).to(device);
  const auto x = model->hidden(row, /*cache=*/nullptr, probe);
  const auto logits = model->out_head(x.select(/*dim=*/1, x.size(1) - 1))[0];
  return logits.to(at::kCPU, at::kDouble).log_softmax(/*dim=*/0);
}

double log_sum(const at::Tensor& log_probs, const std::vector<int64_t>& ids) {
  return log_probs.index_select(0, at::tensor(ids, at::kLong)).logsumexp(0).item<double>();
}

double divergence(const at::Tensor& before, const at::Tensor& after) {
  return (before.exp() * (before - after)).nan_to_num(0).sum().item<double>();
}

std::vector<Probe> probes_of(const Direction& direction,
                             const MeasureOptions& options,
                             const Gemma3Config& cfg) {
  std::vector<Probe> probes;
  for (const auto strength : options.strengths) {
    probes.push_back(steer_probe(
        direction,
        {.layers = options.layers, .strength = strength, .keep_norm = options.keep_norm},
        cfg));
  }
  return probes;
}

void check_measure(const Prompts& prompts, const MeasureOptions& options, int64_t vocab_size) {
  check(!prompts.empty() && !options.strengths.empty(),
        "[steer] expected prompts and strengths, got {} and {}",
        prompts.size(),
        options.strengths.size());
  for (const auto& ids : prompts) {
    check_some(ids, "prompts", vocab_size);
  }
  check_some(options.toward, "tokens", vocab_size);
  check_some(options.away, "tokens against", vocab_size);
}

}  // namespace

std::vector<MeasureRow> measure_steering(Gemma3Model model,
                                         const Direction& direction,
                                         const Prompts& prompts,
                                         const MeasureOptions& options) {
  const at::NoGradGuard no_grad;
  check_measure(prompts, options, model->cfg.vocab_size);
  const auto probes = probes_of(direction, options, model->cfg);
  std::vector<MeasureRow> rows;
  for (const auto strength : options.strengths) {
    rows.push_back({.strength = strength});
  }
  const auto total = static_cast<int64_t>(prompts.size() * (rows.size() + 1));
  int64_t done = 0;
  const auto step = [&] {
    ++done;
    check(!options.on_progress || options.on_progress(done, total),
          "[steer] stopped after {} of {} runs, nothing was written",
          done,
          total);
  };
  const auto share = 1.0 / static_cast<double>(prompts.size());
  for (const auto& ids : prompts) {
    const auto plain = next_log_probs(model, ids, {});
    step();
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto steered = next_log_probs(model, ids, probes[i]);
      const auto score = log_sum(steered, options.toward) - log_sum(steered, options.away);
      rows[i].scores.push_back(score);
      rows[i].mean += share * score;
      rows[i].kl += share * divergence(plain, steered);
      step();
    }
  }
  return rows;
}

bool grows_with_strength(std::vector<MeasureRow> rows) {
  std::sort(rows.begin(), rows.end(), [](const MeasureRow& a, const MeasureRow& b) {
    return a.strength < b.strength;
  });
  bool grows = rows.size() >= 2;
  for (size_t i = 1; i < rows.size(); ++i) {
    grows = grows && rows[i].mean > rows[i - 1].mean;
  }
  return grows;
}

}  // namespace gemma_torch
