#include "explain_flags.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include "gemma_torch/inspect/prompt_row.h"
#include "token_labels.h"

namespace gemma_torch::apps {

void add_explain_flags(CLI::App& command, ExplainOptions& options) {
  options.model.dtype = "float32";
  add_text_flags(command, options.text);
  add_token_flags(command, options.tokens);
  command
      .add_option("--pos",
                  options.position,
                  "the position whose next token is meant; negative: from the end")
      ->capture_default_str();
  command.add_option("--html", options.html, "a page to look at");
  add_module_flags(command, options.model);
  command.add_flag("--json", options.json, "one JSON object on standard output");
}

std::string Explainable::token_at_position() const {
  return fmt::format("position {} {}",
                     position,
                     token_label(ids[static_cast<size_t>(position)], loaded.tokenizer));
}

Explainable read_explainable(const char* command, const ExplainOptions& options) {
  Explainable of{.loaded = load_modules(command, options.model)};
  of.ids = read_ids(options.text, of.loaded.tokenizer);
  of.tokens = read_tokens(options.tokens, of.loaded.tokenizer);
  const auto T = prompt_row(command, of.ids, of.loaded.model).size(1);
  of.position = checked_position(command, options.position, T);
  return of;
}

int64_t likeliest_next(const Explainable& of) {
  const at::NoGradGuard no_grad;
  auto model = of.loaded.model;
  const auto x = model->hidden(prompt_row("prompt", of.ids, model));
  return model->out_head(x.select(/*dim=*/1, of.position))[0].argmax().item<int64_t>();
}

}  // namespace gemma_torch::apps
