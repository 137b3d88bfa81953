#include "gemma_torch/pretrained.h"

#include <ATen/Functions.h>

#include <filesystem>

#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/quant/pack.h"
#include "support/catch.h"
#include "support/golden.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

// A folder without a tokenizer, as gemma would load it.
void write_folder(const ScratchFolder& folder, const Tiny& tiny, const TensorMap& weights) {
  write_file(folder / "config.json", config_to_json(tiny.config).dump());
  save_safetensors(folder / "model.safetensors", weights);
}

}  // namespace

TEST_CASE("a folder loads, converts, and gives the same logits", "[pretrained]") {
  const at::NoGradGuard no_grad;
  for (const char* name : {"tiny_grouped.safetensors", "tiny_scaled.safetensors"}) {
    const Tiny tiny(name);
    const ScratchFolder folder("gemma_pretrained");
    write_folder(folder, tiny, tiny.weights());
    write_file(folder / "generation_config.json", R"({"eos_token_id": [1, 106], "top_k": 9})");
    const auto loaded = load_pretrained(folder.path());
    CHECK_FALSE(loaded.tokenizer.has_value());
    CHECK(loaded.instruct);
    CHECK(loaded.stop_ids == std::vector<int64_t>{1, 106});
    CHECK(loaded.sampling.top_k == 9);
    CHECK(loaded.sampling.top_p == 0.95);
    CHECK(max_difference(Gemma3Model(loaded.model)(tiny.want.at("ids")), tiny.want.at("logits")) <
          kFloatTolerance);

    convert_to_folder(folder.path(), folder / "converted");
    const auto again = load_pretrained(folder / "converted");
    CHECK(again.stop_ids == loaded.stop_ids);
    for (const auto& item : again.model->named_parameters()) {
      CHECK(at::equal(item.value(), loaded.model->named_parameters()[item.key()]));
    }
    CHECK_THROWS_WITH(convert_to_folder(folder.path(), folder / "converted"),
                      Catch::Contains("new or empty folder"));
    CHECK_THROWS_AS(convert_to_folder(folder.path(), "/proc/none"), Error);
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
      CHECK(entry.path().filename().string().find("converted.") ==
            std::string::npos);  // nothing half-written
    }
  }
}

TEST_CASE("weights are packed in loading where that is asked for and can be", "[pretrained]") {
  const auto model = small_models().rounded;
  const ScratchFolder folder("gemma_pretrained");
  write_file(folder / "config.json", config_to_json(model->cfg).dump());
  save_safetensors(folder / "model.safetensors", hf_weights(model));
  CHECK(load_pretrained(folder.path()).pack == nullptr);
  for (const auto format : {kernels::Format::kLossless12, kernels::Format::kInt8}) {
    const auto loaded =
        load_pretrained(folder.path(), {.mapped = true, .pack_threads = 3, .pack_format = format});
    REQUIRE(loaded.pack != nullptr);
    CHECK(loaded.pack->fits(loaded.model, format, /*threads=*/3));
    CHECK(loaded.pack->is_current());
  }
  // the modules alone run float32
  CHECK(load_pretrained(folder.path(), {.dtype = at::kFloat, .pack_threads = 3}).pack == nullptr);
}

TEST_CASE("the text part of a multimodal checkpoint loads", "[pretrained]") {
  const Tiny tiny("tiny_grouped.safetensors");
  for (const std::string prefix : {"language_model.model.", "model.language_model."}) {
    TensorMap weights{{"vision_tower.encoder.weight", at::ones({3})}};
    for (const auto& [name, tensor] : tiny.weights()) {
      weights.emplace(prefix + name.substr(6), tensor);
    }
    CHECK_NOTHROW(build_model(tiny.config, weights, c10::kCPU, "memory"));
  }
}

TEST_CASE("weights that disagree with the config are named, with both shapes", "[pretrained]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto error_with = [&](const std::function<void(TensorMap&)>& change) {
    auto weights = tiny.weights();
    change(weights);
    try {
      build_model(tiny.config, weights, c10::kCPU, "model.safetensors");
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("loaded");
  };
  const std::string up = "model.layers.3.mlp.up_proj.weight";
  CHECK(error_with([&](auto& w) { w[up] = w[up].t().contiguous(); }) ==
        "[load_weights] model.layers.3.mlp.up_proj.weight: expected (32, 20), file has (20, 32) "
        "(model.safetensors)");
  CHECK(error_with([&](auto& w) { w.erase(up); }) ==
        "[load_weights] model.layers.3.mlp.up_proj.weight: not in model.safetensors");
  CHECK_THAT(error_with([&](auto& w) { w["model.layers.9.extra"] = at::ones({2}); }),
             Catch::Contains("model.layers.9.extra: not a tensor of this model"));
  CHECK_THAT(error_with([&](auto& w) { w[up] = w[up].to(at::kInt); }),
             Catch::Contains("expected a floating-point tensor"));
  CHECK_THAT(error_with([&](auto& w) { w["lm_head.weight"] = w["model.embed_tokens.weight"] + 1; }),
             Catch::Contains("tie_word_embeddings"));
  CHECK(error_with([&](auto& w) {
          w["lm_head.weight"] = w["model.embed_tokens.weight"].clone();
        }) == "loaded");
}

TEST_CASE("a path that holds no model is an error that says what was expected", "[pretrained]") {
  const ScratchFolder folder("gemma_no_model");
  CHECK_THROWS_WITH(load_pretrained(folder / "none"), Catch::Contains("no such file or folder"));
  CHECK_THROWS_WITH(load_pretrained(folder.path()), Catch::Contains("expected config.json"));
  const Tiny tiny("tiny_grouped.safetensors");
  write_file(folder / "config.json", config_to_json(tiny.config).dump());
  CHECK_THROWS_WITH(load_pretrained(folder.path()), Catch::Contains("expected model.safetensors"));
  save_safetensors(folder / "model.safetensors", tiny.weights());
  write_file(folder / "generation_config.json", R"({"eos_token_id": "one"})");
  CHECK_THROWS_WITH(load_pretrained(folder.path()), Catch::Contains("eos_token_id"));
  write_file(folder / "generation_config.json", R"({"temperature": -1})");
  CHECK_THROWS_WITH(load_pretrained(folder.path()), Catch::Contains("temperature"));
}

TEST_CASE("loaded weights train without touching the file", "[pretrained]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const ScratchFolder folder("gemma_train");
  write_folder(folder, tiny, tiny.weights());
  auto loaded = load_pretrained(folder.path());
  loaded.model(tiny.want.at("ids")).sum().backward();
  {
    const at::NoGradGuard no_grad;
    loaded.model->final_norm->scale.add_(1.0);
  }
  CHECK(at::equal(load_safetensors(folder / "model.safetensors").at("model.norm.weight"),
                  tiny.want.at("model.norm.weight")));
}
