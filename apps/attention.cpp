#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "attention_page.h"
#include "common.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/inspect/attention_maps.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

constexpr int64_t kLookedAt = 4;  // tokens shown of one position

struct AttentionFlags {
  ModelOptions model = {};
  TextOptions text = {};
  AttentionOptions options = {};
  std::string html = {};
  bool json = false;
};

nlohmann::json to_json(const AttentionCase& of, const std::optional<Tokenizer>& tokenizer) {
  auto heads = nlohmann::json::array();
  for (const auto& map : of.maps) {
    heads.push_back({{"layer", map.layer},
                     {"head", map.head},
                     {"first", map.to_first},
                     {"previous", map.to_previous},
                     {"self", map.to_self},
                     {"entropy", map.entropy}});
    if (map.weights.defined()) {
      heads.back()["weights"] = tensor_json(map.weights);
    }
  }
  return {{"ids", of.ids}, {"pieces", pieces_json(of.ids, tokenizer)}, {"heads", heads}};
}

std::string to_text(const std::vector<AttentionMap>& maps) {
  std::string text =
      "mean weight on the first token, on the one before and on itself; entropy, nats\n";
  text += "layer  head   first  previous   self  entropy\n";
  for (const auto& map : maps) {
    text += fmt::format("{:>5} {:>5} {:>7.3f} {:>9.3f} {:>6.3f} {:>8.3f}\n",
                        map.layer,
                        map.head,
                        map.to_first,
                        map.to_previous,
                        map.to_self,
                        map.entropy);
  }
  return text;
}

// "0.914 ·France, 0.031 ·of": what a head looks at most from one position.
std::string looked_at(const AttentionMap& map, const std::vector<std::string>& labels) {
  const auto [weights, positions] =
      map.weights.topk(std::min<int64_t>(kLookedAt, map.weights.size(0)));
  std::string text;
  for (int64_t i = 0; i < weights.size(0); ++i) {
    text += fmt::format("{}{:.3f} {}",
                        i == 0 ? "" : ", ",
                        weights[i].item<float>(),
                        labels[static_cast<size_t>(positions[i].item<int64_t>())]);
  }
  return text;
}

std::string from_text(const AttentionCase& of, const std::optional<Tokenizer>& tokenizer) {
  const auto labels = token_labels(of.ids, tokenizer);
  std::string text = "weight and token looked at\n";
  for (const auto& map : of.maps) {
    text += fmt::format("  layer {:>2} head {}  {}\n", map.layer, map.head, looked_at(map, labels));
  }
  return text;
}

void run_attention(const AttentionFlags& flags) {
  const auto loaded = load_modules("attention", flags.model);
  AttentionCase of{.ids = read_ids(flags.text, loaded.tokenizer), .config = loaded.config};
  of.maps = attention_maps(loaded.model, of.ids, flags.options);
  if (!flags.html.empty()) {
    write_file(flags.html, attention_page(of, loaded.tokenizer));
  }
  if (flags.json) {
    print_json(to_json(of, loaded.tokenizer));
  } else {
    print_text(flags.options.from ? from_text(of, loaded.tokenizer) : to_text(of.maps));
  }
}

}  // namespace

void add_attention(CLI::App& app) {
  auto* command = app.add_subcommand(
      "attention", "where each head looks: a page of attention maps, and means of each");
  auto flags = std::make_shared<AttentionFlags>();
  const auto list = [&](const char* name, std::vector<int64_t>& target, const char* help) {
    command->add_option(name, target, help)->delimiter(',')->allow_extra_args(false);
  };
  add_text_flags(*command, flags->text);
  list("--layers", flags->options.layers, "0,5,11: which [all]");
  list("--heads", flags->options.heads, "0,2: which of each layer [all]");
  command->add_option(
      "--from",
      flags->options.from,
      "the tokens that a position looks at most, instead of the means; negative: from the end");
  command->add_option("--html", flags->html, "a page with a picture of each head's pattern");
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer("The patterns themselves: gemma capture --sites 'blocks.*.pattern' -o FILE");
  command->callback([flags] { run_attention(*flags); });
}

}  // namespace gemma_torch::apps
