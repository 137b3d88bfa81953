#include "gemma_torch/inspect/capture.h"

#include <fmt/format.h>

#include <memory>

#include "common.h"
#include "fingerprint.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/site_table.h"
#include "part_journal.h"
#include "prompts.h"

namespace gemma_torch::apps {
namespace {

struct CaptureFlags {
  ModelOptions model = {};
  PromptOptions prompts = {};
  std::vector<std::string> sites = {};
  std::string out = {};
  std::string save_dtype = "auto";
  bool resume = false;
  bool list = false;
  bool json = false;
};

void list_sites(bool json) {
  if (!json) {
    constexpr auto row = "{:<10} {:<8} {:<41} {:<38} {:<31} {}";
    std::string text = fmt::format(
        row, "site", "axes", "transformers", "its", "TransformerLens", "where it differs\n");
    for (const auto& [site, axes, module, tensor, hook, difference] : site_table()) {
      auto line = fmt::format(row, site_name(site, -1), axes, module, tensor, hook, difference);
      line.erase(line.find_last_not_of(' ') + 1);
      text += line + "\n";
    }
    text +=
        "Sites of layer N are called blocks.N.SITE. Axes: B batch, T tokens, S stored tokens "
        "(T here), E emb_dim, H heads,\nG kv groups, D head_dim, F hidden_dim, V vocab.\n";
    print_text(text);
    return;
  }
  auto rows = nlohmann::json::array();
  for (const auto& row : site_table()) {
    const auto name = site_name(row.site, -1);
    const auto hook = row.transformer_lens;
    rows.push_back({{"site", is_in_layers(row.site) ? "blocks.N." + name : name},
                    {"axes", row.axes},
                    {"module", row.module},
                    {"tensor", row.tensor},
                    {"transformer_lens", hook.empty() ? nlohmann::json() : nlohmann::json(hook)},
                    {"difference", row.difference}});
  }
  print_json({{"sites", rows}});
}

void report(const CaptureFlags& flags,
            const CaptureReport& done,
            size_t prompts,
            const std::string& dtype) {
  if (flags.json) {
    print_json({{"out", flags.out},
                {"prompts", prompts},
                {"tokens", done.tokens},
                {"tensors", done.tensors},
                {"bytes", done.bytes},
                {"dtype", dtype},
                {"save_dtype", flags.save_dtype == "auto" ? dtype : flags.save_dtype}});
    return;
  }
  print_text(fmt::format("{}: {} tensors of {} prompt{}, {} tokens, {:.1f} MB\n",
                         flags.out,
                         done.tensors,
                         prompts,
                         prompts == 1 ? "" : "s",
                         done.tokens,
                         static_cast<double>(done.bytes) / 1e6));
}

// What a part of a file must have been made with, to be gone on with.
nlohmann::json header_json(const CaptureFlags& flags,
                           const Pretrained& loaded,
                           const std::vector<std::vector<int64_t>>& prompts) {
  auto header = numbers_json(loaded);
  Fingerprint tokens;
  for (const auto& ids : prompts) {
    tokens.add(ids);
  }
  header.update({{"format", "gemma capture 1"},
                 {"model", model_path(flags.model.model)},
                 {"sites", flags.sites},
                 {"save_dtype", flags.save_dtype},
                 {"numbered", flags.prompts.many()},
                 {"prompts", prompts.size()},
                 {"tokens", tokens.hex()}});
  return header;
}

// Sets where to go on, and notes how far the work is.
void go_on(CaptureOptions& options, PartJournal& journal) {
  const auto last = journal.last();
  options.kept_prompts = last.is_null() ? 0 : last.at("prompts").get<int64_t>();
  options.on_prompt = [&journal](int64_t prompts) { journal.append({{"prompts", prompts}}); };
}

void run_capture(const CaptureFlags& flags) {
  if (flags.list) {
    list_sites(flags.json);
    return;
  }
  if (flags.sites.empty() || flags.out.empty()) {
    throw CLI::RequiredError(flags.sites.empty() ? "--sites" : "--out");
  }
  CaptureOptions options{.sites = flags.sites,
                         .numbered = flags.prompts.many(),
                         .metadata = {{"model", model_path(flags.model.model)}}};
  if (flags.save_dtype != "auto") {
    options.save_dtype = parse_dtype(flags.save_dtype, c10::kFloat);
  }
  const auto loaded = load_modules("capture", flags.model);
  const auto prompts = read_prompts(flags.prompts, loaded.tokenizer);
  Progress progress("captured");
  options.on_progress = [&](int64_t written, int64_t total) {
    progress.show(written, total);
    return !interrupted();
  };
  std::optional<PartJournal> journal;
  if (flags.resume) {
    journal.emplace(flags.out, header_json(flags, loaded, prompts));
    go_on(options, *journal);
  }
  catch_interrupt();
  const auto done = capture(loaded.model, prompts, options, flags.out);
  if (journal) {
    journal->remove();
  }
  report(flags, done, prompts.size(), dtype_name(loaded.config.dtype));
}

}  // namespace

void add_capture(CLI::App& app) {
  auto* command = app.add_subcommand(
      "capture", "values inside the model, to a safetensors file under the sites' names");
  auto flags = std::make_shared<CaptureFlags>();
  command->add_option("--sites", flags->sites, "names or globs: 'blocks.*.resid_post,logits'")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("-o,--out", flags->out, "the file to make");
  add_resume_flag(*command, flags->resume);
  add_prompt_flags(*command, flags->prompts);
  add_module_flags(*command, flags->model);
  command
      ->add_option("--save-dtype",
                   flags->save_dtype,
                   "of the values in the file: auto (as computed), float32 or bfloat16")
      ->capture_default_str();
  command->add_flag("--list-sites", flags->list, "only print the table of sites");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "A prompt is one pass without a cache. Beside the weights and the largest value asked for,\n"
      "it takes about four tensors of (H, T, T): for 4,096 tokens 1.1 GB in float32, half of that\n"
      "in bfloat16. Of logits 64 rows are formed at a time; the file takes the rest.");
  command->callback([flags] { run_capture(*flags); });
}

}  // namespace gemma_torch::apps
