#include "gemma_torch/model/gemma3.h"

#include <torch/nn/functional/loss.h>

#include "gemma_torch/base/error.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

TEST_CASE("logits equal transformers' beyond the sliding window", "[gemma3][golden]") {
  // both layer types, window 8 of 21 tokens, several GQA groups; linear RoPE scaling, a separate head
  for (const char* name : {"tiny_grouped.safetensors", "tiny_scaled.safetensors"}) {
    CAPTURE(name);
    const Tiny tiny(name);
    const torch::NoGradGuard no_grad;
    auto model = tiny.model();
    TensorMap seen;
    const Probe record = [&](const At& at, const torch::Tensor& x) {
      seen[site_name(at.site, at.layer)] = x;
      return x;
    };
    const auto logits = model(tiny.want.at("ids"), nullptr, record);
    CHECK(max_difference(logits, tiny.want.at("logits")) < kFloatTolerance);
    for (const auto& [key, want] : tiny.want) {
      if (key == "embed" || key == "final_norm" || key.starts_with("blocks.")) {
        CAPTURE(key);
        CHECK(max_difference(seen.at(key), want) < kFloatTolerance);
      }
    }
  }
}

TEST_CASE("every probe site equals what transformers computes there", "[gemma3][golden][probe]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const auto want = load_safetensors(golden_path("tiny_sites.safetensors"));
  const torch::NoGradGuard no_grad;
  size_t compared = 0;
  const Probe compare = [&](const At& at, const torch::Tensor& x) {
    const auto name = site_name(at.site, at.layer);
    CAPTURE(name);
    if (want.contains(name)) {
      ++compared;
      CHECK(x.sizes() == want.at(name).sizes());
      CHECK(max_difference(x, want.at(name)) < kFloatTolerance);
    }
    return x;
  };
  tiny.model()->forward(want.at("ids"), nullptr, compare);
  CHECK(compared == want.size() - 1);  // all but ids
}

TEST_CASE("a probe replaces the value at its site", "[gemma3][probe]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const torch::NoGradGuard no_grad;
  auto model = tiny.model();
  const auto ids = tiny.want.at("ids");
  const Probe ablate = [](const At& at, const torch::Tensor& x) {
    return at.site == Site::kMlpOut || at.site == Site::kAttnOut ? torch::zeros_like(x) : x;
  };
  torch::Tensor embed;
  const Probe watch = [&](const At& at, const torch::Tensor& x) {
    embed = at.site == Site::kEmbed ? x : embed;
    return ablate(at, x);
  };
  const auto bare = model->forward(ids, nullptr, watch);
  CHECK(max_difference(bare, model->out_head(model->final_norm(embed))) == 0);
  CHECK(max_difference(bare, tiny.want.at("logits")) > 0.1);
}

TEST_CASE("gradients equal PyTorch's for every parameter", "[gemma3][golden]") {
  for (const char* name : {"tiny_grouped.safetensors", "tiny_scaled.safetensors"}) {
    const Tiny tiny(name);
    auto model = tiny.model();
    const auto ids = tiny.want.at("ids");
    const auto logits = model(ids).narrow(1, 0, ids.size(1) - 1);
    const auto loss = torch::nn::functional::cross_entropy(
        logits.reshape({-1, logits.size(-1)}), ids.narrow(1, 1, ids.size(1) - 1).reshape({-1}));
    CHECK(loss.item<double>() == Approx(tiny.want.at("loss").item<double>()).epsilon(1e-6));
    loss.backward();
    size_t compared = 0;
    for (const auto& item : model->named_parameters()) {
      const auto key = "grad." + hf_name(item.key());
      CAPTURE(name, key);
      const auto& want = tiny.want.at(key);
      CHECK(max_difference(item.value().grad(), want) <= 1e-5 * want.abs().max().item<double>());
      ++compared;
    }
    CHECK(compared == tiny.weights().size());
  }
}

TEST_CASE("bfloat16 stays as near to float32 as transformers' bfloat16 does", "[gemma3][golden]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const torch::NoGradGuard no_grad;
  auto model = tiny.model(torch::kBFloat16);
  const auto logits = model(tiny.want.at("ids"));
  const auto theirs = max_difference(tiny.want.at("bf16.logits"), tiny.want.at("logits"));
  CHECK(logits.scalar_type() == torch::kBFloat16);
  CHECK(max_difference(logits, tiny.want.at("logits")) < 1.5 * theirs);
}

TEST_CASE("a seed draws the notebook's weights in the notebook's order", "[gemma3][golden]") {
  const auto path = golden_path("notebook_init.safetensors");
  const auto want = load_safetensors(path);
  const auto stated = nlohmann::json::parse(load_safetensors_metadata(path).at("config"));
  const Gemma3Config config{
      .vocab_size = stated["vocab_size"],
      .context_length = stated["context_length"],
      .emb_dim = stated["emb_dim"],
      .n_heads = stated["n_heads"],
      .n_layers = stated["n_layers"],
      .hidden_dim = stated["hidden_dim"],
      .head_dim = stated["head_dim"],
      .n_kv_groups = stated["n_kv_groups"],
      .sliding_window = stated["sliding_window"],
      .layer_types = {LayerType::kSlidingAttention, LayerType::kFullAttention},
      .dtype = torch::kFloat32,
      .query_pre_attn_scalar = stated["query_pre_attn_scalar"]};
  torch::manual_seed(123);
  Gemma3Model model(config);
  for (const auto& item : model->named_parameters()) {
    CAPTURE(item.key());
    const auto flat = item.value().detach().flatten();
    const auto ends = at::cat({flat.narrow(0, 0, 4), flat.narrow(0, flat.numel() - 4, 4)});
    CHECK(max_difference(ends, want.at(item.key())) == 0);
  }
  CHECK(max_difference(model(want.at("ids")), want.at("logits")) < kFloatTolerance);
}

TEST_CASE("parameter counts are the notebook's, tied and untied", "[gemma3]") {
  Gemma3Model model(Gemma3Config{}, torch::kCPU, Init::kNone);
  const auto count = [&] {
    int64_t total = 0;
    for (const auto& parameter : model->parameters()) {
      total += parameter.numel();
    }
    return total;
  };
  CHECK(count() == 435'870'336);
  model->tie_weights();
  CHECK(count() == 268'098'176);
  CHECK(model->out_head->weight.is_same(model->tok_emb->weight));
}

TEST_CASE("the window counts the current token, and every token sees itself", "[gemma3]") {
  const auto positions = torch::arange(6);
  const auto hidden = create_mask(positions, positions, {}, /*window=*/4);
  REQUIRE(hidden.sizes() == torch::IntArrayRef({1, 1, 6, 6}));
  const auto sees = [&](int64_t i, int64_t j) { return !hidden[0][0][i][j].item<bool>(); };
  CHECK(sees(4, 1));
  CHECK_FALSE(sees(4, 0));
  CHECK_FALSE(sees(1, 2));

  const auto padded = create_mask(positions, positions, torch::tensor({{3}}), /*window=*/4);
  for (int64_t i = 0; i < 6; ++i) {
    CHECK_FALSE(padded[0][0][i][i].item<bool>());
    CHECK(padded[0][0][i][2].item<bool>() == (i != 2));
  }
}

TEST_CASE("wrong shapes are errors that show them", "[gemma3]") {
  const auto cos = torch::zeros({3, 8});
  CHECK_THROWS_WITH(apply_rope(torch::zeros({1, 1, 4, 8}), cos, cos),
                    Catch::Contains("got (3, 8)"));
  CHECK_THROWS_AS(compute_rope_params(torch::arange(3), /*head_dim=*/7), Error);
  Gemma3Model model(Tiny("tiny_grouped.safetensors").config);
  CHECK_THROWS_WITH(model(torch::arange(3)), Catch::Contains("expected (B, T), got (3)"));
  KvCache cache(model->cfg, {.capacity = 8, .dtype = torch::kFloat32});
  CHECK_THROWS_WITH(model(torch::zeros({1, 3}, torch::kLong), &cache),
                    Catch::Contains("holds no gradients"));
}
