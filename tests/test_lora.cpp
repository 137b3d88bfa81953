#include "gemma_torch/adapt/lora.h"

#include <ATen/Functions.h>
#include <torch/optim/adam.h>

#include <fstream>

#include "gemma_torch/adapt/peft.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/quant/quantize.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

at::Tensor some_ids() {
  return ((at::arange(21, at::kLong) * 37 + 5) % 1003).unsqueeze(0);
}

at::Tensor logits_of(Gemma3Model model) {
  const torch::NoGradGuard no_grad;
  return model->forward(some_ids());
}

// An adapter that changes something, as training would have left it.
Adapter trained(const Gemma3Model& model, const LoraConfig& config = {.rank = 4, .alpha = 8}) {
  torch::manual_seed(11);
  Adapter adapter(model, config);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : adapter.parameters()) {
    parameter.normal_(0, 0.05);
  }
  return adapter;
}

// Logits of a model whose weights are changed by hand: W + alpha / r * B A.
at::Tensor by_hand(Gemma3Model model, const Adapter& adapter, double scaling) {
  const torch::NoGradGuard no_grad;
  const auto tensors = adapter.tensors();
  for (auto& item : model->named_parameters()) {
    const auto stem = hf_name(item.key());
    const auto module = stem.substr(0, stem.rfind('.'));
    const auto A = tensors.find(module + ".lora_A.weight");
    if (A != tensors.end()) {
      const auto B = tensors.at(module + ".lora_B.weight");
      item.value().add_(B.matmul(A->second) * scaling);
    }
  }
  return logits_of(model);
}

}  // namespace

TEST_CASE("a new adapter changes nothing, and draws as torch.nn.Linear", "[lora]") {
  auto model = small_models().wide;
  const auto before = logits_of(model);
  Adapter adapter(model, {.rank = 4});
  adapter.attach();
  CHECK(at::equal(logits_of(model), before));
  CHECK(adapter.parameters().size() == 4 * 7 * 2);
  const auto A = adapter.tensors().at("model.layers.2.self_attn.o_proj.lora_A.weight");
  CHECK(A.sizes() == at::IntArrayRef{4, 128});
  const auto largest = A.abs().max().item<double>();
  CHECK(largest <= 1 / std::sqrt(128.0));
  CHECK(largest > 0.9 / std::sqrt(128.0));
}

TEST_CASE("an adapter adds alpha / r B A to each of its targets", "[lora]") {
  for (const bool rslora : {false, true}) {
    auto model = small_models().wide;
    const auto before = logits_of(model);
    auto adapter = trained(model,
                           {.rank = 4,
                            .alpha = 6,
                            .use_rslora = rslora,
                            .target_modules = {"q_proj", "o_proj", "up_proj", "down_proj"}});
    const auto want = by_hand(small_models().wide, adapter, rslora ? 3.0 : 1.5);
    CHECK(adapter.parameters().size() == 4 * 4 * 2);
    adapter.attach();
    const auto attached = logits_of(model);
    CHECK(at::allclose(attached, want, 1e-4, 1e-4));
    CHECK((attached - before).abs().max().item<double>() > 0.1);
    adapter.detach();
    CHECK(at::equal(logits_of(model), before));
    adapter.merge();
    CHECK(at::equal(logits_of(model), want));
    adapter.detach();
    CHECK(at::equal(logits_of(model), before));
  }
}

TEST_CASE("only the matrices of a frozen base learn", "[lora]") {
  auto model = small_models().wide;
  for (auto& parameter : model->parameters()) {
    parameter.requires_grad_(false);
  }
  Adapter adapter(model, {.rank = 4, .alpha = 8});
  adapter.attach();
  const auto loss = [&] {
    return at::cross_entropy_loss(model->forward(some_ids())[0].slice(0, 0, -1),
                                  some_ids()[0].slice(0, 1));
  };
  const auto before = loss().item<double>();
  torch::optim::Adam optimizer(adapter.parameters(), 1e-2);
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  CHECK(loss().item<double>() < 0.7 * before);
  for (const auto& parameter : adapter.parameters()) {
    CHECK(parameter.grad().defined());
  }
  CHECK_FALSE(model->tok_emb->weight.grad().defined());
  adapter.detach();
  adapter.merge();  // as frozen as what it stands for
  CHECK_FALSE(model->blocks[1]->as<TransformerBlockImpl>()->ff->fc1->weight.requires_grad());
}

TEST_CASE("a scale multiplies what alpha says, not the scale before", "[lora]") {
  auto model = small_models().wide;
  auto adapter = trained(model);  // 8 / 4
  adapter.scale(3);
  adapter.scale(0.25);
  const auto want = by_hand(small_models().wide, adapter, 0.5);
  adapter.attach();
  CHECK(at::allclose(logits_of(model), want, 1e-4, 1e-4));
  adapter.detach();
  adapter.merge();
  CHECK(at::equal(logits_of(model), want));
  CHECK(error_of([&] { adapter.scale(1); }).find("scale: this adapter is merged") !=
        std::string::npos);
}

TEST_CASE("dropout acts while training alone", "[lora]") {
  auto model = small_models().wide;
  auto adapter = trained(model, {.rank = 4, .alpha = 8, .dropout = 0.5});
  adapter.attach();
  model->eval();
  CHECK(at::equal(logits_of(model), logits_of(model)));
  model->train();
  CHECK_FALSE(at::equal(logits_of(model), logits_of(model)));
}

TEST_CASE("adapters stand on each other and leave in turn", "[lora]") {
  auto model = small_models().wide;
  const auto before = logits_of(model);
  auto first = trained(model), second = trained(model, {.rank = 2, .alpha = 8});
  first.attach();
  const auto with_first = logits_of(model);
  second.attach();
  const auto with_both = logits_of(model);
  CHECK((with_both - with_first).abs().max().item<double>() > 0.05);
  CHECK(error_of([&] { first.detach(); }).find("another adapter on top") != std::string::npos);
  CHECK(error_of([&] { second.attach(); }).find("in the model already") != std::string::npos);
  second.detach();
  CHECK(at::equal(logits_of(model), with_first));
  CHECK(error_of([&] { second.merge(); }).find("[lora] merge") != std::string::npos);
  CHECK(at::equal(logits_of(model), with_first));  // nothing was half merged
  first.detach();
  CHECK(error_of([&] { first.detach(); }).find("not in the model") != std::string::npos);
  CHECK(at::equal(logits_of(model), before));
  first.merge();
  second.attach();  // on merged weights
  CHECK(at::allclose(logits_of(model), with_both, 1e-4, 1e-4));
}

TEST_CASE("bfloat16 bases round once", "[lora]") {
  auto model = small_models().rounded;
  auto adapter = trained(model);
  const auto W = model->blocks[1]->as<TransformerBlockImpl>()->ff->fc1->weight.clone();
  adapter.merge();
  const auto tensors = adapter.tensors();
  const auto A = tensors.at("model.layers.1.mlp.gate_proj.lora_A.weight");
  const auto B = tensors.at("model.layers.1.mlp.gate_proj.lora_B.weight");
  const auto want = (W.to(at::kFloat) + B.matmul(A) * 2).to(at::kBFloat16);
  CHECK(at::equal(model->blocks[1]->as<TransformerBlockImpl>()->ff->fc1->weight, want));
  adapter.detach();
  adapter.attach();
  CHECK(logits_of(model).scalar_type() == at::kBFloat16);
  const auto x = at::randn({5, 128}).to(at::kBFloat16);
  const auto added = at::linear(at::linear(x.to(at::kFloat), A), B) * 2;
  CHECK(at::equal(model->blocks[1]->as<TransformerBlockImpl>()->ff->fc1->forward(x),
                  (at::linear(x, W) + added).to(at::kBFloat16)));
}

TEST_CASE("the fused engine refuses an adapter and runs a merged one", "[lora]") {
  auto model = small_models().rounded;
  auto adapter = trained(model);
  adapter.attach();
  const auto fused = [&] {
    return make_engine(model, {.kind = EngineKind::kFused, .capacity = 64});
  };
  CHECK(error_of(fused).find("a kind of Linear it does not know") != std::string::npos);
  adapter.detach();
  const auto before = logits_of(model).slice(1, -1).to(at::kFloat);
  adapter.merge();
  const auto engine = fused();
  engine->append(some_ids());
  const auto got = engine->logits(Rows::kLast);
  CHECK(at::allclose(got, logits_of(model).slice(1, -1).to(at::kFloat), 0.05, 0.05));
  CHECK((got - before).abs().max().item<double>() > 0.1);
}

TEST_CASE("an adapter on a quantised base computes, and cannot be merged", "[lora]") {
  auto model = small_models().rounded;
  quantize(model, *find_recipe("int8"), /*calibration=*/nullptr);
  const auto before = logits_of(model);
  auto adapter = trained(model);
  CHECK(error_of([&] { adapter.merge(); }).find("not quantised") != std::string::npos);
  adapter.attach();
  CHECK((logits_of(model) - before).abs().max().item<double>() > 0.1);
}

TEST_CASE("an adapter's files keep it bit for bit", "[lora][peft]") {
  const ScratchFolder folder("gemma_lora");
  auto model = small_models().wide;
  auto adapter = trained(
      model,
      {.rank = 3, .alpha = 6, .dropout = 0.25, .use_rslora = true, .target_modules = {"v_proj"}});
  save_adapter(adapter, folder / "adapter", "some/base");
  const auto path = folder / "adapter/adapter_model.safetensors";
  CHECK(load_safetensors(path).count(
            "base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight") == 1);
  CHECK(load_safetensors_metadata(path).at("format") == "pt");
  CHECK(read_file(folder / "adapter/adapter_config.json").find("\"some/base\"") !=
        std::string::npos);
  auto back = load_adapter(model, folder / "adapter");
  CHECK(back.config().rank == 3);
  CHECK(back.config().alpha == 6);
  CHECK(back.config().dropout == 0.25);
  CHECK(back.config().use_rslora);
  CHECK(back.config().target_modules == std::vector<std::string>{"v_proj"});
  REQUIRE(back.tensors().size() == 8);
  for (const auto& [name, tensor] : adapter.tensors()) {
    CHECK(at::equal(back.tensors().at(name), tensor));
    CHECK(back.tensors().at(name).requires_grad());
  }
  CHECK(error_of([&] { save_adapter(adapter, folder / "adapter", ""); }).find("adapter") !=
        std::string::npos);
}

TEST_CASE("what PEFT could mean otherwise is refused by name", "[lora][peft]") {
  const ScratchFolder folder("gemma_lora_wrong");
  auto model = small_models().wide;
  const auto path = folder / "adapter";
  save_adapter(trained(model), path, "");
  const auto config = read_file(path + "/adapter_config.json");
  const auto wrong = [&](const std::string& text) {
    write_file(path + "/adapter_config.json", text);
    return error_of([&] { load_adapter(model, path); });
  };
  const auto with = [&](const std::string& field) {
    return "{" + field + "," + config.substr(config.find('{') + 1);
  };
  CHECK(wrong(with("\"use_dora\": true")).find("use_dora: expected none") != std::string::npos);
  CHECK(wrong(with("\"rank_pattern\": {\"q_proj\": 3}")).find("rank_pattern") != std::string::npos);
  CHECK(wrong(with("\"use_dora\": false, \"rank_pattern\": {}, \"megatron_config\": null")) == "");
  CHECK(wrong("{\"peft_type\": \"IA3\"}").find("peft_type: expected LORA, got \"IA3\"") !=
        std::string::npos);
  CHECK(wrong("[]").find("expected a JSON object") != std::string::npos);
  auto other = config;
  other.replace(other.find("\"r\": 4"), 6, "\"r\": 5");
  CHECK(wrong(other).find("down_proj.lora_A.weight: expected shape (5, 192), got (4, 192)") !=
        std::string::npos);
  other.replace(other.find("\"r\": 5"), 6, "\"r\": \"5\"");
  CHECK(wrong(other).find("r: expected another kind of value, got \"5\"") != std::string::npos);
  other.replace(other.find("q_proj"), 6, "lm_head");
  other.replace(other.find("\"r\": \"5\""), 8, "\"r\": 4");
  CHECK(wrong(other).find("got lm_head") != std::string::npos);
  other = config;
  other.replace(other.find("\"none\""), 6, "\"all\"");
  CHECK(wrong(other).find("bias: expected none, got \"all\"") != std::string::npos);
  other = config;
  other.replace(other.find("\"q_proj\""), 8, "\"k_proj\"");
  CHECK(wrong(other).find("q_proj.lora_A.weight: expected only matrices of target_modules") !=
        std::string::npos);
  write_file(path + "/adapter_config.json", config);
  auto tensors = load_safetensors(path + "/adapter_model.safetensors");
  tensors.erase(tensors.begin());
  save_safetensors(path + "/adapter_model.safetensors", tensors);
  CHECK(error_of([&] { load_adapter(model, path); }).find("it is not there") != std::string::npos);
}

TEST_CASE("settings that are none are refused by name", "[lora]") {
  CHECK(error_of([] { validated({.rank = 0}); }).find("rank: expected at least 1, got 0") !=
        std::string::npos);
  CHECK(error_of([] { validated({.dropout = 1}); }).find("dropout") != std::string::npos);
  CHECK(error_of([] { validated({.alpha = NAN}); }).find("alpha") != std::string::npos);
  CHECK(error_of([] { validated({.target_modules = {}}); }).find("target_modules") !=
        std::string::npos);
  CHECK(error_of([] {
          validated({.target_modules = {"embed_tokens"}});
        }).find("got embed_tokens") != std::string::npos);
}
