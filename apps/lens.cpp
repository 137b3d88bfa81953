#include "gemma_torch/inspect/lens.h"

#include <memory>

#include "common.h"
#include "explain_flags.h"
#include "gemma_torch/base/atomic_file.h"
#include "lens_report.h"

namespace gemma_torch::apps {
namespace {

struct LensFlags {
  ExplainOptions explain = {};
  int64_t top = 5;
  int64_t rows = 16;
};

void run_lens(const LensFlags& flags) {
  const auto of = read_explainable("lens", flags.explain);
  Progress progress("rows");
  LensOptions options{.targets = of.tokens, .top = flags.top, .rows = flags.rows};
  options.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    return !interrupted();
  };
  catch_interrupt();
  const auto lens = logit_lens(of.loaded.model, of.ids, options);
  if (!flags.explain.html.empty()) {
    write_file(flags.explain.html, lens_page(lens, of));
  }
  if (flags.explain.json) {
    print_json(lens_json(lens, of));
  } else {
    print_text(lens_text(lens, of));
  }
}

}  // namespace

void add_lens(CLI::App& app) {
  auto* command = app.add_subcommand(
      "lens", "logit lens: what each layer would predict, at every position of a prompt");
  auto flags = std::make_shared<LensFlags>();
  add_explain_flags(*command, flags->explain);
  command->get_option("--tokens")
      ->description(
          "' Paris, Rome': tokens whose rank and probability are followed at every "
          "position [at each the one that comes next]");
  command->get_option("--pos")->description(
      "the position that the text shows; negative: from the end; page and JSON hold all");
  command->add_option("--top", flags->top, "likeliest tokens in the JSON")->capture_default_str();
  command
      ->add_option(
          "--rows", flags->rows, "positions whose logits are in memory at a time, 7 MiB each")
      ->capture_default_str();
  command->callback([flags] { run_lens(*flags); });
}

}  // namespace gemma_torch::apps
