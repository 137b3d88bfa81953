#include "gemma_torch/inspect/sae.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "common.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/inspect/perplexity.h"
#include "generation.h"
#include "sae_report.h"

namespace gemma_torch::apps {
namespace {

// What the three commands take alike.
struct SaeFlags {
  ModelOptions model = {};
  std::string file = {};
  std::string site = {}, input = {}, output = {};
};

struct EncodeFlags : SaeFlags {
  TextOptions text = {};
  std::vector<int64_t> features = {};
  int64_t top = 5;
  std::string html = {};
  bool json = false;
};

struct ReconstructFlags : SaeFlags {
  TextOptions text = {};
  int64_t chunk = 0;
  bool json = false;
};

struct GenerateFlags : SaeFlags {
  GenerationFlags generation = {};
  std::vector<int64_t> ablate = {};
  std::vector<std::string> clamp = {};
  bool reconstruct = false;
};

// An autoencoder beside the model that it belongs to.
struct Loaded {
  Sae sae = {};
  Pretrained model = {};
  SaeSites sites = {};
};

SiteAt one_site(const std::string& name, int64_t n_layers) {
  const auto found = match_sites({name}, n_layers);
  check(found.size() == 1, "[sae] site: expected one, {} matches {}", name, found.size());
  return found[0];
}

Loaded load_with_model(const SaeFlags& flags) {
  const bool one = !flags.site.empty();
  if (one == (!flags.input.empty() || !flags.output.empty()) ||
      flags.input.empty() != flags.output.empty()) {
    throw CLI::RequiredError("Either --site, or --input-site and --output-site");
  }
  Loaded loaded{.sae = load_sae(flags.file), .model = load_modules("sae", flags.model)};
  const auto n_layers = loaded.model.config.n_layers;
  loaded.sites = {one_site(one ? flags.site : flags.input, n_layers),
                  one_site(one ? flags.site : flags.output, n_layers)};
  check_sae_sites(loaded.sae, loaded.sites, loaded.model.config);
  return loaded;
}

void run_encode(const EncodeFlags& flags) {
  if (!flags.html.empty() && flags.features.empty()) {
    throw CLI::RequiresError("--html", "--feature");
  }
  const at::NoGradGuard no_grad;
  const auto loaded = load_with_model(flags);
  const auto& [sae, model, sites] = loaded;
  EncodeCase of{.file = flags.file,
                .sites = sites,
                .ids = read_ids(flags.text, model.tokenizer),
                .features = flags.features,
                .tokenizer = model.tokenizer};
  check(!of.ids.empty(), "[sae] prompt: expected at least one token, got none");
  for (const auto id : of.ids) {
    check(id < model.config.vocab_size,
          "[sae] prompt: expected ids from 0 to {}, got {}",
          model.config.vocab_size - 1,
          id);
  }
  for (const auto feature : of.features) {
    check(feature >= 0 && feature < sae.features(),
          "[sae] --feature: expected 0 to {}, got {}",
          sae.features() - 1,
          feature);
  }
  const auto row =
      at::tensor(of.ids, at::kLong).unsqueeze(0).to(model.model->tok_emb->weight.device());
  const auto values = site_values(model.model, row, {sites.input, sites.output});
  const auto x = token_rows(values.at(sites.input.name()))[0];
  const auto y = token_rows(values.at(sites.output.name()))[0];
  const Encoded encoded{.top = top_features(sae, x, flags.top),
                        .activations = sae.encode(x, of.features),
                        .fit = fit_of(sae, x, y)};
  if (!flags.html.empty()) {
    write_file(flags.html, encode_page(encoded, of));
  }
  flags.json ? print_json(encode_json(encoded, of)) : print_text(encode_text(encoded, of));
}

double nll_under(const Loaded& loaded,
                 const Probe& probe,
                 const std::vector<int64_t>& ids,
                 const WindowOptions& options) {
  const auto length = static_cast<int64_t>(ids.size());
  const auto needed = options.chunk > 0 ? std::min(options.chunk, length) : length;
  const auto engine = probed_engine(loaded.model, probe)(needed);
  return mean_nll(score_tokens(*engine, ids, options));
}

void run_reconstruct(const ReconstructFlags& flags) {
  const auto loaded = load_with_model(flags);
  const auto& cfg = loaded.model.config;
  const auto ids = read_ids(flags.text, loaded.model.tokenizer);
  Progress progress("tokens");
  WindowOptions options{.chunk = flags.chunk};
  if (loaded.model.tokenizer) {
    options.bos_id = loaded.model.tokenizer->bos_id();
  }
  catch_interrupt();
  options.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    check(!interrupted(), "[sae] stopped after {} of {} tokens of a run", done, total);
  };
  const auto T = static_cast<int64_t>(ids.size());
  const LossCase of{
      .file = flags.file,
      .sites = loaded.sites,
      .tokens = T,
      .plain = nll_under(loaded, {}, ids, options),
      .reconstructed = nll_under(
          loaded, sae_probe(loaded.sae, loaded.sites, {.reconstruct = true}, cfg), ids, options),
      .zeroed =
          nll_under(loaded, edits_probe({{.site = loaded.sites.output}}, cfg, T), ids, options)};
  flags.json ? print_json(loss_json(of)) : print_text(loss_text(of));
}

// "5=10": feature 5 is given the activation 10.
std::pair<int64_t, double> clamp_of(const std::string& text) {
  const auto equals = text.find('=');
  int64_t feature = -1;
  double value = 0;
  const bool good = equals != std::string::npos &&
                    CLI::detail::lexical_cast(text.substr(0, equals), feature) &&
                    CLI::detail::lexical_cast(text.substr(equals + 1), value);
  check(good, "[sae] --clamp: expected FEATURE=ACTIVATION such as 5=10, got \"{}\"", text);
  return {feature, value};
}

void run_generate(const GenerateFlags& flags) {
  SaeEdit edit{.reconstruct = flags.reconstruct};
  for (const auto feature : flags.ablate) {
    edit.activations[feature] = 0;
  }
  for (const auto& text : flags.clamp) {
    const auto [feature, value] = clamp_of(text);
    check(edit.activations.emplace(feature, value).second,
          "[sae] feature {}: expected one value for it, got two",
          feature);
  }
  if (edit.activations.empty() && !edit.reconstruct) {
    throw CLI::RequiredError("--ablate, --clamp or --reconstruct");
  }
  const auto loaded = load_with_model(flags);
  auto activations = nlohmann::json::array();
  for (const auto& [feature, value] : edit.activations) {
    activations.push_back({{"feature", feature}, {"activation", value}});
  }
  run_generation(
      loaded.model,
      flags.generation,
      probed_engine(loaded.model, sae_probe(loaded.sae, loaded.sites, edit, loaded.model.config)),
      {{"sae", flags.file},
       {"input", loaded.sites.input.name()},
       {"output", loaded.sites.output.name()},
       {"reconstruct", edit.reconstruct},
       {"activations", activations}});
}

void add_sae_flags(CLI::App& command, SaeFlags& flags) {
  command
      .add_option("--sae",
                  flags.file,
                  "safetensors or .npz file with W_enc, W_dec, b_enc, b_dec, threshold")
      ->required();
  command.add_option("--site", flags.site, "what an autoencoder is of: blocks.9.resid_post");
  command.add_option("--input-site", flags.input, "of a transcoder: blocks.9.mlp_in");
  command.add_option("--output-site", flags.output, "of a transcoder: blocks.9.mlp_out");
}

void add_encode(CLI::App& sae) {
  auto* command = sae.add_subcommand("encode", "which features a text has, token by token");
  auto flags = std::make_shared<EncodeFlags>();
  add_sae_flags(*command, *flags);
  add_text_flags(*command, flags->text);
  command->add_option("--top", flags->top, "features of each token")->capture_default_str();
  command->add_option("--feature", flags->features, "also all activations of these: 5,123")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--html", flags->html, "a page: the text in each --feature's colours");
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_encode(*flags); });
}

void add_reconstruct(CLI::App& sae) {
  auto* command = sae.add_subcommand(
      "reconstruct", "the loss of a text with the autoencoder's output in the site's place");
  auto flags = std::make_shared<ReconstructFlags>();
  add_sae_flags(*command, *flags);
  add_text_flags(*command, flags->text);
  command
      ->add_option("-c,--chunk", flags->chunk, "tokens of a window, as in perplexity; 0: one text")
      ->capture_default_str();
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_reconstruct(*flags); });
}

void add_edited_generate(CLI::App& sae) {
  auto* command = sae.add_subcommand("generate", "continue a text with features set or ablated");
  auto flags = std::make_shared<GenerateFlags>();
  add_sae_flags(*command, *flags);
  command->add_option("--ablate", flags->ablate, "features without activation: 5,123")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--clamp", flags->clamp, "features of a fixed activation: 5=10,123=2.5")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_flag("--reconstruct",
                    flags->reconstruct,
                    "the autoencoder's output, without what it does not explain");
  add_generation_flags(*command, flags->generation);
  add_module_flags(*command, flags->model);
  command->callback([flags] { run_generate(*flags); });
}

}  // namespace

void add_sae(CLI::App& app) {
  auto* command = app.add_subcommand(
      "sae", "JumpReLU sparse autoencoders and transcoders: features read, set, ablated");
  command->require_subcommand(1);
  add_encode(*command);
  add_reconstruct(*command);
  add_edited_generate(*command);
}

}  // namespace gemma_torch::apps
