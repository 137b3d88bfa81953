#include "edit_flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch::apps {
namespace {

// An edit as it is spelt: sites still a glob, positions perhaps from the end.
struct Spelt {
  std::string text = {};
  std::string glob = {};
  Part part = {};
  std::string fill = {};      // "zero"
  std::string argument = {};  // what follows the first colon
};

[[noreturn]] void refuse(const std::string& edit, const std::string& expected) {
  fail("[edit] \"{}\": expected {}. Hint: gemma patch --help", edit, expected);
}

int64_t number(const Spelt& edit, std::string_view word) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (word.empty() || error != std::errc() || end != word.data() + word.size()) {
    refuse(edit.text, fmt::format("a number, got \"{}\"", word));
  }
  return value;
}

// "3", "3-5", "-1" (a number below 0 stands alone).
std::pair<int64_t, int64_t> range(const Spelt& edit, std::string_view word) {
  const auto dash = word.find('-', 1);
  if (dash == std::string_view::npos || word[0] == '-') {
    const auto only = number(edit, word);
    return {only, only};
  }
  const auto first = number(edit, word.substr(0, dash));
  const auto last = number(edit, word.substr(dash + 1));
  if (last < first) {
    refuse(edit.text, fmt::format("{} or more after the dash, got {}", first, last));
  }
  return {first, last};
}

void add_positions(Spelt& edit, std::string_view list, int64_t T) {
  while (true) {
    const auto comma = list.find(',');
    const auto [first, last] = range(edit, list.substr(0, comma));
    check(first >= -T && last < T,
          "[edit] \"{}\": pos: expected -{} to {}, got {}",
          edit.text,
          T,
          T - 1,
          first < -T ? first : last);
    for (auto position = first; position <= last; ++position) {
      edit.part.positions.push_back(position < 0 ? T + position : position);
    }
    if (comma == std::string_view::npos) {
      return;
    }
    list.remove_prefix(comma + 1);
  }
}

// One "[pos=3,4]", without its brackets.
void add_part(Spelt& edit, std::string_view part, int64_t T) {
  const auto equals = part.find('=');
  const auto name = part.substr(0, equals);
  const auto value = equals == std::string_view::npos ? "" : part.substr(equals + 1);
  if (name == "pos") {
    add_positions(edit, value, T);
  } else if (name == "head") {
    edit.part.head = number(edit, value);
  } else if (name == "channels") {
    edit.part.channels = range(edit, value);
  } else {
    refuse(edit.text, fmt::format("[pos=..], [head=..] or [channels=..], got [{}]", part));
  }
}

Spelt spell(const std::string& text, int64_t T) {
  Spelt edit{.text = text};
  auto equals = text.find('=');
  if (equals == std::string::npos) {
    refuse(text, "SITE=FILL");
  }
  // A bracket that holds the first "=" starts the parts; others are sets of the glob, "[0-5]".
  const auto open = text.rfind('[', equals);
  const bool parts = open != std::string::npos && text.find(']', open) > equals;
  edit.glob = text.substr(0, parts ? open : equals);
  for (auto start = open; parts && text[start] == '[';) {
    const auto close = text.find(']', start);
    if (close == std::string::npos || close + 1 == text.size()) {
      refuse(text, close == std::string::npos ? "a \"]\"" : "=FILL at the end");
    }
    add_part(edit, std::string_view(text).substr(start + 1, close - start - 1), T);
    equals = start = close + 1;
  }
  if (text[equals] != '=') {
    refuse(text, fmt::format("\"=\" or \"[\" after \"]\", got \"{}\"", text.substr(equals)));
  }
  const auto fill = text.substr(equals + 1);
  const auto colon = fill.find(':');
  edit.fill = fill.substr(0, colon);
  edit.argument = colon == std::string::npos ? "" : fill.substr(colon + 1);
  return edit;
}

double standard_deviation(const Spelt& edit) {
  char* end = nullptr;
  const auto std = std::strtod(edit.argument.c_str(), &end);
  if (edit.argument.empty() || *end != '\0' || !std::isfinite(std) || std < 0) {
    refuse(edit.text,
           fmt::format("{}:STD with a number of 0 or more, got \"{}\"", edit.fill, edit.argument));
  }
  return std;
}

at::Tensor from_file(const Spelt& edit, const SiteAt& site) {
  const auto colon = edit.argument.rfind(':');
  const auto path = edit.argument.substr(0, colon);
  const auto key = colon == std::string::npos ? site.name() : edit.argument.substr(colon + 1);
  const auto tensors = load_safetensors(path);
  const auto found = tensors.find(key);
  check(found != tensors.end(), "[edit] \"{}\": {} has no tensor {}", edit.text, path, key);
  return found->second;
}

Filling filling(const Spelt& edit, const SiteAt& site, const TensorMap& other, uint64_t seed) {
  const auto plain = [&](Fill fill) {
    if (!edit.argument.empty()) {
      refuse(edit.text, fmt::format("nothing after {}, got \"{}\"", edit.fill, edit.argument));
    }
    return Filling{.fill = fill};
  };
  if (edit.fill == "zero") {
    return plain(Fill::kZero);
  }
  if (edit.fill == "mean") {
    return plain(Fill::kMean);
  }
  if (edit.fill == "other") {
    auto with = plain(Fill::kValue);
    with.value = other.at(site.name());
    return with;
  }
  if (edit.fill == "noise" || edit.fill == "add_noise") {
    return {.fill = edit.fill == "noise" ? Fill::kNoise : Fill::kAddNoise,
            .std = standard_deviation(edit),
            .seed = seed};
  }
  if (edit.fill == "file") {
    return {.fill = Fill::kValue, .value = from_file(edit, site)};
  }
  refuse(edit.text,
         fmt::format("zero, mean, noise:STD, add_noise:STD, other or file:PATH[:KEY], got \"{}\"",
                     edit.fill));
}

}  // namespace

const char* const kEditHelp =
    "An edit is SITE[pos=..][head=..][channels=..]=FILL; each [..] may be left out.\n"
    "  SITE      a name or glob, as `gemma capture --list-sites` lists them: blocks.*.attn_out\n"
    "  pos       positions of the prompt: 3,4 or 2-5; -1 is the last\n"
    "  head      one head, of sites that have them\n"
    "  channels  a range of the innermost axis, 0-63 (of pattern: the positions looked at)\n"
    "  FILL      zero; mean (over the positions); noise:STD (Gaussian, in place of the value) or\n"
    "            add_noise:STD (on top); other (the value in a run of --other, of as many "
    "tokens);\n"
    "            file:PATH[:KEY] (a tensor of a safetensors file, by default under the site's "
    "name)";

std::vector<Edit> parse_edits(const std::vector<std::string>& texts, const EditContext& context) {
  std::vector<std::pair<Spelt, std::vector<SiteAt>>> spelt;
  std::vector<SiteAt> asked;
  for (const auto& text : texts) {
    auto edit = spell(text, context.T);
    auto sites = match_sites({edit.glob}, context.model->cfg.n_layers);
    if (edit.fill == "other") {
      check(context.other.defined(), "[edit] \"{}\": expected --other, got none", text);
      asked.insert(asked.end(), sites.begin(), sites.end());
    }
    spelt.emplace_back(std::move(edit), std::move(sites));
  }
  const auto other = asked.empty() ? TensorMap() : site_values(context.model, context.other, asked);
  std::vector<Edit> edits;
  for (const auto& [edit, sites] : spelt) {
    for (const auto& site : sites) {
      edits.push_back({site, edit.part, filling(edit, site, other, context.seed)});
    }
  }
  return edits;
}

}  // namespace gemma_torch::apps
