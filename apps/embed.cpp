#include <ATen/ops/index_select.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "common.h"
#include "embed_report.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/npy_writer.h"
#include "gemma_torch/io/safetensors.h"
#include "prompts.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

struct OutputFlags {
  std::string out = {};
  std::string format = "safetensors";
  bool similarity = false;
  int64_t nearest = 0;
  std::string html = {};
  bool json = false;
};

struct EmbedFlags {
  ModelOptions model = {};
  PromptOptions prompts = {};
  TokenOptions rows = {};  // of the embedding table, in place of texts
  std::string pooling = "mean";
  EmbedOptions how = {};
  bool raw = false;
  bool skip_bos = false;
  OutputFlags output = {};
};

Pooling parse_pooling(const std::string& name) {
  check(name == "mean" || name == "last" || name == "weighted",
        "[embed] --pooling: expected mean, last or weighted, got {}",
        name);
  return name == "mean" ? Pooling::kMean : name == "last" ? Pooling::kLast : Pooling::kWeighted;
}

Embedded embed_rows(const EmbedFlags& flags, const Pretrained& loaded) {
  const auto ids = read_tokens(flags.rows, loaded.tokenizer);
  for (const auto id : ids) {
    check(id < loaded.config.vocab_size,
          "[embed] token id: expected 0 to {}, got {}",
          loaded.config.vocab_size - 1,
          id);
  }
  const auto& table = loaded.model->tok_emb->weight;
  const auto index = at::tensor(ids, at::kLong).to(table.device());
  const auto rows = at::index_select(table.detach(), /*dim=*/0, index).to(at::kCPU, at::kFloat);
  return {.what = "rows of the embedding table",
          .vectors = flags.raw ? rows : unit_rows(rows),
          .labels = token_labels(ids, loaded.tokenizer),
          .similarity = {}};
}

Embedded embed_texts(const EmbedFlags& flags, const Pretrained& loaded) {
  const auto texts = read_prompts(flags.prompts, loaded.tokenizer);
  Embedded found{.what = flags.how.layers.empty() ? flags.pooling + " of final_norm"
                                                  : fmt::format("{} of resid_post of layers {}",
                                                                flags.pooling,
                                                                fmt::join(flags.how.layers, ", ")),
                 .vectors = {},
                 .similarity = {}};
  for (const auto& ids : texts) {
    auto label = prompt_text(ids, loaded.tokenizer);
    found.labels.push_back(label.starts_with("<bos>") ? label.substr(5) : label);
  }
  auto how = flags.how;
  how.pooling = parse_pooling(flags.pooling);
  how.normalize = !flags.raw;
  how.skip = flags.skip_bos ? 1 : 0;
  catch_interrupt();
  Progress progress("texts");
  how.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    check(!interrupted(), "[embed] interrupted; nothing was written");
  };
  found.vectors = embed(loaded.model, texts, how);
  return found;
}

void write_vectors(const EmbedFlags& flags, const Embedded& found, const std::string& dtype) {
  if (flags.output.format == "npy") {
    save_npy(flags.output.out, found.vectors);
  } else if (flags.output.format == "json") {
    write_file(flags.output.out, tensor_json(found.vectors).dump() + "\n");
  } else {
    save_safetensors(flags.output.out,
                     {{"vectors", found.vectors}},
                     {{"reference", "gemma_torch"},
                      {"model", model_path(flags.model.model)},
                      {"dtype", dtype},
                      {"what", found.what},
                      {"normalized", flags.raw ? "no" : "yes"}});
  }
}

void check_flags(const EmbedFlags& flags) {
  check(flags.output.format == "json" || flags.output.format == "npy" ||
            flags.output.format == "safetensors",
        "[embed] --format: expected json, npy or safetensors, got {}",
        flags.output.format);
  check(flags.output.nearest >= 0,
        "[embed] --nearest: expected at least 1, got {}",
        flags.output.nearest);
  parse_pooling(flags.pooling);
}

void run_embed(const EmbedFlags& flags) {
  check_flags(flags);
  const auto loaded = load_modules("embed", flags.model);
  check(flags.output.nearest <= loaded.config.vocab_size,
        "[embed] --nearest: expected at most {}, got {}",
        loaded.config.vocab_size,
        flags.output.nearest);
  auto found = flags.rows.given() ? embed_rows(flags, loaded) : embed_texts(flags, loaded);
  if (flags.output.similarity || !flags.output.html.empty()) {
    const auto unit = unit_rows(found.vectors);
    found.similarity = at::matmul(unit, unit.t());
  }
  if (flags.output.nearest > 0) {
    found.nearest =
        nearest_rows(loaded.model->tok_emb->weight.detach(), found.vectors, flags.output.nearest);
  }
  if (!flags.output.html.empty()) {
    write_file(flags.output.html, embedded_page(found, loaded.tokenizer));
  }
  if (!flags.output.out.empty()) {
    write_vectors(flags, found, dtype_name(loaded.config.dtype));
  }
  if (!flags.output.similarity) {
    found.similarity.reset();  // of the page alone
  }
  if (flags.output.json) {
    auto object = embedded_json(found, loaded.tokenizer);
    object["what"] = found.what;
    object["normalized"] = !flags.raw;
    object["labels"] = found.labels;
    print_json(object);
  } else {
    print_text(embedded_text(found, loaded.tokenizer));
  }
}

void add_row_flags(CLI::App& command, TokenOptions& rows) {
  command.add_option_function<std::string>(
      "--tokens",
      [&rows](const std::string& value) { rows.texts = value; },
      "' Paris, Rome': in place of texts, the rows of the embedding table of these tokens");
  command.add_option_function<std::string>(
      "--token-ids",
      [&rows](const std::string& value) { rows.ids = value; },
      "the same by id: 9079,22138");
}

void add_output_flags(CLI::App& command, OutputFlags& flags) {
  command.add_option("-o,--out", flags.out, "file for the vectors, (N, E) float32");
  command.add_option("--format", flags.format, "of that file: json, npy or safetensors")
      ->capture_default_str();
  command.add_flag("--similarity", flags.similarity, "the cosine of each vector with each");
  command.add_option(
      "--nearest", flags.nearest, "as many tokens whose rows of the table point most alike");
  command.add_option(
      "--html", flags.html, "file for a page: similarities, principal axes, nearest tokens");
  command.add_flag("--json", flags.json, "one JSON object on standard output");
}

}  // namespace

void add_embed(CLI::App& app) {
  auto* command = app.add_subcommand("embed", "a vector for each text; which are alike");
  auto flags = std::make_shared<EmbedFlags>();
  add_module_flags(*command, flags->model);
  add_prompt_flags(*command, flags->prompts);
  add_row_flags(*command, flags->rows);
  command
      ->add_option("--pooling",
                   flags->pooling,
                   "mean of the tokens, last token, or weighted: mean with weights 1, 2, 3, ..")
      ->capture_default_str();
  command
      ->add_option("--layers",
                   flags->how.layers,
                   "average of resid_post after these, 5,11 [final_norm, after the last]")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_flag("--raw", flags->raw, "vectors of any length; else of length 1");
  command->add_flag("--skip-bos", flags->skip_bos, "mean and weighted leave out the first token");
  command->add_option("--batch", flags->how.batch, "texts in one pass")->capture_default_str();
  add_output_flags(*command, flags->output);
  command->footer(
      "Runs the modules (--engine eager): other engines keep no hidden states. Texts of like "
      "length\n"
      "run together, padded at their ends, where no token sees it.");
  command->callback([flags] { run_embed(*flags); });
}

}  // namespace gemma_torch::apps
