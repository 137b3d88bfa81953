#include <memory>

#include "attribution_report.h"
#include "common.h"
#include "explain_flags.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

struct AttributeFlags {
  ExplainOptions explain = {};
  bool less_mean = false;
  int64_t top = 10;
};

void run_attribute(const AttributeFlags& flags) {
  check(flags.top >= 1, "[attribute] --top: expected at least 1, got {}", flags.top);
  auto of = read_explainable("attribute", flags.explain);
  if (of.tokens.empty()) {
    of.tokens = {likeliest_next(of)};
  }
  const auto found =
      attribute_logit(of.loaded.model, of.ids, {of.tokens, of.position, flags.less_mean});
  if (!flags.explain.html.empty()) {
    write_file(flags.explain.html, attribution_page(found, of, flags.less_mean));
  }
  if (flags.explain.json) {
    print_json(attribution_json(found, of, flags.less_mean));
  } else {
    print_text(attribution_text(found, of, flags.less_mean, flags.top));
  }
}

}  // namespace

void add_attribute(CLI::App& app) {
  auto* command = app.add_subcommand(
      "attribute", "direct logit attribution: what each head, MLP and neuron adds to a logit");
  auto flags = std::make_shared<AttributeFlags>();
  add_explain_flags(*command, flags->explain);
  command->get_option("--tokens")
      ->description(
          "' Paris, Rome': one token or two, of which the logit or its difference is "
          "taken apart [the likeliest next one]");
  command->add_flag("--less-mean", flags->less_mean, "less the mean of all logits");
  command->add_option("--top", flags->top, "parts and neurons in the text")->capture_default_str();
  command->callback([flags] { run_attribute(*flags); });
}

}  // namespace gemma_torch::apps
