#include "gemma_torch/inspect/attribution.h"

#include <ATen/Functions.h>

#include "gemma_torch/inspect/patch.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr int64_t kT = 21, kLayers = 4;

std::vector<int64_t> some_ids() {
  return small_prompt(kT);
}

at::Tensor row() {
  return at::tensor(some_ids(), at::kLong).unsqueeze(0);
}

TensorMap all_values(Gemma3Model model) {
  return site_values(model, row(), model_sites(kLayers));
}

/// x as a norm scales it that divides by the root mean square of `by` instead.
at::Tensor held_norm(const RMSNorm& norm, const at::Tensor& x, const at::Tensor& by) {
  return x / (by.square().mean() + norm->eps).sqrt() * (1 + norm->scale);
}

/// What `part` of the residual stream at a position adds to the logits (V).
at::Tensor logits_of(Gemma3Model model,
                     const TensorMap& values,
                     const at::Tensor& part,
                     int64_t position) {
  const auto last = values.at("blocks.3.resid_post")[0][position];
  return model->out_head(held_norm(model->final_norm, part, last));
}

}  // namespace

TEST_CASE("the parts add up to the logit, the difference, and the distance to the mean",
          "[attribution]") {
  const torch::NoGradGuard no_grad;
  const auto model = small_models().wide;
  const auto logits = all_values(model).at("logits")[0].to(at::kDouble);
  const auto position = GENERATE(0, 13, 20);
  const auto check = [&](const AttributionTarget& target, const at::Tensor& value) {
    const auto found = attribute_logit(model, some_ids(), target);
    CHECK(found.value == Approx(value.item<double>()).margin(1e-5));
    CHECK(std::abs(found.residual()) < 2e-5);
    CHECK(std::abs(found.coarse_residual()) < 2e-5);
    CHECK(found.sum() == Approx(found.value).margin(2e-5));
    CHECK(max_difference(found.heads.sum(1), found.attn) < 1e-5);
    CHECK(max_difference(found.neurons.sum(1), found.mlp) < 1e-5);
  };
  check({{17}, position}, logits[position][17]);
  check({{17, 40}, position}, logits[position][17] - logits[position][40]);
  check({{17}, position, true}, logits[position][17] - logits[position].mean());
  check({{17}, position - kT}, logits[position][17]);
}

TEST_CASE("a part is what it writes, through the norms as they were", "[attribution]") {
  const torch::NoGradGuard no_grad;
  auto model = small_models().wide;
  const auto values = all_values(model);
  const int64_t position = 13, layer = 2, head = 3, neuron = 77, token = 17;
  const auto found = attribute_logit(model, some_ids(), {{token}, position});
  const auto at = [&](const char* site) {
    return values.at("blocks.2." + std::string(site))[0][position];
  };
  const auto want = [&](const at::Tensor& part) {
    return logits_of(model, values, part, position)[token].item<double>();
  };
  CHECK(found.embed == Approx(want(values.at("embed")[0][position])).margin(1e-5));
  CHECK(found.attn[layer].item<double>() == Approx(want(at("attn_out"))).margin(1e-5));
  CHECK(found.mlp[layer].item<double>() == Approx(want(at("mlp_out"))).margin(1e-5));
  auto& block = model->blocks->at<TransformerBlockImpl>(layer);
  const auto z = at::zeros({4, 32});
  z[head] = at("z")[head];  // the other heads silent
  const auto one_head = block.att->out_proj(z.view({-1}));
  CHECK(found.heads[layer][head].item<double>() ==
        Approx(want(held_norm(block.post_attention_layernorm, one_head, at("attn_proj"))))
            .margin(1e-5));
  const auto act = at::zeros({192});
  act[neuron] = at("mlp_act")[neuron];
  const auto one_neuron = block.ff->fc3(act);
  CHECK(found.neurons[layer][neuron].item<double>() ==
        Approx(want(held_norm(block.post_feedforward_layernorm, one_neuron, at("mlp_proj"))))
            .margin(1e-5));
  CHECK(found.activations[layer][neuron].item<float>() == at("mlp_act")[neuron].item<float>());
}

TEST_CASE("in bfloat16 the residual is shown, not hidden", "[attribution]") {
  const torch::NoGradGuard no_grad;
  const auto model = small_models().rounded;
  const auto found = attribute_logit(model, some_ids(), {{17}});
  const auto logits = all_values(model).at("logits")[0][kT - 1];
  CHECK(found.value == logits[17].item<double>());
  CHECK(std::abs(found.residual()) < 0.2);
  CHECK(std::abs(found.residual()) > 1e-5);
}

TEST_CASE("what cannot be attributed is refused", "[attribution]") {
  const auto model = small_models().wide;
  const auto error = [&](const std::vector<int64_t>& ids, const AttributionTarget& target) {
    return error_of([&] { attribute_logit(model, ids, target); });
  };
  CHECK_THAT(error({}, {{17}}), Catch::Contains("[attribute] prompt: expected at least one"));
  CHECK_THAT(error({5}, {}), Catch::Contains("tokens: expected 1 to 2, got 0"));
  CHECK_THAT(error({5}, {{1, 2, 3}}), Catch::Contains("got 3"));
  CHECK_THAT(error({5}, {{1003}}), Catch::Contains("tokens: expected ids from 0 to 1002"));
  CHECK_THAT(error({5}, {{17}, 1}), Catch::Contains("position: expected -1 to 0, got 1"));
  CHECK_THAT(error({5}, {{17, 40}, -1, true}), Catch::Contains("mean: expected one token"));
  Gemma3Model packed(model->cfg);
  packed->blocks->at<TransformerBlockImpl>(1).ff->fc3->weight = at::Tensor();
  packed->out_head->weight = at::Tensor();
  CHECK_THAT(error_of([&] { attribute_logit(packed, {5}, {{17}}); }), Catch::Contains("packed"));
}
