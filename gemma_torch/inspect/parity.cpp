#include "gemma_torch/inspect/parity.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/inspect/site_table.h"

namespace gemma_torch {
namespace {

// Elements compared at a time: logits of a long text are large, and differences need room too.
constexpr int64_t kPiece = int64_t{1} << 22;

void measure(const at::Tensor& ours, const at::Tensor& theirs, SiteParity& result) {
  const auto a = ours.reshape({-1});
  const auto b = theirs.reshape({-1});
  double sum = 0;
  for (int64_t start = 0; start < b.numel(); start += kPiece) {
    const auto length = std::min(kPiece, b.numel() - start);
    const auto reference = b.narrow(/*dim=*/0, start, length).to(at::kFloat);
    const auto mine = a.narrow(/*dim=*/0, start, length).to(at::kCPU, at::kFloat);
    const auto difference = (mine - reference).abs();
    const auto largest = difference.max().item<double>();
    result.max_abs = std::isnan(largest) ? largest : std::max(largest, result.max_abs);
    result.max_reference = std::max(result.max_reference, reference.abs().max().item<double>());
    sum += difference.sum(at::kDouble).item<double>();
    if (std::isnan(largest)) {
      break;
    }
  }
  result.mean_abs = sum / static_cast<double>(std::max<int64_t>(1, b.numel()));
}

// The probe that compares: remembers what it has seen.
class Comparison {
 public:
  Comparison(const Gemma3Config& cfg,
             const TensorMap& dump,
             const std::function<void(const SiteParity&)>& on_site)
      : cfg_(cfg), dump_(dump), on_site_(on_site) {}

  void visit(const At& at, const at::Tensor& value) {
    const auto name = site_name(at.site, at.layer);
    const auto found = dump_.find(name);
    if (found == dump_.end()) {
      return;
    }
    auto theirs = found->second;
    check(theirs.sizes() == value.sizes() && theirs.is_floating_point(),
          "[parity] {}: expected {} as this model gives, the dump has {} {}",
          name,
          shape_str(value.sizes()),
          c10::toString(theirs.scalar_type()),
          shape_str(theirs.sizes()));
    auto ours = value;
    if (at.site == Site::kScores) {
      const auto hidden = hidden_scores(at);  // (1, 1, T, T)
      ours = ours.masked_fill(hidden, 0);
      theirs = theirs.masked_fill(hidden.to(theirs.device()), 0);
    }
    SiteParity result{.site = name};
    measure(ours, theirs, result);
    const bool float32 = value.scalar_type() == at::kFloat && theirs.scalar_type() == at::kFloat;
    result.tolerance =
        parity_tolerance(at.site, float32 ? at::kFloat : at::kBFloat16, result.max_reference);
    if (on_site_) {
      on_site_(result);
    }
    results.push_back(std::move(result));
  }

  std::vector<SiteParity> results;

 private:
  at::Tensor hidden_scores(const At& at) const {
    const bool full = cfg_.layer_types[static_cast<size_t>(at.layer)] == LayerType::kFullAttention;
    return create_mask(at.positions, at.positions, {}, full ? 0 : cfg_.sliding_window);
  }

  const Gemma3Config& cfg_;
  const TensorMap& dump_;
  const std::function<void(const SiteParity&)>& on_site_;
};

at::Tensor dump_ids(const TensorMap& dump, int64_t vocab_size) {
  const auto found = dump.find("ids");
  check(found != dump.end(), "[parity] the dump has no ids. Hint: tests/reference/dump_parity.py");
  const auto& ids = found->second;
  check(ids.dim() == 2 && ids.size(0) == 1 && ids.size(1) >= 1 && ids.scalar_type() == at::kLong,
        "[parity] ids: expected (1, T) int64, the dump has {} {}",
        c10::toString(ids.scalar_type()),
        shape_str(ids.sizes()));
  const auto [low, high] = ids.aminmax();
  check(low.item<int64_t>() >= 0 && high.item<int64_t>() < vocab_size,
        "[parity] ids: expected 0 to {}, the dump has {} to {}",
        vocab_size - 1,
        low.item<int64_t>(),
        high.item<int64_t>());
  return ids;
}

// A dump of a deeper model, or a misspelt site, must not pass by being ignored.
void check_names(const TensorMap& dump, int64_t n_layers) {
  std::set<std::string> known = {"ids"};
  for (const auto& site : model_sites(n_layers)) {
    known.insert(site.name());
  }
  for (const auto& [name, tensor] : dump) {
    check(known.contains(name),
          "[parity] the dump holds {} {}, which is no site of this model of {} layers",
          name,
          shape_str(tensor.sizes()),
          n_layers);
  }
  check(dump.size() >= 2, "[parity] the dump holds no site, only ids");
}

// The dtype that an engine's results are judged by.
c10::ScalarType coarser(const Engine& engine, const at::Tensor& theirs) {
  const bool float32 = engine.report(0).weights == "float32" && theirs.scalar_type() == at::kFloat;
  return float32 ? at::kFloat : at::kBFloat16;
}

}  // namespace

double parity_tolerance(Site site, c10::ScalarType dtype, double max_reference) {
  // Rounding follows the largest terms of a sum, so it is measured against the site's largest value
  // (the residual stream reaches 1e5). On the real weights the worst site of float32 differs by
  // 2.2e-6 of that, of bfloat16 by 3.2e-2, with eight bits to a value and 18 layers.
  if (dtype != c10::kFloat) {
    return 0.1 * std::max(1.0, max_reference);
  }
  return site == Site::kLogits ? 2e-3  // what every engine must keep in float32
                               : 2e-5 * std::max(1.0, max_reference);
}

std::vector<SiteParity> compare_with_dump(Gemma3Model model,
                                          const TensorMap& dump,
                                          const std::function<void(const SiteParity&)>& on_site) {
  const at::NoGradGuard no_grad;
  const auto ids = dump_ids(dump, model->cfg.vocab_size);
  check_names(dump, model->cfg.n_layers);
  Comparison comparison(model->cfg, dump, on_site);
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    comparison.visit(at, value);
    return value;
  };
  model->forward(ids.to(model->tok_emb->weight.device()), /*cache=*/nullptr, probe);
  return std::move(comparison.results);
}

SiteParity compare_logits(Engine& engine, const TensorMap& dump) {
  const auto ids = dump_ids(dump, engine.vocab_size());
  const auto found = dump.find("logits");
  check(found != dump.end(),
        "[parity] expected logits in the dump, which an engine is compared at");
  engine.reset();
  engine.append(ids);
  const auto ours = engine.logits(Rows::kAll);
  const auto& theirs = found->second;
  check(ours.sizes() == theirs.sizes(),
        "[parity] logits: expected {}, the dump has {}",
        shape_str(ours.sizes()),
        shape_str(theirs.sizes()));
  SiteParity result{.site = "logits"};
  measure(ours, theirs, result);
  result.tolerance = parity_tolerance(Site::kLogits, coarser(engine, theirs), result.max_reference);
  return result;
}

TensorMap dump_of(Gemma3Model model, const at::Tensor& ids) {
  const auto sites = model_sites(model->cfg.n_layers);
  auto dump = site_values(model, ids.to(model->tok_emb->weight.device()), sites);
  for (auto& [name, value] : dump) {
    value = value.to(at::kCPU);
  }
  dump["ids"] = ids;
  return dump;
}

SiteParity compare_decode(Engine& engine, Gemma3Model model, const at::Tensor& ids, int64_t n) {
  const at::NoGradGuard no_grad;
  const auto T = ids.size(1);
  check(T + n - 1 <= engine.capacity(),
        "[parity] capacity: expected at least {}, got {}",
        T + n - 1,
        engine.capacity());
  engine.reset();
  engine.append(ids);
  std::vector<int64_t> made;
  engine.decode(n, {.temperature = 0}, [&](int64_t, int64_t id) {
    made.push_back(id);
    return true;
  });
  const auto chosen = at::tensor(made, at::kLong).unsqueeze(0);  // (1, n)
  const auto read = at::cat({ids, chosen.narrow(/*dim=*/1, /*start=*/0, n - 1)}, /*dim=*/1);
  const auto x = model->hidden(read.to(model->tok_emb->weight.device()));
  const auto logits = model->out_head(x.narrow(/*dim=*/1, T - 1, n)).to(at::kCPU, at::kFloat);
  const auto of_chosen = logits.gather(/*dim=*/-1, chosen.unsqueeze(-1)).squeeze(-1);
  SiteParity result{.site = "decode"};
  measure(of_chosen, logits.amax(/*dim=*/-1), result);
  result.max_reference = logits.abs().max().item<double>();
  result.tolerance =
      2 * parity_tolerance(Site::kLogits, coarser(engine, logits), result.max_reference);
  return result;
}

}  // namespace gemma_torch
