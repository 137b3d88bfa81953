#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "common.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

struct TokenizeFlags {
  std::string model;
  TextOptions text;
  bool no_bos = false;
  bool text_only = false;
  bool skip_special = false;
  bool json = false;
};

void run_tokenize(const TokenizeFlags& flags) {
  const auto tokenizer = load_tokenizer(model_path(flags.model));
  const auto ids = read_ids(
      flags.text, tokenizer, {.add_bos = !flags.no_bos, .parse_special = !flags.text_only});
  if (flags.json) {
    print_json({{"ids", ids}, {"pieces", pieces_json(ids, tokenizer)}});
  } else {
    print_text(fmt::format("{}\n", fmt::join(ids, ",")));
  }
}

// Ids of --ids, or of the text: separated by commas, spaces or newlines.
std::vector<int64_t> ids_from_text(const TextOptions& options) {
  if (options.ids) {
    return read_ids(options, std::nullopt);
  }
  std::string list;
  for (const char c : read_text(options)) {
    const bool separator = c == ',' || c == ' ' || c == '\n' || c == '\r' || c == '\t';
    if (!separator) {
      list += c;
    } else if (!list.empty() && list.back() != ',') {
      list += ',';
    }
  }
  if (list.ends_with(',')) {
    list.pop_back();
  }
  return parse_ids(list);
}

void run_detokenize(const TokenizeFlags& flags) {
  const auto tokenizer = load_tokenizer(model_path(flags.model));
  const auto ids = ids_from_text(flags.text);
  if (flags.json) {
    const auto text =
        tokenizer ? nlohmann::json(tokenizer->decode(ids, flags.skip_special)) : nlohmann::json();
    print_json({{"text", text}});
    return;
  }
  check(tokenizer.has_value(),
        "[detokenize] {} has no tokenizer.model or tokenizer.json",
        model_path(flags.model));
  print_text(tokenizer->decode(ids, flags.skip_special) + "\n");
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto* command = app.add_subcommand("tokenize", "text to token ids");
  auto flags = std::make_shared<TokenizeFlags>();
  add_model_flag(*command, flags->model);
  add_text_flags(*command, flags->text);
  command->add_flag("--no-bos", flags->no_bos, "without <bos> in front");
  command->add_flag("--text-only", flags->text_only, "special strings such as <bos> read as text");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_tokenize(*flags); });
}

void add_detokenize(CLI::App& app) {
  auto* command = app.add_subcommand("detokenize", "token ids to text");
  auto flags = std::make_shared<TokenizeFlags>();
  add_model_flag(*command, flags->model);
  add_text_flags(*command, flags->text);
  command->get_option("--prompt")->description("the ids as text, 2,818,5279 [standard input]");
  command->get_option("--file")->description("file with the ids");
  command->get_option("--ids")->description("the ids, as with -p");
  command->add_flag(
      "--skip-special", flags->skip_special, "leave special tokens such as <bos> out");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_detokenize(*flags); });
}

}  // namespace gemma_torch::apps
