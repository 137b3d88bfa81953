#include "gemma_torch/inspect/steer.h"

#include <fmt/format.h>

#include <memory>

#include "common.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/io/strict_json.h"
#include "generation.h"
#include "layer_list.h"
#include "prompts.h"
#include "steer_report.h"

namespace gemma_torch::apps {
namespace {

struct MakeFlags {
  ModelOptions model = {};
  std::string pairs = {}, out = {}, layers = {};
  std::string site = "resid_post", method = "mean", pool = "last", format = "safetensors";
  bool json = false;
};

// What generate and measure take alike.
struct AddFlags {
  ModelOptions model = {};
  std::string direction = {}, layers = {};
  bool keep_norm = false;
};

struct GenerateFlags : AddFlags {
  GenerationFlags generation = {};
  double strength = 1;
};

struct MeasureFlags : AddFlags {
  PromptOptions prompts = {};
  TokenOptions toward = {}, away = {.flag = "--against", .ids_flag = "--against-ids"};
  std::vector<double> strengths = {};
  std::string html = {};
  bool json = false;
};

PromptPair pair_of(const std::string& line,
                   const std::string& where,
                   const std::optional<Tokenizer>& tokenizer) {
  constexpr int kDepth = 16;
  const auto record = parse_strict_json(line, kDepth, where);
  check(record.is_object() && record.contains("positive") && record.contains("negative"),
        "[steer] {}: expected an object with \"positive\" and \"negative\", got {}",
        where,
        printable(line.substr(0, 60)));
  return {prompt_of(record["positive"], tokenizer, where),
          prompt_of(record["negative"], tokenizer, where)};
}

std::vector<PromptPair> read_pairs(const std::string& path,
                                   const std::optional<Tokenizer>& tokenizer) {
  std::vector<PromptPair> pairs;
  for (const auto& [line, where] : read_lines(path, "a pair")) {
    pairs.push_back(pair_of(line, where, tokenizer));
  }
  return pairs;
}

Site site_of(const std::string& name) {
  const auto found = find_site(name);
  check(found.has_value(),
        "[steer] --site: expected one of a layer, such as resid_post, got {}",
        name);
  return *found;
}

DirectionOptions direction_options(const MakeFlags& flags,
                                   const std::optional<Tokenizer>& tokenizer) {
  DirectionOptions options{.site = site_of(flags.site), .layers = parse_layers(flags.layers)};
  options.method = flags.method == "pca" ? DirectionMethod::kPca : DirectionMethod::kMean;
  options.pool = flags.pool == "mean" ? Pool::kMean : Pool::kLast;
  if (tokenizer) {
    options.bos_id = tokenizer->bos_id();
  }
  return options;
}

void report_made(const MakeFlags& flags, const MadeDirection& made, size_t pairs) {
  auto layers = nlohmann::json::array();
  auto text = fmt::format("{}: {} of {} pairs at {}\n{:>5} {:>10} {:>16} {:>10}\n",
                          flags.out,
                          flags.method,
                          pairs,
                          flags.site,
                          "layer",
                          "length",
                          "pairs that agree",
                          "explained");
  for (const auto& [layer, fit] : made.fits) {
    layers.push_back(
        {{"layer", layer}, {"norm", fit.norm}, {"agree", fit.agree}, {"explained", fit.explained}});
    text += fmt::format("{:>5} {:>10.3f} {:>14.0f} % {:>8.0f} %\n",
                        layer,
                        fit.norm,
                        100 * fit.agree,
                        100 * fit.explained);
  }
  if (!flags.json) {
    print_text(text);
    return;
  }
  print_json({{"out", flags.out},
              {"format", flags.format},
              {"site", flags.site},
              {"method", flags.method},
              {"pool", flags.pool},
              {"pairs", pairs},
              {"layers", layers}});
}

void run_make(const MakeFlags& flags) {
  const auto loaded = load_modules("steer", flags.model);
  const auto pairs = read_pairs(flags.pairs, loaded.tokenizer);
  auto options = direction_options(flags, loaded.tokenizer);
  const bool gguf = flags.format == "gguf";
  // llama.cpp has no direction for layer 0: "all layers" are all that the format has.
  for (int64_t layer = 1; gguf && flags.layers.empty() && layer < loaded.config.n_layers; ++layer) {
    options.layers.push_back(layer);
  }
  Progress progress("prompts");
  options.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    return !interrupted();
  };
  catch_interrupt();
  auto made = make_direction(loaded.model, pairs, options);
  made.direction.made = {{"method", flags.method},
                         {"pool", flags.pool},
                         {"pairs", std::to_string(pairs.size())},
                         {"model", model_path(flags.model.model)}};
  save_direction(made.direction,
                 flags.out,
                 gguf ? DirectionFormat::kControlVector : DirectionFormat::kSafetensors);
  report_made(flags, made, pairs.size());
}

void run_generate(const GenerateFlags& flags) {
  const auto direction = load_direction(flags.direction);
  const SteerOptions options{.layers = parse_layers(flags.layers),
                             .strength = flags.strength,
                             .keep_norm = flags.keep_norm};
  const auto loaded = load_modules("steer", flags.model);
  const auto probe = steer_probe(direction, options, loaded.config);
  run_generation(loaded,
                 flags.generation,
                 probed_engine(loaded, probe),
                 {{"direction", flags.direction},
                  {"layers", options.layers},
                  {"strength", options.strength},
                  {"keep_norm", options.keep_norm}});
}

void run_measure(const MeasureFlags& flags) {
  const auto direction = load_direction(flags.direction);
  const auto loaded = load_modules("steer", flags.model);
  MeasureCase of{.direction = flags.direction,
                 .prompts = read_prompts(flags.prompts, loaded.tokenizer),
                 .options = {.toward = read_tokens(flags.toward, loaded.tokenizer),
                             .away = read_tokens(flags.away, loaded.tokenizer),
                             .strengths = flags.strengths,
                             .layers = parse_layers(flags.layers),
                             .keep_norm = flags.keep_norm},
                 .tokenizer = loaded.tokenizer};
  Progress progress("runs");
  of.options.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    return !interrupted();
  };
  catch_interrupt();
  const auto rows = measure_steering(loaded.model, direction, of.prompts, of.options);
  if (!flags.html.empty()) {
    write_file(flags.html, measure_page(rows, of));
  }
  flags.json ? print_json(measure_json(rows, of)) : print_text(measure_text(rows, of));
}

void add_adding_flags(CLI::App& command, AddFlags& flags) {
  command.add_option("--direction", flags.direction, "what `steer make` wrote, or llama.cpp's")
      ->required();
  command.add_option("--layers", flags.layers, "8-12 or 3,8-12 [all that the direction has]");
  command.add_flag(
      "--keep-norm", flags.keep_norm, "each token's value keeps its length: only turned");
}

void add_make(CLI::App& steer) {
  auto* command = steer.add_subcommand("make", "a direction from pairs of prompts");
  auto flags = std::make_shared<MakeFlags>();
  command
      ->add_option("--pairs",
                   flags->pairs,
                   "file with {\"positive\": .., \"negative\": ..} in each line, texts or lists "
                   "of ids")
      ->required();
  command->add_option("-o,--out", flags->out, "the file to make")->required();
  command->add_option("--format", flags->format, "safetensors, or gguf for llama.cpp")
      ->check(CLI::IsMember({"safetensors", "gguf"}))
      ->capture_default_str();
  command->add_option("--site", flags->site, "of a layer, without heads")->capture_default_str();
  command->add_option("--layers", flags->layers, "8-12 or 3,8-12 [all]");
  command
      ->add_option("--method",
                   flags->method,
                   "mean of the differences, or pca: their first principal component")
      ->check(CLI::IsMember({"mean", "pca"}))
      ->capture_default_str();
  command->add_option("--pool", flags->pool, "the last position, or the mean over all after BOS")
      ->check(CLI::IsMember({"last", "mean"}))
      ->capture_default_str();
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_make(*flags); });
}

void add_steered_generate(CLI::App& steer) {
  auto* command = steer.add_subcommand("generate", "continue a text with the direction added");
  auto flags = std::make_shared<GenerateFlags>();
  add_adding_flags(*command, *flags);
  command->add_option("--strength", flags->strength, "1: one mean difference of the pairs")
      ->capture_default_str();
  add_generation_flags(*command, flags->generation);
  add_module_flags(*command, flags->model);
  command->callback([flags] { run_generate(*flags); });
}

void add_measure(CLI::App& steer) {
  auto* command = steer.add_subcommand(
      "measure", "ln P(tokens) / P(tokens against) of the next token, at each strength");
  auto flags = std::make_shared<MeasureFlags>();
  add_adding_flags(*command, *flags);
  command->add_option("--strengths", flags->strengths, "-2,-1,0,1,2")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->required();
  add_prompt_flags(*command, flags->prompts);
  add_token_flags(*command,
                  flags->toward,
                  "' good, great': tokens that the direction should make likelier, with their "
                  "spaces");
  add_token_flags(*command, flags->away, "' bad, awful': and less likely");
  command->add_option("--html", flags->html, "a page with a chart and a heatmap");
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_measure(*flags); });
}

}  // namespace

void add_steer(CLI::App& app) {
  auto* command = app.add_subcommand(
      "steer", "directions from pairs of prompts, added inside the model while it generates");
  command->require_subcommand(1);
  add_make(*command);
  add_steered_generate(*command);
  add_measure(*command);
}

}  // namespace gemma_torch::apps
