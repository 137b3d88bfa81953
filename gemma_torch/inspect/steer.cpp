#include "gemma_torch/inspect/steer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <memory>
#include <numeric>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/inspect/prompt_row.h"
#include "gemma_torch/inspect/site_table.h"

namespace gemma_torch {
namespace {

void check_prompt(const std::vector<int64_t>& ids, size_t pair, int64_t vocab_size) {
  check(!ids.empty(), "[steer] pair {}: expected at least one token a prompt, got none", pair);
  check_ids("steer", fmt::format("pair {}", pair), ids, vocab_size);
}

std::vector<int64_t> layers_of(const DirectionOptions& options, const Gemma3Config& cfg) {
  auto layers = options.layers;
  if (layers.empty()) {
    layers.resize(static_cast<size_t>(cfg.n_layers));
    std::iota(layers.begin(), layers.end(), int64_t{0});
  }
  Direction shape{.site = options.site};
  const auto width = site_shape(options.site, cfg, /*B=*/1, /*T=*/1).back();
  for (const auto layer : layers) {
    shape.vectors[layer] = at::zeros({width});
  }
  check_direction(shape, cfg);
  return layers;
}

// A prompt's (T, E) values as one (E) float64.
at::Tensor pooled(const at::Tensor& value,
                  const std::vector<int64_t>& ids,
                  const DirectionOptions& options) {
  const auto wide = value.to(at::kCPU, at::kDouble);
  if (options.pool == Pool::kLast) {
    return wide[-1];
  }
  const int64_t first = ids.size() > 1 && ids[0] == options.bos_id ? 1 : 0;
  return wide.narrow(/*dim=*/0, first, wide.size(0) - first).mean(/*dim=*/0);
}

// Pooled values of a prompt at each site.
std::vector<at::Tensor> values_of(const Gemma3Model& model,
                                  const std::vector<int64_t>& ids,
                                  const std::vector<SiteAt>& sites,
                                  const DirectionOptions& options) {
  const auto device = model->tok_emb->weight.device();
  const auto row = at::tensor(ids, at::kLong).unsqueeze(0).to(device);
  const auto found = site_values(model, row, sites);
  std::vector<at::Tensor> values;
  for (const auto& site : sites) {
    values.push_back(pooled(found.at(site.name())[0], ids, options));
  }
  return values;
}

// The vector (E) of differences (P, E), and how well it fits them. All float64.
std::pair<at::Tensor, DirectionFit> reduce(const at::Tensor& differences,
                                           DirectionMethod method,
                                           const std::string& where) {
  const auto squares = differences.square().sum().item<double>();
  auto vector = differences.mean(/*dim=*/0);  // (E)
  if (method == DirectionMethod::kPca && squares > 0) {
    const auto [u, s, vh] = at::linalg_svd(differences, /*full_matrices=*/false);
    vector = vh[0] * vh[0].dot(vector);  // a sign of vh[0] cancels: the pairs settle it
  }
  DirectionFit fit{.norm = at::linalg_vector_norm(vector).item<double>()};
  check(std::isfinite(fit.norm) && fit.norm > 0,
        "[steer] {}: expected pairs that differ, their differences come to {}",
        where,
        fit.norm);
  const auto along = differences.mv(vector / fit.norm);  // (P)
  fit.agree = along.gt(0).to(at::kDouble).mean().item<double>();
  fit.explained = along.square().sum().item<double>() / squares;
  return {vector, fit};
}

}  // namespace

MadeDirection make_direction(Gemma3Model model,
                             const std::vector<PromptPair>& pairs,
                             const DirectionOptions& options) {
  const at::NoGradGuard no_grad;
  check(!pairs.empty(), "[steer] pairs: expected at least one, got none");
  std::vector<SiteAt> sites;
  for (const auto layer : layers_of(options, model->cfg)) {
    sites.push_back({options.site, layer});
  }
  for (size_t i = 0; i < pairs.size(); ++i) {
    check_prompt(pairs[i].positive, i, model->cfg.vocab_size);
    check_prompt(pairs[i].negative, i, model->cfg.vocab_size);
  }
  std::vector<std::vector<at::Tensor>> differences(sites.size());  // by site, then pair
  const auto total = static_cast<int64_t>(2 * pairs.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    const auto positive = values_of(model, pairs[i].positive, sites, options);
    const auto negative = values_of(model, pairs[i].negative, sites, options);
    for (size_t site = 0; site < sites.size(); ++site) {
      differences[site].push_back(positive[site] - negative[site]);
    }
    const auto done = static_cast<int64_t>(2 * (i + 1));
    check(!options.on_progress || options.on_progress(done, total),
          "[steer] stopped after {} of {} prompts, nothing was written",
          done,
          total);
  }
  MadeDirection made{.direction = {.site = options.site}};
  for (size_t site = 0; site < sites.size(); ++site) {
    const auto [vector, fit] =
        reduce(at::stack(differences[site]), options.method, sites[site].name());
    made.direction.vectors[sites[site].layer] = vector.to(at::kFloat);
    made.fits[sites[site].layer] = fit;
  }
  return made;
}

Probe steer_probe(const Direction& direction,
                  const SteerOptions& options,
                  const Gemma3Config& cfg) {
  check_direction(direction, cfg);
  check(std::isfinite(options.strength),
        "[steer] strength: expected a number, got {}",
        options.strength);
  std::map<int64_t, at::Tensor> added;
  for (const auto& [layer, vector] : direction.vectors) {
    if (options.layers.empty()) {
      added[layer] = vector * options.strength;
    }
  }
  for (const auto layer : options.layers) {
    const auto found = direction.vectors.find(layer);
    check(found != direction.vectors.end(),
          "[steer] layer {}: expected one that the direction has a vector for, {} to {}",
          layer,
          direction.vectors.empty() ? -1 : direction.vectors.begin()->first,
          direction.vectors.empty() ? -1 : direction.vectors.rbegin()->first);
    added[layer] = found->second * options.strength;
  }
  return
      [added, site = direction.site, keep = options.keep_norm](const At& at, const at::Tensor& x) {
        const auto found = at.site == site ? added.find(at.layer) : added.end();
        if (found == added.end()) {
          return x;
        }
        const auto y = x + found->second.to(x.options());
        if (!keep) {
          return y;
        }
        const auto norm = [](const at::Tensor& value) {  // float32: squares of large values
          return at::linalg_vector_norm(value.to(at::kFloat), 2, /*dim=*/-1, /*keepdim=*/true);
        };
        return y * (norm(x) / norm(y)).to(x.scalar_type());
      };
}

}  // namespace gemma_torch
