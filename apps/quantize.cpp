#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <cmath>

#include "common.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/inspect/divergence.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/quant/pack.h"
#include "gemma_torch/quant/quantize.h"

namespace gemma_torch::apps {
namespace {

using Texts = std::vector<std::vector<int64_t>>;

constexpr int64_t kTokens = 512;  // of a text, the first of them BOS
constexpr int64_t kTexts = 36;    // at most
constexpr int64_t kHeldOut = 9;   // every ninth text is for the report
constexpr int64_t kTogether = 4;  // texts that are sampled at once: as many rows as a product takes

struct QuantizeFlags {
  ModelOptions model;
  std::string out;
  std::string calibration;  // empty: the model's own samples
  uint64_t seed = 1;
};

void check_interrupt() {
  check(!interrupted(), "[quantize] interrupted; nothing was written");
}

// Windows of a file, spread evenly over it.
Texts read_texts(const std::string& path, const Tokenizer& tokenizer) {
  const auto ids = tokenizer.encode(read_file(path), {.add_bos = false});
  constexpr int64_t kWindow = kTokens - 1;
  const auto windows = static_cast<int64_t>(ids.size()) / kWindow;
  check(windows >= 2,
        "[quantize] {}: expected at least {} tokens, got {}",
        path,
        2 * kWindow,
        ids.size());
  Texts texts;
  const auto count = std::min(windows, kTexts);
  for (int64_t n = 0; n < count; ++n) {
    const auto first = ids.begin() + n * windows / count * kWindow;
    auto& text = texts.emplace_back(1, tokenizer.bos_id());
    text.insert(text.end(), first, first + kWindow);
  }
  return texts;
}

// What the model itself writes after BOS.
Texts sample_texts(const Pretrained& loaded, int64_t count, uint64_t seed) {
  fmt::print(stderr, "gemma: the model writes {} texts to calibrate with (seed {})\n", count, seed);
  Progress progress("tokens written");
  const auto bos = loaded.tokenizer ? loaded.tokenizer->bos_id() : 2;
  const auto engine =
      gemma_torch::make_engine(loaded.model, {.capacity = kTokens, .batch = kTogether});
  Texts texts;
  int64_t written = 0;
  while (static_cast<int64_t>(texts.size()) < count) {
    engine->reset();
    GenerateOptions how{.max_new_tokens = kTokens - 1, .sampling = loaded.sampling};
    how.sampling.seed = seed + texts.size();
    const Texts prompts(kTogether, {bos});
    const auto result = generate(*engine, prompts, how, [&](int64_t, int64_t) {
      progress.show(++written, (count + kTogether - 1) / kTogether * kTogether * (kTokens - 1));
      return !interrupted();
    });
    check_interrupt();
    for (const auto& row : result.rows) {
      auto& text = texts.emplace_back(1, bos);
      text.insert(text.end(), row.ids.begin(), row.ids.end());
    }
  }
  texts.resize(static_cast<size_t>(count));
  return texts;
}

Calibration calibrate(const Gemma3Model& model, const Texts& texts) {
  Progress progress("calibrating: texts read");
  Calibration calibration(model);
  for (size_t n = 0; n < texts.size(); ++n) {
    calibration.add(at::tensor(texts[n], at::kLong).unsqueeze(0));
    progress.show(static_cast<int64_t>(n + 1), static_cast<int64_t>(texts.size()));
    check_interrupt();
  }
  return calibration;
}

nlohmann::json measure(const Pretrained& original, const Pretrained& rounded, const Texts& texts) {
  Progress progress("comparing: positions");
  const EngineOptions how{.capacity = kTokens};
  const auto reference = gemma_torch::make_engine(original.model, how);
  const auto other = gemma_torch::make_engine(rounded.model, how);
  const auto found =
      compare_distributions(*reference, *other, texts, [&](int64_t done, int64_t of) {
        progress.show(done, of);
        check_interrupt();
      });
  return {{"positions", found.positions},
          {"kl", found.kl.mean.value},
          {"same_top", found.same_top.value},
          {"perplexity", std::exp(found.other_nll.value)},
          {"perplexity_before", std::exp(found.reference_nll.value)},
          {"bytes_per_token", other->report(0).bytes_per_token},
          {"bytes_per_token_before", reference->report(0).bytes_per_token}};
}

void run_quantize(const QuantizeFlags& flags) {
  const auto recipe = find_recipe(flags.model.quant);
  check(
      recipe.has_value(), "[quant] expected one of {}, got {}", recipe_names(), flags.model.quant);
  AtomicFolder out(flags.out);
  auto options = flags.model;
  options.quant = "none";
  options.dtype = "bfloat16";
  auto loaded = load(options);
  check(loaded.formats.empty(),
        "[quantize] expected weights, got a folder that holds {}",
        recipe_name(loaded.formats));
  const auto refusal = Pack::refusal(loaded.model);
  check(refusal.empty(), "[quantize] expected a model that fits the fused kernels: {}", refusal);
  catch_interrupt();
  Texts texts, held_out;
  if (flags.calibration.empty()) {
    texts = sample_texts(loaded, recipe->calibrated ? kTexts : kTexts / kHeldOut, flags.seed);
  } else {
    check(loaded.tokenizer.has_value(), "[quantize] --calibration: this model has no tokenizer");
    texts = read_texts(flags.calibration, *loaded.tokenizer);
  }
  std::optional<Calibration> calibration;
  if (recipe->calibrated) {
    Texts seen;
    for (size_t n = 0; n < texts.size(); ++n) {
      const bool last_of_few = n + 1 == texts.size() && held_out.empty();
      (n % kHeldOut == kHeldOut - 1 || last_of_few ? held_out : seen).push_back(texts[n]);
    }
    calibration = calibrate(loaded.model, seen);
  } else {
    texts.resize(std::min<size_t>(texts.size(), kTexts / kHeldOut));
    held_out = texts;
  }
  {
    Progress progress("rounding: layers");
    quantize(loaded.model,
             *recipe,
             calibration ? &*calibration : nullptr,
             [&](int64_t done, int64_t of) {
               progress.show(done, of);
               check_interrupt();
             });
  }
  auto report = measure(load(options), loaded, held_out);
  report["calibration"] = flags.calibration.empty() ? "own samples" : flags.calibration;
  report["calibration_tokens"] = calibration ? calibration->tokens() : 0;
  report["seed"] = flags.seed;
  write_quantized(model_path(options.model), loaded, report, out);
  out.commit();
  report["quant"] = recipe->name;
  report["out"] = flags.out;
  print_json(report);
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto* command = app.add_subcommand(
      "quantize", "rounds a model's layers to fewer bits, into a folder that loads as it is");
  auto flags = std::make_shared<QuantizeFlags>();
  add_model_flag(*command, flags->model.model);
  command
      ->add_option(
          "--quant",
          flags->model.quant,
          "one of " + recipe_names() + ": bits of most weights; the mixed ones are calibrated")
      ->required();
  command->add_option("-o,--out", flags->out, "the folder to make; new or empty")->required();
  command->add_option("--calibration",
                      flags->calibration,
                      "text file like what the model will read [the model's own samples]");
  command->add_option("--seed", flags->seed, "of the samples")->capture_default_str();
  command->add_option("-t,--threads", flags->model.threads, "[usable physical cores]");
  command->footer(
      "Every ninth text of 512 tokens is held out. On those the result is compared with the "
      "original: kl (mean, nats), same_top (share of positions with the same most probable "
      "token), perplexity. The report is printed as JSON and kept in the folder's config.json.");
  command->callback([flags] { run_quantize(*flags); });
}

}  // namespace gemma_torch::apps
