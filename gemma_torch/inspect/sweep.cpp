#include "gemma_torch/inspect/sweep.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <span>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

// One patched run, and where its score goes.
struct Job {
  SiteAt site = {};
  int64_t column = 0;
  size_t map = 0;
};

void check_prompt(const char* what, const at::Tensor& ids, int64_t vocab_size) {
  check(ids.dim() == 2 && ids.size(0) == 1 && ids.size(1) > 0,
        "[sweep] {}: expected (1, T), got {}",
        what,
        shape_str(ids.sizes()));
  const auto low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  check(low >= 0 && high < vocab_size,
        "[sweep] {}: expected ids from 0 to {}, got {}",
        what,
        vocab_size - 1,
        low < 0 ? low : high);
}

void check_request(const at::Tensor& clean,
                   const at::Tensor& corrupted,
                   const SweepOptions& options,
                   int64_t vocab_size) {
  check_prompt("clean", clean, vocab_size);
  check_prompt("corrupted", corrupted, vocab_size);
  check(clean.size(1) == corrupted.size(1),
        "[sweep] corrupted: expected {} tokens as the clean prompt has, got {}",
        clean.size(1),
        corrupted.size(1));
  const auto n = options.tokens.size();
  check(n == 1 || n == 2, "[sweep] tokens: expected one or two, got {}", n);
  check_ids("sweep", "tokens", options.tokens, vocab_size);
  check(!options.sites.empty(), "[sweep] sites: expected at least one, got none");
  for (const auto site : options.sites) {
    check(is_in_layers(site),
          "[sweep] sites: expected those of layers, got {}",
          site_name(site, /*layer=*/-1));
  }
  check(options.batch >= 1, "[sweep] batch: expected at least 1, got {}", options.batch);
}

// Scores (B) float64 of the last position of each row.
at::Tensor scores_of(Gemma3Model& model,
                     const at::Tensor& ids,
                     const std::vector<int64_t>& tokens,
                     const Probe& probe = {}) {
  const auto x = model->hidden(ids, /*cache=*/nullptr, probe);
  // The head of the last position only: of all it costs more than the layers.
  const auto logits = model->out_head(x.select(/*dim=*/1, ids.size(1) - 1));  // (B, V)
  auto score = logits.select(/*dim=*/1, tokens[0]).to(at::kCPU, at::kDouble);
  if (tokens.size() == 2) {
    score = score - logits.select(/*dim=*/1, tokens[1]).to(at::kCPU, at::kDouble);
  }
  return score;
}

// Every patched run, those of one layer side by side; their scores' places in `result`.
std::vector<Job> plan(const SweepOptions& options,
                      const Gemma3Config& cfg,
                      int64_t T,
                      Sweep& result) {
  std::vector<Job> jobs;
  for (size_t m = 0; m < options.sites.size(); ++m) {
    const auto site = options.sites[m];
    const bool by_head = swept_by_head(site);
    const auto axis = site_axis(site, by_head ? "HG" : "T");
    const auto columns = site_shape(site, cfg, /*B=*/1, T)[static_cast<size_t>(axis)];
    const auto scores = at::zeros({cfg.n_layers, columns}, at::kDouble);
    result.maps.push_back({site, by_head, scores});
    for (int64_t layer = 0; layer < cfg.n_layers; ++layer) {
      for (int64_t column = 0; column < columns; ++column) {
        jobs.push_back({{site, layer}, column, m});
      }
    }
  }
  return jobs;
}

std::vector<SiteAt> sites_of(const std::vector<Job>& jobs) {
  std::vector<SiteAt> sites;
  for (const auto& job : jobs) {
    if (job.column == 0) {
      sites.push_back(job.site);
    }
  }
  return sites;
}

// The scores of jobs, which are the rows of one pass.
std::vector<double> run_batch(Gemma3Model& model,
                              const at::Tensor& corrupted,
                              const std::vector<int64_t>& tokens,
                              std::span<const Job> jobs,
                              const TensorMap& clean) {
  const auto rows = static_cast<int64_t>(jobs.size());
  std::vector<Edit> edits;
  for (const auto& job : jobs) {
    Edit edit{.site = job.site,
              .part = {.row = static_cast<int64_t>(edits.size())},
              .with = {.fill = Fill::kValue, .value = clean.at(job.site.name())}};
    if (swept_by_head(job.site.site)) {
      edit.part.head = job.column;
    } else {
      edit.part.positions = {job.column};
    }
    edits.push_back(std::move(edit));
  }
  const auto T = corrupted.size(1);
  const auto probe = edits_probe(std::move(edits), model->cfg, T);
  const auto scores = scores_of(model, corrupted.expand({rows, T}), tokens, probe).contiguous();
  return {scores.const_data_ptr<double>(), scores.const_data_ptr<double>() + rows};
}

void put(std::span<const double> scores, std::span<const Job> jobs, Sweep& result) {
  for (size_t i = 0; i < scores.size(); ++i) {
    result.maps[jobs[i].map].scores[jobs[i].site.layer][jobs[i].column] = scores[i];
  }
}

}  // namespace

bool swept_by_head(Site site) {
  return site_axis(site, "HG") >= 0;
}

Sweep sweep(Gemma3Model model,
            const at::Tensor& clean,
            const at::Tensor& corrupted,
            const SweepOptions& options) {
  check_request(clean, corrupted, options, model->cfg.vocab_size);
  const at::NoGradGuard no_grad;
  Sweep result;
  result.clean = scores_of(model, clean, options.tokens).item<double>();
  result.corrupted = scores_of(model, corrupted, options.tokens).item<double>();
  check(result.clean != result.corrupted,
        "[sweep] corrupted: expected a prompt that scores otherwise than the clean one, got {} of "
        "both",
        result.clean);
  const auto jobs = plan(options, model->cfg, clean.size(1), result);
  const auto values = site_values(model, clean, sites_of(jobs));
  const auto total = jobs.size();
  const auto batch = static_cast<size_t>(options.batch), found = options.found.size();
  check(found == total || (found < total && found % batch == 0),
        "[sweep] found: expected scores of passes of {}, in all {}, got {}",
        batch,
        total,
        found);
  put(options.found, jobs, result);
  for (size_t begin = found; begin < total;) {
    const auto end = std::min(total, begin + batch);
    const auto pass = std::span(jobs).subspan(begin, end - begin);
    const auto scores = run_batch(model, corrupted, options.tokens, pass, values);
    put(scores, pass, result);
    begin = end;
    if (options.on_scores) {
      options.on_scores(scores);
    }
    check(!options.on_progress ||
              options.on_progress(static_cast<int64_t>(end), static_cast<int64_t>(total)),
          "[sweep] stopped after {} of {} patched runs, {}",
          end,
          total,
          options.on_scores ? "their scores are kept" : "nothing was written");
  }
  return result;
}

}  // namespace gemma_torch
