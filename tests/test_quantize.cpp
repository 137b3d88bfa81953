#include <ATen/Functions.h>
#include <torch/utils.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/engine/fused.h"
#include "gemma_torch/inspect/divergence.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/pretrained.h"
#include "gemma_torch/quant/gptq.h"
#include "gemma_torch/quant/packed_linear.h"
#include "gemma_torch/quant/quantize.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using Catch::Matchers::ContainsSubstring;

namespace {

at::Tensor random_ids(int64_t length) {
  torch::manual_seed(length);
  return at::randint(0, 1003, {1, length}, at::kLong);
}

Calibration calibration_of(const Gemma3Model& model) {
  Calibration calibration(model);
  calibration.add(random_ids(90));
  calibration.add(random_ids(77));
  return calibration;
}

// The small model, rounded.
Gemma3Model quantized(const std::string& mode) {
  const auto model = small_models().rounded;
  const auto calibration = calibration_of(model);
  quantize(model, *find_recipe(mode), &calibration);
  return model;
}

at::Tensor fused_logits(const Gemma3Model& model, OnTheFly quant = OnTheFly::kNone) {
  EngineOptions options{.kind = EngineKind::kFused, .capacity = 64, .kv_dtype = at::kFloat};
  options.fused.products = at::kFloat;
  options.fused.quant = quant;
  const auto engine = make_engine(model, options);
  engine->append(random_ids(40));  // many tokens, then one
  engine->append(random_ids(1));
  return engine->logits(Rows::kLast);
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

// A folder with the small model, and one made of it.
struct Folders {
  explicit Folders(const std::string& mode) {
    const auto models = small_models();
    write_file(scratch / "config.json", config_to_json(models.rounded->cfg).dump());
    save_safetensors(scratch / "model.safetensors", hf_weights(models.rounded));
    auto loaded = load_pretrained(scratch.path());
    const auto calibration = calibration_of(loaded.model);
    quantize(loaded.model, *find_recipe(mode), &calibration);
    want = fused_logits(loaded.model);
    AtomicFolder out(scratch / "out");
    write_quantized(scratch.path(), loaded, {{"kl", 0.5}}, out);
    out.commit();
  }

  std::string out() const { return scratch / "out"; }
  nlohmann::json config() const { return nlohmann::json::parse(read_file(out() + "/config.json")); }
  void set_config(const nlohmann::json& config) const {
    std::filesystem::remove(out() + "/config.json");
    write_file(out() + "/config.json", config.dump());
  }
  std::string error() const {
    return error_of([&] { load_pretrained(out()); });
  }

  ScratchFolder scratch{"gemma_quantize"};
  at::Tensor want;
};

}  // namespace

TEST_CASE("int8 made beforehand is int8 made on loading, bit for bit", "[quantize]") {
  const auto before = fused_logits(quantized("int8"));
  CHECK(at::equal(before, fused_logits(small_models().rounded, OnTheFly::kInt8)));
}

TEST_CASE("the fused engine multiplies with the numbers that codes stand for", "[quantize]") {
  for (const auto& recipe : recipes()) {
    CAPTURE(recipe.name);
    const auto model = quantized(recipe.name);
    CHECK((packed_formats(model) == recipe.formats));
    // The modules in float32, with those numbers for weights.
    const auto wide = small_models().wide;
    std::vector<at::Tensor> weights;
    Gemma3Model(model)->for_each_linear([&](auto&, const std::string& name, Linear& linear) {
      if (name != "out_head") {
        weights.push_back(dynamic_cast<PackedLinearImpl&>(*linear).unpacked());
      }
    });
    const torch::NoGradGuard no_grad;
    size_t n = 0;
    double moved = 0;
    Gemma3Model(wide)->for_each_linear([&](auto&, const std::string& name, Linear& linear) {
      if (name != "out_head") {
        moved = std::max(moved, largest_difference(linear->weight, weights[n]));
        linear->weight.copy_(weights[n++]);
      }
    });
    CHECK(moved > 0);
    const auto ids = at::cat({random_ids(40), random_ids(1)}, 1);
    const auto want = Gemma3Model(wide)->forward(ids).narrow(1, 40, 1);
    CHECK(largest_difference(fused_logits(model), want) < 5e-4);
    // Eager, in bfloat16: only near.
    EngineOptions eager{.kind = EngineKind::kEager, .capacity = 64};
    const auto engine = make_engine(model, eager);
    engine->append(ids);
    CHECK(largest_difference(engine->logits(Rows::kLast), want) < 0.2);
  }
}

TEST_CASE("fewer bits are further from the original", "[quantize]") {
  const auto original = make_engine(small_models().rounded, {.capacity = 64});
  const auto row = random_ids(50).squeeze(0);
  const std::vector<int64_t> ids(row.const_data_ptr<int64_t>(),
                                 row.const_data_ptr<int64_t>() + row.numel());
  double before = 0;
  for (const auto& recipe : recipes()) {
    const auto other = make_engine(quantized(recipe.name), {.capacity = 64});
    const auto found = compare_distributions(*original, *other, {ids}, {});
    CAPTURE(recipe.name, found.kl.mean.value);
    CHECK(found.positions == 49);
    CHECK(found.kl.mean.value > before);
    CHECK(found.same_top.value <= 1);
    before = found.kl.mean.value;
  }
  CHECK(before < 1);
  const auto same = make_engine(small_models().rounded, {.capacity = 64});
  const auto none = compare_distributions(*original, *same, {ids}, {});
  CHECK(std::abs(none.kl.mean.value) < 1e-6);
  CHECK(none.same_top.value == 1);
  CHECK(none.reference_nll.value == none.other_nll.value);
}

TEST_CASE("compensation for the inputs seen makes the product's error smaller", "[quantize]") {
  torch::manual_seed(3);
  const auto mix = at::randn({128, 128});
  const auto x = at::matmul(at::randn({1000, 128}), mix);  // correlated, as activations are
  const auto weight = at::randn({32, 128});
  const auto error = [&](const at::Tensor& second_moment, kernels::Format format) {
    const auto codes = round_compensated(weight, inverse_factor(second_moment), format);
    const PackedLinearImpl linear(128, 32, format, 64, lay_out(codes, 64));
    return at::matmul(x, (linear.unpacked() - weight).t()).square().mean().item<double>();
  };
  const auto seen = at::matmul(x.t(), x) / 1000;
  for (const auto format : {kernels::Format::kLevels4,
                            kernels::Format::kInt5,
                            kernels::Format::kInt6,
                            kernels::Format::kInt8}) {
    CAPTURE(kernels::format_name(format));
    CHECK(error(seen, format) < 0.7 * error(at::eye(128), format));
  }
}

TEST_CASE("a calibration holds the mean of x x^T", "[quantize]") {
  const auto model = small_models().rounded;
  const auto calibration = calibration_of(model);
  CHECK(calibration.tokens() == 167);
  std::map<Site, at::Tensor> inputs;
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    if (at.layer == 2 && value.size(1) == at.positions.size(0)) {  // (B, T, ..)
      auto& all = inputs[at.site];
      const auto x = value.to(at::kFloat).reshape({at.positions.size(0), -1});
      all = all.defined() ? at::cat({all, x}) : x;
    }
    return value;
  };
  const torch::NoGradGuard no_grad;
  for (const int64_t length : {90, 77}) {
    Gemma3Model(model)->hidden(random_ids(length), nullptr, probe);
  }
  for (const auto& [projection, site] : {std::pair{"W_value", Site::kAttnIn},
                                         std::pair{"out_proj", Site::kZ},
                                         std::pair{"fc2", Site::kMlpIn},
                                         std::pair{"fc3", Site::kMlpAct}}) {
    CAPTURE(projection);
    const auto& x = inputs.at(site);
    const auto want = at::matmul(x.t(), x) / 167;
    CHECK(largest_difference(calibration.second_moment(2, Calibration::input_of(projection)),
                             want) < 0.02 * want.abs().max().item<double>());
  }
}

TEST_CASE("a quantised folder loads as it was made", "[quantize]") {
  for (const auto& recipe : recipes()) {
    CAPTURE(recipe.name);
    const Folders folders(recipe.name);
    for (const bool mapped : {false, true}) {
      const auto loaded = load_pretrained(folders.out(), {.mapped = mapped});
      CHECK((loaded.formats == recipe.formats));
      CHECK(at::equal(fused_logits(loaded.model), folders.want));
    }
    const auto quant = folders.config()["quantization_config"];
    CHECK(quant["mode"] == recipe.name);
    CHECK(quant["report"]["kl"] == 0.5);
  }
}

TEST_CASE("a quantised folder that is not right is named", "[quantize]") {
  const Folders folders("mixed4");
  const auto config = folders.config();
  const auto with = [&](const char* key, const nlohmann::json& value) {
    auto changed = config;
    changed["quantization_config"][key] = value;
    folders.set_config(changed);
    return folders.error();
  };
  CHECK_THAT(with("quant_method", "awq"), ContainsSubstring("gemma_torch, got \"awq\""));
  CHECK_THAT(with("layout", 0), ContainsSubstring("layout: expected 5, got 0"));
  CHECK_THAT(with("formats", {{"q_proj", "int8"}}), ContainsSubstring("formats.k_proj"));
  auto formats = config["quantization_config"]["formats"];
  formats["q_proj"] = "int3";
  CHECK_THAT(with("formats", formats), ContainsSubstring("formats.q_proj"));
  formats["q_proj"] = "int8";
  CHECK_THAT(with("formats", formats), ContainsSubstring("layers.0.self_attn.q_proj"));
  folders.set_config(config);
  CHECK(folders.error().empty());
  auto tensors = load_safetensors(folders.out() + "/model.safetensors");
  const auto without = [&](const char* name) {
    auto fewer = tensors;
    fewer.erase(name);
    save_safetensors(folders.out() + "/model.safetensors", fewer);
    return folders.error();
  };
  CHECK_THAT(without("model.layers.1.mlp.up_proj.cells"), ContainsSubstring("up_proj.cells"));
  CHECK_THAT(without("lm_head.scan_order"), ContainsSubstring("scan_order"));
  CHECK_THAT(without("lm_head.scan_residuals"), ContainsSubstring("scan_residuals"));
  tensors["lm_head.scan_order"] = at::zeros({128}, at::kInt);
  save_safetensors(folders.out() + "/model.safetensors", tensors);
  CHECK_THAT(folders.error(), ContainsSubstring("scan_order: expected the 128 columns"));
}

TEST_CASE("what cannot be quantised is refused", "[quantize]") {
  const auto models = small_models();
  CHECK_THAT(error_of([&] { quantize(models.rounded, *find_recipe("mixed4"), nullptr); }),
             ContainsSubstring("mixed4: expected a calibration"));
  CHECK_THAT(error_of([&] { quantize(models.wide, *find_recipe("int8"), nullptr); }),
             ContainsSubstring("bfloat16"));
  const auto once = quantized("int8");
  CHECK_THAT(error_of([&] { quantize(once, *find_recipe("int8"), nullptr); }),
             ContainsSubstring("got a packed one"));
}
